"""Log-probabilities and entropy of tokens from hidden states, in less time than veRL's own code takes on a CPU.

veRL's fused kernel computes the logits again for the gradient, which spares a GPU's memory. Here the probabilities are
kept, as a tiny micro-batch has room for them, and rows without a gradient are left out of the way back.
"""

import torch

from tts_grpo.speech.head_bias import gathered

CHUNK = 128  # rows whose logits stay in the processor's cache


class LinearLogProbs(torch.autograd.Function):
    """``log_softmax(hidden @ weight.T / temperature)`` at the labels, and the entropy of each row."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature):
        """hidden (T, D), weight (V, D), labels (T,) -> log-probabilities (T,) and entropies (T,)."""
        probs = hidden.new_empty(len(hidden), len(weight))
        log_probs, entropy = hidden.new_empty(len(hidden)), hidden.new_empty(len(hidden))
        for first in range(0, len(hidden), CHUNK):
            rows = slice(first, first + CHUNK)
            logits = torch.mm(hidden[rows], weight.t(), out=probs[rows]).div_(temperature)
            logits -= logits.amax(1, keepdim=True)
            chosen = logits.gather(1, labels[rows, None])[:, 0]
            exponentials = logits.exp()
            total = exponentials.sum(1)
            log_total = total.log()
            log_probs[rows] = chosen - log_total
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
        if grad_log_probs is not None:  # of the logits: grad * (one-hot - probs)
            for first in range(0, len(hidden), CHUNK):
                # prompts have no gradient, nor have rollouts whose whole group got the same reward
                rows = first + grad_log_probs[first : first + CHUNK].nonzero()[:, 0]
                if len(rows):
                    scale = (grad_log_probs[rows] / ctx.temperature)[:, None]
                    scaled, chosen = hidden[rows] * scale, probs[rows]
                    grad_hidden[rows] += (weight[labels[rows]] - chosen @ weight) * scale
                    grad_weight.index_add_(0, labels[rows], scaled).addmm_(chosen.t(), scaled, alpha=-1)
        # of the logits: -grad * probs * (log probs + entropy); all 0 where only the entropy's curve is asked for
        if grad_entropy is not None and grad_entropy.any():
            inner = probs * (probs.clamp(min=torch.finfo(probs.dtype).tiny).log() + entropy[:, None])
            scale = (grad_entropy / ctx.temperature)[:, None]
            grad_hidden -= inner @ weight * scale
            grad_weight.addmm_(inner.t(), hidden * scale, alpha=-1)
        return grad_hidden, grad_weight, None, None


def fused_linear(module, hidden_states, vocab_weights, input_ids, temperature=1.0):
    """Stands in for ``FusedLinearForPPO.forward`` (veRL 0.9.1); hidden_states (..., D), input_ids (...)."""
    log_probs, entropy = LinearLogProbs.apply(
        hidden_states.flatten(0, -2), gathered(vocab_weights), input_ids.flatten().long(), temperature
    )
    return log_probs.view(input_ids.shape), entropy.view(input_ids.shape)
