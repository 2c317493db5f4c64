import numpy as np
import pytest

from tts_grpo.evaluation import bootstrap


def fractions(errors, units=10):
    return np.array([(e, units) for e in errors], float)


def test_relative_drop_and_its_interval():
    rng = np.random.default_rng(0)
    errors = rng.integers(0, 6, 300)
    same = bootstrap.compare(fractions(errors), fractions(errors))
    assert same["relative_drop"] == 0.0 and same["ci"] == [0.0, 0.0] == same["relative_drop_ci"]
    half = bootstrap.compare(fractions(errors * 2), fractions(errors))
    assert half["relative_drop"] == pytest.approx(0.5) and half["relative_drop_ci"] == pytest.approx([0.5, 0.5])
    assert half["difference"] == pytest.approx(-errors.mean() / 10)
    noise = bootstrap.compare(fractions(errors), fractions(rng.permutation(errors)))
    assert noise["relative_drop_ci"][0] < -0.05 and noise["relative_drop_ci"][1] > 0.05


def test_intervals_cover_the_true_value():
    rng, drops, rates = np.random.default_rng(1), 0, 0
    for _ in range(60):
        before, after = fractions(rng.binomial(10, 0.2, 200)), fractions(rng.binomial(10, 0.12, 200))
        low, high = bootstrap.compare(before, after)["relative_drop_ci"]
        drops += low <= 0.4 <= high
        low, high = bootstrap.interval(before)
        rates += low <= 0.2 <= high
    assert drops >= 51 and rates >= 51  # 57 expected


def test_width_of_an_interval_matches_theory():
    values = np.random.default_rng(2).normal(3.0, 1.0, 400)
    low, high = bootstrap.interval(fractions(values, units=1))
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)


def test_draws_are_resamples_and_reproducible():
    drawn = bootstrap.draws(30)
    assert drawn.shape == (bootstrap.NUM_DRAWS, 30) and (drawn.sum(axis=1) == 30).all()
    assert drawn.mean(axis=0) == pytest.approx(np.ones(30), abs=0.06)
    bootstrap.draws.cache_clear()
    assert (bootstrap.draws(30) == drawn).all()


def test_utterances_without_a_value_are_ignored():
    measured, not_measured = fractions([1, 2, 3], units=1), np.zeros((40, 2))
    assert bootstrap.ratio(np.concatenate([measured, not_measured])) == 2.0


def test_no_relative_drop_without_errors_before():
    compared = bootstrap.compare(fractions([0, 0, 0]), fractions([0, 1, 0]))
    assert compared["relative_drop"] is None and compared["relative_drop_ci"] is None
    assert compared["difference"] == pytest.approx(1 / 30)


def test_different_numbers_of_utterances_are_refused():
    with pytest.raises(ValueError, match="different utterances"):
        bootstrap.compare(fractions([1, 2]), fractions([1, 2, 3]))


@pytest.mark.parametrize(
    ("ci", "better", "more_failed", "words"),
    [
        ([-0.2, -0.1], "lower", False, "better"),
        ([-0.2, -0.1], "lower", True, bootstrap.MORE_FAILED),
        ([0.1, 0.2], "lower", True, "worse"),
        ([0.1, 0.2], "higher", False, "better"),
        ([-0.2, 0.1], "lower", False, bootstrap.NOT_SIGNIFICANT),
        ([-0.2, 0.0], "lower", False, bootstrap.NOT_SIGNIFICANT),
        ([0.1, 0.2], None, False, "higher"),
        (None, "lower", False, bootstrap.NOT_SIGNIFICANT),
    ],
)
def test_verdicts(ci, better, more_failed, words):
    assert bootstrap.verdict(ci, better, more_failed) == words


def runs_of(rates, num_utterances=100, units=10, rng=None):
    """Simulated errors of one run per rate, (S, N, 2)."""
    return np.array([fractions(rng.binomial(units, rate, num_utterances), units) for rate in rates])


@pytest.mark.parametrize(("num_runs", "spread"), [(3, 0.03), (5, 0.03), (5, 0.0)])
def test_intervals_over_runs_cover_the_mean_of_all_runs(num_runs, spread, monkeypatch):
    """The rate of a run varies around 12%; with the largest spread, this is most of the variance."""
    monkeypatch.setattr(bootstrap, "NUM_DRAWS", 1000)
    bootstrap.draws.cache_clear()
    bootstrap._run_weights.cache_clear()
    rng, covered = np.random.default_rng(3), 0
    for _ in range(100):
        before = runs_of([0.2], rng=rng)
        after = runs_of(np.clip(rng.normal(0.12, spread, num_runs), 0.01, 1), rng=rng)
        low, high = bootstrap.compare_runs(before, after)["ci"]
        covered += low <= -0.08 <= high
    bootstrap.draws.cache_clear()
    bootstrap._run_weights.cache_clear()
    assert covered >= 90


def test_comparison_over_runs():
    rng = np.random.default_rng(4)
    sft, run = runs_of([0.2], rng=rng), runs_of([0.12], rng=rng)
    one, alone = bootstrap.compare_runs(sft, run), bootstrap.compare(sft[0], run[0])
    for name, value in alone.items():  # with one run: variation of the evaluation only
        assert one[name] == pytest.approx(value)
    assert one["p"] < 0.001 and bootstrap.compare_runs(sft, sft)["p"] == 1.0
    several = bootstrap.compare_runs(sft, np.concatenate([run, sft, runs_of([0.16], rng=rng)]))
    assert several["ci"][1] - several["ci"][0] > 2 * (one["ci"][1] - one["ci"][0])
    assert several["before"] == bootstrap.ratio(sft[0]) and several["after"] == pytest.approx(0.17, abs=0.03)
    with pytest.raises(ValueError, match="different utterances"):
        bootstrap.compare_runs(sft, run[:, 1:])


def test_holm():
    """Holm (1979): the smallest of 4 is multiplied by 4, the next by 3; and none is below an earlier one."""
    assert bootstrap.holm([0.04, 0.01, 0.03, 0.005]) == pytest.approx([0.06, 0.03, 0.06, 0.02])
    assert bootstrap.holm([0.9, 0.8]) == [1.0, 1.0] and bootstrap.holm([]) == []
