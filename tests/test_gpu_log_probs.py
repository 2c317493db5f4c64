"""Tests of the GPU's LM head, whose Triton kernels run in Triton's interpreter, against log_softmax."""

import pytest
import torch

from tts_grpo.training import gpu_log_probs
from tts_grpo.training.gpu_log_probs import fused_linear


def reference(hidden, weight, labels, temperature):
    all_log_probs = (hidden @ weight.T / temperature).log_softmax(-1)
    return all_log_probs.gather(-1, labels[..., None])[..., 0], -(all_log_probs.exp() * all_log_probs).sum(-1)


@pytest.mark.parametrize("used", ["log_probs", "entropies", "both"])
def test_values_and_gradients_equal_those_of_log_softmax(monkeypatch, used):
    """Several chunks of rows and of ids, a number of ids that must be padded, and tokens without a gradient."""
    monkeypatch.setattr(gpu_log_probs, "ROWS", 7)
    monkeypatch.setattr(gpu_log_probs, "BLOCK", 32)
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 10, 8, requires_grad=True), torch.randn(75, 8, requires_grad=True)
    labels, temperature = torch.randint(0, 75, (2, 10)), 0.7
    scale = torch.randn(2, 2, 10)
    scale[:, 1, 3:8] = 0.0
    results = []
    for function in (lambda *a: fused_linear(None, *a), reference):
        values = function(hidden, weight, labels, temperature)
        chosen = {"log_probs": values[:1], "entropies": values[1:], "both": values}[used]
        loss = sum((s * v).sum() for s, v in zip(scale, chosen, strict=False))
        results.append([*values, *torch.autograd.grad(loss, (hidden, weight))])
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == torch.float32 and expected.abs().max() > 0.1
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert results[0][2][1, 3:8].abs().max() == 0


def test_nothing_is_learnt_from_tokens_without_a_gradient():
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(70, 8, requires_grad=True)
    log_probs, entropies = fused_linear(None, hidden, weight, torch.arange(5))
    gradients = torch.autograd.grad((0 * log_probs).sum() + (0 * entropies).sum(), (hidden, weight))
    assert all(gradient.abs().max() == 0 for gradient in gradients)
