"""Shared fixtures, such as the models of the tiny stack, which are loaded once."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TRAINER_SCRIPTS = {"merge", "prepare_llm", "train", "validation_audio"}  # scripts that run in the trainer environment
# No deadline: tests must not depend on speed.
hypothesis.settings.register_profile("cases", deadline=None, max_examples=int(os.environ.get("FUZZ_EXAMPLES", "100")))
hypothesis.settings.load_profile("cases")
os.environ.setdefault("TRITON_INTERPRET", "1")  # runs kernels on a CPU; Triton reads it at import

LONGEST = (  # run first, in this order
    "test_full_profile", "test_training", "test_tiny_training", "test_run_sh", "test_inference", "test_reward"
)  # fmt: skip


def pytest_collection_modifyitems(items: list) -> None:
    """Run the longest files first, so that two workers finish at about the same time."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def assets() -> Path:
    return ROOT / "assets" / "tiny"


@pytest.fixture(scope="session")
def token2wav(assets):
    from tts_grpo.speech.token2wav import load_token2wav

    return load_token2wav(assets / "token2wav")


@pytest.fixture(scope="session")
def asr(assets):
    from tts_grpo.speech.asr.sensevoice import SenseVoice

    return SenseVoice(assets / "asr_reward")


@pytest.fixture(scope="session")
def tokenizer(assets):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(assets / "llm")


@pytest.fixture(scope="session")
def lm(assets):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(assets / "llm", dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def sft_checkpoint(tmp_path_factory) -> Path:
    """A checkpoint in the published format of the SFT model, with a small network of random weights."""
    from tools import random_llm

    folder = tmp_path_factory.mktemp("llasa") / "checkpoint-885000"
    random_llm.main(["--output", str(folder), "--shape", "tiny", "--mean-tokens", "200"])
    return folder


@pytest.fixture(scope="session")
def cosyvoice3_dir(tmp_path_factory) -> Path:
    """A folder of CosyVoice3 in the official formats, with small networks of random weights."""
    from tools import random_llm

    folder = tmp_path_factory.mktemp("cosyvoice3")
    command = ["--model", "cosyvoice3", "--token2wav", "--shape", "tiny", "--mean-tokens", "200"]
    random_llm.main([*command, "--output", str(folder)])
    return folder


@pytest.fixture(scope="session")
def test_rows(assets) -> list[dict]:
    from tts_grpo.text.jsonl import read_jsonl

    return read_jsonl(assets / "data" / "test.jsonl")


@pytest.fixture(scope="session")
def trainer_python() -> str:
    """The trainer environment's Python; tests/run.sh makes this environment."""
    python = Path(os.environ.get("TRAINER_PYTHON", ROOT / ".venv" / "trainer" / "bin" / "python"))
    assert python.exists(), f"{python} is missing: bash tests/run.sh makes it"
    return str(python)


@pytest.fixture(scope="session")
def venv_root(trainer_python, tmp_path_factory) -> Path:
    """A folder with the environments speech (this one) and trainer, as run.sh expects them."""
    folder = tmp_path_factory.mktemp("venv")
    for name, python in (("speech", sys.executable), ("trainer", trainer_python)):
        (folder / name).symlink_to(Path(python).parent.parent)
    return folder


def git_commit(folder: Path) -> str:
    """Commit all files of a folder, making it a git repository if it is none. Returns the commit."""
    git = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@y"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "--allow-empty", "-m", "state"]):
        subprocess.run([*git, *command], check=True)
    return subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


def free_ports(count: int) -> list[int]:
    """Ports on which no process listens."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


class RewardServer:
    """A real reward server with the tiny stack's models, as a process on its own ports.

    Args:
        assets: folder of the tiny stack.
        log: file for the server's output; the server works in its folder.
        flags: further flags.
        patch: Python code that injects a fault; it is executed in the server and in each instance.
    """

    def __init__(self, assets: Path, log: Path, *flags: str, patch: str = ""):
        self.http, grpc, metrics = free_ports(3)
        self.url, self.metrics_url, self.log = f"http://127.0.0.1:{self.http}", f"http://127.0.0.1:{metrics}", log
        program = [str(ROOT / "token2wav_asr_server.py")]
        if patch:
            program = [str(log.with_name("server.py"))]
            start = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport token2wav_asr_server as server\n{patch}\n"
            Path(program[0]).write_text(f'{start}if __name__ == "__main__":\n    sys.exit(server.main())\n')
        command = [
            sys.executable, *program, "--token2wav-dir", str(assets / "token2wav"),
            "--asr-dir", str(assets / "asr_reward"), "--no-tones", "--http-port", str(self.http),
            "--grpc-port", str(grpc), "--metrics-port", str(metrics), "--max-batch-size", "8", *flags,
        ]  # fmt: skip
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=log.parent)

    def wait_ready(self, timeout_s: float = 120.0) -> None:
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"{self.url}/v2/models/token2wav_asr/ready", timeout=5):
                    return
            except OSError:
                time.sleep(0.3)
        raise AssertionError(f"not ready: {self.log.read_text()[-3000:]}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Stop the server. Returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout=60)


@pytest.fixture(scope="session")
def reward_server(assets, tmp_path_factory):
    server = RewardServer(assets, tmp_path_factory.mktemp("server") / "log", "--instances", "2")
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()
