"""Runs tools/bench_inference.py on the tiny models."""

import json

import pytest

import infer_dist
from tools import bench_inference
from tts_grpo.text.jsonl import read_jsonl
from tts_grpo.text.rules import TextRules

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


def test_the_set_can_be_synthesised(flags, tmp_path):
    bench_inference.main([*flags, "--num-utterances", "5", "--set", str(tmp_path / "set.jsonl")])
    rows = infer_dist.load_eval_set(tmp_path / "set.jsonl", 160, TextRules())
    assert len(rows) == len(read_jsonl(tmp_path / "set.jsonl")) == 5 and rows[0]["prompt_audio"]
