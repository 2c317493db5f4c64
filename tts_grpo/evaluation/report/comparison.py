"""Render a page with the scores and training curves of several experiments."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from tts_grpo.evaluation.aggregate import compare_rates, read_utterances
from tts_grpo.evaluation.report import figures
from tts_grpo.evaluation.report.experiment import MAIN_METRICS, MODELS, load_scalars
from tts_grpo.evaluation.report.page import template, with_interval

OWN_SETTINGS = ("exp_name", "exp_dir")  # they differ between any two experiments


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """Results of one experiment on one test set.

    Attributes:
        metrics: title of each error rate by its name.
        rates: ``rate`` and ``ci`` by model and name.
        changes: ``relative_drop``, ``relative_drop_ci`` and ``verdict`` by name.
    """

    name: str
    metrics: dict[str, str]
    rates: dict[str, dict[str, dict]]
    changes: dict[str, dict]


def _of_summary(name: str, summary: dict) -> Evaluated:
    """The results in summary.json, or those of one of its test sets."""
    metrics = {metric: about["title"] for metric, about in summary["metrics"].items()}
    keys = ("relative_drop", "relative_drop_ci", "verdict")
    changes = {metric: {key: summary[key][metric] for key in keys} for metric in metrics}
    return Evaluated(name, metrics, {model: summary[model]["pooled"] for model in MODELS}, changes)


def _of_scores(name: str, folders: dict[str, Path]) -> Evaluated:
    """The results in the scored folders of both models."""
    scores = {model: json.loads((folder / "scores.json").read_text("utf-8")) for model, folder in folders.items()}
    metrics = {metric: about["title"] for metric, about in scores["grpo"]["metrics"].items()}
    changes = compare_rates(*map(read_utterances, folders.values()), scores["grpo"]["language"])
    return Evaluated(name, metrics, {model: scores[model]["pooled"] for model in MODELS}, changes)


def evaluations(exp_dir: Path) -> list[Evaluated]:
    """Results of an experiment: those of stage 4, or those that tools/repeat.py keeps in the folder above."""
    path = exp_dir / "summary.json"
    if path.exists():
        summary = json.loads(path.read_text(encoding="utf-8"))
        if sets := summary.get("sets"):
            return [_of_summary(name, figures_) for name, figures_ in sets.items()]
        before_names = Path(summary.get("settings", {}).get("eval_jsonl", "")).stem  # of a summary without "set"
        return [_of_summary(summary.get("set", before_names), summary)]
    return [
        _of_scores(path.parent.parent.name, {"sft": path.parent.parent / "sft", "grpo": path.parent})
        for path in sorted((exp_dir.parent / "eval").glob(f"*/{exp_dir.name}/scores.json"))
    ]


def score_rows(name: str, exp_dir: Path) -> list[dict]:
    """Rows of the table of scores: the main error rate of each evaluation."""
    rows = []
    for found in evaluations(exp_dir):
        metric = next((metric for metric in MAIN_METRICS if metric in found.metrics), next(iter(found.metrics)))
        change = found.changes[metric]
        rows.append({
            "experiment": name, "evaluation": found.name, "title": found.metrics[metric],
            "models": [with_interval(found.rates[m][metric]["rate"], found.rates[m][metric].get("ci"), ".2%")
                       for m in MODELS],
            "drop": with_interval(change["relative_drop"], change["relative_drop_ci"], ".1%"),
            "verdict": change["verdict"],
        })  # fmt: skip
    return rows


def differing_settings(exp_dirs: Sequence[Path]) -> list[tuple[str, list[str]]]:
    """Settings with different values, of experiments with a summary; "–" where one is not known."""
    settings = []
    for exp_dir in exp_dirs:
        path = exp_dir / "summary.json"
        settings.append(json.loads(path.read_text("utf-8")).get("settings", {}) if path.exists() else {})
    names = dict.fromkeys(name for found in settings for name in found if name not in OWN_SETTINGS)
    table = [(name, [str(found.get(name, "–")) for found in settings]) for name in names]
    return [(name, values) for name, values in table if len(set(values)) > 1]


def names_of(exp_dirs: Sequence[Path]) -> list[str]:
    """Short distinct names: that of the folder, or its path if two have the same name."""
    names = [exp_dir.resolve().name for exp_dir in exp_dirs]
    return names if len(set(names)) == len(names) else [str(exp_dir) for exp_dir in exp_dirs]


def render_comparison(exp_dirs: Sequence[Path]) -> str:
    """Render the page as HTML.

    Raises:
        ValueError: a folder is missing or named twice, or has neither scores nor a training log.
    """
    if len({exp_dir.resolve() for exp_dir in exp_dirs}) < len(exp_dirs):
        raise ValueError("an experiment is named twice")
    names, rows, runs = names_of(exp_dirs), [], {}
    for name, exp_dir in zip(names, exp_dirs, strict=True):
        found = score_rows(name, exp_dir)
        runs[name] = load_scalars(exp_dir / "tensorboard")
        if not found and not runs[name]:
            raise ValueError(f"{exp_dir} has neither scores nor a training log: run bash run.sh 0 4")
        rows += found
    styles = map(figures.run_style, range(len(names)))
    legend = [(name, figures.RUN_COLOURS.index(colour), dashes) for name, (colour, dashes) in zip(names, styles)]
    return template("comparison.html").render(
        names=names, legend=legend, rows=rows, curves=figures.overlays(runs), settings=differing_settings(exp_dirs)
    )
