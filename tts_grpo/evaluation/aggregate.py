"""Aggregate scored utterances to the metrics of a system, and compare two systems.

A scored utterance is a line of ``utterances.jsonl``: ``id``, ``language``, ``errors`` (substitutions, deletions,
insertions, length per error metric), ``quality`` (a number or null per quality metric) and ``error`` (why it has no
audio, or null). With a second recogniser (``judge_asr_dir``), ``judge_errors`` has its errors.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tts_grpo.evaluation import bootstrap
from tts_grpo.evaluation.protocols import METRICS, Metric, pool
from tts_grpo.speech.quality import QUALITY_METRICS
from tts_grpo.text.errors import ErrorCounts
from tts_grpo.text.jsonl import read_jsonl

ERRORS, JUDGE_ERRORS = "errors", "judge_errors"  # keys of an utterance, by recogniser


def read_utterances(output_dir: Path) -> list[dict]:
    """Read the scored utterances of all seeds.

    Raises:
        ValueError: there are none.
    """
    rows = []
    for path in sorted(output_dir.glob("seed_*/utterances.jsonl")):
        rows += read_jsonl(path)
    if not rows:
        raise ValueError(f"{output_dir}: no seed_*/utterances.jsonl: run scripts/compute_wer.sh first")
    return rows


def _sum_by_id(rows: Sequence[dict], fraction) -> dict[str, np.ndarray]:
    """``id -> fraction(row)`` (2,), summed over the seeds."""
    sums = {}
    for row in rows:
        sums[row["id"]] = sums.get(row["id"], 0.0) + np.array(fraction(row), float)
    return sums


def error_fractions(rows: Sequence[dict], metric: str, macro: bool, key: str = ERRORS) -> dict[str, np.ndarray]:
    """``id -> (errors, units)``, or ``id -> (error rate, 1)`` for a macro average; summed over the seeds."""

    def fraction(row):
        counts = ErrorCounts(**row[key][metric])
        return (counts.rate, 1) if macro else (counts.errors, counts.length)

    return _sum_by_id(rows, fraction)


def quality_fractions(rows: Sequence[dict], name: str) -> dict[str, np.ndarray]:
    """``id -> (value, 1)``, or (0, 0) if it was not measured; summed over the seeds."""

    def fraction(row):
        value = row.get("quality", {}).get(name)
        return (0, 0) if value is None else (value, 1)

    return _sum_by_id(rows, fraction)


def _used(rows: Sequence[dict], metric: Metric) -> list[dict]:
    """The utterances that a metric is computed over."""
    return [row for row in rows if metric.applies(row.get("language", ""))]


def rates(rows: Sequence[dict], language: str, key: str = ERRORS) -> dict[str, dict]:
    """``rate``, its 95% interval ``ci``, and the counts, by error metric; ``key`` chooses the recogniser."""
    result = {}
    for name, metric in METRICS[language].items():
        used = _used(rows, metric)
        rate, total = pool((ErrorCounts(**row[key][name]) for row in used), metric.macro)
        fractions = np.array(list(error_fractions(used, name, metric.macro, key).values()))
        result[name] = {"rate": rate, "ci": bootstrap.interval(fractions), **vars(total)}
    return result


def quality(rows: Sequence[dict]) -> dict[str, dict]:
    """Mean ``value``, its 95% interval ``ci``, and number of values ``n``, by quality metric that was measured."""
    result = {}
    for name in QUALITY_METRICS:
        fractions = np.array(list(quality_fractions(rows, name).values()))
        if count := int(fractions[:, 1].sum()):
            value, ci = bootstrap.ratio(fractions), bootstrap.interval(fractions)
            result[name] = {"value": value, "ci": ci, "n": count}
    return result


def _compare(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> dict:
    if before.keys() != after.keys():
        raise ValueError("the two systems were scored on different utterances")
    return bootstrap.compare(*(np.array([system[utt_id] for utt_id in before]) for system in (before, after)))


def compare_rates(
    before: Sequence[dict], after: Sequence[dict], language: str, key: str = ERRORS
) -> dict[str, dict]:  # fmt: skip
    """Result of :func:`bootstrap.compare` and ``verdict`` on ``after``, by error metric; ``key``: which recogniser's.

    Raises:
        ValueError: the two were scored on different utterances.
    """
    failed = [sum(bool(row["error"]) for row in rows) / len(rows) for rows in (before, after)]
    changes = {}
    for name, metric in METRICS[language].items():
        used = (_used(rows, metric) for rows in (before, after))
        changes[name] = _compare(*(error_fractions(rows, name, metric.macro, key) for rows in used))
        changes[name]["verdict"] = bootstrap.verdict(changes[name]["ci"], "lower", failed[1] > failed[0])
    return changes


def compare_quality(before: Sequence[dict], after: Sequence[dict]) -> dict[str, dict]:
    """``difference``, its interval ``ci``, and ``verdict`` on ``after``, by quality metric that both systems have.

    Raises:
        ValueError: the two were scored on different utterances.
    """
    changes = {}
    for name, metric in QUALITY_METRICS.items():
        systems = [quality_fractions(rows, name) for rows in (before, after)]
        if all(sum(count for _, count in system.values()) for system in systems):
            change = _compare(*systems)
            changes[name] = {
                "difference": change["difference"], "ci": change["ci"],
                "verdict": bootstrap.verdict(change["ci"], metric.better),
            }  # fmt: skip
    return changes
