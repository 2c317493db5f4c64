"""Log-probabilities and entropies of tokens from hidden states, faster on a CPU than veRL's own code.

veRL's fused kernel recomputes the logits in the backward pass to save GPU memory. Here, the probabilities are stored,
because micro-batches on a CPU are small, and rows without a gradient are skipped in the backward pass.
"""

import torch

from tts_grpo.speech.head_bias import gathered

CHUNK = 128  # rows per chunk, so that their logits fit into the CPU cache


class LinearLogProbs(torch.autograd.Function):
    """``log_softmax(hidden @ weight.T / temperature)`` of the labels, and the entropy of each row."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature):
        """hidden (T, D), weight (V, D), labels (T,) -> log-probabilities (T,) and entropies (T,)."""
        probs = hidden.new_empty(len(hidden), len(weight))
        log_probs, entropy = hidden.new_empty(len(hidden)), hidden.new_empty(len(hidden))
        for first in range(0, len(hidden), CHUNK):
            rows = slice(first, first + CHUNK)
            logits = torch.mm(hidden[rows], weight.t(), out=probs[rows]).div_(temperature)
            logits -= logits.amax(1, keepdim=True)
            label_logits = logits.gather(1, labels[rows, None])[:, 0]
            exponentials = logits.exp()
            total = exponentials.sum(1)
            log_total = total.log()
            log_probs[rows] = label_logits - log_total
            entropy[rows] = log_total - torch.linalg.vecdot(exponentials, logits) / total
            torch.div(exponentials, total[:, None], out=probs[rows])
        ctx.save_for_backward(hidden, weight, labels, probs, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return log_probs, entropy

    @staticmethod
    def backward(ctx, grad_log_probs, grad_entropy):
        hidden, weight, labels, probs, entropy = ctx.saved_tensors
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        if grad_log_probs is not None:  # gradient of the logits: grad * (one-hot - probs)
            for first in range(0, len(hidden), CHUNK):
                # Prompts, and rollouts of groups with equal rewards, have no gradient.
                rows = first + grad_log_probs[first : first + CHUNK].nonzero()[:, 0]
                if len(rows):
                    scale = (grad_log_probs[rows] / ctx.temperature)[:, None]
                    scaled, row_probs = hidden[rows] * scale, probs[rows]
                    grad_hidden[rows] += (weight[labels[rows]] - row_probs @ weight) * scale
                    grad_weight.index_add_(0, labels[rows], scaled).addmm_(row_probs.t(), scaled, alpha=-1)
        # Gradient of the logits: -grad * probs * (log probs + entropy). It is 0 if the entropy is only logged.
        if grad_entropy is not None and grad_entropy.any():
            inner = probs * (probs.clamp(min=torch.finfo(probs.dtype).tiny).log() + entropy[:, None])
            scale = (grad_entropy / ctx.temperature)[:, None]
            grad_hidden -= inner @ weight * scale
            grad_weight.addmm_(inner.t(), hidden * scale, alpha=-1)
        return grad_hidden, grad_weight, None, None


def fused_linear(module, hidden_states, vocab_weights, input_ids, temperature=1.0):
    """Replaces ``FusedLinearForPPO.forward`` (veRL 0.9.1); hidden_states (..., D), input_ids (...)."""
    log_probs, entropy = LinearLogProbs.apply(
        hidden_states.flatten(0, -2), gathered(vocab_weights), input_ids.flatten().long(), temperature
    )
    return log_probs.view(input_ids.shape), entropy.view(input_ids.shape)
