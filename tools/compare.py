"""Write a page with the curves of several experiments in the same plots, and their scores in one table.

    python tools/compare.py exp/A exp/B exp/C --output exp/comparison.html

The page is one HTML file, viewable offline. The experiments are folders of run.sh (summary.json, tensorboard), or runs
of tools/repeat.py, whose scores are in the folder above.
"""

import argparse
from pathlib import Path

from tts_grpo.evaluation.report.comparison import render_comparison
from tts_grpo.text.jsonl import write_text


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exp_dirs", type=Path, nargs="+", help="folders of experiments")
    parser.add_argument("--output", type=Path, default=Path("exp/comparison.html"), help="HTML file to write")
    return parser.parse_args(argv)


def main(argv=None):
    args = get_args(argv)
    try:
        page = render_comparison(args.exp_dirs)
    except (ValueError, OSError) as error:
        raise SystemExit(f"compare.py: {error}") from None
    write_text(args.output, page)
    print(f"{args.output}: {len(page.encode()) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
