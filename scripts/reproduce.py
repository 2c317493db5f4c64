"""Reproduce published figures: evaluate the published systems, and compare ours with each published figure.

    bash run.sh [--dry-run] reproduce [SYSTEM...]

docs/results/published.json has the systems, their published figures with sources, and the conditions of these figures.
Each system is evaluated by ``bash run.sh evaluate`` with the settings given there, and others of the environment, such
as ``workspace``, in exp/reproduce/SYSTEM. Variables that choose another model or other sets are ignored. Finished sets
are not repeated; a system or a set that fails is named, and the others are compared.

The verdict of a figure is ``reproduced`` if our 95% interval, by bootstrap over utterances, contains the published
figure (to its rounding, 0.005 points), otherwise ``off by`` the difference. It is ``not comparable`` if the set has
another number of utterances than the published one. Below it stands what may explain a difference: the conditions
(recogniser, normalisation, sampling, torch version, precision) that differ from the published ones, and those that the
source does not state. The interval covers the choice of utterances only, and the published figure is one sample, too.

This program needs only the standard library, because the environments may not exist yet.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tts_grpo.evaluation.provenance import provenance  # it needs only the standard library

ROOT = Path(__file__).resolve().parent.parent
ROUNDING = 0.005  # half a unit of the last digit of published figures, in points
STRIPPED = "-stripped"  # ends the name of a set without quotes and brackets
NO_OTHER = {  # values without which a variable of the environment would choose another model or other sets
    "recipe": "", "sft_path": "", "llm_pt": "llm.pt", "eval_jsonl": "", "eval_jsonls": "",
}  # fmt: skip
CONDITIONS = {  # conditions as published.json groups them, in the order of their usual effect
    "recogniser": "recogniser", "texts": "normalisation of the texts", "sampling": "sampling", "torch": "torch version",
    "precision": "precision",
}  # fmt: skip


def get_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="bash run.sh reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("systems", nargs="*", metavar="SYSTEM", help="systems to evaluate (default: all)")
    parser.add_argument("--sets", nargs="+", help="evaluation sets (default: all with published figures)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    parser.add_argument("--compare-only", action="store_true", help="compare what was evaluated before")
    parser.add_argument(
        "--published", type=Path, default=ROOT / "docs/results/published.json", help="published figures"
    )
    parser.add_argument("--output-dir", type=Path, default=ROOT / "exp/reproduce", help="folder for results")
    return parser.parse_args(argv)


def chosen_systems(published: dict, names: list[str], sets: list[str] | None) -> list[dict]:
    """The systems with the given names, or all, with their figures on the given sets, or all.

    Raises:
        SystemExit: a name is unknown.
    """
    known = {system["name"]: system for system in published["systems"]}
    for wanted, present in ((names, known), (sets or (), published["sets"])):
        if unknown := [name for name in wanted if name not in present]:
            raise SystemExit(f"reproduce.py: {unknown[0]} is unknown: choose from {', '.join(present)}")
    chosen = []
    for name in names or known:
        tables = [
            table | {"rates": {s: rate for s, rate in table["rates"].items() if not sets or s in sets}}
            for table in known[name]["tables"]
        ]
        if any(table["rates"] for table in tables):
            chosen.append(known[name] | {"tables": tables})
    return chosen


def evaluate(system: dict, args) -> bool:
    """Evaluate a system on the sets of its published figures. Returns whether all of that succeeded."""
    sets = list(dict.fromkeys(name for table in system["tables"] for name in table["rates"]))
    settings = system["settings"] | {
        "dataset": " ".join(sets), "exp_dir": str((args.output_dir / system["name"]).absolute())
    }  # fmt: skip
    settings |= {name: value for name, value in NO_OTHER.items() if name not in settings}
    command = ["bash", str(ROOT / "run.sh"), *["--dry-run"] * args.dry_run, "evaluate"]
    if args.dry_run:
        print(shlex.join(["env", *(f"{name}={value}" for name, value in settings.items()), *command]), flush=True)
    return subprocess.run(command, env=os.environ | settings, check=False).returncode == 0


def set_folder(folder: Path, name: str, table: dict) -> Path | None:
    """The results of a finished set of a system's folder, or None.

    The set may have been evaluated with quotes or stripped of them; of both, the one that is as in the table is taken.
    """
    published_removed = (table["conditions"]["texts"] or {}).get("quotes") == "removed"
    for found in sorted((name, name + STRIPPED), reverse=published_removed):
        if (folder / f".done/4-{found}").exists() and (folder / "eval" / found / "sft/scores.json").exists():
            return folder / "eval" / found / "sft"
    return None


def conditions_of(results: Path, scores: dict) -> dict:
    """The conditions of our figure, as published.json has those of published ones."""
    settings = json.loads((results / "settings.json").read_text(encoding="utf-8"))
    sampling = ("temperature", "top_p", "top_k", "repetition_penalty", "repetition_window", "min_token_text_ratio",
                "max_token_text_ratio")  # fmt: skip
    return {
        "torch": scores["versions"]["torch"].split("+")[0],
        "sampling": {name: float(settings[name]) for name in sampling},
        "texts": {
            "llm_text": settings["llm_text"],
            "quotes": "removed" if results.parent.name.endswith(STRIPPED) else "kept",
        },
        "precision": {name: settings[name] for name in ("lm_precision", "precision")},
        "recogniser": {name: scores["asr"][name] for name in ("backend", "model")},
    }


def published_conditions(table: dict, language: str) -> dict:
    """The conditions of a table, with the recogniser of the language; None for those that its source does not state."""
    stated = table["conditions"]
    return stated | {"recogniser": stated["recogniser"][language]}


def same(published, ours) -> bool:
    """Whether two values of a condition agree; a published version may have fewer parts, such as 1.12."""
    if isinstance(published, str):
        return f"{ours}.".startswith(f"{published}.")
    return published == ours


def text(value) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def differing(published: dict, ours: dict) -> tuple[list[str], list[str]]:
    """The conditions that differ, as text, and those that the source does not state."""
    found, unstated = [], []
    for name, title in CONDITIONS.items():
        if published.get(name) is None:
            unstated.append(title)
            continue
        parts = published[name] if isinstance(published[name], dict) else {"": published[name]}
        values = ours[name] if isinstance(ours[name], dict) else {"": ours[name]}
        wrong = [part for part, value in parts.items() if not same(value, values[part])]
        if wrong:
            shown = (f"{part} {text(values[part])}, published {text(parts[part])}".strip() for part in wrong)
            found.append(f"{title} ({'; '.join(shown)})")
    return found, unstated


def verdict(published: float, rate: float, ci: list[float] | None) -> str:
    """The verdict on a figure; all values in percent."""
    if ci is None:
        return "no interval"
    if ci[0] - ROUNDING <= published <= ci[1] + ROUNDING:
        return "reproduced"
    return f"off by {rate - published:+.2f} points"


def compare(table: dict, name: str, published_utterances: int | None, results: Path) -> dict:
    """Compare our figure with a published one.

    Args:
        table: a table of published figures.
        name: the set.
        published_utterances: number of utterances in the published set; None if unknown.
        results: folder with scores.json and settings.json.
    """
    scores = json.loads((results / "scores.json").read_text(encoding="utf-8"))
    entry, seeds = scores["pooled"][table["metric"]], list(scores["seeds"].values())
    rate, ci = 100 * entry["rate"], entry["ci"] and [100 * limit for limit in entry["ci"]]
    found, unstated = differing(published_conditions(table, scores["language"]), conditions_of(results, scores))
    utterances, failed = seeds[0]["utterances"], sum(seed["failed"] for seed in seeds)
    result = verdict(table["rates"][name], rate, ci)
    if published_utterances not in (None, utterances):
        result = f"not comparable: {utterances} utterances, the published set has {published_utterances}"
    return {
        "set": name, "metric": scores["metrics"][table["metric"]]["title"], "published": table["rates"][name],
        "source": table["source"], "rate": rate, "ci": ci, "utterances": utterances, "seeds": len(seeds),
        "failed": failed, "verdict": result, "differs": found, "not_stated": unstated,
    }  # fmt: skip


def comparison(system: dict, sets: dict, folder: Path) -> list[dict]:
    """Compare all figures of a system; ``rate`` is None for a set that was not evaluated."""
    rows = []
    for table in system["tables"]:
        for name in table["rates"]:
            results = set_folder(folder, name, table)
            row = {"set": name, "published": table["rates"][name], "source": table["source"], "rate": None}
            if results:
                row = compare(table, name, sets[name]["utterances"], results)
            others = [other["rates"][name] for other in system["others"] if name in other["rates"]]
            rows.append({"system": system["name"], "others": others} | row)
    return rows


def explanation(row: dict) -> list[str]:
    """What may explain a difference, as lines."""
    lines = []
    if row["differs"]:
        lines.append(f"differs: {'; '.join(row['differs'])}")
    elif row["verdict"] != "reproduced":
        lines.append("no condition differs from those that the source states")
    if row["not_stated"] and row["verdict"] != "reproduced":
        lines.append(f"not stated by the source: {', '.join(row['not_stated'])}")
    if row["failed"]:
        total = row["utterances"] * row["seeds"]
        lines.append(f"{row['failed']} of {total} utterances have no audio: all deletions here, left out in published "
                     "figures")  # fmt: skip
    return lines


def table_lines(systems: list[dict], rows: list[dict]) -> list[str]:
    """Format the comparison: a line for each figure, and its explanation below it."""
    lines = []
    for system in systems:
        lines += [
            "",
            system["title"],
            f"  {'set':20} {'published':>9}  {'ours (95% interval)':24} {'by others':18} verdict",
        ]
        for row in (row for row in rows if row["system"] == system["name"]):
            others = ", ".join(f"{rate:.2f}" for rate in row["others"])
            ours, result = "-", "not evaluated: see above"
            if row["rate"] is not None:
                ci = f" ({row['ci'][0]:.2f} to {row['ci'][1]:.2f})" if row["ci"] else ""
                ours, result = f"{row['rate']:.2f}{ci}", f"{row['verdict']} ({row['metric']})"
            lines.append(f"  {row['set']:20} {row['published']:9.2f}  {ours:24} {others:18} {result}")
            lines += [f"    {line}" for line in (explanation(row) if row["rate"] is not None else ())]
    return lines[1:]


def main(argv=None) -> int:
    args = get_args(argv)
    published = json.loads(args.published.read_text(encoding="utf-8"))
    systems = chosen_systems(published, args.systems, args.sets)
    failed = [] if args.compare_only else [system["name"] for system in systems if not evaluate(system, args)]
    if not args.dry_run:
        rows = [row for s in systems for row in comparison(s, published["sets"], args.output_dir / s["name"])]
        print("\n".join(table_lines(systems, rows)))
        args.output_dir.mkdir(parents=True, exist_ok=True)
        path = args.output_dir / "comparison.json"
        recorded = provenance("Published figures, evaluated here", ["scripts/reproduce.py", *(argv or sys.argv[1:])])
        recorded |= {
            "conditions": "error rates in percent, with 95% intervals by bootstrap over utterances", "figures": rows
        }  # fmt: skip
        path.write_text(json.dumps(recorded, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        print(f"comparison: {path}")
    if failed:
        print(f"reproduce.py: failed: {', '.join(failed)}: see above; the same command repeats only what failed",
              file=sys.stderr)  # fmt: skip
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
