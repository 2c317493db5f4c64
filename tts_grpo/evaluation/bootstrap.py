"""Bootstrap confidence intervals of means and ratios over the utterances of a test set.

Utterances are drawn with replacement, each with all its seeds, because samples of one text with different seeds are not
independent (Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation", ICASSP 2004).
Two systems are compared on the same draws (paired bootstrap).

A metric is a ratio of sums over N utterances. ``fractions`` (N, 2) has the numerator and the denominator of each
utterance: errors and units for an error rate; sum and number of values, which may be 0, for a mean.
"""

import functools

import numpy as np

NUM_DRAWS = 10_000
_CHUNK = 500  # draws per chunk, which limits the memory
NOT_SIGNIFICANT = "not significant (95%)"
MORE_FAILED = "inconclusive: more audio failed"


@functools.lru_cache(maxsize=2)
def draws(size: int) -> np.ndarray:
    """Number of times that each utterance is drawn, float32 (NUM_DRAWS, size); the same at each call, for pairing."""
    rng = np.random.default_rng(0)
    chunks = []
    for _ in range(NUM_DRAWS // _CHUNK):
        drawn = rng.integers(0, size, (_CHUNK, size)) + np.arange(_CHUNK)[:, None] * size
        chunks.append(np.bincount(drawn.ravel(), minlength=_CHUNK * size).reshape(_CHUNK, size).astype(np.float32))
    return np.concatenate(chunks)


def _sums(fractions: np.ndarray) -> np.ndarray:
    """Sums of numerators and denominators in each draw, (NUM_DRAWS, 2)."""
    return draws(len(fractions)) @ fractions.astype(np.float64)


def _interval(values: np.ndarray) -> list[float] | None:
    """The 2.5th and 97.5th percentile; None if the value of a draw is undefined."""
    if not np.isfinite(values).all():
        return None
    low, high = np.percentile(values, (2.5, 97.5))
    return [float(low), float(high)]


def ratio(fractions: np.ndarray) -> float:
    """The value of the metric."""
    return float(fractions[:, 0].sum() / fractions[:, 1].sum())


def interval(fractions: np.ndarray) -> list[float] | None:
    """95% confidence interval of the metric."""
    with np.errstate(invalid="ignore", divide="ignore"):
        numerator, denominator = _sums(fractions).T
        return _interval(numerator / denominator)


def compare(before: np.ndarray, after: np.ndarray) -> dict:
    """Compare two systems on the same utterances.

    Returns:
        ``difference`` (after - before) with its interval ``ci``, and ``relative_drop`` with ``relative_drop_ci``. The
        relative drop is None if the metric is 0 before.

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
    """Describe a difference in words.

    Args:
        ci: interval of after - before.
        better: "lower" or "higher"; None for a metric without a better direction.
        more_failed: whether more audio failed after than before; the verdict is then never "better".
    """
    if ci is None or ci[0] <= 0 <= ci[1]:
        return NOT_SIGNIFICANT
    direction = "higher" if ci[0] > 0 else "lower"
    if better is None:
        return direction
    if direction != better:
        return "worse"
    return MORE_FAILED if more_failed else "better"
