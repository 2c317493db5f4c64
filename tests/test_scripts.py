"""The programs in scripts/, called as their docstrings and the docs say: python scripts/X.py."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT, TRAINER_SCRIPTS

pytestmark = pytest.mark.slow

# Runs programs as Python does, in one process: most import torch, which takes seconds each time.
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
    scripts = [str(path) for path in (ROOT / "scripts").glob("*.py") if (path.stem in TRAINER_SCRIPTS) == in_trainer]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [trainer_python if in_trainer else sys.executable, "-c", RUN_ALL, *scripts]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage:") == len(scripts) >= len(TRAINER_SCRIPTS)
