"""Ending: a soft penalty on rollouts that are about to reach the length limit.

The score falls linearly over the last ``buffer`` tokens, from 1 to 0 at ``limit``: the soft overlong punishment of DAPO
(arXiv 2503.14476, equation 13), which sets the buffer to a fifth of the limit.
"""

import dataclasses

from tts_grpo.reward.parts.interface import Batch, Context


class Reward:
    """1 up to ``limit`` - ``buffer`` speech tokens, 0 from ``limit`` on; ``limit`` is usually max_response_length."""

    def __init__(self, context: Context, limit: float, buffer: float = 0.0):
        self.limit, self.buffer = limit, buffer or limit / 5

    def __call__(self, batch: Batch) -> list[float]:
        return [min(1.0, max(0.0, (self.limit - len(tokens)) / self.buffer)) for tokens in batch.speech_tokens]

    def spoiled(self, batch: Batch) -> Batch:
        """Repeat the tokens up to the limit."""
        repeats = [int(self.limit / len(tokens)) + 1 for tokens in batch.speech_tokens]
        tokens = [list(tokens) * n for tokens, n in zip(batch.speech_tokens, repeats, strict=True)]
        return dataclasses.replace(batch, speech_tokens=tokens)
