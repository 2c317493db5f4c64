"""What every recogniser offers, and what it returns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

MIN_SAMPLES = 400  # one analysis frame: funasr fails on less


@dataclass(frozen=True)
class Heard:
    """What was heard of a recording.

    Attributes:
        text: the transcript.
        onsets_s: when each of its units (:func:`tts_grpo.text.units.written_units`) came up, in seconds.
    """

    text: str = ""
    onsets_s: tuple[float, ...] = ()


class Recogniser(Protocol):
    """What all recognisers have in common."""

    def transcribe(self, recordings: Sequence[np.ndarray]) -> list[str]: ...
