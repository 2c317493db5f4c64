"""Error counts and rates of transcripts against ground truths."""

from collections.abc import Sequence
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

from tts_grpo.text import pinyin


@dataclass(frozen=True)
class ErrorCounts:
    """Edits that turn a reference into a hypothesis, and the reference's length, in units."""

    errors: int
    length: int

    def __add__(self, other: "ErrorCounts") -> "ErrorCounts":
        return ErrorCounts(self.errors + other.errors, self.length + other.length)

    @property
    def rate(self) -> float:
        """Errors a reference unit; may exceed 1.

        Raises:
            ValueError: the reference is empty, so that no rate exists.
        """
        if self.length == 0:
            raise ValueError("no error rate against an empty reference")
        return self.errors / self.length


def pinyin_errors(ground_truth: str, hypothesis: str, tones: bool) -> ErrorCounts:
    """Substitutions, deletions and insertions of syllables between two texts."""
    reference = pinyin(ground_truth, tones)
    return ErrorCounts(Levenshtein.distance(reference, pinyin(hypothesis, tones)), len(reference))


def pinyin_error_rate(ground_truths: Sequence[str], hypotheses: Sequence[str], tones: bool) -> float:
    """Total syllable errors over total ground-truth syllables of paired texts.

    Raises:
        ValueError: the lists differ in length, or no ground truth has a syllable.
    """
    pairs = zip(ground_truths, hypotheses, strict=True)
    return sum((pinyin_errors(truth, hyp, tones) for truth, hyp in pairs), ErrorCounts(0, 0)).rate
