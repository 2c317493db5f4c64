"""Render the report: collects the contents and fills the template page.html."""

import dataclasses
import math
from pathlib import Path

import jinja2
import numpy as np

from tts_grpo.evaluation.protocols import SET_METRICS
from tts_grpo.evaluation.report import figures
from tts_grpo.evaluation.report.alignment import cells
from tts_grpo.evaluation.report.clips import Clip, load_clip
from tts_grpo.evaluation.report.disagreements import find_disagreements
from tts_grpo.evaluation.report.experiment import MODEL_TITLES, MODELS, Experiment, Sample, Utterance
from tts_grpo.evaluation.report.selection import select
from tts_grpo.text.input_files import split_paths

# Colours of the spectrograms, legible on light and dark backgrounds.
RGB = {"prompt": (74, 140, 98), "sft": (92, 124, 158), "grpo": (214, 88, 38)}
TITLES = MODEL_TITLES | {"prompt": "Prompt"}
SEED_METRICS = {
    "eos_share": ("EOS rate", "{:.1%}"),
    "tokens_per_character": ("speech tokens per character", "{:.2f}"),
    "failed": ("utterances without usable audio per seed", "{:.1f}"),
}

OVERVIEW = (figures.drops, figures.by_seed, figures.by_length, figures.by_kind)


@dataclasses.dataclass(frozen=True)
class Player:
    """An audio player, or the reason why there is no audio.

    Attributes:
        kind: "prompt", "sft" or "grpo".
        fault: why there is no audio; empty if there is.
        width: duration in percent of the example's longest recording.
        errors: ``(seed, errors, whether this seed is played)``; empty for a prompt.
    """

    kind: str
    title: str
    clip: Clip | None
    fault: str
    width: float
    errors: list[tuple[str, int, bool]]
    cells: list
    hypothesis: str


@dataclasses.dataclass(frozen=True)
class Example:
    """An utterance with its players."""

    utt_id: str
    target_text: str
    language: str
    length: int
    players: list[Player]


def number_format(unit: str, values: list[float | None]) -> str:
    """Number format for a table row: percent for shares, else four significant digits of the largest value."""
    if unit == "share":
        return "z.1%"
    largest = max((abs(value) for value in values if value), default=1.0)
    return f"z.{min(3, max(0, 3 - math.floor(math.log10(largest))))}f"


def error_rows(experiment: Experiment) -> list[dict]:
    """The table of error rates, with one row per metric."""
    summary, rows = experiment.summary, []
    for name, title in experiment.metrics.items():
        drop, ci = summary["relative_drop"][name], summary["relative_drop_ci"].get(name)
        rows.append({
            "title": title, "main": name == experiment.main_metric,
            "models": [with_interval(rate["rate"], rate.get("ci"), ".2%")
                       for rate in (experiment.scores[m]["pooled"][name] for m in MODELS)],
            "drop": with_interval(drop, ci, ".1%"),
            "verdict": summary.get("verdict", {}).get(name, ""),
        })  # fmt: skip
        if judge := summary.get("judge"):
            change = judge["change"][name]
            rows.append({
                "title": f"{title}, by {judge['asr']['model']}", "main": False,
                "models": [with_interval(judge[m][name]["rate"], judge[m][name]["ci"], ".2%") for m in MODELS],
                "drop": with_interval(change["relative_drop"], change["relative_drop_ci"], ".1%"),
                "verdict": change["verdict"],
            })  # fmt: skip
    return rows


def set_rows(summary: dict) -> list[dict]:
    """The table of evaluation sets: the published and the micro rates of each; empty if there is one set."""
    rows = []
    for name, part in summary.get("sets", {}).items():
        for metric in SET_METRICS[part["language"]]:
            drop, ci = part["relative_drop"][metric], part["relative_drop_ci"][metric]
            rates = [part[m]["pooled"][metric] for m in MODELS]
            rows.append({
                "set": name, "title": part["metrics"][metric]["title"],
                "models": [with_interval(rate["rate"], rate["ci"], ".2%") for rate in rates],
                "drop": with_interval(drop, ci, ".1%"), "verdict": part["verdict"][metric],
            })  # fmt: skip
    return rows


