import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tts_grpo.training.verl_cpu import log_probs
from tts_grpo.training.verl_cpu.log_probs import fused_linear

pytestmark = pytest.mark.slow


def reference(hidden, weight, labels, temperature):
    all_log_probs = (hidden @ weight.T / temperature).log_softmax(-1)
    return all_log_probs.gather(-1, labels[..., None])[..., 0], -(all_log_probs.exp() * all_log_probs).sum(-1)


def test_values_and_gradients_equal_those_of_log_softmax(monkeypatch):
    monkeypatch.setattr(log_probs, "CHUNK", 7)
    torch.manual_seed(0)
    hidden = torch.randn(2, 15, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(40, 8, dtype=torch.float64, requires_grad=True)
    labels, temperature = torch.randint(0, 40, (2, 15)), 0.7
    for factors in ((1.0, 0.0), (0.0, 1.0), (1.0, -0.3)):
        scale = torch.randn(2, 2, 15, dtype=torch.float64) * torch.tensor(factors)[:, None, None]
        results = []
        for function in (lambda *a: fused_linear(None, *a), reference):
            values = function(hidden, weight, labels, temperature)
            loss = sum((s * v).sum() for s, v, factor in zip(scale, values, factors, strict=True) if factor)
            results.append([*values, *torch.autograd.grad(loss, (hidden, weight))])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def gradient_of_a_sharded_head(rank: int, folder: str) -> None:
    """One of two workers with different hidden states: compares its results with those of an unsharded head."""
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    torch.manual_seed(0)
    weight, hidden, labels = torch.randn(40, 8), torch.randn(2, 3, 8), torch.tensor([1, 2, 33])
    sharded = distribute_tensor(weight, init_device_mesh("cpu", (2,)), [Shard(0)]).requires_grad_()
    log_probs, _ = fused_linear(None, hidden[rank], sharded, labels)
    log_probs.sum().backward()
    expected = weight.requires_grad_()
    sum(reference(states, expected, labels, 1.0)[0].sum() / 2 for states in hidden).backward()
    torch.testing.assert_close(log_probs, reference(hidden[rank], weight, labels, 1.0)[0])
    torch.testing.assert_close(sharded.grad.full_tensor(), expected.grad)
    dist.destroy_process_group()


def test_a_sharded_head_is_gathered_and_its_gradient_averaged(tmp_path):
    """FSDP2 shards a head that is not tied to the embedding, and averages the gradients of all other weights."""
    torch.multiprocessing.spawn(gradient_of_a_sharded_head, (str(tmp_path),), nprocs=2)
