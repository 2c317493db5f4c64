"""The interface and the result of recognisers, and the batching that they share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np

MIN_SAMPLES = 400  # one analysis frame: funasr fails on shorter recordings


@dataclass(frozen=True)
class Transcript:
    """The transcript of a recording, with times.

    Attributes:
        text: the transcript.
        onsets_s: when each of its characters (all of them, spaces too) came up, in seconds. Units have their places in
            the text, so a unit's time is that of its first character, however a text is cut into units.
        tags: probabilities of emotions and events that the recogniser tells, such as HAPPY or Laughter.
    """

    text: str = ""
    onsets_s: tuple[float, ...] = ()
    tags: Mapping[str, float] = field(default_factory=dict, compare=False)


class Recogniser(Protocol):
    """The interface of all recognisers."""

    def transcribe(self, recordings: Sequence[np.ndarray], languages: Sequence[str] | None = None) -> list[str]:
        """Transcripts of recordings, each float32 (T,) at 16 kHz.

        Args:
            recordings: the recordings.
            languages: language of each; by default, that with which the recogniser was loaded.

        Raises:
            ValueError: the recogniser does not know a language.
        """


Result = TypeVar("Result")


def recognise_in_batches(
    recordings: Sequence, recognise: Callable[[list], Sequence[Result]], batch_size: int, silence: Result
) -> list[Result]:
    """Results for recordings, in order. Recordings of similar length are batched together to reduce padding.

    Args:
        recordings: each (T,) at 16 kHz.
        recognise: returns the results for a batch, in order.
        batch_size: maximum batch size.
        silence: the result for a recording shorter than one analysis frame; it is not passed to ``recognise``.
    """
    results = [silence] * len(recordings)
    order = sorted((i for i, r in enumerate(recordings) if len(r) >= MIN_SAMPLES), key=lambda i: len(recordings[i]))
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        for i, result in zip(batch, recognise([recordings[i] for i in batch]), strict=True):
            results[i] = result
    return results