def quality_rows(experiment: Experiment) -> list[dict]:
    """The table of quality metrics that both models have."""
    measured = {m: experiment.scores[m].get("quality", {}) for m in MODELS}
    rows = []
    for name, entry in measured["sft"].items():
        if name not in measured["grpo"]:
            continue
        change = experiment.summary.get("quality_change", {}).get(name, {})
        unit = entry.get("unit") or ""
        form = number_format(unit, [measured[m][name]["value"] for m in MODELS])
        rows.append({
            "title": entry["title"], "model": entry.get("model") or "", "unit": "" if unit == "share" else unit,
            "models": [with_interval(measured[m][name]["value"], measured[m][name].get("ci"), form) for m in MODELS],
            "change": _change(change, unit, form),
            "verdict": change.get("verdict", ""),
        })  # fmt: skip
    return rows


def _change(change: dict, unit: str, form: str) -> tuple[str, str]:
    """A difference and its interval as text; in percentage points if the metric is a share."""
    value, ci = change.get("difference"), change.get("ci")
    if unit != "share" or value is None:
        return with_interval(value, ci, "+" + form)
    value, interval = with_interval(100 * value, ci and [100 * limit for limit in ci], "+z.1f")
    return f"{value} points", interval


def with_interval(value: float | None, ci: list[float] | None, form: str) -> tuple[str, str]:
    """A value and its interval as text; "–" and "" if they are None."""
    return "–" if value is None else f"{value:{form}}", f"{ci[0]:{form}} to {ci[1]:{form}}" if ci else ""


def seed_rows(experiment: Experiment) -> list[tuple[str, list[str]]]:
    """Means over the seeds of other metrics, if they are not in the table of quality metrics."""
    rows = []
    for name, (title, form) in SEED_METRICS.items():
        values = [[seed[name] for seed in experiment.scores[m]["seeds"].values() if name in seed] for m in MODELS]
        if all(values) and name not in experiment.scores["sft"].get("quality", {}):
            rows.append((title, [form.format(np.mean(v)) for v in values]))
    return rows


def headline(experiment: Experiment) -> dict:
    """Title and main results for the top of the page."""
    main = experiment.main_metric
    before, after = (experiment.scores[m]["pooled"][main]["rate"] for m in MODELS)
    verdict = experiment.summary.get("verdict", {}).get(main, "")
    drops, intervals = experiment.summary["relative_drop"], experiment.summary["relative_drop_ci"]
    drop, interval = with_interval(drops[main], intervals.get(main), ".1%")
    return {
        "title": _title(experiment.metrics[main], verdict, drop.lstrip("-")),
        "before": f"{before:.2%}", "after": f"{after:.2%}", "drop": drop,
        "interval": interval,
        "changes": {name: sum(1 for u in experiment.utterances if (u.change > 0) - (u.change < 0) == sign)
                    for name, sign in (("fewer", -1), ("as many", 0), ("more", 1))},
    }  # fmt: skip


def _title(metric: str, verdict: str, size: str) -> str:
    """The result as a sentence; if it is inconclusive, the metric and the verdict."""
    if verdict in ("better", "worse"):
        comma = "," if "," in metric else ""
        return f"GRPO {'lowers' if verdict == 'better' else 'raises'} the {metric}{comma} by {size}"
    return f"{metric[:1].upper()}{metric[1:]}: {verdict or 'before and after GRPO'}"


def make_example(utterance: Utterance, seed: str, prompts: dict[Path, Clip | str]) -> Example:
    """Players for one utterance; their widths are proportional to the durations."""
    samples = {model: utterance.samples[model][seed] for model in MODELS}
    clips = {model: _clip(sample.audio, sample.fault, model) for model, sample in samples.items()}
    if utterance.prompt_audio:
        if utterance.prompt_audio not in prompts:
            prompts[utterance.prompt_audio] = _clip(utterance.prompt_audio, None, "prompt")
        clips = {"prompt": prompts[utterance.prompt_audio]} | clips
    longest = max((clip.duration_s for clip in clips.values() if isinstance(clip, Clip)), default=1.0)
    players = [_player(kind, clip, longest, utterance, seed, samples.get(kind)) for kind, clip in clips.items()]
    return Example(utterance.utt_id, utterance.target_text, utterance.language, utterance.length, players)


