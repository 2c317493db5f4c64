"""Write the peak memory of all processes of a run, in GiB, to a file. Runs until it is killed."""

import argparse
import time
from pathlib import Path

from tts_grpo.evaluation.processes import used_gib
from tts_grpo.text.jsonl import write_text

INTERVAL_S = 10.0  # one measurement takes about 0.2 s of CPU time, which slows the training down


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-id", required=True, help="value of TTS_GRPO_RUN")
    parser.add_argument("--output", type=Path, required=True, help="file to write; a larger value in it is kept")
    return parser.parse_args(argv)


def main(argv=None):
    args = get_args(argv)
    peak = float(args.output.read_text()) if args.output.exists() else 0.0
    while True:
        used = used_gib(args.run_id)
        if used > peak:
            peak = used
            write_text(args.output, f"{peak:.2f}\n")
        time.sleep(INTERVAL_S)


if __name__ == "__main__":
    main()
