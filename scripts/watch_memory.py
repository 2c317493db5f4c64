"""Write the peak memory of all processes of a run, in GiB, to a file. Runs until it is killed.

Processes of a run have TTS_GRPO_RUN=ID in their environment. Unlike a process group, this includes the daemons that Ray
starts. Memory is measured as PSS, which counts shared pages once.
"""

import argparse
import time
from pathlib import Path

from tts_grpo.text.jsonl import write_text

INTERVAL_S = 3.0


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-id", required=True, help="value of TTS_GRPO_RUN")
    parser.add_argument("--output", type=Path, required=True, help="file to write; a larger value in it is kept")
    return parser.parse_args(argv)


def pss_kib(process: Path) -> int:
    """Proportional set size (PSS) of a process in KiB."""
    for line in (process / "smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0


def used_gib(run_id: str) -> float:
    """Memory of all processes of the run in GiB; processes that exit meanwhile are not counted."""
    mark, total = f"TTS_GRPO_RUN={run_id}".encode(), 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes().split(b"\0"):
                total += pss_kib(process)
        except OSError:
            continue
    return total / 2**20


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
