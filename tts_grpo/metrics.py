"""Alignments, error counts and error rates of transcripts against ground truths, and the reward made of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

from tts_grpo.text import pinyin

REWARD_CURVES = {
    # The original recipe's (DESIGN: 1 - tanh(3 e)).
    "tanh": lambda error_rate: 1.0 - math.tanh(3.0 * error_rate),
    # Its successor's, flat near 0: exp(-12 e^1.5).
    "exp": lambda error_rate: math.exp(-12.0 * error_rate**1.5),
}


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


def reward(error_rate: float, curve: str = "tanh") -> float:
    """Reward in [0, 1] of an error rate, falling from 1 at no error.

    Args:
        error_rate: pinyin error rate, 0 or more.
        curve: name in ``REWARD_CURVES``.
    """
    return min(1.0, max(0.0, REWARD_CURVES[curve](error_rate)))
