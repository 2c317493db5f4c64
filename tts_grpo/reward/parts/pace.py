"""Pace: the speech rate, held to a reference, so that it does not drift in the training."""

import math

import numpy as np

from tts_grpo.reward.parts.interface import Batch, Context
from tts_grpo.speech.audio import resample


class Reward:
    """exp(-d^2 / 2), where d is the logarithm of the speech rate over the reference, divided by ``width``.

    The speech rate is the number of the text's units (syllables, words) per second, without silence before and after
    the speech, as in the evaluation's report. The score of a rollout that is silent is 0.

    Args:
        units_per_s: reference, such as the speech rate of the SFT model in the report.
        units_per_s_en: reference for English texts, whose units are words; 0: ``units_per_s``.
        width: a rate that differs by the factor exp(width) has the score 0.61.
    """

    def __init__(self, context: Context, units_per_s: float, width: float = 0.15, units_per_s_en: float = 0):
        self.units_per_s, self.width = {"zh": units_per_s, "en": units_per_s_en or units_per_s}, width

    def __call__(self, batch: Batch) -> list[float]:
        scores = []
        rollouts = zip(batch.seconds, batch.silences, batch.references, batch.languages, strict=True)
        for duration_s, (leading, trailing, _), reference, language in rollouts:
            seconds = duration_s - leading - trailing
            if seconds <= 0:
                scores.append(0.0)
                continue
            distance = math.log(len(reference.units) / seconds / self.units_per_s[language]) / self.width
            scores.append(math.exp(-(distance**2) / 2))
        return scores

    def spoiled(self, batch: Batch) -> Batch:
        """Speak at half the rate."""
        return batch.with_recordings([resample(np.asarray(one), 1, 2) for one in batch.recordings])
