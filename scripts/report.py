"""Write the report of an experiment: one HTML file with tables, curves, alignments and audio, viewable offline.

    python scripts/report.py --exp-dir exp/NAME

It reads the results of stage 4 (summary.json, eval/) and, if present, the TensorBoard log of stage 2. With several
evaluation sets, report.html has a table of all and the details of the first one; eval/NAME/report.html has those of a
further one.
"""

import argparse
from pathlib import Path

from tts_grpo.evaluation.report.experiment import load_experiment
from tts_grpo.evaluation.report.page import render
from tts_grpo.text.jsonl import write_text


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp-dir", type=Path, required=True, help="folder of the experiment")
    parser.add_argument("--sets", nargs="+", default=[""], help="evaluation sets with results in eval/NAME (default: "
                        "one, in eval)")  # fmt: skip
    parser.add_argument("--examples", type=int, default=5, help="utterances per group in the section with audio")
    return parser.parse_args(argv)


def main(argv=None):
    args = get_args(argv)
    for number, name in enumerate(args.sets):
        try:
            page = render(load_experiment(args.exp_dir, name), args.examples)
        except ValueError as error:
            raise SystemExit(f"report.py: {error}") from None
        path = args.exp_dir / Path("eval", name) / "report.html" if number else args.exp_dir / "report.html"
        write_text(path, page)
        print(f"{path}: {len(page.encode()) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
