"""Intervals of means and ratios over the utterances of a test set, by bootstrap.

Utterances are drawn with replacement, each with all its seeds: the seeds of an utterance say the same text and are not
independent (Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation", ICASSP 2004).
Two systems are compared on the same draws (paired).

A figure is a ratio of sums: ``parts`` (N, 2) holds numerator and denominator of each of N utterances. Total errors over
total units, or the mean of values that an utterance has one or several of, or none.
"""

import functools

import numpy as np

NUM_DRAWS = 10_000
_CHUNK = 500  # draws made at once
SAME = "no difference at this size"
UNFAIR = "no verdict: more audio failed"


@functools.lru_cache(maxsize=2)
def draws(size: int) -> np.ndarray:
    """How often each utterance is drawn, float32 (NUM_DRAWS, size): the same at each call, so that systems pair."""
    rng = np.random.default_rng(0)
    chunks = []
    for _ in range(NUM_DRAWS // _CHUNK):
        drawn = rng.integers(0, size, (_CHUNK, size)) + np.arange(_CHUNK)[:, None] * size
        chunks.append(np.bincount(drawn.ravel(), minlength=_CHUNK * size).reshape(_CHUNK, size).astype(np.float32))
    return np.concatenate(chunks)


def _sums(parts: np.ndarray) -> np.ndarray:
    return draws(len(parts)) @ parts.astype(np.float64)


def _interval(values: np.ndarray) -> list[float] | None:
    """Middle 95%; None where some draw has no value."""
    if not np.isfinite(values).all():
        return None
    low, high = np.percentile(values, (2.5, 97.5))
    return [float(low), float(high)]


def ratio(parts: np.ndarray) -> float:
    """The figure itself."""
    return float(parts[:, 0].sum() / parts[:, 1].sum())


def interval(parts: np.ndarray) -> list[float] | None:
    """95% interval of the figure."""
    with np.errstate(invalid="ignore", divide="ignore"):
        numerator, denominator = _sums(parts).T
        return _interval(numerator / denominator)


def compare(before: np.ndarray, after: np.ndarray) -> dict:
    """``difference`` (after - before) and ``relative_drop`` of two systems on the same utterances, with intervals.

    Returns:
        both, and ``ci`` and ``relative_drop_ci``; None where a figure of 0 leaves no relative drop.

    Raises:
        ValueError: the two have different numbers of utterances.
    """
    if before.shape != after.shape:
        raise ValueError("the two systems were scored on different utterances")
    with np.errstate(invalid="ignore", divide="ignore"):
        a, b = _sums(before), _sums(after)
        a, b = a[:, 0] / a[:, 1], b[:, 0] / b[:, 1]
        drop_ci = _interval(1 - b / a)
    first, second = ratio(before), ratio(after)
    return {
        "difference": second - first, "ci": _interval(b - a),
        "relative_drop": 1 - second / first if first else None, "relative_drop_ci": drop_ci,
    }  # fmt: skip


def verdict(ci: list[float] | None, better: str | None, more_failed: bool = False) -> str:
    """A difference in words.

    Args:
        ci: interval of after - before.
        better: "lower" or "higher"; None for a figure that is neither good nor bad.
        more_failed: whether more audio failed after than before: then nothing is called better.
    """
    if ci is None or ci[0] <= 0 <= ci[1]:
        return SAME
    direction = "higher" if ci[0] > 0 else "lower"
    if better is None:
        return direction
    if direction != better:
        return "worse"
    return UNFAIR if more_failed else "better"
