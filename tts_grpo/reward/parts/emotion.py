"""Emotion and event: the probability that SenseVoice gives to an emotion, or to an event such as laughter."""

from tts_grpo.reward.parts.interface import Batch, Context
from tts_grpo.speech.asr.sensevoice import EMOTIONS, EVENTS


class Reward:
    """Probability of a tag in the answers of the first recogniser of the reward.

    Args:
        tag: HAPPY, SAD, ANGRY, NEUTRAL, ... or Speech, Laughter, Cry, ... (``tts_grpo/speech/asr/sensevoice.py``).
    """

    def __init__(self, context: Context, tag: str):
        if tag not in (*EMOTIONS, *EVENTS):
            raise ValueError(f"SenseVoice has no tag {tag}: it has {', '.join((*EMOTIONS, *EVENTS))}")
        if tag not in context.asr.tags:
            raise ValueError(f"the vocabulary of the reward's recogniser has no <|{tag}|>: use another recogniser")
        self.tag = tag

    def __call__(self, batch: Batch) -> list[float]:
        # A recording that is too short to be recognised has no tags.
        return [min(1.0, transcript.tags.get(self.tag, 0.0)) for transcript in batch.transcripts]
