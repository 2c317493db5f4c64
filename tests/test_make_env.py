"""Tests of scripts/make_env.sh with a fake Python."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow

# Responds like Python. "-m venv DIR" copies this fake to DIR, and calls of pip are recorded in a file.
STAND_IN = """#!/usr/bin/env bash
case "$*" in
  --version) echo "Python $VERSION" ;;
  *sys.version_info*) [[ $VERSION == 3.11.* || $VERSION == 3.12.* ]] ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *import_module*) shift 2 && echo "${PYTHONDONTWRITEBYTECODE-unset} $*" >>"$IMPORTS" ;;
  "-m pip "*) [[ -z ${HANG-} ]] || { echo $$ >"$HANG" && exec sleep 60; }
    echo "$*" >>"$PIP_CALLS" && exit "${PIP_STATUS:-0}" ;;
esac
"""


@pytest.fixture
def make_env(tmp_path):
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    requirements = tmp_path / "req uirements.txt"
    requirements.write_text("a==1\n")
    calls = tmp_path / "calls"
    calls.touch()

    command = ["bash", "scripts/make_env.sh", "speech", str(requirements)]
    base = os.environ | {"base_python": str(python), "venv_root": str(tmp_path / "environments"), "VERSION": "3.11.7"}
    base |= {"PIP_CALLS": str(calls), "IMPORTS": str(tmp_path / "imports")}

    def run(version="3.11.7", pip_status=0):
        environment = base | {"VERSION": version, "PIP_STATUS": str(pip_status)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done, len(calls.read_text().splitlines())

    run.requirements, run.command, run.environment = requirements, command, base
    return run


def test_environments_are_rebuilt_when_pins_change(make_env):
    assert make_env()[1] == 1
    assert make_env()[1] == 1
    make_env.requirements.write_text("a==2\n")
    done, calls = make_env()
    assert (done.returncode, calls) == (0, 2)


def test_a_failed_installation_is_not_taken_for_done(make_env):
    assert make_env(pip_status=1)[0].returncode != 0
    done, calls = make_env()
    assert (done.returncode, calls) == (0, 2)


def test_only_what_is_imported_is_compiled_also_if_python_is_told_not_to_write(make_env, tmp_path):
    make_env.environment["PYTHONDONTWRITEBYTECODE"] = "1"
    make_env()
    assert "--no-compile" in (tmp_path / "calls").read_text()
    variable, *modules = (tmp_path / "imports").read_text().split()
    assert variable == "unset" and {"verl.trainer.main_ppo", "funasr"} <= set(modules)
    assert modules[-1] == "verl.workers.rollout.vllm_rollout.vllm_async_server"  # last, should vLLM crash


def test_hashes_are_required_except_of_marked_lines(make_env, tmp_path):
    make_env.requirements.write_text("a==1 --hash=sha256:0\nb==2  # no-hash: two builds\n")
    assert make_env()[1] == 2
    first, second = (tmp_path / "calls").read_text().splitlines()
    assert "--require-hashes --no-deps" in first
    assert "--require-hashes" not in second and "--no-deps" not in second
    environment = tmp_path / "environments/speech"
    assert (environment / "requirements.txt").read_text().startswith("a==1")
    assert (environment / "no-hash.txt").read_text().startswith("b==2")


LOCKS = {
    name: ROOT / f"requirements-{name}.txt" for name in ("cosyvoice", "asr", "verl", "verl-gpu")
} | {"tests": ROOT / "tests/requirements.txt"}  # fmt: skip


@pytest.mark.parametrize("name", LOCKS)
def test_lock_files_contain_the_requested_versions(name):
    """requirements/lock.sh was run after the last edit, and every package has a hash."""

    def versions(text: str) -> dict[str, str]:
        found = re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE)
        return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in found}

    lock = LOCKS[name].read_text()
    asked = versions((ROOT / f"requirements/{name}.in").read_text())
    assert asked and asked.items() <= versions(lock).items()
    for entry in re.split(r"\n(?=\S)", lock.strip()):
        assert entry.startswith("#") or "--hash=sha256:" in entry or "# no-hash" in entry, entry


def test_environments_have_all_that_their_packages_need(trainer_python):
    """They are installed without dependencies, so a package that a lock lacks would be missed at run time only."""
    on_purpose = (
        r"resemblyzer \S+ requires (typing|webrtcvad), |(token2wav-cosyvoice|dashscope) \S+ requires \S+, which"
    )
    for python in (sys.executable, trainer_python):
        done = subprocess.run([python, "-m", "pip", "check"], capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line != "No broken requirements found."]
        assert [line for line in lines if not re.match(on_purpose, line)] == []


def test_the_installation_ends_with_the_script(make_env, tmp_path):
    process = subprocess.Popen(make_env.command, env=make_env.environment | {"HANG": str(tmp_path / "pid")})
    end = time.monotonic() + 20
    while not (tmp_path / "pid").exists() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.3)
    process.terminate()
    assert process.wait(timeout=20) == 143
    pid = int((tmp_path / "pid").read_text())
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end, "pip is still at work"
        time.sleep(0.05)


def test_another_python_version_is_refused(make_env):
    done, calls = make_env(version="3.13.0")
    assert (done.returncode, calls) == (1, 0)
    assert "needs Python 3.11.5 or later" in done.stderr and "base_python=" in done.stderr


def test_usage():
    done = subprocess.run(["bash", "scripts/make_env.sh"], capture_output=True, text=True)
    assert done.returncode == 2 and "NAME" in done.stderr


def requirements_of_scripts() -> set[str]:
    """Requirements files that the repository's scripts pass to make_env.sh, relative to the repository."""
    scripts = [*ROOT.glob("*.sh"), *ROOT.glob("*/*.sh")]
    commands = "".join(" ".join(re.findall(r"make_env\.sh.*", path.read_text(encoding="utf-8"))) for path in scripts)
    return set(re.findall(r"(?:\w+/)?requirements[\w-]*\.txt", commands.replace("$root/", "")))


def test_every_package_of_an_environment_has_hashes_because_pip_refuses_it_otherwise():
    names = requirements_of_scripts()
    assert {"requirements-cosyvoice.txt", "tests/requirements.txt", "tiny_stack/requirements-corpus.txt"} <= names
    for name in names:
        text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        assert lines and all("--hash=sha256:" in line or "# no-hash" in line for line in lines), name
