"""Record the figures of finished runs in docs/results/tiny_grpo.json, and update the tables that show them.

    python tools/record_results.py [EXP_DIR ...]

The experiments (default: exp/tiny) are runs of the same settings. The tables of README.md and docs/results.md show the
run whose change of the toneless pinyin error rate is the median; of the others only this rate and the speech rate are
recorded. The times are those of the first one, which should have begun with a fresh clone. Stages 2 to 4 must be
finished. Only the tables after the comments ``<!-- table: NAME -->`` are written; check the sentences around them.
"""

import argparse
import datetime
import json
from pathlib import Path

from tts_grpo.evaluation.provenance import ROOT, provenance, replace_tables
from tts_grpo.training.verl_log import read_steps, step_seconds

RESULTS = Path("docs/results/tiny_grpo.json")
MAIN_RATE = "pinyin_error_rate_toneless"  # what the tiny profile's reward measures
SHORT = (MAIN_RATE, "pinyin_error_rate", "spoken", "cer", "dnsmos_ovrl", "f0_median_hz")  # rows of the README


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exp_dirs", nargs="*", type=Path, default=[Path("exp/tiny")], help="folders of experiments")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout whose JSON and pages are written")
    return parser.parse_args(argv)


def read_summary(exp_dir: Path) -> dict:
    """Return an experiment's summary.json.

    Raises:
        SystemExit: stage 4 is not finished, or the commit of the run is unknown or has uncommitted changes.
    """
    path = exp_dir / "summary.json"
    if not path.exists():
        raise SystemExit(f"record_results.py: {path} is missing: run stages 2 to 4 first")
    summary = json.loads(path.read_text(encoding="utf-8"))
    commit = summary["git_commit"]
    if not commit or commit.endswith("-dirty"):
        raise SystemExit(
            f"record_results.py: the commit of {exp_dir} is {commit or 'unknown'}: repeat the run with committed code"
        )
    return summary


def rate_figures(summary: dict) -> list[dict]:
    """Return the error rates in percent, and the relative change with its 95% interval."""
    figures = []
    for metric, about in summary["metrics"].items():
        drop, interval = summary["relative_drop"][metric], summary["relative_drop_ci"][metric]
        before, after = (round(100 * summary[model]["pooled"][metric]["rate"], 2) for model in ("sft", "grpo"))
        change = [round(-100 * value, 1) for value in (drop, *interval[::-1])]
        figures.append(
            {"key": metric, "name": about["title"], "unit": "%", "sft": before, "grpo": after,
             "relative_change_percent": change[0], "ci95": change[1:], "conclusion": summary["verdict"][metric]}
        )  # fmt: skip
    return figures


def quality_figures(summary: dict) -> list[dict]:
    """Return the speech-quality metrics, and their difference with its 95% interval."""
    figures = []
    for metric, change in summary["quality_change"].items():
        before, after = (summary[model]["quality"][metric] for model in ("sft", "grpo"))
        figures.append(
            {"key": metric, "name": after["title"], "unit": after["unit"], "sft": round(before["value"], 3),
             "grpo": round(after["value"], 3), "difference": round(change["difference"], 3),
             "ci95": [round(value, 3) for value in change["ci"]], "conclusion": change["verdict"]}
        )  # fmt: skip
    return figures


def run_figures(summary: dict) -> dict:
    """Return the figures of one of several runs: the main error rate, and the change of the speech rate."""
    (rate,) = (figure for figure in rate_figures(summary) if figure["key"] == MAIN_RATE)
    (speech_rate,) = (figure for figure in quality_figures(summary) if figure["key"] == "speech_rate")
    kept = {key: rate[key] for key in ("sft", "grpo", "relative_change_percent", "ci95")}
    return {"commit": summary["git_commit"][:7], **kept, "speech_rate_difference": speech_rate["difference"]}


