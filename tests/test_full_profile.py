"""Runs the full-size profiles from downloads to the last stage on a CPU, with fake hubs and small random networks.

The hubs serve repositories in the published layouts (tests/hub_repositories.py): file names, formats, data types and
configs are the originals', but sizes and weights are not. A random token2wav makes unintelligible speech, so the
known-answer check is off and the error rates are meaningless.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests import hub_repositories
from tests.asr_folders import make_small_sensevoice
from tests.conftest import free_ports, git_commit
from tests.hub import Hub
from tts_grpo.speech.cosyvoice2.random_weights import make_sensevoice_folder
from tts_grpo.speech.head_bias import load_head_bias
from tts_grpo.text.jsonl import read_jsonl, write_jsonl
from tts_grpo.text.tokens import parse_speech_tokens
from tts_grpo.training.verl_log import parse_step

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
VARIED_REWARD = """
class Reward:
    def __init__(self, context):
        pass

    def __call__(self, batch):
        return [sum(tokens) % 1000 / 1000 for tokens in batch.speech_tokens]
"""


def make_source(folder: Path, assets: Path) -> str:
    """Make a git repository with CosyVoice's modules in the official layout. Returns its commit."""
    import cosyvoice
    import matcha
    import soundfile as sf

    shutil.copytree(Path(cosyvoice.__path__[0]), folder / "cosyvoice")
    shutil.copytree(Path(matcha.__path__[0]), folder / "third_party/Matcha-TTS/matcha")
    (folder / "asset").mkdir()
    speech, rate = sf.read(sorted((assets / "prompts").glob("*.ogg"))[0])
    sf.write(folder / "asset/zero_shot_prompt.wav", speech, rate)
    return git_commit(folder)


@pytest.fixture(scope="module")
def shared(trainer_python, venv_root, assets, sft_checkpoint, cosyvoice3_dir, tmp_path_factory):
    """Variables for every run: the hubs, the repository to clone, the folder of the downloads, small sizes.

    Recognisers find no text in the speech of random weights. A second part of the reward makes rewards differ.
    """
    folder = tmp_path_factory.mktemp("profile")
    hub_repositories.make_all(folder / "hub", assets, sft_checkpoint, cosyvoice3_dir, trainer_python)
    hub = Hub(folder / "hub")
    (folder / "varied.py").write_text(VARIED_REWARD)
    yield {
        "profile": "cosyvoice2", "venv_root": str(venv_root), "make_envs": "0", "cosyvoice_url": str(folder / "source"),
        "cosyvoice_commit": make_source(folder / "source", assets),
        "MODELSCOPE_ENDPOINT": hub.url, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(folder / "hf"), "MODELSCOPE_CACHE": str(folder / "ms"),
        "workspace": str(folder / "workspace"), "rewards": f"intelligibility:1 {folder / 'varied.py'}:1",
        "check_reward": "0", "num_train": "40", "num_test": "4", "train_device": "cpu", "server_devices": "cpu",
        "server_instances": "1", "server_threads": "1", "infer_device": "cpu", "server_batch_size": "4",
        "total_steps": "2", "train_batch_size": "2", "rollout_n": "2", "micro_batch_size": "2",
        "max_response_length": "24", "max_new_tokens": "24", "save_freq": "2", "test_freq": "2", "train_threads": "2",
        "quality_utterances": "3",
        # a random model would end at once if top_k left only the end token and few others
        "temperature": "1.0", "top_p": "1.0", "top_k": "-1",
    }  # fmt: skip
    hub.close()


def model_variables(llm: str, shared: dict[str, str], folder: Path) -> dict[str, str]:
    """Variables that choose the language model: CosyVoice3's, ``llm=llasa``, ``llm=official`` or a user's own folder.

    The own folder holds the official model as CosyVoice's recipe converts it. This is the most demanding form: without
    the head's bias, its text ids have the logit 0.
    """
    if llm == "cosyvoice3":
        return {"profile": llm, "model_hub": "huggingface", "llm_pt": "llm.rl.pt"} | two_languages(folder)
    if llm != "own":
        return {"llm": llm}
    official = Path(shared["HF_HOME"]).parent / "hub" / hub_repositories.COSYVOICE2["modelscope"]
    return {"sft_path": str(hub_repositories.make_cosyvoice2_llm(folder / "my-model", official))}


def two_languages(folder: Path) -> dict[str, str]:
    """Variables for training and evaluation in Chinese, with an instruction, and in English."""
    texts = {
        "train": [
            {"text": "我们明天见。", "instruct": "请用广东话表达。"},
            {"text": "See you later.", "language": "en"},
        ],
        "test": [{"text": "今天天气好。"}, {"text": "How are you today?", "language": "en"}],
    }
    for name, rows in texts.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    asr_dirs = [
        str(make_sensevoice_folder(folder / name)) for name in ("asr_reward", "asr_eval")
    ]  # know both languages
    return {
        "train_jsonl": str(folder / "train.jsonl"), "test_jsonl": str(folder / "test.jsonl"),
        "reward_asr_dirs": asr_dirs[0], "eval_asr_dir_en": asr_dirs[1], "dataset": "zero_shot_zh zero_shot_en",
    }  # fmt: skip


