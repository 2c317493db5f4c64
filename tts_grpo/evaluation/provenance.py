"""Recorded figures: where they come from (date, commit, machine and command), and the tables that show them."""

import datetime
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MARK = "<!-- table: {} -->"


def git_commit(root: Path = ROOT) -> str | None:
    """Return the commit of a checkout, with "-dirty" if tracked files differ; None outside a git checkout."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> dict:
    """Return the number of CPU cores, and the models of the CPU and the GPU of this machine (None if unknown)."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        gpus = []
    return {
        "cpu_cores": len(os.sched_getaffinity(0)), "cpu_model": models[0] if models else platform.machine(),
        "gpu": ", ".join(filter(None, gpus)) or None,
    }  # fmt: skip


def provenance(title: str, command: Sequence[str]) -> dict:
    """Return the first keys of a file in docs/results: title, date, commit, machine and command.

    Args:
        title: what was measured.
        command: program and arguments.
    """
    return {
        "title": title, "date": datetime.date.today().isoformat(), "commit": git_commit(), "machine": machine(),
        "command": f"python {shlex.join(command)}",
    }  # fmt: skip


def replace_tables(page: str, made: dict[str, list[str]]) -> str:
    """Return a page's text with the table after each comment ``<!-- table: NAME -->`` replaced."""
    lines, kept, in_table = [], page.splitlines(), False
    names = {MARK.format(name): table for name, table in made.items()}
    for line in kept:
        if in_table and line.startswith("|"):
            continue
        in_table = line in names
        lines += [line, *names.get(line, ())]
    return "\n".join(lines) + "\n"
