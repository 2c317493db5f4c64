"""The full-size profile from its downloads to its last stage, on a CPU: stand-in hubs, small random networks.

Only sizes and weights differ from what a user downloads: file formats, tokenizer, template and commands are the same.
Random token2wav is not understood, so the known-answer check is off and the error rates say nothing.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import free_ports, git_commit
from tests.hub import Hub
from tts_grpo.jsonl import read_jsonl, write_jsonl
from tts_grpo.random_weights import make_cosyvoice2_folder

ROOT = Path(__file__).resolve().parent.parent
PARAFORMER = "iic/speech_seaco_paraformer_large_asr_nat-zh-cn-16k-common-vocab8404-pytorch"
MAKE_PARQUET = """
import sys, pathlib, pyarrow as pa, pyarrow.parquet as pq
rows = [
    {"id": f"utt{i}", "prompt_text": "在这里", "target_text": "你好吗", "prompt_audio": {"bytes": path.read_bytes()}}
    for i, path in enumerate(sorted(pathlib.Path(sys.argv[1]).glob("*.ogg")))
]
pq.write_table(pa.Table.from_pylist(rows), sys.argv[2])
"""


def make_repositories(root: Path, assets: Path, trainer_python: str) -> None:
    """What the hubs hold."""
    make_cosyvoice2_folder(root / "iic/CosyVoice2-0.5B")
    (root / "iic/CosyVoice2-0.5B/llm.pt").write_bytes(b"not used by these stages")
    shutil.copytree(assets / "asr_reward", root / "iic/SenseVoiceSmall")
    shutil.copytree(assets / "asr_eval", root / PARAFORMER)
    shutil.copytree(assets / "llm", root / "yuekai/llasa_cosyvoice2_token_qwen_0.5b")
    texts = root / "SparkAudio/voxbox/metadata/emilia_zh.jsonl"
    texts.parent.mkdir(parents=True)
    rows = [row | {"language": "zh", "duration": 3.0} for row in read_jsonl(assets / "data/train.jsonl")]
    write_jsonl(texts, rows)
    evaluation = root / "yuekai/CV3-Eval/data/zero_shot_zh-00000-of-00001.parquet"
    evaluation.parent.mkdir(parents=True)
    subprocess.run([trainer_python, "-c", MAKE_PARQUET, str(assets / "prompts"), str(evaluation)], check=True)


def make_source(folder: Path, assets: Path) -> str:
    """A git repository with CosyVoice's modules, laid out as the official one; its commit."""
    import cosyvoice
    import matcha
    import soundfile as sf

    shutil.copytree(Path(cosyvoice.__path__[0]), folder / "cosyvoice")
    shutil.copytree(Path(matcha.__path__[0]), folder / "third_party/Matcha-TTS/matcha")
    (folder / "asset").mkdir()
    speech, rate = sf.read(sorted((assets / "prompts").glob("*.ogg"))[0])
    sf.write(folder / "asset/zero_shot_prompt.wav", speech, rate)
    return git_commit(folder)


@pytest.fixture
def environment(trainer_python, venv_root, assets, tmp_path):
    make_repositories(tmp_path / "hub", assets, trainer_python)
    hub = Hub(tmp_path / "hub")
    http, grpc, metrics = map(str, free_ports(3))
    yield {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "PYTHONPATH")} | {
        "profile": "cosyvoice2", "workspace": str(tmp_path / "workspace"), "venv_root": str(venv_root),
        "exp_dir": str(tmp_path / "exp"), "make_envs": "0", "cosyvoice_url": str(tmp_path / "source"),
        "cosyvoice_commit": make_source(tmp_path / "source", assets),
        "MODELSCOPE_ENDPOINT": hub.url, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "hf"), "MODELSCOPE_CACHE": str(tmp_path / "ms"),
        "http_port": http, "grpc_port": grpc, "metrics_port": metrics, "check_reward": "0", "num_train": "40",
        "num_test": "4", "train_device": "cpu", "server_devices": "cpu", "server_threads": "1", "infer_device": "cpu",
        "server_batch_size": "4", "total_steps": "2", "train_batch_size": "2", "rollout_n": "2", "seeds": "0 1",
        "micro_batch_size": "2", "max_response_length": "24", "max_new_tokens": "24", "save_freq": "2",
        "test_freq": "2", "train_threads": "2",
    }  # fmt: skip
    hub.close()


def test_all_stages(environment, tmp_path):
    command = ["bash", str(ROOT / "run.sh"), "-1", "5"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    summary = json.loads((tmp_path / "exp/summary.json").read_text())
    for model in ("sft", "grpo"):
        for seed in ("0", "1"):
            manifest = tmp_path / f"exp/eval/{model}/seed_{seed}/manifest.jsonl"
            rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
            assert [r["id"] for r in rows] == ["utt0", "utt1", "utt2"] and all(r["prompt_text"] for r in rows)
            spoken = [r for r in rows if r["num_speech_tokens"]]
            assert spoken and all(r["duration_s"] == pytest.approx(r["num_speech_tokens"] / 25) for r in spoken)
        assert set(summary[model]["seeds"]) == {"0", "1"}
    assert "step 2/2: reward" in done.stdout
    assert (tmp_path / "exp/tongue_twister.wav").stat().st_size > 10_000
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and again.stdout.count("there already") == 4, again.stdout[-2000:]
    assert again.stdout.count("done already") == 4
