"""Compare the scores of the SFT and the GRPO model: a table, and summary.json.

Each difference has a 95% interval by paired bootstrap over utterances (tts_grpo/evaluation/bootstrap.py) and a verdict
such as "not significant (95%)". With several evaluation sets, the table ends with all of them side by side, and
summary.json has the figures of each in ``sets``; its other figures are those of the first set, whose name is ``set``.
"""

import argparse
import json
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tts_grpo.evaluation.aggregate import JUDGE_ERRORS, compare_quality, compare_rates, read_utterances
from tts_grpo.evaluation.protocols import SET_METRICS
from tts_grpo.evaluation.provenance import git_commit
from tts_grpo.text.jsonl import read_jsonl, write_json
from tts_grpo.training.verl_log import read_steps

MODELS = ("sft", "grpo")
PART = re.compile(r"reward_parts/(.+)/mean")  # metric of a part of the reward in each step's log
STEPS = 5  # steps at the beginning and the end of the training whose mean is shown


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--exp-dir", type=Path, required=True, help="folder of the experiment, with eval/sft, eval/grpo"
    )
    parser.add_argument("--sets", nargs="+", help="evaluation sets with results in eval/NAME (default: one, in eval)")
    parser.add_argument("--settings", default="{}", help="JSON of the settings, to be recorded")
    parser.add_argument("--costs-only", action="store_true", help="only update times and memory in summary.json")
    return parser.parse_args(argv)


def stage_seconds(exp_dir: Path) -> dict[str, int]:
    """Seconds that the current result of each stage took: the sum over its runs, including interrupted ones.

    Runs that made another result (for example from other settings) and runs before one with ``force=1`` are excluded.
    """
    seconds, present = {}, {}
    path = exp_dir / "stage_seconds.jsonl"
    for row in read_jsonl(path) if path.exists() else ():
        stage = present[str(row["stage"])] = (row["stage"], row.get("result"))
        seconds[stage] = row["seconds"] + (0 if row.get("anew") else seconds.get(stage, 0))
    return {name: seconds[stage] for name, stage in present.items()}


def costs(exp_dir: Path) -> dict:
    """Seconds per stage and peak memory so far."""
    peak = exp_dir / "peak_memory_gib"
    return {
        "stage_seconds": stage_seconds(exp_dir), "peak_rss_gib": float(peak.read_text()) if peak.exists() else None
    }  # fmt: skip


def reward_parts(exp_dir: Path) -> dict[str, dict[str, float]]:
    """Mean score of each part of the reward in the first and the last steps of the training, by name."""
    log = exp_dir / "log/train.log"
    steps = [metrics for _, metrics in sorted(read_steps(log, 0).items())] if log.exists() else []
    found = {}
    for key in dict.fromkeys(key for metrics in steps for key in metrics if PART.fullmatch(key)):
        values = [metrics[key] for metrics in steps if key in metrics]
        found[PART.fullmatch(key)[1]] = {
            "first": float(np.mean(values[:STEPS])), "last": float(np.mean(values[-STEPS:]))
        }  # fmt: skip
    return found


def summarise_set(eval_dir: Path) -> dict:
    """The figures of one evaluation set, whose scores are in ``eval_dir/sft`` and ``eval_dir/grpo``."""
    scores = {m: json.loads((eval_dir / m / "scores.json").read_text(encoding="utf-8")) for m in MODELS}
    utterances = [read_utterances(eval_dir / m) for m in MODELS]
    changes = compare_rates(*utterances, scores["sft"]["language"])
    judge = {}
    if all("judge" in scores[m] for m in MODELS):
        judge = {
            "asr": scores["grpo"]["judge"]["asr"], **{m: scores[m]["judge"]["pooled"] for m in MODELS},
            "change": compare_rates(*utterances, scores["sft"]["language"], JUDGE_ERRORS),
        }  # fmt: skip
    return {
        **{m: {key: scores[m][key] for key in ("pooled", "seeds", "quality", "quality_sample")} for m in MODELS},
        "language": scores["grpo"]["language"],
        "metrics": scores["grpo"]["metrics"],
        "relative_drop": {metric: change["relative_drop"] for metric, change in changes.items()},
        "relative_drop_ci": {metric: change["relative_drop_ci"] for metric, change in changes.items()},
        "verdict": {metric: change["verdict"] for metric, change in changes.items()},
        "quality_change": compare_quality(*utterances),
        "asr": scores["grpo"]["asr"],
        "judge": judge,
        "versions": scores["grpo"]["versions"] | {"python": platform.python_version()},
    }


def summarise(exp_dir: Path, settings: dict, sets: Sequence[str] = ()) -> dict:
    """The contents of summary.json.

    Args:
        exp_dir: folder of the experiment.
        settings: its settings, to be recorded.
        sets: names of the evaluation sets, whose scores are in ``eval/NAME``; empty: one set, in ``eval``.
    """
    figures = {name: summarise_set(exp_dir / "eval" / name) for name in sets or ("",)}
    first = next(iter(figures))
    return {
        **({"set": first} if first else {}),
        **figures[first],
        **({"sets": figures} if len(figures) > 1 else {}),
        "reward_parts": reward_parts(exp_dir),
        **costs(exp_dir),
        "git_commit": git_commit(),
        "settings": settings,
    }


