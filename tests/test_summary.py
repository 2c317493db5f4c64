import json
import shutil

import pytest

from scripts.summarise import main, stage_seconds, summarise, table
from tts_grpo.evaluation.aggregate import JUDGE_ERRORS, quality, rates
from tts_grpo.evaluation.protocols import METRICS
from tts_grpo.evaluation.report.page import set_rows
from tts_grpo.text.jsonl import read_jsonl, write_json, write_jsonl


def utterance(number, errors, mos):
    counts = {"substitutions": errors, "deletions": 0, "insertions": 0, "length": 10}
    return {
        "id": str(number), "error": None, "errors": dict.fromkeys(METRICS["zh"], counts),
        "quality": {"dnsmos_ovrl": mos, "duration_s": 2.0},
    }  # fmt: skip


@pytest.fixture
def exp_dir(tmp_path):
    for model, errors, mos in (("sft", 4, 3.0), ("grpo", 2, 2.5)):
        rows = [utterance(i, errors + i % 2, mos + 0.01 * i) for i in range(20)]
        write_jsonl(tmp_path / "eval" / model / "seed_0" / "utterances.jsonl", rows)
        figures = {name: entry | {"title": name, "unit": "u", "model": "M"} for name, entry in quality(rows).items()}
        write_json(tmp_path / "eval" / model / "scores.json", {
            "language": "zh", "pooled": rates(rows, "zh"), "quality": figures, "quality_sample": None, "versions": {},
            "metrics": {name: {"title": metric.title, "mean": metric.mean} for name, metric in METRICS["zh"].items()},
            "seeds": {"0": {"tokens_per_character": 6.0, "failed": 0}},
            "asr": {"backend": "funasr", "model": "A", "sha256": "0" * 64},
        })  # fmt: skip
    runs = [(2, 900, "b", 0), (2, 800, "a", 0), (2, 50, "a", 1), (2, 700, "b", 0), (0, 5, "a", 0), (2, 3, "a", 0)]
    names = ("stage", "seconds", "result", "anew")
    write_jsonl(tmp_path / "stage_seconds.jsonl", [dict(zip(names, run, strict=True)) for run in runs])
    return tmp_path


def test_summary(exp_dir):
    summary = summarise(exp_dir, {"seed": "42"})
    assert summary["relative_drop"]["cer"] == pytest.approx(1 - 2.5 / 4.5) and summary["settings"] == {"seed": "42"}
    assert set(summary["verdict"].values()) == {"better"} and set(summary["verdict"]) == set(METRICS["zh"])
    assert summary["quality_change"]["dnsmos_ovrl"]["verdict"] == "worse"
    assert summary["quality_change"]["dnsmos_ovrl"]["difference"] == pytest.approx(-0.5)
    assert summary["quality_change"]["duration_s"]["verdict"] == "not significant (95%)"
    assert stage_seconds(exp_dir) == {"0": 5, "2": 53} == summary["stage_seconds"]


def test_a_second_opinion_is_compared_and_shown(exp_dir):
    """The judge has 3 and 2.5 errors of 10, where the evaluation's recogniser has 4.5 and 2.5."""
    for model, errors in (("sft", 3), ("grpo", 2)):
        folder = exp_dir / "eval" / model
        judged = [utterance(i, errors + i % 2 * (model == "grpo"), 3.0)["errors"] for i in range(20)]
        own = read_jsonl(folder / "seed_0/utterances.jsonl")
        rows = [row | {JUDGE_ERRORS: one} for row, one in zip(own, judged, strict=True)]
        write_jsonl(folder / "seed_0/utterances.jsonl", rows)
        scores = json.loads((folder / "scores.json").read_text())
        scores["judge"] = {"asr": {"model": "Outsider"}, "pooled": rates(rows, "zh", JUDGE_ERRORS)}
        write_json(folder / "scores.json", scores)
    summary = summarise(exp_dir, {})
    assert summary["relative_drop"]["cer"] == pytest.approx(1 - 2.5 / 4.5)
    assert summary["judge"]["change"]["cer"]["relative_drop"] == pytest.approx(1 / 6)
    assert "by Outsider" in table(summary) and "30.00%   25.00%   16.7%" in table(summary)


