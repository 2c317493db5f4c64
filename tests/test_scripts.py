"""Tests of all programs: those in scripts/ and tools/ run as documented, and none executes code that is in a file."""

import ast
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


FOLDERS = ("", "scripts", "tiny_stack", "tools", "tts_grpo")


def calls_in(tree: ast.AST):
    """Return the calls in a program, as pairs of the function's name and its keyword arguments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


def unsafe_calls(tree: ast.AST) -> list[str]:
    """Return the calls in a program that would execute code which a file of weights or data contains."""
    found = []
    for name, options in calls_in(tree):
        last = name.split(".")[-1]
        if name == "torch.load" and options.get("weights_only") != "True":
            found.append(f"{name} without weights_only=True")
        if name in ("pickle.load", "pickle.loads", "joblib.load", "yaml.load", "eval", "exec", "torch.hub.load"):
            found.append(name)
        if last in ("load", "from_pretrained", "AutoModel") and options.get("allow_pickle", "False") != "False":
            found.append(f"{name} with allow_pickle")
        if options.get("trust_remote_code", "False") != "False" or options.get("shell", "False") != "False":
            found.append(f"{name} with trust_remote_code or shell")
    return found


def test_no_program_executes_code_in_weights_or_data():
    for call in ("torch.load(p)", "torch.load(p, weights_only=False)", "f(p, trust_remote_code=True)", "eval(line)"):
        assert unsafe_calls(ast.parse(call)), call
    programs = [path for folder in FOLDERS for path in (ROOT / folder).glob("**/*.py" if folder else "*.py")]
    assert len(programs) > 100
    found = {path: unsafe for path in programs if (unsafe := unsafe_calls(ast.parse(path.read_text(encoding="utf-8"))))}
    assert found == {}
