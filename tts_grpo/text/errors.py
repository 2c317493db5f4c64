"""Alignments, error counts and error rates of transcripts against ground truths."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rapidfuzz.distance import Levenshtein

from tts_grpo.text.units import pinyin


@dataclass(frozen=True)
class ErrorCounts:
    """Edits that turn a reference into a hypothesis, and the reference's length, in units."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    length: int = 0

    def __add__(self, other: "ErrorCounts") -> "ErrorCounts":
        return ErrorCounts(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.length + other.length,
        )

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors a reference unit; may exceed 1.

        Raises:
            ValueError: the reference is empty, so that no rate exists.
        """
        if self.length == 0:
            raise ValueError("no error rate against an empty reference")
        return self.errors / self.length


def align(reference: Sequence[str], hypothesis: Sequence[str]) -> list[tuple[str | None, str | None]]:
    """Pairs of units, in order, by least edits (Levenshtein); None stands where the other side has a unit alone."""
    pairs = []
    for op in Levenshtein.opcodes(reference, hypothesis):
        said, heard = reference[op.src_start : op.src_end], hypothesis[op.dest_start : op.dest_end]
        pairs += zip(said or [None] * len(heard), heard or [None] * len(said), strict=True)
    return pairs


def locate_errors(
    reference: Sequence[str], hypothesis: Sequence[str], onsets_s: Sequence[float], duration_s: float
) -> tuple[list[int], list[float]]:
    """Errors at each unit of a reference, and when that unit begins in the recording.

    A unit too many counts at the reference unit before it (at the first one, if it comes first); a unit that was not
    heard is placed between its neighbours. The errors' sum is the number of edits.

    Args:
        reference: N units that were to be said.
        hypothesis: units that were heard.
        onsets_s: when each of them was heard, in seconds.
        duration_s: of the recording.

    Returns:
        N errors and N times in seconds, ascending.

    Raises:
        ValueError: hypothesis and onsets differ in length.
    """
    if len(hypothesis) != len(onsets_s):
        raise ValueError(f"{len(hypothesis)} units were heard, {len(onsets_s)} times are given")
    errors, heard_at = [0] * len(reference), {-1: 0.0, len(reference): duration_s}
    onsets, unit = iter(onsets_s), 0  # unit: the reference's next one
    for said, heard in align(reference, hypothesis):
        onset = next(onsets) if heard is not None else None
        if said is None:
            errors[max(0, unit - 1)] += 1
            continue
        errors[unit] += said != heard
        if onset is not None:
            heard_at[unit] = onset
        unit += 1
    places = sorted(heard_at)
    return errors, np.interp(range(len(reference)), places, [heard_at[place] for place in places]).tolist()


def count_errors(reference: Sequence[str], hypothesis: Sequence[str]) -> ErrorCounts:
    """Substitutions, deletions and insertions of units between two sequences."""
    kinds = [op.tag for op in Levenshtein.editops(reference, hypothesis)]
    return ErrorCounts(kinds.count("replace"), kinds.count("delete"), kinds.count("insert"), len(reference))


def pinyin_errors(ground_truth: str, hypothesis: str, tones: bool) -> ErrorCounts:
    """Substitutions, deletions and insertions of syllables between two texts."""
    return count_errors(pinyin(ground_truth, tones), pinyin(hypothesis, tones))


def pinyin_error_rate(ground_truths: Sequence[str], hypotheses: Sequence[str], tones: bool) -> float:
    """Total syllable errors over total ground-truth syllables of paired texts.

    Raises:
        ValueError: the lists differ in length, or no ground truth has a syllable.
    """
    pairs = zip(ground_truths, hypotheses, strict=True)
    return sum((pinyin_errors(truth, hyp, tones) for truth, hyp in pairs), ErrorCounts()).rate
