"""Write the report of an experiment: one HTML file with tables, curves, alignments and audio, viewable offline.

    python scripts/report.py --exp-dir exp/NAME

It reads the results of stage 4 (summary.json, eval/) and, if present, the TensorBoard log of stage 2.
"""

import argparse
from pathlib import Path

from tts_grpo.evaluation.report.experiment import load_experiment
from tts_grpo.evaluation.report.page import render
from tts_grpo.text.jsonl import write_text


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp-dir", type=Path, required=True, help="folder of the experiment")
    parser.add_argument("--examples", type=int, default=5, help="utterances per group in the section with audio")
    return parser.parse_args(argv)


def main(argv=None):
    args = get_args(argv)
    try:
        page = render(load_experiment(args.exp_dir), args.examples)
    except ValueError as error:
        raise SystemExit(f"report.py: {error}") from None
    write_text(args.exp_dir / "report.html", page)
    print(f"{args.exp_dir / 'report.html'}: {len(page.encode()) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
