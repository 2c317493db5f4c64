"""Runs tools/bench_inference.py on the tiny models."""

import json
import types

import pytest

from tools import bench_inference

pytestmark = pytest.mark.slow


@pytest.fixture
def flags(assets):
    voices = str(assets / "prompts/prompts.jsonl")
    return ["--llm-path", str(assets / "llm"), "--token2wav-dir", str(assets / "token2wav"), "--voices", voices,
            "--jsonl", str(assets / "data/test.jsonl")]  # fmt: skip


def test_engines_are_measured_and_draw_the_same_tokens(flags, capsys):
    flags += ["--num-utterances", "4", "--batch-size", "4", "--max-new-tokens", "30", "--sampling-tokens", "3"]
    bench_inference.main([*flags, "--runs", "continuous-fp32:4", "batches-fp32:4"])
    result = json.loads(capsys.readouterr().out)
    continuous, batches = result["continuous-fp32"], result["batches-fp32"]
    assert continuous["utterances"] == batches["utterances"] == 4
    assert continuous["mean_tokens"] == batches["mean_tokens"] > 5
    for run in (continuous, batches):
        assert sum(run["seconds"].values()) <= run["wall_s"] and run["utterances_per_s"] > 0
    assert result["sampling"]["mean_tokens"] == 3
    assert result["independence"] == {"responses": 2, "same_tokens": 2, "same_log_probs": 2}


def test_a_complete_run_with_two_processes(flags, tmp_path):
    flags += ["--num-utterances", "5", "--batch-size", "2", "--max-new-tokens", "160", "--llm-text", "spoken"]
    args = bench_inference.get_args(flags)
    rows = bench_inference.make_utterances(args)
    seconds, lines = bench_inference.complete_run(args, 2, rows, tmp_path)
    assert seconds > 0 and lines.keys() == {row["id"] for row in rows}
    assert all(line["num_speech_tokens"] > 5 and line["prompt_audio"] for line in lines.values())


def test_numbers_of_processes_are_compared(flags, capsys, monkeypatch):
    calls = []

    def run(args, processes, rows, folder):
        calls.append((processes, len(rows)))
        (folder / str(processes)).mkdir(parents=True)
        line = dict.fromkeys(bench_inference.SAME, 1)
        return 8.0 / processes, {row["id"]: line | {"duration_s": (row == rows[0]) * processes} for row in rows}

    monkeypatch.setattr(bench_inference, "complete_run", run)
    bench_inference.main([*flags, "--num-utterances", "32", "--processes", "1", "2"])
    assert json.loads(capsys.readouterr().out)["infer_dist"] == [
        {"processes": 1, "utterances": 32, "seconds": 8, "same_as_first": 32, "utterances_per_s": 4, "speed_up": 1},
        {"processes": 2, "utterances": 32, "seconds": 4, "same_as_first": 31, "utterances_per_s": 8, "speed_up": 2},
    ]
    assert calls == [(2, 16), (1, 32), (2, 32)]  # the first one warms up


def test_lost_utterances_are_an_error(flags, monkeypatch, tmp_path):
    args = bench_inference.get_args(flags)
    rows = bench_inference.make_utterances(args)[:2]

    def run(command, **kwargs):
        bench_inference.write_jsonl(tmp_path / "1/seed_0/manifest.jsonl", rows[:1])
        return types.SimpleNamespace(returncode=0, stderr="1 utterances in 2.0 s")

    monkeypatch.setattr(bench_inference.subprocess, "run", run)
    with pytest.raises(SystemExit, match="1 processes lost utterances"):
        bench_inference.complete_run(args, 1, rows, tmp_path)
    monkeypatch.setattr(
        bench_inference.subprocess, "run", lambda *_, **__: types.SimpleNamespace(returncode=1, stderr="no GPU")
    )
    with pytest.raises(SystemExit, match=r"failed \(1\):\nno GPU"):
        bench_inference.complete_run(args, 1, rows, tmp_path)