def results(exp_dirs: list[Path]) -> dict:
    """Return the contents of docs/results/tiny_grpo.json."""
    summaries = [read_summary(exp_dir) for exp_dir in exp_dirs]
    runs = [run_figures(summary) for summary in summaries]
    ranked = sorted(range(len(runs)), key=lambda run: runs[run]["relative_change_percent"])
    shown = ranked[len(ranked) // 2]
    summary, settings = summaries[shown], summaries[shown]["settings"]
    test_set = summary.get("set", Path(settings["eval_jsonl"]).stem)
    seconds = {stage: round(value) for stage, value in summaries[0]["stage_seconds"].items()}
    steps = read_steps(exp_dirs[0] / "log/train.log", skip=2)
    finished = datetime.datetime.fromtimestamp((exp_dirs[shown] / "summary.json").stat().st_mtime)
    changes = [run["relative_change_percent"] for run in runs]
    return {
        **provenance("Tiny profile: SFT model and GRPO", []),
        "date": finished.date().isoformat(),
        "commit": summary["git_commit"],
        "command": "bash run.sh",
        "conditions": f"profile={settings['profile']}, {settings['total_steps']} steps, credit={settings['credit']}; "
        f"{test_set}.jsonl, seeds {settings['seeds']}, temperature {settings['temperature']}; "
        "95% intervals by paired bootstrap over utterances; speaker similarity, DNSMOS and F0 of "
        f"{settings['quality_utterances']} utterances",
        "shown_run": shown + 1,
        "runs": runs,
        "mean_relative_change_percent": round(sum(changes) / len(changes), 1),
        "figures": rate_figures(summary) + quality_figures(summary),
        "stage_seconds": seconds | {"all": sum(seconds.values())},
        "peak_memory_gib": round(max(other["peak_rss_gib"] for other in summaries), 1),
        "step_seconds": {name: round(value, 1) for name, value, _ in step_seconds([steps[n] for n in sorted(steps)])},
    }


def change_cell(figure: dict) -> str:
    """Format a relative change as "-33.0% (-40.1% to -25.1%)", a difference as "-0.038 (-0.174 to +0.099)"."""
    change, form = (figure.get("relative_change_percent"), "{:+.1f}%")
    if change is None:
        change, form = figure["difference"], "{:+.3f}"
    low, high = map(form.format, figure["ci95"])
    return f"{form.format(change)} ({low} to {high})"


def figure_table(figures: list[dict]) -> list[str]:
    lines = ["| | SFT | GRPO | Change (95% interval) | Conclusion |", "| --- | --- | --- | --- | --- |"]
    for figure in figures:
        is_rate = figure["unit"] == "%"
        before, after = (f"{figure[m]:.2f}%" if is_rate else f"{figure[m]:.3f}" for m in ("sft", "grpo"))
        name = figure["name"] if is_rate or not figure["unit"] else f"{figure['name']}, {figure['unit']}"
        lines.append(f"| {name} | {before} | {after} | {change_cell(figure)} | {figure['conclusion']} |")
    return lines


def tables(recorded: dict) -> dict[str, list[str]]:
    """Return the lines of each table by the name in its comment, from the contents of docs/results/tiny_grpo.json."""
    figures, seconds = recorded["figures"], recorded["stage_seconds"]
    by_key = {figure["key"]: figure for figure in figures}
    return {
        "short": figure_table([by_key[key] for key in SHORT]),
        "rates": figure_table([figure for figure in figures if figure["unit"] == "%"]),
        "quality": figure_table([figure for figure in figures if figure["unit"] != "%"]),
        "stage seconds": [
            f"| Stage | {' | '.join(seconds)} |",
            f"|{' --- |' * (len(seconds) + 1)}",
            f"| Seconds on {recorded['machine']['cpu_cores']} cores | {' | '.join(map(str, seconds.values()))} |",
        ],
        "step seconds": [
            "| Part of a training step | Seconds |",
            "| --- | --- |",
            *(f"| {name} | {value:.1f} |" for name, value in recorded["step_seconds"].items()),
        ],
        "runs": [
            "| Run | Commit | SFT | GRPO | Change (95% interval) | Change of the speech rate, units/s |",
            "| --- | --- | --- | --- | --- | --- |",
            *(
                f"| {number} | `{run['commit']}` | {run['sft']:.2f}% | {run['grpo']:.2f}% | {change_cell(run)} | "
                f"{run['speech_rate_difference']:+.3f} |"
                for number, run in enumerate(recorded["runs"], 1)
            ),
            f"| mean | | | | {recorded['mean_relative_change_percent']:+.1f}% | |",
        ],
    }


def main(argv=None):
    args = get_args(argv)
    recorded = results(args.exp_dirs)
    path = args.root / RESULTS
    path.write_text(json.dumps(recorded, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    made = tables(recorded)
    for name in ("README.md", "docs/results.md"):
        page = args.root / name
        page.write_text(replace_tables(page.read_text(encoding="utf-8"), made), encoding="utf-8")
    print("\n".join(made["rates"]))


if __name__ == "__main__":
    main()
