"""Intelligibility: the error rate of the transcript against the text, through a reward curve."""

from tts_grpo.reward.curves import reward
from tts_grpo.reward.parts.interface import Batch, Context, Scores


class Reward:
    """1 for speech that is recognised without errors; ``curve`` is ``tanh`` or ``exp`` (default: ``reward_curve``)."""

    def __init__(self, context: Context, curve: str = ""):
        self.curve = curve or context.curve
        reward(0.0, self.curve)  # KeyError for an unknown curve

    def __call__(self, batch: Batch) -> Scores:
        scores = [reward(errors.error_rate, self.curve) for errors in batch.errors]
        return Scores(scores, [errors.errors for errors in batch.errors])
