"""ASR likelihood: how probable the text is for the recogniser, which also grades speech that it understands."""

import dataclasses
import math

from tts_grpo.reward.parts.interface import Batch, Context


class Reward:
    """exp of the mean CTC log-likelihood per piece of the text, divided by ``temperature``.

    The first recogniser of the reward encodes the speech once more for it.
    """

    def __init__(self, context: Context, temperature: float = 1.0):
        self.asr, self.temperature = context.asr, temperature

    def __call__(self, batch: Batch) -> list[float]:
        recordings = [row[:n] for row, n in zip(batch.waveforms, batch.lens, strict=True)]
        found = self.asr.log_likelihoods(recordings, [reference.raw for reference in batch.references], batch.languages)
        return [math.exp(min(0.0, value) / self.temperature) for value in found]

    def spoiled(self, batch: Batch) -> Batch:
        """Give each recording the text of the next one."""
        return dataclasses.replace(batch, references=[*batch.references[1:], batch.references[0]])
