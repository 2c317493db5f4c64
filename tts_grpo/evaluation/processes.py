"""All processes of a run, and their memory.

They are found by a variable of their environment, such as run.sh's TTS_GRPO_RUN=ID and TTS_GRPO_EXP_DIR=FOLDER. Unlike
a process group, this includes the daemons that Ray starts. Memory is measured as PSS, which counts shared pages once.
"""

from collections.abc import Iterator
from pathlib import Path


def processes_with(variable: str, value: str) -> Iterator[Path]:
    """Folders in /proc of the processes that have this variable; those of other users cannot be read."""
    mark = f"{variable}={value}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes().split(b"\0"):
                yield process
        except OSError:  # it has ended
            continue


def pss_kib(process: Path, kinds: tuple[str, ...]) -> int:
    """Proportional set size (PSS) of a process in KiB, summed over kinds."""
    lines = (process / "smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.split(":")[0] in kinds)


def used_gib(run_id: str, kinds: tuple[str, ...] = ("Pss",)) -> float:
    """Memory of all processes of the run in GiB; processes that exit meanwhile are not counted.

    Args:
        run_id: value of TTS_GRPO_RUN.
        kinds: lines of Linux's smaps_rollup to add up, such as Pss_Anon, which does not change if processes of other
            runs map the same files.
    """
    total = 0
    for process in processes_with("TTS_GRPO_RUN", run_id):
        try:
            total += pss_kib(process, kinds)
        except OSError:
            continue
    return total / 2**20