def _clip(audio: Path | None, fault: str | None, kind: str) -> Clip | str:
    """A recording, or the reason why there is none."""
    if audio is None:
        return fault or "no audio"
    try:
        return load_clip(audio, RGB[kind])
    except ValueError as error:
        return str(error)


def _player(
    kind: str, clip: Clip | str, longest: float, utterance: Utterance, seed: str, sample: Sample | None
) -> Player:
    audio = clip if isinstance(clip, Clip) else None
    errors = [(s, t.errors, s == seed) for s, t in utterance.samples[kind].items()] if sample else []
    hypothesis = sample.hypothesis if sample else ""
    return Player(
        kind, TITLES[kind], audio, clip if isinstance(clip, str) else "",
        100 * audio.duration_s / longest if audio else 0, errors,
        cells(utterance.target_text, hypothesis, utterance.language) if sample else [], hypothesis,
    )  # fmt: skip


def provenance(experiment: Experiment) -> list[tuple[str, list[tuple[str, str]]]]:
    """Settings, versions and hashes, as tables with names and values."""
    summary, scores = experiment.summary, experiment.scores["grpo"]
    asr = scores.get("asr", {})
    run = {
        "git commit": summary.get("git_commit") or "unknown (not a git checkout)",
        "evaluation recogniser": " ".join(filter(None, (asr.get("backend"), asr.get("model")))) or scores["asr_dir"],
        "evaluation recogniser's SHA-256": asr.get("sha256") or scores.get("asr_sha256"),
        "test set's SHA-256": scores.get("eval_set_sha256"),
        "peak memory": f"{summary['peak_rss_gib']:.1f} GiB" if summary.get("peak_rss_gib") else None,
    } | {f"stage {stage}": f"{seconds} s" for stage, seconds in summary.get("stage_seconds", {}).items()}  # fmt: skip
    tables = {"Run": run, "Settings": summary.get("settings", {}), "Versions": summary.get("versions", {})}
    known = lambda table: [(name, str(value)) for name, value in table.items() if value not in (None, "")]  # noqa: E731
    return [(title, known(table)) for title, table in tables.items() if table]


def recogniser(experiment: Experiment) -> str:
    """Name of the evaluation recogniser."""
    scores = experiment.scores["grpo"]
    return scores.get("asr", {}).get("model") or Path(scores["asr_dir"]).name


def same_recogniser(settings: dict, asr_dir: str) -> bool:
    """Whether the recogniser that scored the set, in the folder ``asr_dir``, is one of the reward's."""
    several = settings.get("reward_asr_dirs", "")
    return asr_dir in (split_paths(several) if several.strip() else [settings.get("reward_asr_dir", "")])


def template(name: str) -> jinja2.Template:
    """A template of this folder."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return environment.get_template(name)


def render(experiment: Experiment, examples: int) -> str:
    """Render the report as HTML."""
    prompts: dict[Path, Clip | str] = {}
    groups = [
        {"title": g.title, "rule": g.rule,
         "examples": [make_example(u, seed, prompts) for u, seed in g.chosen]}
        for g in select(experiment.utterances, examples)
    ]  # fmt: skip
    return template("page.html").render(
        disagreements=find_disagreements(experiment.utterances),
        has_tones=any(utterance.language == "zh" for utterance in experiment.utterances),
        name=experiment.name, headline=headline(experiment), errors=error_rows(experiment),
        sets=set_rows(experiment.summary),
        quality=quality_rows(experiment), per_seed=seed_rows(experiment),
        sample=experiment.scores["sft"].get("quality_sample"),
        recogniser=recogniser(experiment), num_utterances=len(experiment.utterances), seeds=experiment.seeds,
        overview=[p for draw in OVERVIEW for p in [draw(experiment)] if p],
        curves=figures.curves(experiment.scalars), groups=groups, provenance=provenance(experiment),
        same_recogniser=same_recogniser(experiment.summary.get("settings", {}), experiment.scores["grpo"]["asr_dir"]),
    )  # fmt: skip
