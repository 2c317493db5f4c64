"""scripts/make_env.sh with a stand-in for Python."""

import os
import subprocess
import time
from pathlib import Path

import pytest

# Answers as Python would; "-m venv DIR" puts the stand-in itself there. Calls of pip are written to a file.
STAND_IN = """#!/usr/bin/env bash
case "$*" in
  --version) echo "Python $VERSION" ;;
  *sys.version_info*) [[ $VERSION == 3.11.* || $VERSION == 3.12.* ]] ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
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
    base |= {"PIP_CALLS": str(calls)}

    def run(version="3.11.7", pip_status=0):
        environment = base | {"VERSION": version, "PIP_STATUS": str(pip_status)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done, len(calls.read_text().splitlines())

    run.requirements, run.command, run.environment = requirements, command, base
    return run


def test_made_once_and_again_when_pins_change(make_env):
    assert make_env()[1] == 1
    assert make_env()[1] == 1
    make_env.requirements.write_text("a==2\n")
    done, calls = make_env()
    assert (done.returncode, calls) == (0, 2)


def test_a_failed_installation_is_not_taken_for_done(make_env):
    assert make_env(pip_status=1)[0].returncode != 0
    done, calls = make_env()
    assert (done.returncode, calls) == (0, 2)


def test_a_marked_line_is_installed_without_what_it_asks_for(make_env, tmp_path):
    make_env.requirements.write_text("a==1\nb==2  # no-deps: asks for a compiler\n")
    assert make_env()[1] == 2
    first, second = (tmp_path / "calls").read_text().splitlines()
    assert "--no-deps" not in first and "--no-deps" in second
    environment = tmp_path / "environments/speech"
    assert (environment / "requirements.txt").read_text() == "a==1\n"
    assert (environment / "no-deps.txt").read_text().startswith("b==2")


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


def test_another_python_is_refused_in_words(make_env):
    done, calls = make_env(version="3.13.0")
    assert (done.returncode, calls) == (1, 0)
    assert "needs Python 3.11 or 3.12" in done.stderr and "base_python=" in done.stderr


def test_usage():
    done = subprocess.run(["bash", "scripts/make_env.sh"], capture_output=True, text=True)
    assert done.returncode == 2 and "NAME" in done.stderr
