"""Bootstrap confidence intervals of means and ratios over the utterances of a test set.

Utterances are drawn with replacement, each with all its seeds, because samples of one text with different seeds are not
independent (Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation", ICASSP 2004).
Two systems are compared on the same draws (paired bootstrap).

Several trainings of one setting with different seeds are drawn with replacement, too (hierarchical bootstrap), so that
the interval holds for the setting and not for one of its runs. See :func:`compare_runs`.

A metric is a ratio of sums over N utterances. ``fractions`` (N, 2) has the numerator and the denominator of each
utterance: errors and units for an error rate; sum and number of values, which may be 0, for a mean.
"""

import functools
from collections.abc import Sequence

import numpy as np
from scipy.stats import norm, t

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


@functools.cache
def _run_weights(num_runs: int, stream: int) -> np.ndarray:
    """Weight of each training run in each draw, float64 (NUM_DRAWS, num_runs), with a sum of 1.

    The weight of a run is its share of the drawn runs, with the distance from ``1 / num_runs`` multiplied by
    ``sqrt(n / (n - 1)) * t / z``: the quantile of means of a few drawn values is too small, by these factors of the
    normal case (Hesterberg, "What teachers should know about the bootstrap", The American Statistician 2015, on
    expanded percentile intervals).
    """
    if num_runs == 1:
        return np.ones((NUM_DRAWS, 1))
    rng = np.random.default_rng([1, stream])
    shares = rng.multinomial(num_runs, np.full(num_runs, 1 / num_runs), NUM_DRAWS) / num_runs
    widening = np.sqrt(num_runs / (num_runs - 1)) * t.ppf(0.975, num_runs - 1) / norm.ppf(0.975)
    return 1 / num_runs + widening * (shares - 1 / num_runs)


def _run_rates(runs: np.ndarray, stream: int) -> np.ndarray:
    """Mean metric of the runs (S, N, 2) in each draw of runs and utterances, (NUM_DRAWS,)."""
    by_run = np.stack([np.divide(*_sums(fractions).T) for fractions in runs], axis=1)
    return (by_run * _run_weights(len(runs), stream)).sum(1)


def compare_runs(before: np.ndarray, after: np.ndarray) -> dict:
    """Compare two settings over their training runs, on the same utterances.

    Args:
        before, after: fractions of each run and utterance, (S, N, 2). S may differ, and is 1 for a model that was not
            trained, such as the SFT model. With one run, the interval does not contain the variation of the training.

    Returns:
        ``before`` and ``after``: means over the runs; ``difference`` with its 95% interval ``ci``; ``relative_drop``
        with ``relative_drop_ci``; and ``p``: two-sided p-value of the difference, at least 2 / (NUM_DRAWS + 1).

    Raises:
        ValueError: the two have different utterances.
    """
    if before.shape[1:] != after.shape[1:]:
        raise ValueError("the two settings were scored on different utterances")
    with np.errstate(invalid="ignore", divide="ignore"):
        a, b = _run_rates(before, 0), _run_rates(after, 1)
        drop_ci = _interval(1 - b / a)
    first, second = (float(np.mean([ratio(fractions) for fractions in runs])) for runs in (before, after))
    tail = min((b >= a).sum(), (b <= a).sum())
    return {
        "before": first, "after": second, "difference": second - first, "ci": _interval(b - a),
        "relative_drop": 1 - second / first if first else None, "relative_drop_ci": drop_ci,
        "p": min(1.0, 2 * (int(tail) + 1) / (NUM_DRAWS + 1)),
    }  # fmt: skip


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number (Holm, Scandinavian Journal of Statistics 1979), in the order given."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


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
