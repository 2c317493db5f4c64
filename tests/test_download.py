"""Downloads from a fake hub with the hubs' own libraries."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.hub import Hub

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
REPO = "owner/model"


@pytest.fixture
def hub(tmp_path):
    folder = tmp_path / "repositories" / REPO
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "flow.pt").write_bytes(np.random.default_rng(0).bytes(300_000))
    hub = Hub(tmp_path / "repositories")
    yield hub
    hub.close()


def download(hub_url, name, tmp_path, *flags, repo=REPO):
    command = [
        sys.executable, str(ROOT / "scripts/download.py"), "--hub", name, "--repo", repo,
        "--output-dir", str(tmp_path / "out"), "--require", "config.json", "sub/flow.pt", *flags,
    ]  # fmt: skip
    settings = {
        "PYTHONPATH": str(ROOT), "MODELSCOPE_ENDPOINT": hub_url, "HF_ENDPOINT": hub_url, "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "hf"), "MODELSCOPE_CACHE": str(tmp_path / "ms"), "HF_HUB_DOWNLOAD_TIMEOUT": "5",
    }  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | settings
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", ["modelscope", "huggingface"])
def test_downloads_once_and_restores_changed_files(hub, name, tmp_path):
    done = download(hub.url, name, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    source = hub.folder / REPO / "sub/flow.pt"
    assert (tmp_path / "out/sub/flow.pt").read_bytes() == source.read_bytes()
    hub.requests.clear()
    assert "already downloaded" in download(hub.url, name, tmp_path).stdout and not hub.requests
    (tmp_path / "out/sub/flow.pt").write_bytes(b"cut off")
    done = download(hub.url, name, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out/sub/flow.pt").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("name", ["modelscope", "huggingface"])
def test_interrupted_download_is_resumed(hub, name, tmp_path):
    hub.cut["sub/flow.pt"] = 1
    done = download(hub.url, name, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out/sub/flow.pt").read_bytes() == (hub.folder / REPO / "sub/flow.pt").read_bytes()


def test_corrupt_file_is_refused(hub, tmp_path):
    hub.corrupt.add("sub/flow.pt")
    done = download(hub.url, "modelscope", tmp_path)
    assert done.returncode == 1 and "differs from the hub's listing" in done.stderr and "flow.pt" in done.stderr
    assert not (tmp_path / "out/.downloaded.json").exists()


@pytest.mark.parametrize(("name", "text"), [("modelscope", "access"), ("huggingface", "set HF_TOKEN")])
def test_error_for_a_gated_repository_gives_advice(hub, name, text, tmp_path):
    hub.gated.add(REPO)
    done = download(hub.url, name, tmp_path)
    assert done.returncode == 1 and text in done.stderr, done.stderr[-2000:]


@pytest.mark.parametrize("name", ["modelscope", "huggingface"])
def test_errors_name_a_missing_repository_and_missing_files(hub, name, tmp_path):
    done = download(hub.url, name, tmp_path, repo="owner/nothing")
    assert done.returncode == 1 and "no such repository" in done.stderr, done.stderr[-2000:]
    (hub.folder / REPO / "sub/flow.pt").unlink()
    done = download(hub.url, name, tmp_path)
    assert done.returncode == 1 and "sub/flow.pt missing or empty in owner/model" in done.stderr, done.stderr[-2000:]
    assert name == "modelscope" or "It contains config.json" in done.stderr


def test_include_selects_files_of_one_folder(hub, tmp_path):
    folder = hub.folder / REPO / "checkpoint-5"
    (folder / "global_step5").mkdir(parents=True)
    for path in ("config.json", "model.safetensors", "optimizer.pt", "global_step5/config.json"):
        (folder / path).write_bytes(b"{}")
    done = download(
        hub.url, "huggingface", tmp_path, "--include", "checkpoint-5/config.json", "checkpoint-5/model.safetensors",
        "--require", "checkpoint-5/config.json", "checkpoint-5/model.safetensors",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file() and ".cache" not in p.parts]
    assert {p.name for p in files} == {"config.json", "model.safetensors", ".downloaded.json"} and len(files) == 3


def test_two_models_of_one_folder_are_downloaded_once_each(hub, tmp_path):
    """As llm.pt and llm.rl.pt of CosyVoice3, evaluated in turns; without this, each turn would need the network."""
    (hub.folder / REPO / "other.pt").write_bytes(b"{}")
    parts = (["config.json", "sub/*"], ["config.json", "sub/*", "other.pt"])
    for include in parts:
        assert download(hub.url, "huggingface", tmp_path, "--include", *include).returncode == 0
    hub.requests.clear()
    for include in parts:
        assert "already downloaded" in download(hub.url, "huggingface", tmp_path, "--include", *include).stdout
    assert not hub.requests
    (tmp_path / "out/other.pt").write_bytes(b"cut off")
    assert download(hub.url, "huggingface", tmp_path, "--include", *parts[0]).returncode == 0
    assert (tmp_path / "out/other.pt").read_bytes() == b"{}"


@pytest.mark.parametrize("name", ["modelscope", "huggingface"])
def test_no_network_and_no_space(hub, name, tmp_path):
    done = download(hub.url, name, tmp_path, "--need-gib", "1000000")
    assert done.returncode == 1 and "GiB free" in done.stderr and not hub.requests
    done = download("http://127.0.0.1:9", name, tmp_path)
    assert done.returncode == 1 and "cannot be reached" in done.stderr, done.stderr[-2000:]
