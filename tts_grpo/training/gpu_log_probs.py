"""Log-probabilities and entropies of tokens from hidden states, on a GPU, without keeping the logits.

veRL's own code computes the logits of 512 tokens at a time and passes over them a dozen times. Here, a chunk of logits
is read once in the forward pass, and read and written once in the backward pass (Triton kernels). The weights are
padded to a multiple of 64 ids, without which cuBLAS uses slow kernels (the SFT model has 158,227 ids). Tokens
without a gradient, such as those of prompts and of groups with equal rewards, are left out of the backward pass.

The loss is that of veRL (``FusedLinearForPPO``, 0.9.1), up to rounding: logits are rounded to the type of the weights,
and everything after them is computed in float32.
"""

import torch
import triton
import triton.language as tl

from tts_grpo.speech.head_bias import gathered

ROWS = 4096  # tokens per chunk: 1.2 GiB of logits in half precision for 158,227 ids
MULTIPLE = 64  # the number of ids is padded to a multiple of it
BLOCK = 8192


@triton.jit
def _statistics(logits, labels, log_probs, entropies, lse, columns, stride, scale, BLOCK: tl.constexpr):
    """Per row of logits: log-probability of the label, entropy, and log of the sum of exponentials."""
    row = tl.program_id(0).to(tl.int64)
    largest, total, weighted = -float("inf"), 0.0, 0.0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        x = tl.load(logits + row * stride + column, mask=inside, other=-float("inf")).to(tl.float32) * scale
        new = tl.maximum(largest, tl.max(x, axis=0))
        exponentials = tl.exp(x - new)
        kept = tl.exp(largest - new)
        total = total * kept + tl.sum(exponentials, axis=0)
        weighted = weighted * kept + tl.sum(exponentials * tl.where(inside, x, 0.0), axis=0)
        largest = new
    log_total = largest + tl.log(total)
    label = tl.load(labels + row)
    x = tl.load(logits + row * stride + label).to(tl.float32) * scale
    tl.store(log_probs + row, x - log_total)
    tl.store(entropies + row, log_total - weighted / total)
    tl.store(lse + row, log_total)


@triton.jit
def _gradient(logits, labels, lse, entropies, grad_log_probs, grad_entropies, columns, padded, stride, scale,
              BLOCK: tl.constexpr):  # fmt: skip
    """Replace logits by their gradient; that of padding is 0."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(logits + row * stride + column, mask=inside, other=-float("inf")).to(tl.float32) * scale
    log_probs = x - tl.load(lse + row)
    probs = tl.exp(log_probs)
    label = (column == tl.load(labels + row)).to(tl.float32)
    value = tl.load(grad_log_probs + row) * (label - probs)
    surprise = probs * (tl.where(inside, log_probs, 0.0) + tl.load(entropies + row))
    value = (value - tl.load(grad_entropies + row) * surprise) * scale
    tl.store(logits + row * stride + column, value.to(logits.dtype.element_ty), mask=column < padded)


def _pad(weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % MULTIPLE))


class LinearLogProbs(torch.autograd.Function):
    """``log_softmax(hidden @ weight.T / temperature)`` at the labels, and the entropy of each row."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature):
        """hidden (T, D), weight (V, D), labels (T,) int64 -> log-probabilities (T,) and entropies (T,), float32."""
        padded = _pad(weight)
        log_probs, entropies, lse = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))
        for first in range(0, len(hidden), ROWS):
            rows = slice(first, first + ROWS)
            logits = hidden[rows] @ padded.t()
            _statistics[(len(logits),)](
                logits, labels[rows], log_probs[rows], entropies[rows], lse[rows], len(weight), logits.stride(0),
                1 / temperature, BLOCK=BLOCK,
            )  # fmt: skip
        ctx.save_for_backward(hidden, weight, labels, lse, entropies)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return log_probs, entropies

    @staticmethod
    def backward(ctx, grad_log_probs, grad_entropies):
        hidden, weight, labels, lse, entropies = ctx.saved_tensors
        zero = torch.zeros_like(lse)
        grad_log_probs = zero if grad_log_probs is None else grad_log_probs.float()
        grad_entropies = zero if grad_entropies is None else grad_entropies.float()
        used = ((grad_log_probs != 0) | (grad_entropies != 0)).nonzero()[:, 0]
        padded, grad_hidden = _pad(weight), torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(padded)
        for rows in used.split(ROWS):
            inputs = hidden[rows]
            logits = inputs @ padded.t()
            columns = logits.shape[1]
            _gradient[(len(rows), triton.cdiv(columns, BLOCK))](
                logits, labels[rows], lse[rows], entropies[rows], grad_log_probs[rows], grad_entropies[rows],
                len(weight), columns, logits.stride(0), 1 / ctx.temperature, BLOCK=BLOCK,
            )  # fmt: skip
            grad_hidden[rows] = logits @ padded
            grad_weight.addmm_(logits.t(), inputs)
        return grad_hidden, grad_weight[: len(weight)], None, None


def fused_linear(module, hidden_states, vocab_weights, input_ids, temperature=1.0):
    """Replaces ``FusedLinearForPPO.forward`` (veRL 0.9.1).

    Args:
        module: the ``FusedLinearForPPO``, not used.
        hidden_states: (..., D).
        vocab_weights: weights of the LM head (V, D).
        input_ids: ids whose log-probabilities are wanted (...).
        temperature: the logits are divided by it.

    Returns:
        Log-probabilities and entropies (...), float32.
    """
    log_probs, entropies = LinearLogProbs.apply(
        hidden_states.flatten(0, -2).contiguous(), gathered(vocab_weights), input_ids.flatten().long(), temperature
    )
    return log_probs.view(input_ids.shape), entropies.view(input_ids.shape)
