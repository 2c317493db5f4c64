"""Tests of the verdicts on published figures, with given scores and without running a model."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from scripts import reproduce
from tts_grpo.text.jsonl import write_json

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = json.loads((ROOT / "docs/results/published.json").read_text())
SYSTEMS = {system["name"]: system for system in PUBLISHED["systems"]}
OFFICIAL = {"temperature": "1.0", "top_p": "0.8", "top_k": "25", "repetition_penalty": "1.0",
            "repetition_window": "10", "min_token_text_ratio": "2.0", "max_token_text_ratio": "20.0",
            "llm_text": "raw", "lm_precision": "fp32", "precision": "fp32"}  # fmt: skip


def make_results(
    folder: Path, name: str, rate: float, ci: list[float] | None, *, utterances: int = 2020, failed: int = 0,
    torch: str = "2.13.0+cpu", asr: str = "SeacoParaformer", backend: str = "funasr", metric: str = "seed-tts-eval",
    **settings: str,
) -> None:  # fmt: skip
    """Write the results of a finished set, as bash run.sh evaluate leaves them; rates in percent."""
    results, language = folder / "eval" / name / "sft", "en" if "_en" in name else "zh"
    entry = {"rate": rate / 100, "ci": ci and [limit / 100 for limit in ci]}
    write_json(results / "scores.json", {
        "language": language, "pooled": {metric: entry}, "metrics": {metric: {"title": f"{metric} CER"}},
        "seeds": {"0": {"utterances": utterances, "failed": failed}, "1": {"utterances": utterances, "failed": 0}},
        "versions": {"torch": torch}, "asr": {"backend": backend, "model": asr},
    })  # fmt: skip
    write_json(results / "settings.json", OFFICIAL | settings)
    (folder / ".done").mkdir(exist_ok=True)
    (folder / f".done/4-{name}").touch()


def rows_of(system: str, folder: Path) -> dict[str, dict]:
    return {row["set"]: row for row in reproduce.comparison(SYSTEMS[system], PUBLISHED["sets"], folder)}


@pytest.mark.parametrize(
    ("rate", "ci", "expected"),
    [
        (1.40, [1.20, 1.60], "reproduced"), (1.60, [1.45, 1.80], "reproduced"), (1.60, [1.454, 1.80], "reproduced"),
        (1.60, [1.456, 1.80], "off by +0.15 points"), (1.20, [1.00, 1.44], "off by -0.25 points"),
        (1.20, [1.00, 1.446], "reproduced"), (1.20, None, "no interval"),
    ],
)  # fmt: skip
def test_the_interval_decides(tmp_path, rate, ci, expected):
    """1.45 is published, which may be anything from 1.445 to 1.455."""
    make_results(tmp_path, "test_zh", rate, ci)
    row = rows_of("cosyvoice2", tmp_path)["test_zh"]
    assert row["verdict"] == expected and row["rate"] == pytest.approx(rate) and row["published"] == 1.45


def test_conditions_that_differ_are_named_and_so_are_those_that_are_not_stated(tmp_path):
    make_results(tmp_path, "test_zh", 1.9, [1.8, 2.0], top_k="50", llm_text="spoken", asr="SenseVoiceSmall")
    row = rows_of("cosyvoice2", tmp_path)["test_zh"]
    assert row["differs"] == [
        "recogniser (model SenseVoiceSmall, published SeacoParaformer)",
        "normalisation of the texts (llm_text spoken, published raw)", "sampling (top_k 50, published 25)",
    ]  # fmt: skip
    assert row["not_stated"] == ["torch version"]
    lines = "\n".join(reproduce.table_lines([SYSTEMS["cosyvoice2"]], [row]))
    assert "1.45  1.90 (1.80 to 2.00)      1.28" in lines and "off by +0.45 points (seed-tts-eval CER)" in lines
    assert "    differs: recogniser (model" in lines and "    not stated by the source: torch version" in lines
    make_results(tmp_path, "test_zh", 1.9, [1.8, 2.0])
    lines = "\n".join(reproduce.table_lines([SYSTEMS["cosyvoice2"]], [rows_of("cosyvoice2", tmp_path)["test_zh"]]))
    assert "no condition differs from those that the source states" in lines


@pytest.mark.parametrize(("torch", "differs"), [("1.12.1+cu113", False), ("1.12", False), ("1.120.0", True)])
def test_a_torch_version_is_compared_by_its_published_parts(tmp_path, torch, differs):
    make_results(tmp_path, "zero_shot_zh", 4.1, [3.9, 4.3], utterances=500, torch=torch, metric="cv3-eval")
    row = rows_of("cosyvoice2", tmp_path)["zero_shot_zh"]
    assert row["verdict"] == "reproduced" and row["others"] == [4.51, 4.02]
    assert row["differs"] == ["torch version (1.120.0, published 1.12)"] * differs


def test_another_set_is_not_compared_and_failures_are_counted(tmp_path):
    make_results(tmp_path, "test_zh", 1.45, [1.4, 1.5], utterances=30, failed=2)
    row = rows_of("cosyvoice2", tmp_path)["test_zh"]
    assert row["verdict"] == "not comparable: 30 utterances, the published set has 2020"
    assert "2 of 60 utterances have no audio" in "".join(reproduce.explanation(row))


def test_stripped_sets_are_those_of_mair_hub(tmp_path):
    hub = {"temperature": "0.8", "top_p": "0.95", "top_k": "50", "repetition_penalty": "1.1", "repetition_window": "0",
           "precision": "fp16"}  # fmt: skip
    make_results(tmp_path, "zero_shot_zh-stripped", 4.3, [4.1, 4.5], utterances=500, metric="cer", **hub)
    make_results(tmp_path, "test_zh", 1.7, [1.6, 1.8], metric="cer", **hub)
    rows = rows_of("sft", tmp_path)
    names = [text.split(" (")[0] for text in rows["zero_shot_zh"]["differs"]]
    assert rows["zero_shot_zh"]["verdict"] == "reproduced" and names == ["recogniser"]
    assert "normalisation of the texts (quotes kept, published removed)" in rows["test_zh"]["differs"]
    make_results(tmp_path, "zero_shot_zh", 4.8, [4.7, 4.9], utterances=500, metric="cer", **hub)
    assert rows_of("sft", tmp_path)["zero_shot_zh"] == rows["zero_shot_zh"], "with quotes, too, it is another set"


def test_a_set_that_was_not_finished_is_not_compared(tmp_path):
    make_results(tmp_path, "test_zh", 1.45, [1.4, 1.5])
    (tmp_path / ".done/4-test_zh").unlink()
    row = rows_of("cosyvoice2", tmp_path)["test_zh"]
    assert row["rate"] is None and "not evaluated" in "".join(reproduce.table_lines([SYSTEMS["cosyvoice2"]], [row]))


def test_english_figures_have_their_own_recogniser(tmp_path):
    make_results(tmp_path, "test_en", 2.6, [2.3, 2.9], utterances=1088, asr="Whisper", backend="faster-whisper")
    row = rows_of("cosyvoice2", tmp_path)["test_en"]
    assert row["verdict"] == "reproduced"
    assert row["differs"] == ["recogniser (backend faster-whisper, published transformers)"]


def test_the_published_file_is_complete():
    names = list(SYSTEMS)
    assert names == ["cosyvoice2", "sft", "cosyvoice3", "cosyvoice3-rl"]
    for system in SYSTEMS.values():
        assert (ROOT / f"conf/evaluations/{system['settings']['evaluation']}.sh").exists()
        for table in (*system["tables"], *system["others"]):
            assert table["source"] and set(table["rates"]) <= set(PUBLISHED["sets"])
        for table in system["tables"]:
            assert set(table["conditions"]) == set(reproduce.CONDITIONS)
            for name in table["rates"]:
                reproduce.published_conditions(table, "en" if "_en" in name else "zh")
    rates = {name: system["tables"][0]["rates"] for name, system in SYSTEMS.items()}
    assert rates["cosyvoice3-rl"] == {"test_zh": 0.81, "test_en": 1.68, "test_hard": 5.44}


def make_run_sh(folder: Path) -> None:
    """A run.sh that evaluates by leaving given results, and fails for the SFT model."""
    (folder / "run.sh").write_text(
        'echo "$profile $llm $evaluation $dataset $exp_dir $eval_jsonl$sft_path$*" >>"$CALLS"\n'
        "[[ $llm != llasa ]] || exit 1\n"
    )


def test_systems_are_evaluated_with_their_settings_and_one_that_fails_is_named(tmp_path, monkeypatch, capsys):
    make_run_sh(tmp_path)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("eval_jsonl", "/another/set.jsonl")
    monkeypatch.setenv("sft_path", "/another/model")
    make_results(tmp_path / "out/cosyvoice2", "test_zh", 1.40, [1.2, 1.6])
    status = reproduce.main(["sft", "cosyvoice2", "--output-dir", str(tmp_path / "out"), "--sets", "test_zh",
                             "--published", str(ROOT / "docs/results/published.json")])  # fmt: skip
    out, err = capsys.readouterr()
    assert status == 1 and "failed: sft" in err
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"cosyvoice2 llasa mair-hub test_zh {tmp_path}/out/sft evaluate",
        f"cosyvoice2 official official test_zh {tmp_path}/out/cosyvoice2 evaluate",
    ]
    assert "1.40 (1.20 to 1.60)" in out and "reproduced (seed-tts-eval CER)" in out and "not evaluated" in out
    rows = json.loads((tmp_path / "out/comparison.json").read_text())["figures"]
    assert [(row["system"], row["rate"] is None) for row in rows] == [("sft", True), ("cosyvoice2", False)]
    for wrong in (["cosyvoice9"], ["--sets", "test_fr"]):
        with pytest.raises(SystemExit, match="is unknown: choose from "):
            reproduce.main([*wrong, "--published", str(ROOT / "docs/results/published.json")])


def test_a_dry_run_prints_the_commands():
    environment = os.environ | {"workspace": "/a workspace", "gpu_memory_gib": "80"}
    command = ["bash", str(ROOT / "run.sh"), "--dry-run", "reproduce", "cosyvoice2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.replace("\\", "")
    assert shown.startswith(
        "env profile=cosyvoice2 llm=official evaluation=official 'dataset=test_zh test_en test_hard"
    )
    assert "exp/reproduce/cosyvoice2 recipe= sft_path= llm_pt=llm.pt eval_jsonl= eval_jsonls= bash " in shown
    assert shown.count("infer_dist.py") == 7 == shown.count("compute_wer.sh") and "main_ppo" not in shown
    assert "--top-p 0.8 --top-k 25 " in shown and "voxbox" not in shown and "SenseVoice" not in shown
    assert "comparison" not in shown
