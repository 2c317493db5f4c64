"""Tests of the reward benchmark with small random networks."""

import json
import subprocess
import sys

import pytest

from tools import bench_reward

pytestmark = pytest.mark.slow


def test_rollouts_have_the_requested_lengths():
    args = bench_reward.get_args(["--random", "unused", "--seconds", "2", "4.5", "12", "--num-rollouts", "400"])
    lens = [len(tokens) / 25 for tokens, _ in bench_reward.rollouts(args)]
    assert min(lens) >= 2 and max(lens) <= 12 and sum(lens) / len(lens) == pytest.approx(4.5, abs=0.3)
    assert lens != sorted(lens)


def test_table_shows_ratios_to_measured_baselines_only():
    result = {"official": {"rollouts_per_s": 2.0}, "server": {"rollouts_per_s": 50.0}}
    *_, last = bench_reward.table(result, audio_s=4.0).split("\n")
    assert last.split() == ["server", "50.00", "200.0", "25.0", "-"]


def test_all_measurements_in_one_run(tmp_path):
    """The official code is the baseline for speed, and results of batches equal its results."""
    command = [
        sys.executable, "tools/bench_reward.py", "--server-url", "", "--random", tmp_path, "--small", "--seconds",
        "1", "1", "1", "--num-rollouts", "4", "--batch-size", "2", "--baseline", "2", "--compare-precisions", "fp32",
        "--rewards", "intelligibility:1 similarity:0.3 pitch:0.6,semitones=3.5",
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    result, rows = next(line for line in done.stdout.split("\n") if line.startswith("{")), done.stdout.split("\n")
    result = json.loads(result)
    assert 0 < result["exactness"]["fp32_batch_max_difference"] < 1e-4 < result["exactness"]["waveform_peak"]
    assert result["fp32"]["mel_relative_error"] == 0 == result["fp32"]["transcript_difference"]
    in_process = result["in_process"]["2"]
    assert sum(in_process["seconds"].values()) < in_process["wall_s"]
    assert min(in_process["seconds"][part] for part in ("similarity", "pitch")) > 0
    ratio = in_process["rollouts_per_s"] / result["official"]["rollouts_per_s"]
    (row,) = (row.split() for row in rows if row.startswith("in process"))
    assert float(row[-2]) == pytest.approx(ratio, abs=0.06) and row[-1] == "-"


def test_costs_of_the_parts_are_relative_to_token2wav_and_recognition():
    costs = bench_reward.part_costs({"token2wav": 3.0, "asr": 1.0, "pitch": 2.0}, 100)
    assert costs[2] == {"step": "pitch", "ms_per_rollout": 20.0, "relative_percent": 50.0}
