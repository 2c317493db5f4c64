"""GRPO with the real veRL and reward server, by run.sh, with few rollouts.

One training is killed after its first step and resumed; another one is not, and ends when its reward server dies.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tests.conftest import free_ports
from tests.test_validation_audio import read_audio
from tts_grpo.training.verl_log import parse_step

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 1200  # also on a machine with other load
OWN_REWARD = (ROOT / "docs/my_reward.py").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def recipe(venv_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    http, grpc, metrics = map(str, free_ports(3))
    small = {
        "total_steps": "2", "train_batch_size": "2", "rollout_n": "2", "max_response_length": "48", "save_freq": "1",
        "test_freq": "2", "micro_batch_size": "4", "server_instances": "1", "server_batch_size": "4",
        "check_reward_freq": "1", "seeds": "0", "quality_utterances": "0", "infer_procs": "1", "max_new_tokens": "60",
    }  # fmt: skip
    test_jsonl = folder / "dev.jsonl"
    lines = (ROOT / "assets/tiny/data/dev.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    test_jsonl.write_text("".join(lines[:4]), encoding="utf-8")
    ports = {"http_port": http, "grpc_port": grpc, "metrics_port": metrics}
    own = folder / "my rewards/short.py"
    own.parent.mkdir()
    own.write_text(OWN_REWARD)
    files = {
        "venv_root": venv_root, "exp_dir": folder / "exp", "test_jsonl": test_jsonl, "eval_jsonl": test_jsonl,
        "rewards": f'intelligibility:1 pace:0.2,units_per_s=3.9 "{own}":0.3,limit_s=1.5',
    }  # fmt: skip
    return os.environ | small | ports | {name: str(value) for name, value in files.items()}


def run_sh(recipe, *arguments) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "run.sh"), *arguments]
    return subprocess.run(command, env=recipe, capture_output=True, text=True, timeout=TIMEOUT_S)


@pytest.fixture(scope="module")
def with_data(recipe, tmp_path_factory):
    """A function that copies the results of stage 0 to a folder, and returns the variables of a run there."""
    made = tmp_path_factory.mktemp("data") / "exp"
    done = run_sh(recipe | {"exp_dir": str(made)}, "0", "0")
    assert done.returncode == 0, done.stderr

    def copy(exp_dir: Path) -> dict[str, str]:
        shutil.copytree(made, exp_dir, symlinks=True)
        return recipe | {"exp_dir": str(exp_dir)}

    return copy


def start(recipe) -> subprocess.Popen:
    """Start the training, with its reward server."""
    command = ["bash", str(ROOT / "run.sh"), "1", "2"]
    return subprocess.Popen(command, env=recipe, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def read_until(process: subprocess.Popen, text: str) -> str:
    """Read what a run shows up to the first line with ``text``, and return it."""
    shown = ""
    while text not in shown:
        line = process.stdout.readline()
        assert line, shown
        shown += line
    return shown


def kill_trainer_after_first_checkpoint(recipe) -> None:
    """Kill veRL's driver with SIGKILL after the first checkpoint, as the kernel does when memory runs out."""
    exp_dir = Path(recipe["exp_dir"])
    process = start(recipe)
    end = time.monotonic() + TIMEOUT_S
    while not (exp_dir / "checkpoints/latest_checkpointed_iteration.txt").exists():
        assert process.poll() is None and time.monotonic() < end, process.stdout.read()[-3000:]
        time.sleep(0.05)
    found = subprocess.run(["pgrep", "-f", f"main_ppo.*{exp_dir}"], capture_output=True, text=True).stdout.split()
    for pid in found:
        if "train.py" not in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(int(pid), signal.SIGKILL)
    assert process.wait(timeout=120) != 0


