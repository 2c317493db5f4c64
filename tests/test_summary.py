import numpy as np
import pytest

from scripts.summarise import relative_drop, stage_seconds, summarise, table
from tts_grpo.jsonl import write_json, write_jsonl
from tts_grpo.metrics import UNITS


def counts(errors, units=10):
    return {str(i): np.array([e, units], float) for i, e in enumerate(errors)}


def test_relative_drop_and_its_interval():
    rng = np.random.default_rng(0)
    errors = rng.integers(0, 6, 300)
    same, ci = relative_drop(counts(errors), counts(errors), rng)
    assert same == 0.0 and ci == [0.0, 0.0]
    half, (low, high) = relative_drop(counts(errors * 2), counts(errors), rng)
    assert half == pytest.approx(0.5) and (low, high) == (pytest.approx(0.5), pytest.approx(0.5))
    noise, (low, high) = relative_drop(counts(errors), counts(rng.permutation(errors)), rng)
    assert noise == pytest.approx(0.0) and low < -0.05 and high > 0.05


def test_the_interval_covers_the_truth():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(60):
        before, after = rng.binomial(10, 0.2, 200), rng.binomial(10, 0.12, 200)
        _, (low, high) = relative_drop(counts(before), counts(after), rng)
        covered += low <= 0.4 <= high
    assert covered >= 51  # 57 expected


def test_different_utterances_are_not_compared():
    with pytest.raises(ValueError, match="different utterances"):
        relative_drop(counts([1, 2]), counts([1, 2, 3]), np.random.default_rng(0))


def test_summary(tmp_path):
    for model, errors in (("sft", 4), ("grpo", 2)):
        entry = {"substitutions": errors, "deletions": 0, "insertions": 0, "length": 10}
        row = {"id": "a", "errors": dict.fromkeys(UNITS, entry)}
        seed = {"eos_share": 1.0, "tokens_per_character": 6.0, "failed": 0}
        write_jsonl(tmp_path / "eval" / model / "seed_0" / "utterances.jsonl", [row])
        rates = {metric: {"rate": errors / 10} for metric in UNITS}
        write_json(tmp_path / "eval" / model / "scores.json", {"pooled": rates, "seeds": {"0": seed}, "versions": {}})
    write_jsonl(tmp_path / "stage_seconds.jsonl", [{"stage": 2, "seconds": 50}, {"stage": 2, "seconds": 1}])
    summary = summarise(tmp_path, {"seed": "42"})
    assert summary["relative_drop"]["cer"] == pytest.approx(0.5) and summary["settings"] == {"seed": "42"}
    assert stage_seconds(tmp_path) == {"2": 50} == summary["stage_seconds"]
    assert "40.00%   20.00%   50.0%" in table(summary)
