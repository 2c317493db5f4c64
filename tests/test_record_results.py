"""Tests that the tables of tiny results are those of the recorded JSON, and how both are made from a run."""

import json

import pytest

from tools.record_results import MAIN_RATE, RESULTS, ROOT, main, read_summary, tables
from tts_grpo.evaluation.provenance import replace_tables


def summary(sft: float, grpo: float, commit: str = "c" * 40) -> dict:
    metrics = {name: {"title": f"rate {name}"} for name in ("cer", "spoken", "pinyin_error_rate", MAIN_RATE)}
    drop = 1 - grpo / sft
    models = {
        model: {
            "pooled": {name: {"rate": rate} for name in metrics},
            "quality": {
                name: {"title": f"figure {name}", "unit": "MOS", "value": 40 * rate}
                for name in ("dnsmos_ovrl", "f0_median_hz", "speech_rate")
            },
        }
        for model, rate in (("sft", sft), ("grpo", grpo))
    }
    change = {"difference": -0.5, "ci": [-0.75, 0.25], "verdict": "not significant (95%)"}
    return models | {
        "metrics": metrics, "relative_drop": dict.fromkeys(metrics, drop), "git_commit": commit,
        "relative_drop_ci": {name: [drop - 0.1, drop + 0.05] for name in metrics},
        "verdict": dict.fromkeys(metrics, "better"),
        "quality_change": dict.fromkeys(("dnsmos_ovrl", "f0_median_hz", "speech_rate"), change),
        "set": "test", "stage_seconds": {"2": 300, "4": 100.4}, "peak_rss_gib": 6.04,
        "settings": {"profile": "tiny", "total_steps": "30", "credit": "syllable", "eval_jsonl": "a/other.jsonl",
                     "seeds": "0 1", "temperature": "1.0", "quality_utterances": "25"},
    }  # fmt: skip


@pytest.fixture
def runs(tmp_path):
    for name, grpo in (("a", 0.03), ("b", 0.05), ("c", 0.04)):
        (tmp_path / name / "log").mkdir(parents=True)
        (tmp_path / name / "summary.json").write_text(json.dumps(summary(0.0625, grpo, name * 40)))
        steps = "".join(f"step:{n} - timing_s/step:10.0 - timing_s/generation:{n}.0\n" for n in range(1, 6))
        (tmp_path / name / "log/train.log").write_text(steps)
    (tmp_path / "docs/results").mkdir(parents=True)
    (tmp_path / "README.md").write_text("Before\n\n<!-- table: short -->\n| old |\n| --- |\n\n| another table |\n")
    (tmp_path / "docs/results.md").write_text("<!-- table: runs -->\n\nAfter\n")
    return tmp_path


def test_figures_and_tables_are_made_from_the_runs(runs):
    """Changes of -52%, -20% and -36%: the third run is the median."""
    main([*(str(runs / name) for name in "abc"), "--root", str(runs)])
    recorded = json.loads((runs / RESULTS).read_text("utf-8"))
    rate = next(figure for figure in recorded["figures"] if figure["key"] == MAIN_RATE)
    assert (rate["sft"], rate["grpo"], rate["relative_change_percent"]) == (6.25, 4.0, -36.0)
    assert rate["ci95"] == [-41.0, -26.0] and "; test.jsonl, seeds 0 1" in recorded["conditions"]
    assert recorded["stage_seconds"] == {"2": 300, "4": 100, "all": 400} and recorded["commit"] == "c" * 40
    assert recorded["step_seconds"]["generation"] == 4.0  # the median of steps 3 to 5
    readme = (runs / "README.md").read_text()
    assert readme.startswith("Before\n\n<!-- table: short -->\n| | SFT |") and readme.endswith(
        "|\n\n| another table |\n"
    )
    assert "| old |" not in readme
    assert f"| rate {MAIN_RATE} | 6.25% | 4.00% | -36.0% (-41.0% to -26.0%) | better |" in readme
    assert "| figure dnsmos_ovrl, MOS | 2.500 | 1.600 | -0.500 (-0.750 to +0.250) | not significant (95%) |" in readme
    assert (
        "| 2 | `bbbbbbb` | 6.25% | 5.00% | -20.0% (-25.0% to -10.0%) | -0.500 |"
        in (runs / "docs/results.md").read_text()
    )


def test_only_finished_runs_of_a_commit_are_recorded(runs):
    with pytest.raises(SystemExit, match="run stages 2 to 4"):
        read_summary(runs / "d")
    for commit in (None, "abc-dirty"):
        (runs / "a/summary.json").write_text(json.dumps(summary(0.1, 0.1, commit)))
        with pytest.raises(SystemExit, match="committed code"):
            read_summary(runs / "a")


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_the_pages_show_the_recorded_figures(page):
    text = (ROOT / page).read_text("utf-8")
    assert "<!-- table: " in text
    assert replace_tables(text, tables(json.loads((ROOT / RESULTS).read_text("utf-8")))) == text
