"""Tests that the programs in scripts/ and tools/ run as documented: python scripts/X.py."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT, TRAINER_SCRIPTS

pytestmark = pytest.mark.slow

PROGRAMS = sorted([*ROOT.glob("scripts/*.py"), *ROOT.glob("tools/*.py")])
# Runs programs as Python does, but in one process, because most import torch, which takes seconds.
RUN_ALL = """
import os, runpy, sys
for script in sys.argv[1:]:
    sys.path[0], sys.argv = os.path.dirname(script), [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, script
    else:
        raise AssertionError(f"{script} went on after --help")
"""


@pytest.mark.parametrize("in_trainer", [False, True], ids=["speech", "trainer"])
def test_programs_need_no_pythonpath(in_trainer, trainer_python, tmp_path):
    scripts = [str(path) for path in PROGRAMS if (path.stem in TRAINER_SCRIPTS) == in_trainer]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [trainer_python if in_trainer else sys.executable, "-c", RUN_ALL, *scripts]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage:") == len(scripts) >= len(TRAINER_SCRIPTS)


def test_scripts_are_what_the_recipe_calls_and_tools_are_not():
    """A name in a comment does not count as a call."""
    callers = [ROOT / "run.sh", *ROOT.glob("conf/**/*.sh"), *ROOT.glob("scripts/*.*")]
    code = "\n".join(line for path in callers for line in path.read_text().splitlines() if "#" not in line)
    for path in PROGRAMS:
        called = f"scripts/{path.name}" in code or f'"{path.name}"' in code
        assert called == (path.parent.name == "scripts"), path
