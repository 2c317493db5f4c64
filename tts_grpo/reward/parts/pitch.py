"""Pitch: the variation of F0, held to a reference, so that speech does not become monotonous in the training."""

import math

import numpy as np

from tts_grpo.reward.parts.interface import Batch, Context
from tts_grpo.speech.audio import ASR_HZ
from tts_grpo.speech.nets.f0 import F0Metrics


class Reward:
    """exp(-d^2 / 2), where d is the difference of the standard deviation of F0 from the reference, over ``width``.

    The score of a rollout with hardly any voiced speech is 0.

    Args:
        semitones: reference, such as the F0 standard deviation of the SFT model in the report.
        width: in semitones; speech that differs by it has the score 0.61.
    """

    def __init__(self, context: Context, semitones: float, width: float = 1.0):
        self.semitones, self.width, self.f0 = semitones, width, F0Metrics(context.device)

    def __call__(self, batch: Batch) -> list[float]:
        scores = []
        for metrics in self.f0.measure_all(batch.waveforms, batch.lens):
            deviation = metrics["f0_std_semitones"]
            distance = math.inf if deviation is None else (deviation - self.semitones) / self.width
            scores.append(math.exp(-(distance**2) / 2))
        return scores

    def spoiled(self, batch: Batch) -> Batch:
        """Replace each recording by a monotonous buzz of 200 Hz, 20 harmonics."""
        phases = [2 * np.pi * 200 / ASR_HZ * np.arange(n) for n in batch.lens]
        buzzes = [sum(np.cos(k * phase) / k for k in range(1, 21)) * 0.1 for phase in phases]
        return batch.with_recordings([buzz.astype(np.float32) for buzz in buzzes])