@pytest.fixture(scope="module")
def resumed(recipe, with_data) -> subprocess.CompletedProcess:
    """The second part of a training that was killed after the first step, and its merge."""
    with_data(Path(recipe["exp_dir"]))
    kill_trainer_after_first_checkpoint(recipe)
    done = run_sh(recipe, "1", "3")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def ended_by_its_server(with_data, tmp_path_factory) -> tuple[Path, int, str]:
    """A training of 50 steps whose reward server dies after the second. Returns its folder, status and output.

    Other processes load the machine in the first two steps: they would only slow down the start.
    """
    exp_dir, load = tmp_path_factory.mktemp("ended") / "exp", []
    variables = with_data(exp_dir) | {"total_steps": "50", "save_freq": "2"}
    process = start(variables)
    try:
        shown = read_until(process, "validation after step 0")
        load += [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
        shown += read_until(process, "step 2/50")
    finally:
        for one in load:
            one.kill()
            one.wait()
    server = ["pgrep", "-f", f"token2wav_asr_server.*{variables['http_port']}"]
    for pid in subprocess.run(server, capture_output=True, text=True).stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    shown += process.communicate(timeout=TIMEOUT_S)[0]
    return exp_dir, process.returncode, shown


def weights(exp_dir: Path) -> dict[str, bytes]:
    """The data of the tensors in a checkpoint and its optimizer; the rest of these files differs at each writing."""
    found = {}
    for kind in ("model", "optim"):
        (path,) = exp_dir.glob(f"checkpoints/global_step_2/actor/{kind}_*.pt")
        with zipfile.ZipFile(path) as archive:
            found |= {f"{kind} {name}": archive.read(name) for name in archive.namelist() if "/data/" in name}
    return found


def test_trains_survives_a_kill_and_merges(recipe, resumed):
    done = resumed
    exp_dir = Path(recipe["exp_dir"])
    assert (exp_dir / "log/hydra/.hydra/config.yaml").exists() and not (ROOT / "outputs").exists()
    log = (exp_dir / "log/train.log").read_text()
    assert re.search(r"[Rr]esum\w* from .*global_step_1|Setting global step to 1", log)
    assert "step 2/2: reward" in done.stdout and "validation after step 2" in done.stdout
    assert {"0.jsonl", "2.jsonl"} <= {path.name for path in (exp_dir / "validation").iterdir()}
    audio = read_audio(exp_dir / "tensorboard/validation")
    metrics = dict(filter(None, map(parse_step, log.splitlines())))[2]
    share, *bounds = (metrics[f"critic/advantages/{name}"] for name in ("nonzero", "min", "max"))
    assert (share > 0) == any(bounds)  # veRL logs the advantages after credit by syllable, the profile's setting
    assert metrics["rollouts/unscored_rollout"] == metrics["rollouts/other_tokens"] == 0
    assert 0 < metrics["timing_s/generation"] < metrics["timing_s/step"]
    assert len(audio) == 4 and all(events[-1][0] == 2 for events in audio.values()), done.stdout[-3000:]
    merged = exp_dir / "merged_hf_model"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    assert len(model.generation_config.eos_token_id) == 2
    assert tokenizer.chat_template.count("SPEECH_GENERATION_START") == 1
    assert run_sh(recipe, "0", "3").stdout.count("already done") == 3


def test_a_checkpoint_of_a_training_with_attention_over_packs_is_merged(recipe, resumed, tmp_path):
    """On GPUs, the checkpoint's config.json names this attention, which only this recipe's modules know."""
    exp_dir = Path(recipe["exp_dir"])
    checkpoint = shutil.copytree(exp_dir / "checkpoints/global_step_2/actor", tmp_path / "actor")
    config = checkpoint / "huggingface/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attn_implementation": "varlen"}))
    command = [Path(recipe["venv_root"]) / "trainer/bin/python", ROOT / "scripts/merge.py", "--checkpoint", checkpoint,
               "--sft-path", exp_dir / "sft_model", "--output-dir", tmp_path / "merged"]  # fmt: skip
    done = subprocess.run(command, env=recipe | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "varlen" not in (tmp_path / "merged/config.json").read_text()


def test_a_reward_of_the_users_own_is_in_log_summary_and_report(recipe, resumed):
    exp_dir = Path(recipe["exp_dir"])
    metrics = dict(filter(None, map(parse_step, (exp_dir / "log/train.log").read_text().splitlines())))[2]
    for name in ("intelligibility", "pace", "short"):
        assert 0 <= metrics[f"reward_parts/{name}/mean"] <= 1 and 0 <= metrics[f"reward_parts/{name}/equal_groups"] <= 1
    done = run_sh(recipe, "4", "4")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((exp_dir / "summary.json").read_text(encoding="utf-8"))
    assert summary["reward_parts"]["short"]["last"] > 0 and "short " in done.stdout
    assert "Reward: short" in (exp_dir / "report.html").read_text(encoding="utf-8")
    own = exp_dir.parent / "my rewards/short.py"
    own.write_text(OWN_REWARD.replace("min(1.0,", "min(0.9,"))
    done = run_sh(recipe, "2", "2")
    own.write_text(OWN_REWARD)
    assert done.returncode and f"(rewards: {own} has changed)" in done.stderr


def test_equal_settings_give_equal_weights_in_spite_of_a_kill_and_of_other_load(recipe, resumed, ended_by_its_server):
    """After two steps each. The number of steps that a training is to have does not matter."""
    exp_dir, _, shown = ended_by_its_server
    first, second = weights(Path(recipe["exp_dir"])), weights(exp_dir)
    assert len(first) > 100 and [name for name in first | second if first.get(name) != second.get(name)] == []
    assert "did not arrive" not in (exp_dir / "log/train.log").read_text(), shown


def test_a_server_that_dies_in_mid_training_stops_it(ended_by_its_server):
    exp_dir, status, shown = ended_by_its_server
    assert status != 0
    assert "training failed: the reward server has ended" in shown and "continues from the last checkpoint" in shown
    assert (exp_dir / "checkpoints/latest_checkpointed_iteration.txt").read_text() == "2"


def test_training_without_a_server_does_not_start(with_data, tmp_path):
    done = run_sh(with_data(tmp_path / "exp") | {"server_urls": "http://127.0.0.1:9"}, "2", "2")
    assert done.returncode == 1 and "no reward server is ready" in done.stderr