class Profile:
    """Runs of run.sh with one language model (see :func:`model_variables`), in a folder of their own."""

    def __init__(self, shared: dict[str, str], folder: Path, llm: str, **settings: str):
        self.exp_dir = folder / "exp"
        ports = dict(zip(("http_port", "grpc_port", "metrics_port"), map(str, free_ports(3)), strict=True))
        self.environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "PYTHONPATH")} | shared
        self.environment |= ports | {"exp_dir": str(self.exp_dir)} | settings | model_variables(llm, shared, folder)

    def run(self, *arguments: str, **settings: str) -> str:
        """Run stages, which must succeed. Returns the output."""
        command = ["bash", str(ROOT / "run.sh"), *arguments]
        done = subprocess.run(command, env=self.environment | settings, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0 and "WRONG" not in done.stdout, done.stdout[-3000:] + done.stderr[-5000:]
        return done.stdout


def test_all_stages(shared, tmp_path):
    """The SFT model, trained with GSPO and with DAPO's replacement of groups and penalty of long rollouts."""
    settings = {"algorithm": "gspo", "filter_groups": "True", "overlong_percent": "20", "seeds": "0 1"}
    llasa = Profile(shared, tmp_path, "llasa", **settings)
    assert "step 2/2: reward" in llasa.run("-1", "5")
    steps = dict(filter(None, map(parse_step, (llasa.exp_dir / "log/train.log").read_text().splitlines())))
    assert all(steps[step]["critic/advantages/max"] > 0 for step in (1, 2))
    check_evaluation(llasa.exp_dir, ["0", "1"])
    assert (llasa.exp_dir / "tongue_twister.wav").stat().st_size > 10_000
    assert not (llasa.exp_dir / "merged_hf_model/lora_adapter").exists()
    llasa.run("--check")
    again = llasa.run("-1", "5")
    assert again.count("already done") == 4 and again.count("already downloaded") == 4, again[-2000:]


def test_all_stages_of_cosyvoice3(shared, tmp_path):
    """Trained and evaluated in two languages. An adapter is trained, with Dr. GRPO and a KL loss."""
    one_step = {"total_steps": "1", "save_freq": "1", "test_freq": "1", "seeds": "0"}
    settings = {"algorithm": "dr_grpo", "lora_rank": "4", "kl_loss_coef": "0.01"}
    cosyvoice3 = Profile(shared, tmp_path, "cosyvoice3", **one_step, **settings)
    assert "step 1/1: reward" in cosyvoice3.run("-1", "5")
    exp_dir = cosyvoice3.exp_dir
    check_evaluation(exp_dir, ["0"])
    assert (exp_dir / "tongue_twister.wav").stat().st_size > 10_000
    summary = json.loads((exp_dir / "summary.json").read_text())
    assert set(summary["sets"]) == {"zero_shot_zh", "zero_shot_en"}
    assert set(summary["sets"]["zero_shot_en"]["grpo"]["seeds"]) == {"0"}
    prompts = {row["input"] for row in read_jsonl(exp_dir / "validation/1.jsonl")}
    assert "You are a helpful assistant.How are you today?" in prompts  # veRL leaves out control tokens
    check_trained_with_bias(exp_dir, "1")
    check_exported(exp_dir / "llm.pt", Path(shared["workspace"]) / "Fun-CosyVoice3-0.5B-2512/llm.rl.pt", True)
    assert (exp_dir / "merged_hf_model/lora_adapter").exists()
    cosyvoice3.run("--check")


def test_own_folder_is_trained_and_the_official_model_gets_its_weights(shared, tmp_path):
    """Both have the same form. The training with GDPO runs on the own folder, and its checkpoint is merged into both.

    Their evaluation is left out: the test of published figures evaluates the official model.
    """
    official_pt = Path(shared["workspace"]) / "CosyVoice2-0.5B/llm.pt"
    own = Profile(shared, tmp_path / "own", "own", algorithm="gdpo")
    assert "step 2/2: reward" in own.run("-1", "3")
    check_trained_with_bias(own.exp_dir, "2")
    check_exported(own.exp_dir / "llm.pt", official_pt, False)
    own.run("--check")
    official = Profile(shared, tmp_path / "official", "official")
    official.run("-1", "0")
    official.run("3", "3", llm_path=str(own.exp_dir / "checkpoints/global_step_2"))
    check_exported(official.exp_dir / "llm.pt", official_pt, True)
    merged, prepared = (load_head_bias(official.exp_dir / name) for name in ("merged_hf_model", "sft_model"))
    assert torch.equal(merged, prepared)
    official.run("--check")


def check_evaluation(exp_dir: Path, seeds: list[str]) -> None:
    """Check that the manifests of both models have all utterances of the set, and the summary has all seeds."""
    summary = json.loads((exp_dir / "summary.json").read_text())
    for model in ("sft", "grpo"):
        for seed in seeds:
            manifest = exp_dir / f"eval/{model}/seed_{seed}/manifest.jsonl"
            rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
            assert [r["id"] for r in rows] == [f"zero_shot_zh-{i}" for i in range(3)]
            assert all(r["prompt_text"] for r in rows)
            spoken = [r for r in rows if r["num_speech_tokens"]]
            assert spoken and all(r["duration_s"] == pytest.approx(r["num_speech_tokens"] / 25) for r in spoken)
        assert set(summary[model]["seeds"]) == set(seeds)


def check_trained_with_bias(exp_dir: Path, steps: str) -> None:
    """Check that the official head's bias, which excludes text ids, was used in rollouts and training, and merged."""
    rollouts = [json.loads(line) for line in (exp_dir / f"validation/{steps}.jsonl").read_text("utf-8").splitlines()]
    assert all(re.fullmatch(r"(<\|s_\d+\|>)*(<\|eos\d\|>)?", row["output"]) for row in rollouts), rollouts
    assert any(parse_speech_tokens(row["output"]) for row in rollouts)  # raises an error beyond the codebook
    assert torch.equal(load_head_bias(exp_dir / "merged_hf_model"), load_head_bias(exp_dir / "sft_model"))
    # training computes the same log-probability for each token as the rollout did
    log = (exp_dir / "log/train.log").read_text()
    (kl,) = re.findall(rf"step:{steps} - .*actor/ppo_kl:(?:np\.float64\()?([-0-9.e]+)", log)
    assert abs(float(kl)) < 1e-5


def check_exported(path: Path, original: Path, exact: bool) -> None:
    """Check that the export has the original's names, shapes and head bias (unless ``exact``, rounded to bfloat16)."""
    exported, before = (torch.load(p, map_location="cpu", weights_only=True) for p in (path, original))
    assert {k: v.shape for k, v in exported.items()} == {k: v.shape for k, v in before.items()}
    if "llm_decoder.bias" in before:
        bias, of_original = (state["llm_decoder.bias"].float() for state in (exported, before))
        assert torch.equal(bias, of_original if exact else of_original.bfloat16().float())


def test_published_figures_are_compared_with_those_of_random_weights(shared, tmp_path):
    """Runs the downloads, the conversion and the evaluation of a Chinese and an English set, without any training.

    CosyVoice3 is evaluated with ``llm.rl.pt``, on the English set only, because that is published.
    """
    sampling = ("temperature", "top_p", "top_k", "max_new_tokens")  # those of the published figures are used
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "PYTHONPATH")}
    environment |= {k: v for k, v in shared.items() if k not in sampling}
    environment |= {"workspace": str(tmp_path / "workspace"), "seeds": "0"}  # of its own: not everything is downloaded
    environment["eval_asr_dir_en"] = str(make_small_sensevoice(tmp_path / "asr_en"))  # instead of Whisper

    def reproduce(*systems: str) -> subprocess.CompletedProcess:
        command = ["bash", str(ROOT / "run.sh"), "reproduce", *systems, "--sets", "zero_shot_zh", "test_en",
                   "--output-dir", str(tmp_path / "out")]  # fmt: skip
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)

    done = reproduce("cosyvoice2", "cosyvoice3-rl")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    *figures, rl = json.loads((tmp_path / "out/comparison.json").read_text())["figures"]
    rows = {row["set"]: row for row in figures}
    assert (rl["system"], rl["published"]) == ("cosyvoice3-rl", 1.68) and rl["verdict"].startswith("not comparable: 3")
    assert rows["zero_shot_zh"]["verdict"] == "not comparable: 3 utterances, the published set has 500"
    assert rows["test_en"]["metric"] == "seed-tts-eval WER" and rows["test_en"]["published"] == 2.57
    assert not [text for row in rows.values() for text in row["differs"] if "sampling" in text or "precision" in text]
    assert rows["zero_shot_zh"]["differs"] == [f"torch version ({torch.__version__.split('+')[0]}, published 1.12)"]
    assert "recogniser (backend funasr, published transformers; model SenseVoiceSmall" in rows["test_en"]["differs"][0]
    assert "not comparable: 3 utterances" in done.stdout and not (tmp_path / "workspace/SenseVoiceSmall").exists()
    again = reproduce("cosyvoice2")
    assert again.returncode == 0 and again.stdout.count("already evaluated") == 2