def drop_text(drop: float | None, ci: list[float] | None) -> str:
    """Format a relative reduction with its interval; "-" if it is undefined."""
    return "-" if drop is None else f"{drop:.1%}" + (f" ({ci[0]:.1%} to {ci[1]:.1%})" if ci else "")


def rate_lines(summary: dict) -> list[str]:
    """Format error rates before and after training, with the relative reduction and the verdict."""
    lines = [f"{'':36} {'SFT':>8} {'GRPO':>8}   relative drop (95% interval)"]
    for metric, about in summary["metrics"].items():
        before, after = (summary[m]["pooled"][metric]["rate"] for m in MODELS)
        shown = drop_text(summary["relative_drop"][metric], summary["relative_drop_ci"][metric])
        lines.append(f"{about['title']:36} {before:8.2%} {after:8.2%}   {shown}: {summary['verdict'][metric]}")
        if judge := summary.get("judge"):
            change, (before, after) = judge["change"][metric], (judge[m][metric]["rate"] for m in MODELS)
            shown = drop_text(change["relative_drop"], change["relative_drop_ci"])
            by = f"  by {judge['asr']['model']}"
            lines.append(f"{by:36} {before:8.2%} {after:8.2%}   {shown}: {change['verdict']}")
    return lines


def quality_lines(summary: dict) -> list[str]:
    """Format quality metrics before and after training, with the difference and the verdict."""
    lines = [f"{'':36} {'SFT':>8} {'GRPO':>8}   difference (95% interval)"]
    for name, change in summary["quality_change"].items():
        before, after = (summary[m]["quality"][name] for m in MODELS)
        ci = f" ({change['ci'][0]:+.3f} to {change['ci'][1]:+.3f})" if change["ci"] else ""
        model = f", by {after['model']}" if after["model"] else ""
        lines.append(f"{after['title']:36} {before['value']:8.3f} {after['value']:8.3f}   "
                     f"{change['difference']:+.3f}{ci} {after['unit']}: {change['verdict']}{model}")  # fmt: skip
    for name, form in (("tokens_per_character", ".2f"), ("failed", ".0f")):
        means = [np.mean([seed[name] for seed in summary[m]["seeds"].values()]) for m in MODELS]
        lines.append(f"{name.replace('_', ' '):36} {means[0]:>8{form}} {means[1]:>8{form}}")
    return lines


def set_lines(sets: dict[str, dict]) -> list[str]:
    """Format the published rate and the micro rates of each evaluation set, side by side."""
    lines = [f"{'evaluation set':28} {'metric':22} {'SFT':>8} {'GRPO':>8}   relative drop (95% interval)"]
    for name, figures in sets.items():
        for metric in SET_METRICS[figures["language"]]:
            before, after = (figures[m]["pooled"][metric]["rate"] for m in MODELS)
            shown = drop_text(figures["relative_drop"][metric], figures["relative_drop_ci"][metric])
            title = figures["metrics"][metric]["title"]
            lines.append(f"{name:28} {title:22} {before:8.2%} {after:8.2%}   {shown}: {figures['verdict'][metric]}")
    return lines


def recogniser_line(summary: dict) -> str:
    asr = summary["asr"]
    return f"recogniser: {asr['model']} by {asr['backend']}, {asr['sha256'][:12]}"


def table(summary: dict) -> str:
    """Format the summary as a readable table."""
    lines, sets = [], summary.get("sets", {})
    for name, figures in (sets or {"": summary}).items():
        lines += [f"== {name}"] * bool(name)
        lines += [*rate_lines(figures), *quality_lines(figures), recogniser_line(figures)]
    if sets:
        lines += ["== all evaluation sets", *set_lines(sets)]
    if summary["reward_parts"]:
        shown = (f"{name} {mean['first']:.3f} -> {mean['last']:.3f}" for name, mean in summary["reward_parts"].items())
        lines.append(f"parts of the reward in the first and the last {STEPS} steps: {', '.join(shown)}")
    return "\n".join(lines)


def main(argv=None):
    args = get_args(argv)
    path = args.exp_dir / "summary.json"
    if args.costs_only:
        write_json(path, json.loads(path.read_text(encoding="utf-8")) | costs(args.exp_dir))
        return
    for name in args.sets or [""]:
        for model in MODELS:
            folder = Path("eval", name, model)
            if not (args.exp_dir / folder / "scores.json").exists():
                raise SystemExit(f"summarise.py: {folder}/scores.json is missing in {args.exp_dir}: run stage 4")
    summary = summarise(args.exp_dir, json.loads(args.settings), args.sets or ())
    write_json(path, summary)
    print(table(summary))


if __name__ == "__main__":
    main()
