"""The bias of the LM head of CosyVoice2's language model, which restricts the ids that can be sampled.

The LM head of CosyVoice2's language model has 6,564 outputs with a bias: speech tokens and end tokens. Converted to a
Hugging Face model (scripts/convert_llm.py; CosyVoice's examples/grpo/cosyvoice2/pretrained_to_huggingface.py), it has
an output for each id of the vocabulary, the bias is ``lm_head.bias``, and ids that the official model cannot produce
have the bias -inf and a zero row in the weights. Transformers, veRL and vLLM load such a folder as a stock Qwen2, whose
head has no bias, and ignore the bias: the 151,663 text ids then have the logit 0 instead of -inf, and together a large
part of the probability. Weights alone cannot replace the bias: the input of the head is the output of an RMSNorm, in
which no component is constant, and a row of weights that gives a low logit for a hidden state h gives a high one for
-h.

Therefore the bias is added wherever logits are computed, so that generation, training and export use the same policy:

- inference, and rollouts on a CPU: :func:`add_head_bias` (``tts_grpo.speech.generation.load_lm``);
- rollouts in vLLM: :func:`add_to_logits` (tts_grpo/training/verl_vllm.py);
- training: :func:`restrict_to_sampleable_ids` (tts_grpo/training/engine.py), which removes the rows of ids that cannot
  be sampled.

The bias is not trained. scripts/merge.py copies it to the merged folder.
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

FILE = "head_bias.safetensors"  # a separate file: readers of the weights would reject or drop an unknown tensor
NAME = "lm_head.bias"
# Used instead of -inf, because 0 * -inf in the entropy is NaN. The softmax of it is 0 in float32 and bfloat16.
UNREACHABLE = -1e4
COLUMNS = 8  # added columns: bfloat16 matrix products are fast only if the width is a multiple of 8


def load_head_bias(folder: str | Path, tokenizer=None) -> torch.Tensor | None:
    """The LM head's bias in ``folder``, float32 (V,), not below ``UNREACHABLE``; None if there is none.

    Args:
        folder: Hugging Face folder.
        tokenizer: tokenizer of the model, to check that a model that needs a bias has one.

    Raises:
        ValueError: a value is NaN or infinite, or the model is CosyVoice2's own and has no bias.
    """
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if NAME in file.keys():  # noqa: SIM118  # not a dict
                bias = file.get_tensor(NAME).float()
                if not (bias < torch.inf).all():
                    raise ValueError(f"{path}: {NAME} has NaN or infinite values: download or convert it again")
                return bias.clamp(min=UNREACHABLE)
    if tokenizer is not None and TASK_ID in (tokenizer.chat_template or ""):
        raise ValueError(
            f"{folder}: the LM head has no bias, so that text ids, whose logit is 0, would be sampled: convert the "
            "model to llm.pt and back (scripts/convert_llm.py to-official, then to-hf)"
        )
    return None


def save_head_bias(bias: torch.Tensor, folder: Path) -> None:
    """Save a bias in the model folder ``folder``."""
    save_file({NAME: bias}, folder / FILE)


def sampleable_ids(bias: torch.Tensor) -> torch.Tensor:
    """The ids that can be sampled, int64, in ascending order."""
    return (bias > UNREACHABLE).nonzero()[:, 0]


def add_head_bias(model, bias: torch.Tensor) -> None:
    """Add the bias to the LM head of a Transformers model.

    Raises:
        ValueError: the bias has another number of values than the model has ids.
    """
    weight = model.lm_head.weight
    if len(bias) != len(weight):
        raise ValueError(f"{NAME} has {len(bias)} values, but the model has {len(weight)} ids: convert it again")
    model.lm_head.bias = torch.nn.Parameter(bias.to(weight.device, weight.dtype), requires_grad=False)


def add_to_logits(model, bias: torch.Tensor) -> None:
    """Make ``model.compute_logits`` of a vLLM model add ``bias`` (V,) to the logits (..., V), in float32."""
    compute_logits = model.compute_logits

    def with_bias(*args, **kwargs):
        return compute_logits(*args, **kwargs).float().add_(bias)

    model.compute_logits = with_bias


def gathered(weights: torch.Tensor) -> torch.Tensor:
    """The unsharded weights of an LM head.

    FSDP2 shards a head that is not tied to the embedding, but veRL's fused use of its weights bypasses FSDP2's hooks.
    Therefore the gradient is averaged over the workers here, as FSDP2 does for other weights.
    """
    if not isinstance(weights, DTensor):
        return weights
    return weights.full_tensor(grad_placements=[Partial("avg")] * weights.device_mesh.ndim)


def restrict_to_sampleable_ids(forward: Callable, bias: torch.Tensor) -> Callable:
    """Adapt veRL's fused log-probabilities and entropies (``FusedLinearForPPO.forward``, 0.9.1) to a head with a bias.

    Only rows of ids that can be sampled are used. The bias is added through extra inputs that are always 1. It takes
    two columns of weights: the bias rounded to the type of the weights, and the rounding error. An id that cannot be
    sampled, such as most ids of a prompt, gets the log-probability ``UNREACHABLE``.

    Args:
        forward: function of hidden states (..., D), weights (V, D), ids (...) and a temperature.
        bias: (V,).
    """
    ids, row_of_id = sampleable_ids(bias), torch.full(bias.shape, -1)
    row_of_id[ids] = torch.arange(len(ids))

    @functools.wraps(forward)
    def with_bias(module, hidden_states, vocab_weights, input_ids, temperature=1.0):
        device, dtype = vocab_weights.device, vocab_weights.dtype
        id_bias = bias[ids].to(device)
        rounded = id_bias.to(dtype)
        columns = F.pad(torch.stack([rounded, (id_bias - rounded.float()).to(dtype)], 1), (0, COLUMNS - 2))
        weights = torch.cat([gathered(vocab_weights).index_select(0, ids.to(device)), columns], 1)
        ones = hidden_states.new_ones(*hidden_states.shape[:-1], COLUMNS)
        rows = row_of_id.to(device)[input_ids.long()]
        hidden_states = torch.cat([hidden_states, ones], -1)
        log_probs, entropy = forward(module, hidden_states, weights, rows.clamp(min=0), temperature)
        return torch.where(rows < 0, UNREACHABLE, log_probs), entropy

    return with_bias
