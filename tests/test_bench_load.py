"""Tests of the benchmark of the reward server under load."""

import json

import pytest

from tests.conftest import free_ports
from tools import bench_load
from tts_grpo.evaluation.provenance import replace_tables


@pytest.mark.slow
def test_every_request_is_answered_or_refused_and_a_full_queue_refuses(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_load, "LOADS", (0.5, 8))
    monkeypatch.setattr(bench_load, "SAMPLE_S", 0.5)
    (tmp_path / "docs/results").mkdir(parents=True)
    page = tmp_path / bench_load.PAGE
    page.write_text("<!-- table: load -->\n\n<!-- table: memory -->\n")
    flags = ["--seconds", "4", "--soak-s", "4", "--num-rollouts", "64", "--in-flight", "8", "--max-queue-size", "8"]
    paths = ["--log", str(tmp_path / "log"), "--root", str(tmp_path)]
    assert bench_load.main([*flags, *paths, "--instances", "1", "--ports", *map(str, free_ports(3))]) == 0
    recorded = json.loads((tmp_path / bench_load.RESULTS).read_text())
    for figures in (recorded["capacity"], *recorded["figures"], recorded["soak"]):
        assert figures["answered"] + figures["refused"] == figures["requests"] > 0 == figures["lost"], figures
        assert 0 < figures["p50_s"] <= figures["p95_s"] <= figures["p99_s"]
    assert recorded["figures"][1]["refused"] > 0
    assert recorded["memory"]["samples"] > 3 and recorded["memory"]["first_mib"] > 100
    assert page.read_text().count("\n| ") == 2 + 3 + 2 + 6 and "| 8 | " in page.read_text()


def test_memory_is_flat_or_grows_with_the_answers():
    flat, grows = ([(100 * i, 500.0 + step * i) for i in range(20)] for step in (0, 0.5))
    assert bench_load.memory_figures(flat)["slope_mib_per_1000_requests"] == pytest.approx(0, abs=1e-6)
    assert bench_load.memory_figures(grows)["slope_mib_per_1000_requests"] == pytest.approx(5)
    assert bench_load.memory_figures(grows)["slope_of_second_half"] == pytest.approx(5)


def test_the_page_shows_the_recorded_figures():
    recorded = json.loads((bench_load.ROOT / bench_load.RESULTS).read_text("utf-8"))
    text = (bench_load.ROOT / bench_load.PAGE).read_text("utf-8")
    assert text.count("<!-- table: ") == 3
    assert replace_tables(text, bench_load.tables(recorded)) == text
