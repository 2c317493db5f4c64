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
        self.tag = tag

    def __call__(self, batch: Batch) -> list[float]:
        if not all(self.tag in transcript.tags for transcript in batch.transcripts):
            raise RuntimeError(f"the vocabulary of the reward's recogniser has no <|{self.tag}|>: use another one")
        return [min(1.0, transcript.tags[self.tag]) for transcript in batch.transcripts]
