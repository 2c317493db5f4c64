"""Select the best of several scored systems, such as the checkpoints of a run: the one with the lowest error rate among
those without a loss in speech quality.

    python tools/select_checkpoint.py exp/tiny/eval/sft exp/tiny/eval/step_20 exp/tiny/eval/step_40

The first folder is the baseline. A system is refused if a quality metric (tts_grpo/speech/quality.py) differs from the
baseline by more than the limit of that metric and the difference is significant (95% interval by paired bootstrap over
utterances). The last line of the output is the chosen folder: the baseline, if all others are refused or none has a
lower error rate.
"""

import argparse
import json
from pathlib import Path

from tts_grpo.evaluation.aggregate import compare_quality, read_utterances
from tts_grpo.speech.quality import QUALITY_METRICS

# Largest tolerated change in the unit of the metric, or relative to the baseline ("%"): a decrease if higher is better,
# an increase if lower is better, and a change in either direction for other metrics.
LIMITS = {
    "speaker_similarity": "0.02",
    "dnsmos_ovrl": "0.1",
    "eos_share": "0.005",
    "repetition": "0.005",
    "clipped_share": "0.001",
    "speech_rate": "10%",
    "leading_silence_s": "0.1",
    "trailing_silence_s": "0.1",
    "inner_silence_share": "0.05",
    "f0_std_semitones": "15%",
}


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dirs", type=Path, nargs="+", help="scored folders; the first is the baseline")
    parser.add_argument("--metric", help="error rate to minimise (default: the last one for the language)")
    parser.add_argument("--limit", action="append", default=[], metavar="METRIC=VALUE", help="change a limit, such as "
                        "dnsmos_ovrl=0.2, speech_rate=5%% or f0_std_semitones=off")  # fmt: skip
    return parser.parse_args(argv)


def read_limits(changes: list[str]) -> dict[str, str]:
    """``LIMITS`` with the user's changes.

    Raises:
        ValueError: a change is not of the form METRIC=VALUE.
    """
    limits = dict(LIMITS)
    for change in changes:
        name, _, value = change.partition("=")
        if name not in QUALITY_METRICS or not (value == "off" or value.removesuffix("%").replace(".", "", 1).isdigit()):
            raise ValueError(
                f"--limit {change}: expected METRIC=VALUE, where METRIC is one of {', '.join(QUALITY_METRICS)}"
            )
        limits[name] = value
    return {name: value for name, value in limits.items() if value != "off"}


def excess(name: str, change: dict, baseline: float, limit: str) -> str | None:
    """The reason to refuse a system for this change, or None."""
    allowed = float(limit.removesuffix("%")) * (abs(baseline) / 100 if limit.endswith("%") else 1)
    better, difference = QUALITY_METRICS[name].better, change["difference"]
    loss = -difference if better == "higher" else difference if better == "lower" else abs(difference)
    if loss <= allowed or change["verdict"] not in ("worse", "higher", "lower"):
        return None
    return f"{name} {baseline:.3f} -> {baseline + difference:.3f} (limit {limit})"


def refusals(folder: Path, baseline: Path, scores: dict[Path, dict], limits: dict[str, str]) -> list[str]:
    """Reasons to refuse a system; empty if there are none."""
    failed = {f: sum(seed["failed"] for seed in scores[f]["seeds"].values()) for f in (baseline, folder)}
    reasons = []
    if failed[folder] > failed[baseline]:
        reasons.append(f"{failed[folder]} utterances without usable audio, {failed[baseline]} in the baseline")
    missing = [n for n in limits if n in scores[baseline]["quality"] and n not in scores[folder]["quality"]]
    reasons += [f"{name} was not measured" for name in missing]
    changes = compare_quality(read_utterances(baseline), read_utterances(folder))
    for name in limits.keys() & changes.keys():
        reasons.append(excess(name, changes[name], scores[baseline]["quality"][name]["value"], limits[name]))
    return sorted(filter(None, reasons))


def load_scores(folders: list[Path]) -> dict[Path, dict]:
    """``scores.json`` of each folder.

    Raises:
        ValueError: one is missing, or the test sets, languages or recognisers differ.
    """
    scores = {}
    for folder in folders:
        path = folder / "scores.json"
        if not path.exists():
            raise ValueError(f"{path} is missing: run bash scripts/compute_wer.sh {folder} DATASET")
        scores[folder] = json.loads(path.read_text(encoding="utf-8"))
    for key in ("eval_set_sha256", "asr_sha256", "language"):
        if len({entry[key] for entry in scores.values()}) > 1:
            raise ValueError(f"the folders differ in {key}: score them with the same test set and recogniser")
    return scores


def choose(folders: list[Path], metric: str | None, limits: dict[str, str]) -> tuple[Path, str]:
    """The chosen folder, and the table.

    Raises:
        ValueError: the folders cannot be compared, or the metric does not exist.
    """
    scores = load_scores(folders)
    metric = metric or list(scores[folders[0]]["metrics"])[-1]
    if metric not in scores[folders[0]]["metrics"]:
        raise ValueError(f"--metric {metric} does not exist: choose one of {', '.join(scores[folders[0]]['metrics'])}")
    rate = {folder: scores[folder]["pooled"][metric]["rate"] for folder in folders}
    reasons = {folder: refusals(folder, folders[0], scores, limits) for folder in folders[1:]}
    allowed = [folder for folder in folders if not reasons.get(folder)]
    best = min(allowed, key=rate.get)  # the first of equal ones: the baseline, unless another is better
    lines = [f"{metric:>28}  system"]
    for folder in sorted(folders, key=rate.get):
        note = "refused: " + "; ".join(reasons[folder]) if reasons.get(folder) else ""
        note = note or ("chosen" if folder == best else "") + (" (baseline)" if folder == folders[0] else "")
        lines.append(f"{rate[folder]:28.2%}  {folder}  {note}".rstrip())
    unknown = sorted(limits.keys() - scores[folders[0]]["quality"].keys())
    if unknown:
        lines.append(f"not measured in the baseline, and therefore not checked: {', '.join(unknown)}")
    return best, "\n".join(lines)


def main(argv=None):
    args = get_args(argv)
    try:
        best, table = choose(args.output_dirs, args.metric, read_limits(args.limit))
    except ValueError as error:
        raise SystemExit(f"select_checkpoint.py: {error}") from error
    print(table)
    print(best)


if __name__ == "__main__":
    main()
