"""Pauses: the share of silence within the speech, which must not exceed a limit."""

import numpy as np

from tts_grpo.reward.parts.interface import Batch, Context
from tts_grpo.speech.audio import ASR_HZ


class Reward:
    """1 up to the share ``allowed`` of silence between the first and the last sound, falling to 0 at ``most``.

    The score of a rollout that is silent is 0. The evaluation reports the same share as inner silence.
    """

    def __init__(self, context: Context, allowed: float = 0.15, most: float = 0.6):
        self.allowed, self.most = allowed, most

    def __call__(self, batch: Batch) -> list[float]:
        scores = []
        for n, (leading, _, inner) in zip(batch.lens, batch.silences, strict=True):
            if leading * ASR_HZ >= n:  # silent
                scores.append(0.0)
            else:
                scores.append(min(1.0, max(0.0, (self.most - inner) / (self.most - self.allowed))))
        return scores

    def spoiled(self, batch: Batch) -> Batch:
        """Insert silence in the middle, twice as long as the speech."""
        pieces = [np.split(one, [len(one) // 2]) for one in batch.recordings]
        gaps = [np.zeros(2 * len(one), one.dtype) for one in batch.recordings]
        return batch.with_recordings([np.concatenate([a, gap, b]) for (a, b), gap in zip(pieces, gaps, strict=True)])