def test_several_sets_stand_side_by_side(exp_dir):
    """The second set is English, with half as many errors by both models."""
    shutil.copytree(exp_dir / "eval", exp_dir / "eval/zero_shot_zh")
    for model in ("sft", "grpo"):
        folder = exp_dir / "eval" / model
        rows = [utterance(i, 2 - (model == "grpo"), 3.0) for i in range(20)]
        rows = [row | {"errors": dict.fromkeys(METRICS["en"], row["errors"]["cer"])} for row in rows]
        write_jsonl(exp_dir / "eval/test_en" / model / "seed_0/utterances.jsonl", rows)
        english = {
            "language": "en", "pooled": rates(rows, "en"),
            "metrics": {name: {"title": metric.title, "mean": metric.mean} for name, metric in METRICS["en"].items()},
        }  # fmt: skip
        write_json(exp_dir / "eval/test_en" / model / "scores.json",
                   json.loads((folder / "scores.json").read_text()) | english)  # fmt: skip
    sets = ("zero_shot_zh", "test_en")
    alone, summary = summarise(exp_dir, {}), summarise(exp_dir, {}, sets)
    assert {key: summary[key] for key in alone} == alone and list(summary["sets"]) == list(sets)
    assert summary["set"] == sets[0] and summarise(exp_dir, {}, sets[1:])["set"] == sets[1]
    assert summary["sets"]["test_en"]["relative_drop"]["wer"] == pytest.approx(0.5)
    lines = table(summary).split("== all evaluation sets\n")[1].splitlines()
    assert [line[:51].split("  ")[0] for line in lines[1:5]] == ["zero_shot_zh"] * 2 + ["test_en"] * 2
    assert "seed-tts-eval CER" in lines[1] and "45.00%   25.00%   44.4%" in lines[1] and "micro CER" in lines[2]
    assert "seed-tts-eval WER" in lines[3] and "20.00%   10.00%   50.0%" in lines[3] and "micro WER" in lines[4]
    assert [(row["set"], row["title"], row["verdict"]) for row in set_rows(summary)] == [
        (name, title, "better") for name, titles in (("zero_shot_zh", "CER"), ("test_en", "WER"))
        for title in (f"seed-tts-eval {titles}", f"micro {titles}")
    ]  # fmt: skip
    assert set_rows(alone) == []
    main(["--exp-dir", str(exp_dir), "--sets", *sets])
    with pytest.raises(SystemExit, match=r"eval/test_zh/sft/scores.json is missing"):
        main(["--exp-dir", str(exp_dir), "--sets", "test_zh"])


def test_costs_of_later_stages_are_added_to_an_existing_summary(exp_dir):
    main(["--exp-dir", str(exp_dir), "--settings", '{"seed": "42"}'])
    before = json.loads((exp_dir / "summary.json").read_text())
    with (exp_dir / "stage_seconds.jsonl").open("a") as times:
        times.write('{"stage": 4, "seconds": 9, "result": "a", "anew": 0}\n')
    (exp_dir / "peak_memory_gib").write_text("6.5")
    main(["--exp-dir", str(exp_dir), "--costs-only"])
    after = json.loads((exp_dir / "summary.json").read_text())
    assert after == before | {"stage_seconds": {"0": 5, "2": 53, "4": 9}, "peak_rss_gib": 6.5}


def test_the_table_has_rates_verdicts_and_the_networks_names(exp_dir):
    shown = table(summarise(exp_dir, {}))
    assert "45.00%   25.00%   44.4%" in shown and "by M" in shown
    assert "seed-tts-eval CER" in shown and ": better" in shown and ": worse" in shown
