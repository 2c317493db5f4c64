"""Compare the scores of the SFT and the GRPO model: a table, and summary.json.

The relative drop of each error rate has a 95% interval by paired bootstrap over utterances: utterances of the test
set are drawn with replacement, with all their seeds, for both models alike (Bisani and Ney, "Bootstrap estimates for
confidence intervals in ASR performance evaluation", ICASSP 2004).
"""

import argparse
import collections
import json
import platform
import subprocess
from pathlib import Path

import numpy as np

from tts_grpo.jsonl import read_jsonl, write_json
from tts_grpo.metrics import UNITS

MODELS = ("sft", "grpo")
MAIN_METRIC = "pinyin_error_rate_toneless"
NUM_DRAWS = 10_000


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--exp-dir", type=Path, required=True, help="folder of the experiment, with eval/sft, eval/grpo"
    )
    parser.add_argument("--settings", default="{}", help="JSON of the settings, to be recorded")
    return parser.parse_args(argv)


def counts_by_utterance(output_dir: Path, metric: str) -> dict[str, np.ndarray]:
    """``id -> (errors, units)``, summed over the seeds."""
    counts = collections.defaultdict(lambda: np.zeros(2))
    for path in sorted(output_dir.glob("seed_*/utterances.jsonl")):
        for row in read_jsonl(path):
            c = row["errors"][metric]
            counts[row["id"]] += (c["substitutions"] + c["deletions"] + c["insertions"], c["length"])
    return counts


def relative_drop(before: dict[str, np.ndarray], after: dict[str, np.ndarray], rng) -> tuple[float, list[float]]:
    """Share of the error rate that is gone, and its 95% interval.

    Raises:
        ValueError: the two were scored on different utterances.
    """
    if before.keys() != after.keys():
        raise ValueError("the two models were scored on different utterances")
    a, b = (np.array([counts[utt_id] for utt_id in before]) for counts in (before, after))
    drop = lambda x, y: 1 - (y[..., 0] / y[..., 1]) / (x[..., 0] / x[..., 1])  # noqa: E731
    draws = rng.multinomial(len(a), np.full(len(a), 1 / len(a)), size=NUM_DRAWS)
    low, high = np.percentile(drop(draws @ a, draws @ b), (2.5, 97.5))
    return float(drop(a.sum(0), b.sum(0))), [float(low), float(high)]


def stage_seconds(exp_dir: Path) -> dict[str, int]:
    """Seconds of each stage's longest run: later runs skip what is done."""
    seconds = {}
    path = exp_dir / "stage_seconds.jsonl"
    for row in read_jsonl(path) if path.exists() else ():
        seconds[str(row["stage"])] = max(row["seconds"], seconds.get(str(row["stage"]), 0))
    return seconds


def git_commit(root: Path) -> str | None:
    """The commit of the recipe, "-dirty" if files differ; None outside of a checkout."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def summarise(exp_dir: Path, settings: dict) -> dict:
    """The contents of summary.json."""
    scores = {m: json.loads((exp_dir / "eval" / m / "scores.json").read_text(encoding="utf-8")) for m in MODELS}
    rng = np.random.default_rng(0)
    drops = {}
    for metric in UNITS:
        drops[metric] = relative_drop(*(counts_by_utterance(exp_dir / "eval" / m, metric) for m in MODELS), rng)
    peak = exp_dir / "peak_memory_gib"
    return {
        **{m: {"pooled": scores[m]["pooled"], "seeds": scores[m]["seeds"]} for m in MODELS},
        "relative_drop": {metric: drop for metric, (drop, _) in drops.items()},
        "relative_drop_ci": {metric: ci for metric, (_, ci) in drops.items()},
        "stage_seconds": stage_seconds(exp_dir),
        "peak_rss_gib": float(peak.read_text()) if peak.exists() else None,
        "versions": scores["grpo"]["versions"] | {"python": platform.python_version()},
        "git_commit": git_commit(Path(__file__).resolve().parent.parent),
        "settings": settings,
    }


def table(summary: dict) -> str:
    """Error rates before and after, for people."""
    lines = [f"{'':28} {'SFT':>8} {'GRPO':>8}   relative drop (95% interval)"]
    for metric in UNITS:
        before, after = (summary[m]["pooled"][metric]["rate"] for m in MODELS)
        low, high = summary["relative_drop_ci"][metric]
        drop = summary["relative_drop"][metric]
        lines.append(f"{metric:28} {before:8.2%} {after:8.2%}   {drop:.1%} ({low:.1%} to {high:.1%})")
    for name, form in (("eos_share", ".1%"), ("tokens_per_character", ".2f"), ("failed", ".0f")):
        means = [np.mean([seed[name] for seed in summary[m]["seeds"].values()]) for m in MODELS]
        lines.append(f"{name:28} {means[0]:>8{form}} {means[1]:>8{form}}")
    return "\n".join(lines)


def main(argv=None):
    args = get_args(argv)
    for model in MODELS:
        if not (args.exp_dir / "eval" / model / "scores.json").exists():
            raise SystemExit(f"summarise.py: eval/{model}/scores.json is missing in {args.exp_dir}: run stage 4")
    summary = summarise(args.exp_dir, json.loads(args.settings))
    write_json(args.exp_dir / "summary.json", summary)
    print(table(summary))


if __name__ == "__main__":
    main()
