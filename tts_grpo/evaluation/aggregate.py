"""From scored utterances to the figures of a system, and of one system against another.

A scored utterance is a line of ``utterances.jsonl``: ``id``, ``errors`` (by metric: substitutions, deletions,
insertions, length), ``quality`` (by figure: a number or null) and ``error`` (why it has no usable audio, or null).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tts_grpo.evaluation import bootstrap
from tts_grpo.evaluation.protocols import METRICS, pool
from tts_grpo.speech.quality import FIGURES
from tts_grpo.text.errors import ErrorCounts
from tts_grpo.text.jsonl import read_jsonl


def read_utterances(output_dir: Path) -> list[dict]:
    """The scored utterances of all seeds.

    Raises:
        ValueError: there are none.
    """
    rows = []
    for path in sorted(output_dir.glob("seed_*/utterances.jsonl")):
        rows += read_jsonl(path)
    if not rows:
        raise ValueError(f"{output_dir}: no seed_*/utterances.jsonl: run scripts/compute_wer.sh first")
    return rows


def _by_id(rows: Sequence[dict], part) -> dict[str, np.ndarray]:
    """``id -> part(row)`` (2,), summed over the seeds."""
    sums = {}
    for row in rows:
        sums[row["id"]] = sums.get(row["id"], 0.0) + np.array(part(row), float)
    return sums


def metric_parts(rows: Sequence[dict], metric: str, macro: bool) -> dict[str, np.ndarray]:
    """``id -> (errors, units)``; for a macro mean ``id -> (error rate, 1)``; summed over the seeds."""

    def part(row):
        counts = ErrorCounts(**row["errors"][metric])
        return (counts.rate, 1) if macro else (counts.errors, counts.length)

    return _by_id(rows, part)


def figure_parts(rows: Sequence[dict], name: str) -> dict[str, np.ndarray]:
    """``id -> (value, 1)``, (0, 0) where it was not measured; summed over the seeds."""

    def part(row):
        value = row.get("quality", {}).get(name)
        return (0, 0) if value is None else (value, 1)

    return _by_id(rows, part)


def rates(rows: Sequence[dict], language: str) -> dict[str, dict]:
    """By metric: ``rate``, its 95% interval ``ci``, and the counts."""
    found = {}
    for name, metric in METRICS[language].items():
        rate, total = pool((ErrorCounts(**row["errors"][name]) for row in rows), metric.macro)
        parts = np.array(list(metric_parts(rows, name, metric.macro).values()))
        found[name] = {"rate": rate, "ci": bootstrap.interval(parts), **vars(total)}
    return found


def quality(rows: Sequence[dict]) -> dict[str, dict]:
    """By figure that was measured: the mean ``value``, its 95% interval ``ci``, and ``n`` values it is of."""
    found = {}
    for name in FIGURES:
        parts = np.array(list(figure_parts(rows, name).values()))
        if parts[:, 1].sum():
            found[name] = {
                "value": bootstrap.ratio(parts), "ci": bootstrap.interval(parts), "n": int(parts[:, 1].sum()),
            }  # fmt: skip
    return found


def _compare(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> dict:
    if before.keys() != after.keys():
        raise ValueError("the two systems were scored on different utterances")
    return bootstrap.compare(*(np.array([parts[utt_id] for utt_id in before]) for parts in (before, after)))


def compare_rates(before: Sequence[dict], after: Sequence[dict], language: str) -> dict[str, dict]:
    """By metric: what :func:`bootstrap.compare` gives, and the ``verdict`` on ``after``.

    Raises:
        ValueError: the two were scored on different utterances.
    """
    failed = [sum(bool(row["error"]) for row in rows) / len(rows) for rows in (before, after)]
    found = {}
    for name, metric in METRICS[language].items():
        found[name] = _compare(*(metric_parts(rows, name, metric.macro) for rows in (before, after)))
        found[name]["verdict"] = bootstrap.verdict(found[name]["ci"], "lower", failed[1] > failed[0])
    return found


def compare_quality(before: Sequence[dict], after: Sequence[dict]) -> dict[str, dict]:
    """By figure that both have: ``difference``, its interval ``ci``, and the ``verdict`` on ``after``.

    Raises:
        ValueError: the two were scored on different utterances.
    """
    found = {}
    for name, figure in FIGURES.items():
        parts = [figure_parts(rows, name) for rows in (before, after)]
        if all(sum(part[1] for part in system.values()) for system in parts):
            change = _compare(*parts)
            found[name] = {
                "difference": change["difference"], "ci": change["ci"],
                "verdict": bootstrap.verdict(change["ci"], figure.better),
            }  # fmt: skip
    return found
