"""What every recogniser offers, and what it returns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

MIN_SAMPLES = 400  # one analysis frame: funasr fails on less


@dataclass(frozen=True)
class Heard:
    """What was heard of a recording.

    Attributes:
        text: the transcript.
        onsets_s: when each of its characters (all of them, spaces too) came up, in seconds. Units have their places in
            the text, so a unit's time is that of its first character, however a text is cut into units.
    """

    text: str = ""
    onsets_s: tuple[float, ...] = ()


class Recogniser(Protocol):
    """What all recognisers have in common."""

    def transcribe(self, recordings: Sequence[np.ndarray]) -> list[str]: ...


Result = TypeVar("Result")


def recognise_in_batches(
    recordings: Sequence, recognise: Callable[[list], Sequence[Result]], batch_size: int, silence: Result
) -> list[Result]:
    """The result for each recording, in order, computed in batches of like lengths: less padding, the same result.

    Args:
        recordings: each (T,) at 16 kHz.
        recognise: gives the results of a batch, in its order.
        batch_size: the largest batch.
        silence: result for a recording shorter than an analysis frame, which is not passed to ``recognise``.
    """
    results = [silence] * len(recordings)
    order = sorted((i for i, r in enumerate(recordings) if len(r) >= MIN_SAMPLES), key=lambda i: len(recordings[i]))
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        for i, result in zip(batch, recognise([recordings[i] for i in batch]), strict=True):
            results[i] = result
    return results
