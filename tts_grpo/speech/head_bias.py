"""The bias of a language model's head, which stock Qwen2 has not: it says which ids can be sampled at all.

The head of CosyVoice2's own language model has 6,564 outputs with a bias: speech tokens and end tokens. As a Hugging
Face model (scripts/convert_llm.py; CosyVoice's examples/grpo/cosyvoice2/pretrained_to_huggingface.py) it has an output
for each id of the vocabulary, the bias is ``lm_head.bias``, and ids that the official model cannot produce have -inf
there and a row of zeros in the weights. Transformers, veRL and vLLM load such a folder as a stock Qwen2 and ignore the
bias; text ids then have the logit 0 instead of -inf, and all 151,663 of them together get a large part of the
probability. Weights alone cannot do better: the head sees the output of an RMSNorm, in which no component is constant,
and a row of weights that gives a low logit for a hidden state h gives a high one for -h.

So the bias is added wherever logits are made, and the same policy generates, is trained and is exported:

- inference and rollouts on a CPU: :func:`add_head_bias` (``tts_grpo.speech.generation.load_lm``);
- rollouts in vLLM: :func:`add_to_logits` (tts_grpo/training/verl_vllm.py);
- training: :func:`over_said_ids` (tts_grpo/training/engine.py), which leaves out the rows of all other ids.

It is not trained. scripts/merge.py copies it to the merged folder.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, Partial

from tts_grpo.text.prompts import TASK_ID

FILE = "head_bias.safetensors"  # beside the weights, whose readers would reject or drop a tensor that they do not know
NAME = "lm_head.bias"
# Instead of -inf, as 0 * -inf in an entropy is not a number; the softmax of such an id is 0 in float32 and bfloat16.
UNREACHABLE = -1e4
COLUMNS = 8  # a multiple of it keeps matrix products in bfloat16 on the fast path


def load_head_bias(folder: str | Path, tokenizer=None) -> torch.Tensor | None:
    """float32 (V,) bias of the head of the model in ``folder``, ``UNREACHABLE`` at least; None if there is none.

    Args:
        folder: Hugging Face folder.
        tokenizer: its tokenizer, to check that there is a bias where the model needs one.

    Raises:
        ValueError: values are not numbers or infinite, or it is CosyVoice2's own model and has no bias.
    """
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if NAME in file.keys():  # noqa: SIM118  # not a dict
                bias = file.get_tensor(NAME).float()
                if not (bias < torch.inf).all():
                    raise ValueError(f"{path}: {NAME} has values that are not numbers: download or convert it again")
                return bias.clamp(min=UNREACHABLE)
    if tokenizer is not None and TASK_ID in (tokenizer.chat_template or ""):
        raise ValueError(
            f"{folder}: the head has no bias, so that text would be said, as its ids have the logit 0: convert it to "
            "llm.pt and back (scripts/convert_llm.py to-official, then to-hf)"
        )
    return None


def save_head_bias(bias: torch.Tensor, folder: Path) -> None:
    """Write a bias beside the weights in ``folder``."""
    save_file({NAME: bias}, folder / FILE)


def said_ids(bias: torch.Tensor) -> torch.Tensor:
    """int64 ids that can be sampled, in order."""
    return (bias > UNREACHABLE).nonzero()[:, 0]


def add_head_bias(model, bias: torch.Tensor) -> None:
    """Give a Transformers model the bias.

    Raises:
        ValueError: it has not as many values as the model has ids.
    """
    weight = model.lm_head.weight
    if len(bias) != len(weight):
        raise ValueError(f"{NAME} has {len(bias)} values, but the model has {len(weight)} ids: convert it again")
    model.lm_head.bias = torch.nn.Parameter(bias.to(weight.device, weight.dtype), requires_grad=False)


def add_to_logits(model, bias: torch.Tensor) -> None:
    """Let ``model.compute_logits`` of a vLLM model add ``bias`` (V,) to the logits (..., V), in float32."""
    compute_logits = model.compute_logits

    def with_bias(*args, **kwargs):
        return compute_logits(*args, **kwargs).float().add_(bias)

    model.compute_logits = with_bias


def gathered(weights: torch.Tensor) -> torch.Tensor:
    """The whole weights of a head.

    FSDP2 shards a head that is not tied to the embedding by itself, and sees nothing of veRL's fused use of it: the
    gradient is averaged over the workers here, as FSDP2 does with the others.
    """
    if not isinstance(weights, DTensor):
        return weights
    return weights.full_tensor(grad_placements=[Partial("avg")] * weights.device_mesh.ndim)


def over_said_ids(forward: Callable, bias: torch.Tensor) -> Callable:
    """veRL's fused log-probabilities and entropies (``FusedLinearForPPO.forward``, 0.9.1) for a head with a bias.

    Only rows of ids that can be sampled take part. The bias is a further input that is always 1: as two columns of
    weights, what the type of the weights holds of it and the remainder. An id that cannot be sampled, such as those of
    a prompt, has the log-probability ``UNREACHABLE``.

    Args:
        forward: of hidden states (..., D), weights (V, D), ids (...) and a temperature.
        bias: (V,).
    """
    ids, place = said_ids(bias), torch.full(bias.shape, -1)
    place[ids] = torch.arange(len(ids))

    @functools.wraps(forward)
    def with_bias(module, hidden_states, vocab_weights, input_ids, temperature=1.0):
        device, dtype = vocab_weights.device, vocab_weights.dtype
        said = bias[ids].to(device)
        rounded = said.to(dtype)
        columns = F.pad(torch.stack([rounded, (said - rounded.float()).to(dtype)], 1), (0, COLUMNS - 2))
        weights = torch.cat([gathered(vocab_weights).index_select(0, ids.to(device)), columns], 1)
        ones = hidden_states.new_ones(*hidden_states.shape[:-1], COLUMNS)
        places = place.to(device)[input_ids.long()]
        hidden_states = torch.cat([hidden_states, ones], -1)
        log_probs, entropy = forward(module, hidden_states, weights, places.clamp(min=0), temperature)
        return torch.where(places < 0, UNREACHABLE, log_probs), entropy

    return with_bias
