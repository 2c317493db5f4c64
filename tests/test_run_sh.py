"""Tests of run.sh with stub programs: which commands it runs, in which order, and what makes it stop."""

import functools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.settings import CODE, COMMANDS, Digests
from tests.conftest import free_ports, git_commit

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent

STUB = r"""#!/usr/bin/env bash
# Stands for python, torchrun and curl: notes its arguments, makes what the real program would, obeys FAIL and HANG.
name=$(basename "$1")
[[ $(basename "$0") != python || $name != watch_memory.py ]] || exec sleep 60
echo "$(basename "$0") $*" >>"$CALLS"
all=" $* "
value() { [[ $all =~ \ $1\ ([^ ]+) ]] && echo "${BASH_REMATCH[1]}"; }
[[ -z ${FAIL-} || $all != *"$FAIL"* ]] || { sleep "${SLOW:-0}"; echo "stub failure" >&2; exit 3; }
[[ -z ${FILL-} || $all != *"$FILL"* ]] || { head -c 99999999 /dev/zero >"$exp_dir/fill"; exit 3; }
case $all in
  *select_texts.py*|*--voices*) while (($#)); do
      [[ $1 != --*output ]] || { mkdir -p "$(dirname "$2")" && touch "$2"; }
      shift
    done ;;
  *download.py*|*prepare_eval_set.py*|*encode_prompts.py*) ;;
  *to-hf*) mkdir -p "${*: -1}" && touch "${*: -1}/config.json" ;;
  *prepare_llm.py*) mkdir -p "$exp_dir/sft_model" && touch "$exp_dir/sft_model/config.json" ;;
  *prepare_data.py*) mkdir -p "$exp_dir/data" && touch "$exp_dir/data/train.parquet" ;;
  *token2wav_asr_server.py\ --*) [[ -z ${SERVER_DIES-} ]] || { printf '%b\n' "$SERVER_DIES" >&2; exit 1; }
    echo $$ >"$READY"
    stopped() { # not before two seconds after the program STOPS_AFTER was called
      for ((i = 0; i < 50; i++)); do
        [[ -n ${STOPS_AFTER-} ]] && ! grep -qF "$STOPS_AFTER" "$CALLS" || break
        sleep 0.1
      done
      [[ -z ${STOPS_AFTER-} ]] || sleep 2
      rm -f "$READY"; echo stopped >>"$CALLS"; exit 0
    }
    trap stopped TERM INT
    while :; do sleep 0.1; done ;;
  *main_ppo*) for ((i = 0; i < ${HANG:-0}; i++)); do
      [[ ! -e $exp_dir/reward_failure ]] || { cat "$exp_dir/reward_failure" >&2; exit 1; }
      sleep 0.1
    done
    checkpoint=$exp_dir/checkpoints/global_step_7
    mkdir -p "$checkpoint/actor/huggingface"
    echo '{}' >"$checkpoint/actor/huggingface/config.json"
    echo '{"world_size": 1}' >"$checkpoint/actor/fsdp_config.json"
    for file in data.pt actor/{model,optim,extra_state}_world_size_1_rank_0.pt; do
      printf 'PK\005\006\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0' >"$checkpoint/$file" # an empty ZIP archive
    done
    echo -n 7 >"$exp_dir/checkpoints/latest_checkpointed_iteration.txt" ;;
  *merge.py*) while (($#)); do
      [[ $1 != --output-dir ]] || { mkdir -p "$2" && touch "$2/config.json"; }
      shift
    done ;;
esac
"""
PROGRAMS = (
    "make_env speech", "make_env trainer", "main_ppo", "prepare_llm.py", "prepare_data.py",
    "token2wav_asr_server.py --", "reward_tts.py", "merge.py", "infer_dist.py", "compute_wer", "summarise.py",
    "report.py", "infer_single.py", "stopped",
)  # fmt: skip
CURL = """#!/usr/bin/env bash
[[ -e $READY ]] || exit 22
"""


class Recipe:
    """A copy of the recipe whose programs are stubs, in a folder with a space in its name."""

    def __init__(self, tmp_path: Path):
        self.root = tmp_path / "a recipe"
        (self.root / "scripts").mkdir(parents=True)
        shutil.copytree(ROOT / "conf", self.root / "conf")
        shutil.copy(ROOT / "run.sh", self.root)
        for name in ("lib.sh", "eval_sets.sh", "full_size.sh", "verl_cpu.sh", "settings.py", "checkpoints.py"):
            shutil.copy(ROOT / "scripts" / name, self.root / "scripts")
        (self.root / "tts_grpo/reward").mkdir(parents=True)
        for name in ("libpython.py", "rewards.py"):
            shutil.copy(ROOT / "tts_grpo/reward" / name, self.root / "tts_grpo/reward")
        shutil.copytree(ROOT / "tts_grpo/reward/parts", self.root / "tts_grpo/reward/parts")
        (self.root / "tts_grpo/text").mkdir()
        for name in ("input_files.py", "jsonl.py", "tags.py", "tokens.py"):
            shutil.copy(ROOT / "tts_grpo/text" / name, self.root / "tts_grpo/text")
        (self.root / "scripts/make_env.sh").write_text('echo "make_env $1" >>"$CALLS"\n')
        (self.root / "scripts/compute_wer.sh").write_text('echo "compute_wer $1 seeds=$seeds" >>"$CALLS"\n')
        for name, text in (("venv/speech/bin/python", STUB), ("venv/trainer/bin/python", STUB),
                           ("venv/speech/bin/torchrun", STUB), ("bin/curl", CURL)):  # fmt: skip
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        self.calls_path, self.exp_dir = self.root / "calls", self.root / "exp/tiny"
        ports = map(str, free_ports(3))
        self.ports = dict(zip(("http_port", "grpc_port", "metrics_port"), ports, strict=True))

    def environment(self, **variables) -> dict[str, str]:
        return os.environ | {
            "PATH": f"{self.root}/bin:{os.environ['PATH']}", "venv_root": str(self.root / "venv"),
            "CALLS": str(self.calls_path), "READY": str(self.root / "ready"), "exp_dir": str(self.exp_dir),
            "server_timeout_s": "5", "profile": "tiny",
        } | self.ports | variables  # fmt: skip

    def run(self, *arguments, **variables) -> subprocess.CompletedProcess:
        self.calls_path.write_text("")
        command = ["bash", str(self.root / "run.sh"), *arguments]
        return subprocess.run(command, env=self.environment(**variables), capture_output=True, text=True, timeout=60)

    def calls(self) -> list[str]:
        """Names of the programs that were called, in order."""
        lines = self.calls_path.read_text().splitlines()
        return [name for line in lines for name in [next((n for n in PROGRAMS if n in line), None)] if name]


@pytest.fixture
def recipe(tmp_path):
    return Recipe(tmp_path)


def test_idle_openmp_threads_spin_briefly_unless_the_user_decides(recipe):
    (recipe.root / "scripts/compute_wer.sh").write_text('echo "$OMP_WAIT_POLICY, $GOMP_SPINCOUNT" >>"$CALLS"\n')
    assert recipe.run("0", "4", OMP_WAIT_POLICY="", GOMP_SPINCOUNT="").returncode == 0
    assert "active, 1000" in recipe.calls_path.read_text()
    assert recipe.run("4", "4", force="1", OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT="7").returncode == 0
    assert "passive, 7" in recipe.calls_path.read_text()


def test_all_stages_in_order_then_skipped_then_forced(recipe):
    done = recipe.run(STOPS_AFTER="merge.py")
    assert done.returncode == 0, done.stderr
    calls = recipe.calls()
    assert set(calls[:2]) == {"make_env speech", "make_env trainer"}
    assert calls[2:] == [
        "prepare_llm.py", "prepare_data.py", "token2wav_asr_server.py --", "reward_tts.py", "main_ppo",
        "merge.py", "stopped",
        "infer_dist.py", "infer_dist.py", "compute_wer", "compute_wer", "summarise.py", "report.py", "infer_single.py",
    ]  # fmt: skip
    assert not (recipe.root / "ready").exists(), "the server was not stopped"
    assert recipe.run("0", "4").returncode == 0
    assert recipe.calls() == []
    assert recipe.run("0", "4", exp_name="tiny", rollout_n="3", force="1").returncode == 0
    assert recipe.calls()[-1] == "report.py" and "main_ppo" in recipe.calls()


def test_one_changed_setting_redoes_what_depends_on_it(recipe):
    assert recipe.run("0", "4").returncode == 0
    assert recipe.run("0", "4", seeds="0 1").returncode == 0
    assert recipe.calls() == ["infer_dist.py"] * 2 + ["compute_wer"] * 2 + ["summarise.py", "report.py"]
    assert "--seeds 0 1 " in recipe.calls_path.read_text()


def test_checkpoints_of_other_settings_are_not_trained_on(recipe):
    assert recipe.run("0", "2").returncode == 0
    other = recipe.run("0", "2", learning_rate="1")
    assert other.returncode == 1 and "trained with other settings" in other.stderr
    assert recipe.run("0", "2", learning_rate="1", force="1").returncode == 0


@pytest.mark.parametrize("arguments", [("x",), ("3", "1"), ("-2",), ("6",), ("0", "1", "2"), ("1.5",)])
def test_usage_errors(recipe, arguments):
    done = recipe.run(*arguments)
    assert done.returncode == 2 and "bash run.sh [--dry-run]" in done.stderr
    assert recipe.calls() == []


def test_unknown_profile_and_help(recipe):
    assert recipe.run("0", profile="huge").returncode == 2 and recipe.run("0", profile="settings").returncode == 2
    assert "tongue-twister" in recipe.run("--help").stderr


def test_full_size_install(recipe, tmp_path):
    source, workspace = tmp_path / "source", tmp_path / "a workspace"
    (source / "cosyvoice").mkdir(parents=True)
    (source / "cosyvoice/__init__.py").touch()
    commit = git_commit(source)
    assert git_commit(source) != commit
    settings = {
        "profile": "cosyvoice2", "workspace": str(workspace), "cosyvoice_url": str(source), "cosyvoice_commit": commit,
    }  # fmt: skip
    broken = recipe.run("-1", "-1", **settings | {"cosyvoice_commit": "0" * 40})
    assert broken.returncode != 0 and not (workspace / "CosyVoice").exists()
    done = recipe.run("-1", "-1", **settings)
    assert done.returncode == 0, done.stderr
    head = subprocess.run(
        ["git", "-C", str(workspace / "CosyVoice"), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    assert head.stdout.strip() == commit
    calls = recipe.calls_path.read_text()
    for repo in (
        "iic/CosyVoice2-0.5B",
        "iic/SenseVoiceSmall",
        "yuekai/llasa_cosyvoice2_token_qwen_0.5b",
        "yuekai/CV3-Eval",
    ):
        assert f"--repo {repo} " in calls
    assert "prepare_eval_set.py" in calls and "encode_prompts.py" in calls
    assert recipe.run("-1", "-1", **settings, dataset="test_zh").returncode == 0
    calls = recipe.calls_path.read_text()
    assert "--repo yuekai/seed_tts_cosy2 " in calls and "voxbox" not in calls, (
        "texts that are there were asked for again"
    )
    assert recipe.run("-1", "-1", **settings, num_train="7").returncode == 0
    assert "--num-train 7 --num-test 100 " in recipe.calls_path.read_text(), (
        "other settings took the texts that were there"
    )


def test_one_checkpoint_of_the_sft_model_is_fetched(recipe, tmp_path):
    (tmp_path / "workspace/CosyVoice/cosyvoice").mkdir(parents=True)
    settings = {"profile": "cosyvoice2", "workspace": str(tmp_path / "workspace")}
    llasa = f"{tmp_path}/workspace/llasa_cosyvoice2_token_qwen_0.5b"
    fetched = lambda **more: recipe.run("--dry-run", "-1", "0", **settings | more).stdout  # noqa: E731
    dry = fetched()
    assert f"--output-dir {llasa} " in dry and f"--sft-path {llasa}/checkpoint-885000 " in dry
    assert " checkpoint-885000/model.safetensors " in dry and " model.safetensors " not in dry
    assert f"--sft-path {llasa}/checkpoint-800000 " in fetched(sft_checkpoint="checkpoint-800000")
    dry = fetched(sft_checkpoint="")
    assert f"--sft-path {llasa} " in dry and " model.safetensors " in dry and "checkpoint-" not in dry


def test_a_users_language_model_is_not_changed(recipe, tmp_path):
    (tmp_path / "workspace/CosyVoice/cosyvoice").mkdir(parents=True)
    settings = {"profile": "cosyvoice2", "workspace": str(tmp_path / "workspace"), "sft_path": str(tmp_path / "own")}
    missing = recipe.run("-1", "-1", **settings)
    assert missing.returncode == 1 and "own has no config.json" in missing.stderr
    (tmp_path / "own").mkdir()
    (tmp_path / "own/config.json").touch()
    assert recipe.run("-1", "-1", **settings).returncode == 0
    assert "llasa" not in recipe.calls_path.read_text()
    dry = recipe.run("--dry-run", "0", "4", **settings).stdout.replace("\\ ", " ")
    prepared = recipe.exp_dir / "sft_model"
    assert f"--sft-path {tmp_path}/own --output-dir {prepared} " in dry
    for text in (
        f"actor_rollout_ref.model.path=\\'{prepared}\\' ",
        f"--llm-path {prepared} ",
        f"--sft-path {prepared} ",
    ):
        assert text in dry


def test_the_official_language_model_is_converted_and_comes_back(recipe, tmp_path):
    workspace = tmp_path / "workspace"
    (workspace / "CosyVoice/cosyvoice").mkdir(parents=True)
    settings = {"profile": "cosyvoice2", "workspace": str(workspace), "llm": "official"}
    assert recipe.run("-1", "-1", **settings).returncode == 0
    calls = recipe.calls_path.read_text()
    llm, official = workspace / "CosyVoice2-0.5B-llm", workspace / "CosyVoice2-0.5B"
    assert f"convert_llm.py to-hf --cosyvoice-dir {official} --llm llm.pt --output {llm}\n" in calls
    assert "yuekai/llasa" not in calls
    dry = recipe.run("--dry-run", "2", "3", **settings).stdout
    assert f"prepare_llm.py --sft-path {llm} " in recipe.run("--dry-run", "0", **settings).stdout
    merged = recipe.exp_dir / "checkpoints/global_step_N/merged_hf_model"
    back = f"to-official --hf {merged} --like {official}/llm.pt --output {recipe.exp_dir}/llm.pt"
    assert back in dry.replace("\\ ", " ")
    assert "to-official" not in recipe.run("--dry-run", "2", "3", **settings | {"llm": "llasa"}).stdout


def test_english_takes_english_texts_sets_and_recognisers(recipe):
    settings = {"profile": "cosyvoice2", "gpu_memory_gib": "80", "workspace": "/workspace", "exp_dir": ""}
    shown = recipe.run("--dry-run", "-1", "4", **settings, language="en").stdout.replace("\\", "")
    for part in (
        "--include metadata/emilia_en.jsonl ", "--max-duration-s 30 --excludes '' ", "select_texts.py",
        "--language en ", "data/zero_shot_en.jsonl ", "known_answer-en.jsonl",
        "faster-whisper-large-v3", ", language: en,",
        "--asr-dirs /workspace/SenseVoiceSmall ",
    ):  # fmt: skip
        assert part in shown, part
    assert "zero_shot_zh" not in shown and "--language zh" not in shown


def test_cosyvoice3_has_its_own_files(recipe, tmp_path):
    workspace = tmp_path / "workspace"
    (workspace / "CosyVoice/cosyvoice").mkdir(parents=True)
    settings = {"profile": "cosyvoice3", "workspace": str(workspace), "llm_pt": "llm.rl.pt", "model_hub": "huggingface"}
    dry = recipe.run("--dry-run", "-1", "4", **settings).stdout.replace("\\ ", " ")
    official = workspace / "Fun-CosyVoice3-0.5B-2512"
    assert f"--hub huggingface --repo FunAudioLLM/Fun-CosyVoice3-0.5B-2512 --output-dir {official} --need-gib 8 " in dry
    assert "speech_tokenizer_v3.onnx llm.pt llm.rl.pt " in dry
    assert f"to-hf --cosyvoice-dir {official} --llm llm.rl.pt --output {official}-llm-" in dry
    assert f"--like {official}/llm.rl.pt --output " in dry and "known_answer-cosyvoice3.jsonl" in dry
    assert "known_answer-cosyvoice3-en.jsonl" in recipe.run("--dry-run", "-1", "-1", **settings, language="en").stdout
    assert "--top-p 0.8 --top-k 25 --repetition-penalty 1.0 --repetition-window 10 " in dry
    checkpoint = tmp_path / "epoch_3_whole.pt"
    dry = recipe.run("--dry-run", "-1", "-1", **settings | {"llm_pt": str(checkpoint)}).stdout
    assert f"--llm {checkpoint} " in dry and "--need-gib 6 " in dry and "llm.rl.pt" not in dry
    refused = recipe.run("--dry-run", "-1", "-1", **settings | {"llm": "llasa"})
    assert refused.returncode == 1 and "set profile=cosyvoice2" in refused.stderr
    refused = recipe.run("--dry-run", "-1", "-1", **settings | {"profile": "cosyvoice2"})
    assert refused.returncode == 1 and "llm_pt=llm.rl.pt has no effect with llm=llasa" in refused.stderr


def test_a_changed_checkpoint_is_converted_again(recipe, tmp_path):
    """Also one that is older than the conversion of another: a copy keeps its time, and the folder may be another."""
    workspace, checkpoint = tmp_path / "workspace", tmp_path / "epoch_3_whole.pt"
    (workspace / "CosyVoice/cosyvoice").mkdir(parents=True)
    settings = {"profile": "cosyvoice3", "workspace": str(workspace)}

    def converted(**more: str) -> bool:
        done = recipe.run("-1", "-1", **settings, **more)
        assert done.returncode == 0, done.stderr
        return "to-hf" in recipe.calls_path.read_text()

    checkpoint.write_text("one")
    of_file = {"llm_pt": str(checkpoint)}
    assert converted(**of_file) and not converted(**of_file)
    checkpoint.write_text("two")
    assert converted(**of_file) and not converted(**of_file)
    checkpoint.write_text("three")
    os.utime(checkpoint, (1, 1))
    assert converted(**of_file) and not converted(**of_file)
    folders = [{"token2wav_dir": str(tmp_path / name)} for name in "ab"]
    for folder in folders:
        Path(folder["token2wav_dir"]).mkdir()
        (Path(folder["token2wav_dir"]) / "llm.pt").touch()
    assert [converted(**folder) for folder in (*folders, folders[1])] == [True, True, False]


PRESETS = {  # per published recipe: arguments of stage -1, the server, veRL and the evaluation
    "": [
        "--include metadata/emilia_zh.jsonl ",
        "--num-train 80000 --num-test 100 --max-duration-s 30 --excludes [A-Za-z] ", "--reward-curve exp ",
        " --no-tones ", " --language zh", "norm_adv_by_std_in_grpo=False ", "train_batch_size=32 ",
        "ppo_mini_batch_size=16 ",
        "rollout.n=8 ", "rollout.temperature=1.0 ", "rollout.top_p=1.0 ", "rollout.top_k=-1 ",
        "bypass_mode=True ", "max_response_length=1024 ", "total_training_steps=1800 ",
        "--temperature 0.8 --top-p 0.95 --top-k 50 ", "--max-new-tokens 2048 ",
        "--lm-precision bf16 ", "--device cuda --precision fp16 ", "data/zero_shot_zh.jsonl ",
        "exp/cosyvoice2/",
    ],
    "seed": [
        "--include metadata/aishell-3.jsonl ", "--num-train 80000 --num-test 100 --max-duration-s 0 --excludes '' ",
        "--reward-curve tanh ", "norm_adv_by_std_in_grpo=True ", "train_batch_size=32 ", "ppo_mini_batch_size=16 ",
        "rollout.n=4 ", "rollout.temperature=0.8 ", "rollout.top_p=0.9 ", "rollout.top_k=-1 ",
        "val_kwargs.temperature=0.8 ", "val_kwargs.top_p=0.9 ", "bypass_mode=False ",
        "max_response_length=1024 ", "total_training_steps=2100 ",
        "aishell-voices-200.jsonl --prompt-voice-per rollout ", "--top-k 50 ", "--max-new-tokens 2048 ",
        "--lm-precision fp32 ", "data/zero_shot_zh.jsonl ", "exp/seed/",
    ],
    "mair-hub": [
        "--include metadata/emilia_zh.jsonl ", "--reward-curve exp ", " --no-tones ", "norm_adv_by_std_in_grpo=False ",
        "ppo_mini_batch_size=16 ", "rollout.n=8 ", "rollout.temperature=1.0 ", "rollout.top_p=1.0 ",
        "total_training_steps=1800 ", "--voices 200 ", "aishell-voices-200.jsonl --prompt-voice-per rollout ",
        "--lm-precision fp32 ", "data/zero_shot_zh-stripped.jsonl --strip-quotes ",
        "--eval-set /workspace/data/zero_shot_zh-stripped.jsonl ",
    ],
    "mair-hub-dapo": [
        "clip_ratio_low=0.2 ", "clip_ratio_high=0.28 ", "filter_groups.enable=True ", "max_inflight_gen_batches=3 ",
        "norm_adv_by_std_in_grpo=True ", "max_response_length=2048 ", "total_training_steps=700 ",
        "--reward-curve exp ", "--strip-quotes ", "lr_warmup_steps=10 ", "weight_decay=0.1 ",
    ],
    "cosyvoice": [
        "convert_llm.py to-hf ", "--include metadata/aishell-3.jsonl ", "--reward-curve tanh ",
        "norm_adv_by_std_in_grpo=True ", "ppo_mini_batch_size=32 ", "rollout.n=4 ", "rollout.temperature=0.8 ",
        "rollout.top_p=0.95 ", "rollout.top_k=25 ", "val_kwargs.top_k=25 ", "bypass_mode=False ",
        "max_response_length=512 ", "total_training_steps=400 ", "--prompt-voice-per rollout ",
        "data/zero_shot_zh.jsonl ",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_presets_of_the_published_recipes(recipe, name):
    settings = {"profile": "cosyvoice2", "gpu_memory_gib": "80", "workspace": "/workspace", "num_gpus": "8"}
    environment = {"exp_dir": "", "recipe": name} | settings
    done = recipe.run("--dry-run", "-1", "4", **environment)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.replace("\\", "")
    for text in PRESETS[name]:
        assert text in shown, text
    tones = "--no-tones" not in shown
    assert tones == (name in ("seed", "cosyvoice"))
    own = recipe.run("--dry-run", "2", "2", **environment, total_steps="5", mini_batch_size="8")
    assert "total_training_steps=5 " in own.stdout and "ppo_mini_batch_size=8 " in own.stdout


def test_every_preset_is_tested_and_an_unknown_one_is_refused(recipe):
    names = sorted(path.stem for path in (ROOT / "conf/recipes").glob("*.sh"))
    assert names == sorted(filter(None, PRESETS))
    done = recipe.run("0", "0", profile="cosyvoice2", recipe="mairhub")
    assert done.returncode == 1 and "recipe=mairhub is unknown: choose one of " in done.stderr
    assert sorted(done.stderr.split("one of ")[1].split()) == names
    done = recipe.run("0", "0", profile="tiny", recipe="seed")
    assert done.returncode == 1 and "recipe=seed is for profile=cosyvoice2" in done.stderr


EVALUATIONS = {  # per evaluation of published figures: arguments of stages -1 and 4
    "official": [
        "--temperature 1.0 --top-p 0.8 --top-k 25 --repetition-penalty 1.0 --repetition-window 10 "
        "--min-token-text-ratio 2 --max-token-text-ratio 20 ",
        "--precision fp32 --lm-precision fp32 ", "--llm-text raw ", "data/test_en.jsonl ",
    ],
    "seed": [
        "--temperature 0.8 --top-p 0.95 --top-k 50 --repetition-penalty 1.1 --repetition-window 0 ",
        "--max-new-tokens 2048 ", "--precision fp16 --lm-precision fp32 ", "data/zero_shot_zh.jsonl ",
    ],
    "mair-hub": ["--top-k 50 --repetition-penalty 1.1 ", "data/zero_shot_zh-stripped.jsonl --strip-quotes "],
}  # fmt: skip


def test_evaluations_of_published_figures(recipe):
    assert sorted(path.stem for path in (ROOT / "conf/evaluations").glob("*.sh")) == sorted(EVALUATIONS)
    settings = {"profile": "cosyvoice2", "gpu_memory_gib": "80", "dataset": "zero_shot_zh test_en"}
    for name, texts in EVALUATIONS.items():
        shown = recipe.run("--dry-run", "-1", "4", **settings, evaluation=name).stdout.replace("\\", "")
        for text in texts:
            assert text in shown, (name, text)
    shown = recipe.run("--dry-run", "4", evaluation="official", temperature="0.7").stdout
    assert "--temperature 0.7 --top-p 0.8 --top-k 25 " in shown, "it is for any profile, and the environment counts"
    done = recipe.run("0", "0", evaluation="paper")
    assert done.returncode == 1 and "evaluation=paper is unknown: choose one of mair-hub official seed" in done.stderr


ALGORITHMS = {  # per algorithm: arguments of veRL
    "grpo": [
        "adv_estimator=grpo ", "norm_adv_by_std_in_grpo=False ", "loss_mode=vanilla ", "loss_agg_mode=token-mean ",
        "clip_ratio_low=0.2 ", "clip_ratio_high=0.2 ", "filter_groups.enable=False ", "by_syllable: true,",
        "bypass_mode=True ", "use_kl_loss=False ", "model.lora_rank=0 ",
    ],
    "dr_grpo": [
        "adv_estimator=grpo ", "norm_adv_by_std_in_grpo=False ", "loss_agg_mode=seq-mean-token-sum-norm ",
        "loss_scale_factor=160 ", "use_kl_loss=False ", "by_syllable: false,",
    ],
    "dapo": [
        "adv_estimator=grpo ", "norm_adv_by_std_in_grpo=True ", "clip_ratio_low=0.2 ", "clip_ratio_high=0.28 ",
        "clip_ratio_c=10.0 ", "loss_agg_mode=token-mean ", "filter_groups.enable=True ", "use_kl_loss=False ",
        "reward_manager.name=dapo ", "reward_kwargs={max_resp_len: 160, ",
        "{enable: True, len: 32, penalty_factor: 1.0,",
    ],
    "gspo": [
        "adv_estimator=grpo ", "norm_adv_by_std_in_grpo=True ", "loss_mode=gspo ", "loss_agg_mode=seq-mean-token-mean ",
        "clip_ratio_low=3e-4 ", "clip_ratio_high=4e-4 ", "use_kl_loss=False ", "bypass_mode=False ",
    ],
    "gdpo": [
        "adv_estimator=gdpo ", "norm_adv_by_std_in_grpo=True ", "loss_agg_mode=token-mean ", "by_syllable: false,",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_is_chosen_by_name_and_single_values_take_precedence(recipe, name):
    done = recipe.run("--dry-run", "2", "2", algorithm=name)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.replace("\\", "")
    for text in ALGORITHMS[name]:
        assert text in shown, text
    assert ("reward_manager" in shown) == (name == "dapo")
    shown = recipe.run("--dry-run", "2", "2", algorithm=name, clip_ratio_high="0.3", norm_adv_by_std="True").stdout
    assert "clip_ratio_high=0.3 " in shown and "norm_adv_by_std_in_grpo=True " in shown


def test_every_algorithm_is_tested_and_an_unknown_one_is_refused(recipe):
    names = sorted(path.stem for path in (ROOT / "conf/algorithms").glob("*.sh"))
    assert names == sorted(ALGORITHMS)
    for arguments in (("0", "0"), ("--check",), ("--settings",)):
        done = recipe.run(*arguments, algorithm="ppo")
        assert done.returncode == 1 and "algorithm=ppo is unknown: choose one of " in done.stderr
        assert sorted(done.stderr.split("one of ")[1].split()) == names
    (meaning,) = re.findall(r'^setting algorithm .*"(.*?), as published', (ROOT / "conf/settings.sh").read_text(), re.M)
    assert sorted(re.split(", | or ", meaning)) == names
    assert recipe.calls() == []


def test_credit_by_syllable_is_refused_where_the_algorithm_would_lose_something(recipe):
    for name in ("dr_grpo", "gspo"):
        assert "by_syllable: true" in recipe.run(
            "--dry-run", "2", "2", algorithm=name, credit="syllable"
        ).stdout.replace("\\", "")
    done = recipe.run("0", "0", algorithm="gdpo", credit="syllable")
    assert done.returncode == 1 and "but adv_estimator=gdpo (algorithm=gdpo): set credit=utterance" in done.stderr
    done = recipe.run("0", "0", algorithm="dapo", credit="syllable")
    assert done.returncode == 1 and "overlong_percent=20 among syllables: set credit=utterance, or" in done.stderr
    assert recipe.run("--dry-run", "2", "2", algorithm="dapo", credit="syllable", overlong_percent="0").returncode == 0


def test_kl_and_lora_are_settings(recipe):
    for none in ("0", "0.0", "0e5"):
        assert "use_kl_loss=False " in recipe.run("--dry-run", "2", "2", kl_loss_coef=none).stdout
    shown = recipe.run("--dry-run", "2", "2", kl_loss_coef="1e-3", kl_loss_type="kl").stdout
    assert "use_kl_loss=True " in shown and "kl_loss_coef=1e-3 " in shown and "kl_loss_type=kl " in shown
    shown = recipe.run("--dry-run", "2", "2", lora_rank="8", lora_alpha="32", lora_modules="q_proj v_proj").stdout
    shown = shown.replace("\\", "")
    assert "lora_rank=8 " in shown and "lora_alpha=32 " in shown and "target_modules=[q_proj,v_proj] " in shown
    assert "lora.merge=True " in shown and "bypass_mode=False " in shown


def test_rollouts_may_continue_speech(recipe):
    shown = recipe.run("--dry-run", "0", "0").stdout
    assert "--speech-" not in shown and "encode_prompts.py" not in shown
    shown = recipe.run("--dry-run", "0", "0", speech_prefix="recording").stdout
    assert "--speech-role" in shown and "--speech-prefix recording" in shown and "encode_prompts.py" not in shown
    assert "--max-prompt-length 224 " in shown
    done = recipe.run("0", "0", speech_prefix="recording", max_response_length="2000")
    assert done.returncode == 1 and "lower max_response_length=2000" in done.stderr
    done = recipe.run("0", "0", speech_prefix="voice")
    assert done.returncode == 1 and "speech_prefix=voice needs a prompt_list" in done.stderr
    voices = recipe.root / "voices list.jsonl"
    voices.write_text("one")
    given = {"speech_prefix": "voice", "prompt_list": str(voices)}
    assert "needs a prompt_list" in recipe.run("0", "0", **given, prompt_voice_per="rollout").stderr
    assert recipe.run("0", "0", **given).returncode == 0
    calls = recipe.calls_path.read_text()
    assert f"encode_prompts.py --voices {voices} " in calls and f"--output {recipe.exp_dir}/voices.jsonl" in calls
    assert f"--speech-prefix voice --voices {recipe.exp_dir}/voices.jsonl --seed 42" in calls
    assert recipe.run("0", "0", **given).returncode == 0 and recipe.calls() == []
    for change in ({"seed": "43"}, {}):
        voices.write_text(f"{change}")
        assert recipe.run("0", "0", **given, **change).returncode == 0
        assert recipe.calls() == ["prepare_llm.py", "prepare_data.py"], change


@pytest.mark.parametrize(
    ("settings", "reused"),
    [
        ({}, True),
        ({"rollout_temperature": "0.8"}, True),
        ({"rollout_top_p": "1"}, True),
        ({"rollout_top_p": "0.9"}, False),
        ({"rollout_top_k": "25"}, False),
    ],
)
def test_log_probabilities_of_truncated_distributions_are_not_reused(recipe, settings, reused):
    shown = recipe.run("--dry-run", "2", "2", **settings).stdout
    assert f"bypass_mode={reused} " in shown


def test_settings_of_rollouts_and_updates_redo_the_training(recipe):
    assert recipe.run("0", "2").returncode == 0
    for setting in ({"mini_batch_size": "8"}, {"rollout_temperature": "0.9"}, {"rollout_top_p": "0.9"},
                    {"rollout_top_k": "5"}, {"prompt_voice_per": "rollout"}):  # fmt: skip
        assert "trained with other settings" in recipe.run("0", "2", **setting).stderr, setting


def test_settings_of_the_evaluation_redo_it(recipe):
    assert recipe.run("0", "4").returncode == 0
    for setting in ({"max_new_tokens": "99"}, {"infer_lm_precision": "bf16"}):
        assert recipe.run("0", "4", **setting).returncode == 0
        assert "infer_dist.py" in recipe.calls(), setting


SMI = "#!/bin/sh\nprintf '%s\\n' 81559 81559 81559 81559 {memory} 81559 81559 81559\n"


@pytest.mark.parametrize(
    ("memory", "settings", "expected"),
    [
        (81559, {}, ["train_batch_size=32 ", "n_gpus_per_node=1 ", "CUDA_VISIBLE_DEVICES=0 ", "per_gpu=16 ",
                     "gpu_memory_utilization=0.40 ", "--devices cuda:0 --", "--nproc-per-node 1 "]),
        (81559, {"num_gpus": "8"}, ["train_batch_size=32 ", "CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 ", "per_gpu=16 ",
                                    "cuda:6 cuda:7 --", "--nproc-per-node 8 "]),
        (81559, {"num_gpus": "8", "rollout_n": "4"}, ["ppo_mini_batch_size=16 ", "micro_batch_size_per_gpu=8 "]),
        (81559, {}, ["use_dynamic_bsz=True", "max_token_len_per_gpu=24576 ", "enable_gradient_checkpointing=False"]),
        (24564, {}, ["max_token_len_per_gpu=4096 ", "enable_gradient_checkpointing=True"]),
        (24564, {}, ["per_gpu=4 ", "gpu_memory_utilization=0.21 "]),
        (24564, {"server_devices": "cuda:1"}, ["gpu_memory_utilization=0.40 ", "--devices cuda:1 --"]),
        (46068, {"num_gpus": "2", "CUDA_VISIBLE_DEVICES": "4,5,7"}, ["CUDA_VISIBLE_DEVICES=4,5 ", "per_gpu=8 "]),
        (24564, {"num_gpus": "2", "CUDA_VISIBLE_DEVICES": "5,7"}, ["CUDA_VISIBLE_DEVICES=5,7 ", "per_gpu=16 "]),
        ("[N/A]", {"gpu_memory_gib": "24"}, ["per_gpu=4 "]),
        (81559, {"num_gpus": "8", "num_nodes": "4", "ray_address": "10.0.0.1:6379",
                  "server_urls": "http://a:1,http://b:1"},
         ["train_batch_size=128 ", "ppo_mini_batch_size=64 ", "trainer.nnodes=4 ",
          "RAY_ADDRESS=10.0.0.1:6379 ", "runtime_env.env_vars=",
          "http://a:1,http://b:1"]),
    ],
)  # fmt: skip
def test_sizes_follow_the_gpus(recipe, memory, settings, expected):
    smi = recipe.root / "bin/nvidia-smi"
    smi.write_text(SMI.format(memory=memory))
    smi.chmod(0o755)
    done = recipe.run("--dry-run", "1", "4", profile="cosyvoice2", **settings)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.replace("\\", "")
    for text in expected:
        assert text in shown, text
    assert ("CUDA_VISIBLE_DEVICES" in done.stdout) == ("ray_address" not in settings)


def test_several_machines_need_a_ray_cluster(recipe):
    done = recipe.run("--dry-run", "2", "2", profile="cosyvoice2", num_nodes="2")
    assert done.returncode == 1 and "needs ray_address" in done.stderr


def test_rollouts_must_fill_the_micro_batches(recipe):
    done = recipe.run("0", "0", rollout_n="3", train_batch_size="3", micro_batch_size="8")
    assert done.returncode == 1 and "9 rollouts are not a multiple of" in done.stderr
    done = recipe.run("0", "0", mini_batch_size="5")
    assert done.returncode == 1 and "train_batch_size=16 is not a multiple of mini_batch_size=5" in done.stderr
    done = recipe.run("0", "0", pack_tokens="200")
    assert done.returncode == 1 and "pack_tokens=200 holds no rollout" in done.stderr
    done = recipe.run("0", "0", server_address="0.0.0.0")
    assert done.returncode == 1 and "set server_secret_file" in done.stderr
    done = recipe.run("0", "0", prompt_voice_per="group")
    assert done.returncode == 1 and "prompt_voice_per=group: expected text or rollout" in done.stderr
    assert recipe.calls() == []


@pytest.mark.parametrize(
    ("override", "instead"),
    [
        ("trainer.v1.trainer_mode=sync", "leave it out (docs/credit.md"),
        ("++trainer.v1.trainer_mode=colocate_async", "leave it out (docs/credit.md"),
        ("~trainer.v1.trainer_mode", "leave it out (docs/credit.md"),
        ("trainer.v1={trainer_mode: sync}", "leave it out (docs/credit.md"),
        ("trainer.v1.sampler.sync_refill_failed_groups=True", "leave it out (docs/credit.md"),
        ("trainer.use_v1=False", "leave it out (docs/credit.md"),
        ("actor_rollout_ref.model.external_lib=mine", "import what you need in tts_grpo/training/engine.py"),
        ("reward.custom_reward_function.reward_kwargs={by_syllable: false}", "set credit and server_urls"),
        ("reward.custom_reward_function.reward_kwargs.by_syllable=false", "set credit and server_urls"),
        ("trainer.total_training_steps=7", "set total_steps"),
        ("data.train_files=x.parquet", "set train_jsonl, and run stage 0 again"),
        ("--cfg=job", "only settings of veRL (name=value) may follow --"),
    ],
)
def test_overrides_that_bypass_the_recipe_are_refused_by_name(recipe, override, instead):
    done = recipe.run("0", "2", "--", "trainer.foo=1", override)
    assert done.returncode == 1 and recipe.calls() == []
    assert f"-- {override} is refused: " in done.stderr and instead in done.stderr and "foo=1 is" not in done.stderr


def test_credit_reaches_the_reward(recipe):
    for credit, by_syllable in (("syllable", "true"), ("utterance", "false")):
        done = recipe.run("--dry-run", "2", "2", credit=credit)
        assert f"by_syllable: {by_syllable}, " in done.stdout.replace("\\", ""), done.stdout
    done = recipe.run("0", "0", credit="word")
    assert done.returncode == 1 and "credit=word: expected syllable or utterance" in done.stderr


@pytest.mark.parametrize("profile", ["tiny", "cosyvoice2", "cosyvoice3"])
def test_dry_run_prints_and_runs_nothing(recipe, profile):
    done = recipe.run("--dry-run", "-1", "5", "--", "trainer.foo=1", profile=profile)
    assert done.returncode == 0, done.stderr
    for name in ("make_env.sh", "prepare_data.py", "token2wav_asr_server.py", "main_ppo", "merge.py", "infer_dist.py",
                 "compute_wer.sh", "language=zh", "quality_utterances=", "infer_single.py",
                 "trainer.foo=1"):  # fmt: skip
        assert name in done.stdout
    assert recipe.calls() == [] and not recipe.exp_dir.exists(), list(recipe.exp_dir.rglob("*"))


def test_the_tongue_twister_is_synthesised_as_the_evaluation_is(recipe):
    settings = {"temperature": "0.7", "top_p": "0.9", "top_k": "7", "repetition_penalty": "1.1", "seeds": "3 4"}
    lines = recipe.run("--dry-run", "4", "5", **settings).stdout.splitlines()
    evaluation, single = (next(line for line in lines if name in line) for name in ("infer_dist.py", "infer_single.py"))
    shared = re.search("--token2wav-dir .*--llm-text [a-z]+", evaluation)[0]
    assert "--temperature 0.7 --top-p 0.9 --top-k 7 " in shared and f"{shared} --language zh --seed 3 " in single


def test_missing_inputs_name_the_stage(recipe):
    assert "run bash run.sh 0 0 first" in recipe.run("2", "2").stderr
    assert recipe.run("0", "0").returncode == 0
    assert "start one with bash run.sh 1 1" in recipe.run("2", "2").stderr
    assert "run bash run.sh 2 2 first" in recipe.run("3", "3").stderr
    assert "run bash run.sh 3 3 first" in recipe.run("4", "4").stderr


def test_server_that_dies_or_is_never_ready(recipe):
    dead = recipe.run("0", "2", SERVER_DIES="no memory")
    assert dead.returncode == 1 and "no memory" in dead.stderr and "ended with status 1 before it was" in dead.stderr
    slow = recipe.run("0", "2", READY="/nowhere/ready", server_timeout_s="2")
    assert slow.returncode == 1 and "not ready within 2 s" in slow.stderr
    assert "main_ppo" not in recipe.calls()


@pytest.mark.parametrize(
    "cause",
    [
        "OSError: AF_UNIX path too long",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "E1127 19:02:26.090996 4681 server.cc:798] Socket '0.0.0.0:8000' already in use",
        "2026-01-31 12:00:00,123 token2wav_asr_server ERROR: Triton has ended",
        "token2wav_asr_server.py: error: argument --asr-dir: is required",
    ],
)
def test_the_cause_of_a_servers_end_is_shown_though_many_lines_follow_it(recipe, cause):
    noise = "Error: Failed to initialize NVML\\nI1127 loading"
    dead = recipe.run(
        "0", "2", SERVER_DIES=r"\n".join([noise] * 30 + [cause] + ["  File x, line 7"] * 60 + ["EOFError"])
    )
    assert dead.returncode == 1
    shown = dead.stderr.splitlines()
    assert shown[shown.index("its first errors:") + 1 : shown.index("its last lines:")] == [cause]
    assert "EOFError" in shown and len(shown) < 40


def test_a_failing_stage_stops_the_run_and_the_server_and_is_done_again(recipe):
    failed = recipe.run("0", "4", FAIL="main_ppo")
    assert failed.returncode != 0
    assert recipe.calls()[-1] == "stopped" and not (recipe.root / "ready").exists()
    again = recipe.run("0", "4")
    assert again.returncode == 0, again.stderr
    assert recipe.calls()[:3] == ["token2wav_asr_server.py --", "reward_tts.py", "main_ppo"]


@pytest.mark.parametrize("sent, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_training_and_server_at_once(recipe, sent, status):
    recipe.calls_path.write_text("")
    command, environment = ["bash", str(recipe.root / "run.sh"), "0", "2"], recipe.environment(HANG="600")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # pytest itself may ignore SIGINT
    process = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=listen, **quiet)
    end = time.monotonic() + 20
    while "main_ppo" not in recipe.calls_path.read_text() and time.monotonic() < end:
        time.sleep(0.1)
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)  # as a terminal does on Ctrl-C
    else:
        process.send_signal(sent)
    assert process.wait(timeout=20) == status
    assert not (recipe.root / "ready").exists()
    left = subprocess.run(["pgrep", "-f", f"{recipe.root}.*main_ppo"], capture_output=True, text=True).stdout.split()
    assert left == []


DAEMON = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"  # survives SIGTERM


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def daemon(recipe, run_id: str, exp_dir: Path) -> subprocess.Popen:
    """A process as a killed run leaves behind."""
    environment = os.environ | {"TTS_GRPO_RUN": run_id, "TTS_GRPO_EXP_DIR": str(exp_dir)}
    return subprocess.Popen([sys.executable, "-c", DAEMON], env=environment, start_new_session=True)


def test_processes_of_a_killed_run_of_this_experiment_are_ended(recipe):
    dead = subprocess.Popen(["true"])
    dead.wait()
    script = recipe.root / "other/run.sh"
    script.parent.mkdir()
    script.write_text("sleep 60\n:\n")
    living = subprocess.Popen(["bash", str(script)])
    left, others = daemon(recipe, str(dead.pid), recipe.exp_dir), daemon(recipe, str(dead.pid + 1), recipe.root)
    beside = daemon(recipe, str(living.pid), recipe.exp_dir)
    try:
        time.sleep(1)
        done = recipe.run("0", "0")
        assert done.returncode == 0, done.stderr
        assert f"run {dead.pid} of {recipe.exp_dir} was killed: ending its processes {left.pid}" in done.stderr
        assert not alive(left.pid) and alive(others.pid) and alive(beside.pid)
    finally:
        for process in (living, left, others, beside):
            process.kill()
            process.wait()


def test_a_failed_start_of_the_server_leaves_no_process_behind(recipe):
    """Triton goes on running when the process that started it is killed."""
    pids = recipe.root / "pids"
    python = recipe.root / "venv/speech/bin/python"
    daemon = f'{{ setsid {sys.executable} -c "{DAEMON}" & echo $! >>"{pids}"; }}'
    start = f'[[ "$*" != *token2wav_asr_server.py\\ --* ]] || {daemon}'
    python.write_text(python.read_text().replace("all=", f"{start}\nall=", 1))
    for fault in ({"SERVER_DIES": "no memory"}, {"READY": "/nowhere/ready", "server_timeout_s": "2"}):
        assert recipe.run("0", "2", **fault).returncode == 1
        assert not alive(int(pids.read_text().split()[-1])), fault


def test_a_server_that_is_still_stopping_is_waited_for(recipe):
    listen = "import socket, sys, time; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()"
    listen += "; print(s.getsockname()[1], flush=True); time.sleep(4)"
    stopping = subprocess.Popen([sys.executable, "-c", listen], stdout=subprocess.PIPE, text=True)
    port = stopping.stdout.readline().strip()
    start = time.monotonic()
    done = recipe.run("0", "2", grpc_port=port)
    stopping.wait()
    assert done.returncode == 0, done.stderr
    assert f"port {port} is in use: waiting" in done.stderr
    assert time.monotonic() - start > 2


def test_the_training_stops_at_once_when_the_server_of_this_run_ends(recipe):
    recipe.calls_path.write_text("")
    command, environment = ["bash", str(recipe.root / "run.sh"), "0", "2"], recipe.environment(HANG="600")
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 20
    while "main_ppo" not in recipe.calls_path.read_text() and time.monotonic() < end:
        time.sleep(0.1)
    os.kill(int((recipe.root / "ready").read_text()), signal.SIGKILL)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 1
    assert "the reward server has ended: see " in errors and "continues from the last checkpoint" in errors


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"seed": "x", "top_p": "2"}, ["seed=x: expected a whole number", "top_p=2: expected a number > 0 and <= 1"]),
        ({"rollout_n": "08"}, ["rollout_n=08: expected a whole number >= 1"]),
        ({"total_steps": "1_000"}, ["total_steps=1_000: expected a whole number >= 1"]),
        ({"learning_rate": "1e-6x"}, ["learning_rate=1e-6x: expected a number > 0"]),
        ({"http_port": "70000"}, ["http_port=70000: expected a whole number >= 1 and <= 65535"]),
        ({"seeds": "1 2 1"}, ["seeds=1 2 1: expected whole numbers, separated by spaces, each once"]),
        ({"server_devices": "gpu"}, ["server_devices=gpu: expected cpu, cuda or cuda:N"]),
        ({"make_envs": "yes"}, ["make_envs=yes: expected 0 or 1"]),
        ({"exp_name": "a${b}"}, ["exp_name=a${b}: expected a name without ${"]),
        ({"exp_dir": "/x/a[1]"}, ["exp_dir=/x/a[1]: expected a path without ${, [ or ]"]),
        ({"num_gpus": "x[$(touch hacked)]", "profile": "cosyvoice2"}, ["num_gpus=x[$(touch hacked)]: "]),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_before_any_work(recipe, settings, expected):
    for arguments in (("-1", "5"), ("--check",)):
        done = recipe.run(*arguments, **settings)
        assert done.returncode == 1, done.stdout
        for text in expected:
            assert text in done.stderr
    assert recipe.calls() == [] and not (recipe.root / "hacked").exists()


def shown_settings(copy, *arguments, **variables) -> dict[str, tuple[str, str]]:
    """Parse the table of settings to ``name -> (value, origin)``."""
    done = copy.run("--settings", *arguments, **variables)
    assert done.returncode == 0 and copy.calls() == [], done.stderr
    rows = re.findall(
        r"^(?!setting )(\w+) +(.*?)\s+(environment|recipe|evaluation|algorithm|profile|default|command line) ",
        done.stdout,
        re.MULTILINE,
    )
    return {name: (value, origin) for name, value, origin in rows}


def test_settings_are_shown_with_their_origin(recipe):
    tiny = shown_settings(recipe, "--", "trainer.foo=1", rollout_n="4", prompt_text="", exp_dir="")
    assert tiny["rollout_n"] == ("4", "environment") and tiny["train_batch_size"] == ("16", "profile")
    assert shown_settings(recipe, profile="")["profile"] == ("tiny", "default")
    assert tiny["mini_batch_size"] == ("16", "default") and tiny["profile"] == ("tiny", "environment")
    assert tiny["overrides"] == ("trainer.foo=1", "command line") and "workspace" not in tiny
    assert tiny["exp_dir"] == (f"{recipe.root}/exp/tiny", "default")
    given = {"num_gpus": "2", "text_excludes": "", "infer_device": "cpu", "infer_precision": "fp16"}
    full = shown_settings(recipe, profile="cosyvoice2", recipe="seed", **given)
    assert full["rollout_n"] == ("4", "recipe") and full["num_gpus"] == ("2", "environment")
    assert full["text_excludes"] == ("''", "environment") and full["train_batch_size"] == ("32", "profile")
    assert full["infer_precision"] == ("fp32", "profile"), "there is no fp16 on a CPU"
    assert shown_settings(recipe, profile="cosyvoice2")["infer_precision"] == ("fp16", "profile")
    dapo = shown_settings(recipe, algorithm="dapo", clip_ratio_low="0.1")
    assert dapo["clip_ratio_low"] == ("0.1", "environment") and dapo["clip_ratio_high"] == ("0.28", "algorithm")
    assert dapo["credit"] == ("utterance", "algorithm") and tiny["credit"] == ("syllable", "profile")
    assert set(tiny) < set(full)


def test_each_setting_is_declared_once_and_profiles_hold_what_differs():
    declared = re.findall(
        r"^ *setting (\w+) ('.*?'|\".*?\"|\S+) ", (ROOT / "conf/settings.sh").read_text(), re.MULTILINE
    )
    defaults = {name: value.strip("'\"") for name, value in declared}
    assert len(defaults) == len(declared) > 80
    for path in (ROOT / "conf").glob("*.sh"):
        for name, value in re.findall(r"(\w+)=\$\{\1:?-(.*?)\}(?:\s|$)", path.read_text()):
            assert name in defaults, f"{path}: {name} is not declared"
            assert value != defaults[name], f"{path}: {name}={value} is the default already"


NASTY = (
    "实验 一,\"x\"", "1e5", "true", "null", "2024", "1_000", "lr=1e-6", "a,b", "it's", "a(b)[c]{d}", "x&y#z", "~u", "é",
    "a\nb", "C:\\new", "back\\", "\\'", "a\\\\'b", "''", "$x", "  a  ", "%(x)s", "*", ":", "-", "@a",
)  # fmt: skip
READ_OVERRIDES = """
import json, sys
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
config = OmegaConf.create({})
for override in OverridesParser.create().parse_overrides(sys.argv[1:]):
    OmegaConf.update(config, override.key_or_group, override.value(), force_add=True)
print(json.dumps(OmegaConf.to_container(config, resolve=True)))
"""


def read_by_hydra(overrides: list[str]) -> dict:
    """Parse overrides with the Hydra version that veRL uses."""
    python = ROOT / ".venv/trainer/bin/python"
    done = subprocess.run([python, "-c", READ_OVERRIDES, *overrides], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_any_text_reaches_hydra_as_it_is():
    rng = random.Random(0)
    texts = [*NASTY, *("".join(rng.choices("\\'\"a ,中é=[]{}()#\n:$", k=rng.randint(0, 9))) for _ in range(300))]
    texts = [text for text in texts if "${" not in text]  # run.sh refuses these values
    command = f'source "{ROOT}/scripts/lib.sh"; for text; do printf "%s\\0" "$(hydra "$text")"; done'
    quoted = subprocess.run(["bash", "-c", command, "bash", *texts], capture_output=True, text=True, check=True).stdout
    config = read_by_hydra([f"x{i}={text}" for i, text in enumerate(quoted.split("\0")[:-1])])
    assert list(config.values()) == texts


@pytest.mark.parametrize("name", ['实验 一,"x"', "1e5", "null", "2024", "it's a\\", "(é){d}=&#~$\n"])
def test_names_and_folders_reach_veRL_as_they_are(recipe, tmp_path, name):
    """Parses the command line that the stub of veRL receives with the real Hydra."""
    exp_dir = f"{tmp_path}/exp {name}"
    assert recipe.run("0", "0", exp_name=name, exp_dir=exp_dir).returncode == 0
    stub = recipe.root / "venv/trainer/bin/python"
    stub.write_text(f'#!/usr/bin/env bash\nprintf "%s\\0" "$@" >"{tmp_path}/arguments"\n')
    (recipe.root / "ready").touch()
    done = recipe.run(
        "2", "2", "--", "trainer.foo=1", exp_name=name, exp_dir=exp_dir, server_urls="http://a:1,http://b:2"
    )
    assert done.returncode == 0, done.stderr
    arguments = (tmp_path / "arguments").read_text().split("\0")[:-1]
    config = read_by_hydra(arguments[arguments.index("verl.trainer.main_ppo") + 1 :])
    assert config["trainer"]["experiment_name"] == name
    assert config["trainer"]["default_local_dir"] == f"{exp_dir}/checkpoints"
    assert config["data"]["train_files"] == f"{exp_dir}/data/train.parquet"
    kwargs = config["reward"]["custom_reward_function"]["reward_kwargs"]
    assert kwargs["failure_file"] == f"{exp_dir}/reward_failure" and kwargs["server_urls"] == "http://a:1,http://b:2"


@pytest.mark.parametrize("text", ['x"y', "a\nb", "a\tb", "C:\\new", "中文"])
def test_settings_are_recorded_as_they_are(recipe, text):
    """Tests the JSON that is passed to scripts/check.py and scripts/summarise.py."""
    done = recipe.run("--dry-run", "4", "4", prompt_text=text)
    line = next(line for line in done.stdout.splitlines() if "summarise.py" in line)
    assert json.loads(shlex.split(line)[-1])["prompt_text"] == text


def test_one_value_written_in_two_ways_is_one(recipe):
    assert recipe.run("0", "4", learning_rate="1e-6", seeds="0 1").returncode == 0
    assert recipe.run("0", "4", learning_rate="0.000001", seeds=" 0  1 ").returncode == 0
    assert recipe.calls() == []


def test_training_is_refused_on_data_made_from_other_inputs(recipe, tmp_path):
    assert recipe.run("0", "2").returncode == 0
    (tmp_path / "new.jsonl").write_text('{"text": "新"}\n')
    for force in ("0", "1"):
        done = recipe.run("2", "2", train_jsonl=str(tmp_path / "new.jsonl"), force=force, server_urls="http://a:1")
        assert done.returncode == 1 and recipe.calls() == []
        assert "data was made from other inputs (train_jsonl was " in done.stderr
        assert "run bash run.sh 0 0 first" in done.stderr


def settings_of_the_summary(recipe) -> dict:
    line = next(line for line in recipe.calls_path.read_text().splitlines() if "summarise.py" in line)
    return json.loads(line[line.index("--settings ") + len("--settings ") :])


def test_the_summary_has_the_settings_that_were_trained_with(recipe):
    assert recipe.run("0", "2", "--", "trainer.foo=1", rollout_n="4").returncode == 0
    done = recipe.run("3", "5", seeds="7")
    assert done.returncode == 0, done.stderr
    settings = settings_of_the_summary(recipe)
    assert settings["rollout_n"] == "4" and settings["overrides"] == "trainer.foo=1" and settings["seeds"] == "7"


def seconds(recipe, stage: int) -> list[tuple[int, str, int]]:
    """``(seconds, result, anew)`` for each run of a stage; ``anew`` is 1 for a run with force=1."""
    rows = map(json.loads, (recipe.exp_dir / "stage_seconds.jsonl").read_text().splitlines())
    return [(row["seconds"], row["result"], row["anew"]) for row in rows if row["stage"] == stage]


def test_the_times_of_all_runs_of_a_stage_are_noted_with_what_they_made(recipe):
    assert recipe.run("0", "2", total_steps="7", FAIL="main_ppo", SLOW="2").returncode != 0
    assert recipe.run("0", "2", total_steps="7").returncode == 0
    ((failed, first, _), (_, second, _)) = seconds(recipe, 2)
    assert failed >= 2 and first == second and len(seconds(recipe, 0)) == 1, "a stage that was done already counts"
    assert recipe.run("0", "2", total_steps="9").returncode == 0
    assert seconds(recipe, 2)[2][1] == first, "a training that is extended is one training"
    assert recipe.run("0", "2", learning_rate="1").returncode == 1
    assert len(seconds(recipe, 2)) == 3, "a refused run counts"
    assert recipe.run("2", "2", learning_rate="1", force="1", server_urls="http://a:1").returncode == 1
    assert recipe.run("0", "2", learning_rate="1", force="1").returncode == 0
    assert seconds(recipe, 2)[-1][1] != first and seconds(recipe, 2)[-1][2] == 1


def test_only_the_requested_seeds_are_scored(recipe):
    assert recipe.run("0", "4").returncode == 0
    assert recipe.run("0", "4", seeds="0 1").returncode == 0
    assert recipe.calls_path.read_text().count(" seeds=0 1\n") == 2


def test_speech_of_other_settings_is_kept(recipe):
    folders = []
    for settings in ({}, {"temperature": "0.6"}, {}):
        stages = ("4", "4") if folders else ("0", "4")
        assert recipe.run(*stages, **settings).returncode == 0
        calls = recipe.calls_path.read_text()
        folders.append(
            re.findall(r"--output-dir (\S+/eval/test/(?:sft|grpo)-\w+) ", calls.replace("a recipe", "a_recipe"))
        )
        links = [(recipe.exp_dir / "eval" / name).resolve().name for name in ("sft", "grpo")]
        assert links == [Path(folder).name for folder in folders[-1]]
    assert len({*folders[0], *folders[1]}) == 4 and folders[2] == folders[0]


def test_another_evaluation_set_goes_into_the_same_folder(recipe, tmp_path):
    """infer_dist.py then synthesises only the utterances that have changed."""
    folders = []
    for text in ("好", "好吗"):
        (tmp_path / "set.jsonl").write_text(f'{{"id": "a", "target_text": "{text}"}}\n')
        done = recipe.run(*(("4", "4") if folders else ("0", "4")), eval_jsonl=str(tmp_path / "set.jsonl"))
        assert done.returncode == 0 and recipe.calls().count("compute_wer") == 2, done.stderr
        folders.append([(recipe.exp_dir / "eval" / name).resolve() for name in ("sft", "grpo")])
    assert folders[0] == folders[1] and len(set(folders[0])) == 2


def make_sets(folder: Path, *names: str) -> dict[str, str]:
    """Write evaluation sets to a folder with a space in its name; return the path of each."""
    (folder / "test sets").mkdir(exist_ok=True)
    paths = {name: folder / f"test sets/{name}.jsonl" for name in names}
    for name, path in paths.items():
        path.write_text(f'{{"id": "{name}", "target_text": "好"}}\n')
    return {name: str(path) for name, path in paths.items()}


def test_several_sets_are_evaluated_in_one_run_and_a_finished_one_is_not_repeated(recipe, tmp_path):
    sets = make_sets(tmp_path, "a", "b")
    assert recipe.run("0", "4", eval_jsonl=sets["a"]).returncode == 0
    both = {"eval_jsonls": " ".join(path.replace(" ", "\\ ") for path in sets.values())}
    done = recipe.run("4", "4", **both)
    assert done.returncode == 0 and "a: already evaluated" in done.stdout, done.stderr
    assert recipe.calls() == ["infer_dist.py"] * 2 + ["compute_wer"] * 2 + ["summarise.py", "report.py"]
    calls = recipe.calls_path.read_text()
    assert calls.count(f"--eval-set {sets['b']} ") == 2 and f"--eval-set {sets['a']} " not in calls
    assert calls.count(f"--exp-dir {recipe.exp_dir} --sets a b") == 2
    for name in ("sft", "grpo"):
        assert (recipe.exp_dir / "eval" / name).resolve().parent == recipe.exp_dir / "eval/a"
        assert (recipe.exp_dir / "eval/b" / name).resolve().is_dir()
    assert recipe.run("4", "4", **both).returncode == 0 and recipe.calls() == []
    Path(sets["b"]).write_text('{"id": "b", "target_text": "好吗"}\n')
    assert recipe.run("4", "4", **both).returncode == 0 and recipe.calls().count("infer_dist.py") == 2
    assert f"--eval-set {sets['a']} " not in recipe.calls_path.read_text()
    assert recipe.run("4", "4", **both, temperature="0.6").returncode == 0
    assert recipe.calls().count("infer_dist.py") == 4, "another setting of the evaluation counts for each set"


def test_sets_that_fail_are_named_and_the_others_are_kept(recipe, tmp_path):
    sets = make_sets(tmp_path, "a", "b", "c")
    settings = {"eval_jsonls": " ".join(path.replace(" ", "\\ ") for path in sets.values())}
    with (recipe.root / "scripts/compute_wer.sh").open("a") as program:
        program.write("[[ -z ${FAIL-} || $1 != */eval/c/* ]] || exit 3\n")
    done = recipe.run("0", "4", **settings, FAIL="/eval/b/")
    assert done.returncode == 1 and "the evaluation of b c failed" in done.stderr
    assert "summary.json and report.html have a," in done.stderr
    assert re.findall(" --sets (.*?)(?: --settings .*)?\n", recipe.calls_path.read_text()) == ["a", "a"]
    assert recipe.calls()[-1] == "report.py"
    assert recipe.run("4", "4", **settings).returncode == 0
    calls = recipe.calls_path.read_text()
    assert recipe.calls().count("infer_dist.py") == 4 and f"--eval-set {sets['a']} " not in calls
    assert calls.count(" --sets a b c") == 2
    failed = recipe.run("4", "4", **settings, seeds="7", FAIL="infer_dist")
    assert failed.returncode == 1 and "no evaluation set could be evaluated (a b c)" in failed.stderr


def test_a_model_is_evaluated_without_a_training(recipe, tmp_path):
    sets = make_sets(tmp_path, "a", "b")
    settings = {"eval_jsonls": " ".join(path.replace(" ", "\\ ") for path in sets.values())}
    failed = recipe.run("evaluate", **settings, FAIL="/eval/b/")
    assert failed.returncode == 1 and "the evaluation of b failed" in failed.stderr
    calls = recipe.calls()
    assert calls[2:] == ["prepare_llm.py", "infer_dist.py", "compute_wer", "infer_dist.py"]
    assert not (recipe.exp_dir / ".done/4-b").exists()
    done = recipe.run("evaluate", **settings)
    assert done.returncode == 0 and "a: already evaluated" in done.stdout, done.stderr
    assert recipe.calls()[2:] == ["prepare_llm.py", "infer_dist.py", "compute_wer"]
    assert "eval/SET/sft/scores.json of a b" in done.stdout and not (recipe.exp_dir / "eval/b/grpo").exists()
    (recipe.exp_dir / "eval/a/speech").touch()
    assert recipe.run("evaluate", **settings, force="1").returncode == 0
    assert not (recipe.exp_dir / "eval/a/speech").exists() and recipe.calls().count("infer_dist.py") == 2
    shown = recipe.run("--dry-run", "evaluate", exp_dir="").stdout.replace("\\", "")
    assert f"--output-dir {recipe.root}/exp/evaluate-tiny/sft_model" in shown and "merged_hf" not in shown
    refused = recipe.run("--dry-run", "evaluate", exp_dir="", llm_path="/x/global_step_7")
    assert refused.returncode == 1 and "llm_path=/x/global_step_7 has no effect" in refused.stderr
    assert recipe.run("evaluate", "4").returncode == 2
    assert recipe.run("0", "0").returncode == 0
    refused = recipe.run("evaluate")
    assert refused.returncode == 1 and "has a training, whose language model would be replaced" in refused.stderr


def test_sets_of_the_full_profile_are_chosen_by_name_and_language(recipe, tmp_path):
    """English sets are transcribed by Whisper and scored as English, whatever the language of the training."""
    workspace = tmp_path / "work space"
    (workspace / "CosyVoice/cosyvoice").mkdir(parents=True)
    settings = {"profile": "cosyvoice2", "workspace": str(workspace), "gpu_memory_gib": "80"}
    names = "zero_shot_zh test_en test_hard zero_shot_hard_en"
    dry = recipe.run("--dry-run", "-1", "4", **settings, dataset=names).stdout.replace("\\", "")
    for repository, source in (
        ("yuekai/CV3-Eval", "--split zero_shot_zh"), ("yuekai/seed_tts_cosy2", "--split test_en"),
        ("zhaochenyang20/seed-tts-eval", "seed-tts-eval/zh/hardcase.lst"),
    ):  # fmt: skip
        assert f"--repo {repository} " in dry and source in dry
    as_they_are = recipe.run("--dry-run", "-1", **settings, dataset=names, make_envs="0").stdout
    assert "-m pip install --quiet --requirement" in dry and "pip install" not in as_they_are
    assert "--repo Systran/faster-whisper-large-v3 " in dry
    assert f"encode_prompts.py --eval-set {workspace}/data/zero_shot_zh.jsonl " in dry
    known = [("zero_shot_zh", "zh"), ("test_en", "en"), ("test_hard", "zh"), ("zero_shot_hard_en", "en")]
    for name, language in known:
        assert f"--output {workspace}/data/{name}.jsonl --language {language} " in dry
        asr = f"{workspace}/{'faster-whisper-large-v3' if language == 'en' else 'paraformer-zh'}"
        scored = [line for line in dry.splitlines() if f"compute_wer.sh {recipe.exp_dir}/eval/{name}/sft " in line]
        assert len(scored) == 1 and f" eval_asr_dir={asr} " in scored[0] and f" language={language} " in scored[0]
        assert dry.count(f"--language {language} --eval-set {workspace}/data/{name}.jsonl ") == 2
    one = recipe.run("--dry-run", "-1", "4", **settings, dataset="test_zh").stdout
    assert "whisper" not in one and one.count("infer_dist.py") == 2 and "pip install" not in one
    for name in ("zero_shot_ja", "zero_shot_zh-stripped"):  # the second one would not be stripped
        unknown = recipe.run("--dry-run", "-1", **settings, dataset=f"test_zh {name}")
        assert unknown.returncode == 1 and f"{name} is unknown: choose from zero_shot_zh " in unknown.stderr
    own = recipe.run("--dry-run", "4", **settings, dataset=names, eval_jsonl="/own/set.jsonl").stdout
    assert own.count("infer_dist.py") == 2 == own.count("--eval-set /own/set.jsonl ")


def test_own_files_of_sets_have_the_recogniser_of_their_names_and_are_never_made_from_another_set(recipe, tmp_path):
    workspace = tmp_path / "workspace"
    (workspace / "CosyVoice/cosyvoice").mkdir(parents=True)
    settings = {"profile": "cosyvoice2", "workspace": str(workspace), "gpu_memory_gib": "80"}
    files = {"eval_jsonls": "/own/test_en.jsonl /own/zero_shot_zh-stripped.jsonl"}
    dry = recipe.run("--dry-run", "-1", "4", **settings, **files).stdout.replace("\\", "")
    assert f" eval_asr_dir={workspace}/faster-whisper-large-v3 " in dry
    assert "--output /own/zero_shot_zh-stripped.jsonl --strip-quotes " in dry
    assert "encode_prompts.py --eval-set /own/zero_shot_zh-stripped.jsonl " in dry
    missing = recipe.run("--dry-run", "-1", **settings, eval_jsonl="/own/mine.jsonl")
    assert missing.returncode == 1 and "the evaluation set /own/mine.jsonl is missing" in missing.stderr


def test_sets_of_the_same_name_are_refused(recipe):
    for names in (
        {"eval_jsonls": "/a/x.jsonl /b/x.jsonl"},
        {"eval_jsonls": "/a/sft.jsonl"},
        {"eval_jsonl": "/a/sft.jsonl"},
    ):
        done = recipe.run("4", "4", **names)
        assert done.returncode == 1 and "rename a file" in done.stderr and recipe.calls() == []


def test_more_steps_extend_a_training_and_fewer_are_refused(recipe):
    assert recipe.run("0", "3", total_steps="7").returncode == 0
    more = recipe.run("0", "3", total_steps="12")
    assert more.returncode == 0 and "main_ppo" in recipe.calls() and "merge.py" in recipe.calls(), more.stderr
    fewer = recipe.run("0", "2", total_steps="5")
    assert fewer.returncode == 1 and "has trained 7 steps, more than total_steps=5" in fewer.stderr
    cosine = {"learning_rate_schedule": "cosine", "exp_dir": f"{recipe.exp_dir}-cosine"}
    assert recipe.run("0", "2", total_steps="7", **cosine).returncode == 0
    done = recipe.run("0", "2", total_steps="12", **cosine)
    assert done.returncode == 1 and "trained with other settings (total_steps was '7', is '12')" in done.stderr


def add_checkpoint(recipe, step: int) -> Path:
    """Copy the checkpoint that the stub has written to another step, which becomes the last one."""
    folder = recipe.exp_dir / f"checkpoints/global_step_{step}"
    shutil.copytree(recipe.exp_dir / "checkpoints/global_step_7", folder)
    (folder.parent / "latest_checkpointed_iteration.txt").write_text(str(step))
    return folder


def test_a_damaged_last_checkpoint_is_named_and_the_one_before_is_used(recipe):
    assert recipe.run("0", "3", total_steps="30").returncode == 0
    tracker = recipe.exp_dir / "checkpoints/latest_checkpointed_iteration.txt"
    shard = add_checkpoint(recipe, 20) / "actor/model_world_size_1_rank_0.pt"
    shard.write_bytes(shard.read_bytes()[:9])
    done = recipe.run("3", "3", total_steps="30")
    assert done.returncode == 0 and f"damaged checkpoint: {shard} is damaged or truncated" in done.stderr
    assert tracker.read_text() == "7" and "global_step_7 it is used" in done.stderr.replace(":", "")
    assert recipe.run("1", "2", total_steps="30").returncode == 0
    assert "main_ppo" in recipe.calls(), "a training whose last checkpoint is damaged goes on"
    shutil.rmtree(shard.parent.parent)
    (recipe.exp_dir / "checkpoints/global_step_7/data.pt").unlink()
    done = recipe.run("1", "2", total_steps="30")
    assert done.returncode == 0 and "the training starts anew" in done.stderr and "main_ppo" in recipe.calls()


def test_a_deleted_checkpoint_is_not_a_damaged_one(recipe):
    assert recipe.run("0", "3").returncode == 0
    shutil.rmtree(recipe.exp_dir / "checkpoints/global_step_7/actor")
    assert recipe.run("0", "4").returncode == 0 and "main_ppo" not in recipe.calls()


def test_a_damaged_checkpoint_is_not_merged(recipe):
    assert recipe.run("0", "2").returncode == 0
    folder = recipe.exp_dir / "checkpoints/global_step_7"
    (folder / "actor/optim_world_size_1_rank_0.pt").unlink()  # a merge does not need it
    assert recipe.run("3", "3", llm_path=str(folder)).returncode == 0
    (folder / "actor/model_world_size_1_rank_0.pt").unlink()
    done = recipe.run("3", "3", llm_path=str(folder), force="1")
    assert done.returncode == 1 and "rank_0.pt is missing: set llm_path" in done.stderr and recipe.calls() == []


def test_replaced_weights_and_edited_code_count(recipe, tmp_path):
    weights = tmp_path / "llm/model.safetensors"
    weights.parent.mkdir()
    weights.write_text("old")
    code = recipe.root / "reward_tts.py"
    code.write_text("a = 1")
    assert recipe.run("0", "2", sft_path=str(weights.parent), FAIL="main_ppo").returncode != 0
    code.write_text("a = 2")
    assert recipe.run("0", "4", sft_path=str(weights.parent)).returncode == 0, "a training that has not ended goes on"
    code.write_text("a = 3")
    done = recipe.run("0", "4", sft_path=str(weights.parent))
    assert done.returncode == 1 and "trained with other settings (reward_tts.py has changed)" in done.stderr
    assert recipe.run("3", "4", sft_path=str(weights.parent)).returncode == 0 and recipe.calls() == []
    weights.write_text("new")
    assert recipe.run("0", "0", sft_path=str(weights.parent)).returncode == 0
    assert "prepare_llm.py" in recipe.calls()


def edit(path: Path, *change: str) -> None:
    assert change[0] in path.read_text()
    path.write_text(path.read_text().replace(*change))


CODE_CHANGES = [  # (file, old text, new text) of edits that change the training
    ("run.sh", "data.truncation=error", "data.truncation=left"),
    ("run.sh", '--reward-curve "$reward_curve"', "--reward-curve exp"),
    ("conf/tiny.sh", "configure_cpu_training; }", "configure_cpu_training; profile_verl_args+=(trainer.foo=1); }"),
    ("scripts/verl_cpu.sh", "fsdp_config.dtype=float32", "fsdp_config.dtype=bfloat16"),
    ("tts_grpo/reward/curves.py", "3.0 * error_rate", "4.0 * error_rate"),
    ("requirements-verl.txt", "verl==0.9.1", "verl==0.9.2"),
]


@pytest.mark.parametrize("change", CODE_CHANGES, ids=[f"{change[0]}-{change[2][:9]}" for change in CODE_CHANGES])
def test_changed_commands_modules_and_pins_of_a_training_count(recipe, change):
    for name in ("reward_tts.py", "token2wav_asr_server.py", "requirements-verl.txt"):
        shutil.copy(ROOT / name, recipe.root)
    shutil.rmtree(recipe.root / "tts_grpo")
    shutil.copytree(ROOT / "tts_grpo", recipe.root / "tts_grpo", ignore=shutil.ignore_patterns("__pycache__"))
    assert recipe.run("0", "4").returncode == 0
    edit(recipe.root / change[0], *change[1:])
    done = recipe.run("0", "2")
    what = COMMANDS if change[0].endswith(".sh") else change[0]
    assert done.returncode == 1 and f"trained with other settings ({what} has changed)" in done.stderr
    assert recipe.run("3", "4").returncode == 0 and recipe.calls() == [], "it changes nothing in the evaluation"


def test_comments_other_stages_and_free_settings_do_not_count(recipe):
    program = recipe.root / "reward_tts.py"
    program.write_text('"""Reward."""\n\n\ndef f():\n    """One."""\n    return "#1"  # one\n')
    assert recipe.run("0", "4").returncode == 0
    program.write_text('"""The reward."""\n# new\ndef f():\n    """Two,\n\n    at length."""\n\n    return "#1"\n')
    edit(recipe.root / "run.sh", "stage_2() {\n", "stage_2() {\n  # a comment\n")
    edit(recipe.root / "run.sh", '--output "$exp_dir/tongue_twister.wav"', '--output "$exp_dir/one.wav"')
    edit(recipe.root / "conf/tiny.sh", "# models\n", "# the models\n")
    free = {"test_freq": "7", "train_threads": "1", "http_port": "81", "micro_batch_size": "8", "infer_procs": "3"}
    done = recipe.run("0", "4", **free, CUDA_VISIBLE_DEVICES="3", PYTHONPATH="/x")
    assert done.returncode == 0 and recipe.calls() == [], done.stderr
    program.write_text('"""The reward."""\n\n\ndef f():\n    return "#2"\n')
    assert "reward_tts.py has changed" in recipe.run("0", "2").stderr


def test_every_module_of_the_training_counts_to_it():
    """Includes the modules that veRL imports by name."""
    found = Digests(Path("/nonexistent")).of_code(CODE["2"])
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "tts_grpo/training").rglob("*.py")}
    free = {"tts_grpo/training/verl_log.py"}  # affects the display only
    assert {path for path in modules - free if "__init__" not in path} <= found.keys()
    assert "missing" not in found.values() and "tts_grpo/evaluation/protocols.py" not in found


def test_every_template_of_the_report_counts_to_the_scores():
    folder = ROOT / "tts_grpo/evaluation/report"
    used = {"page.html", *re.findall(r'{% (?:from|include) "(.*?)"', (folder / "page.html").read_text())}
    assert len(used) > 1 and {f"tts_grpo/evaluation/report/{name}" for name in used} <= set(CODE["4s"])


def test_the_evaluation_is_refused_on_another_merged_model(recipe):
    assert recipe.run("0", "3", total_steps="7").returncode == 0
    assert recipe.run("1", "2", total_steps="12").returncode == 0
    done = recipe.run("4", "4", total_steps="12")
    assert done.returncode == 1 and "merged_hf_model was made from other inputs (training has changed)" in done.stderr
    assert "run bash run.sh 3 3 first" in done.stderr


RESULTS_DEPEND_ON = {
    "0": "sft_path train_jsonl test_jsonl max_prompt_length max_bad_ratio max_test_overlap text_tags llm_text language "
    "train_batch_size speech_prefix",
    "2": "seed token2wav_dir reward_asr_dir rewards reward_asr_dirs reward_asr_pool token2wav_precision reward_curve "
    "reward_tones prompt_audio prompt_text prompt_list prompt_voice_per num_gpus num_nodes train_device total_steps "
    "train_batch_size mini_batch_size rollout_n rollout_temperature rollout_top_p rollout_top_k max_response_length "
    "learning_rate learning_rate_schedule adam_eps credit algorithm adv_estimator norm_adv_by_std loss_mode "
    "loss_agg_mode clip_ratio_low clip_ratio_high clip_ratio_c filter_groups overlong_percent kl_loss_coef "
    "kl_loss_type lora_rank lora_alpha lora_modules recipe_args overrides language",
    "3": "llm_path",
    "4": "token2wav_dir infer_engine infer_batch_size infer_precision infer_lm_precision temperature top_p top_k "
    "repetition_penalty repetition_window min_token_text_ratio max_token_text_ratio max_new_tokens language text_tags "
    "llm_text",
    "4s": "eval_asr_dir eval_asr_dir_en judge_asr_dir eval_jsonl eval_jsonls language text_tags seeds "
    "quality_utterances reference_audio speaker_model_dir",
}


def test_each_result_depends_on_its_settings_and_code(recipe):
    assert recipe.run("0", "4").returncode == 0
    made_from = {stage: json.loads((recipe.exp_dir / ".done" / stage).read_text().split("\n")[0]) for stage in "0234"}
    wanted = {stage: set(names.split()) for stage, names in RESULTS_DEPEND_ON.items()}
    wanted["4"] |= wanted.pop("4s")
    assert {stage: set(state["settings"]) for stage, state in made_from.items()} == wanted
    for state in made_from.values():
        assert len(state["code"]) > 1 and all((ROOT / path).exists() for path in state["code"].keys() - {COMMANDS})


def exported(recipe, name: str, **variables) -> tuple[str, str]:
    """The value of an environment variable in the programs that run.sh starts, and the text that run.sh logs."""
    programs = recipe.root / "bin/python3"
    settings = f'[ "$1" = -IS ] && exec {sys.executable} "$@"'
    programs.write_text(f'#!/bin/sh\n{settings}\nprintf "%s" "${{{name}-}}" >"$SEEN"\n')
    programs.chmod(0o755)
    seen = recipe.root / "seen"
    done = recipe.run("--check", SEEN=str(seen), base_python=str(programs), **variables)
    assert done.returncode == 0, done.stderr
    return seen.read_text(), done.stderr


@pytest.mark.parametrize("given", ["", "example.org,10.0.0.9"])
def test_local_addresses_bypass_a_proxy(recipe, given):
    servers = "http://10.1.2.3:8000,http://reward.lan:8000"
    variables = {"http_proxy": "http://127.0.0.1:9", "no_proxy": given, "server_urls": servers}
    hosts, _ = exported(recipe, "no_proxy", **variables)
    assert {"127.0.0.1", "localhost", "10.1.2.3", "reward.lan", *filter(None, given.split(","))} <= set(
        hosts.split(",")
    )
    assert exported(recipe, "NO_PROXY", **variables)[0] == hosts
    assert exported(recipe, "http_proxy", **variables)[0] == "http://127.0.0.1:9"  # downloads still use the proxy


@pytest.mark.parametrize("home", ["", "/proc", "/nowhere"])
def test_a_home_that_is_not_writable_is_replaced(recipe, tmp_path, home):
    used, log = exported(recipe, "HOME", HOME=home, TMPDIR=str(tmp_path))
    assert Path(used).is_dir() and Path(used).parent == tmp_path and f"using {used}" in log
    assert exported(recipe, "HOME", HOME=str(tmp_path))[0] == str(tmp_path)


SHORT = {"TMPDIR": "/tmp", "RAY_TMPDIR": "", "XDG_CACHE_HOME": "", "PYTRITON_HOME": ""}


def test_folders_that_are_too_long_for_sockets_are_replaced(recipe, tmp_path):
    long = str(tmp_path / ("t" * 60))
    Path(long).mkdir()
    used, log = exported(recipe, "TMPDIR", **SHORT | {"TMPDIR": long})
    assert used == "/tmp" and "too long for the sockets of Ray" in log
    used, log = exported(recipe, "RAY_TMPDIR", **SHORT | {"RAY_TMPDIR": long})
    assert used == "" and f"RAY_TMPDIR={long} is too long for the sockets of Ray: using /tmp" in log
    for variables in ({"XDG_CACHE_HOME": long}, {"PYTRITON_HOME": long}, {"HOME": long}):
        assert len(exported(recipe, "PYTRITON_HOME", **SHORT | variables)[0]) < 46
    (tmp_path / "link").symlink_to(long)
    assert (
        exported(recipe, "PYTRITON_HOME", **SHORT | {"PYTRITON_HOME": "/tmp/../" + str(tmp_path / "link")})[0] != long
    )
    kept = "/tmp/short"
    assert exported(recipe, "PYTRITON_HOME", **SHORT | {"PYTRITON_HOME": kept})[0] == kept


def test_the_longest_socket_paths_have_107_bytes(recipe):
    """The folders keep their values if a path below them has 107 bytes, and are replaced if it has 108."""
    longest = {
        "TMPDIR": "/ray/session_2026-01-31_12-00-00_123456_4194304/sockets/plasma_store",
        "RAY_TMPDIR": "/ray/session_2026-01-31_12-00-00_123456_4194304/sockets/plasma_store",
        "PYTRITON_HOME": "/workspace_12345678/token2wav_asr_0_999-server.sock",
    }
    for name, path in longest.items():
        for extra, kept in ((0, True), (1, False)):
            folder = "/tmp/" + "x" * (107 - len("/tmp/") - len(path) + extra)
            assert len(folder + path) == 107 + extra
            used, _ = exported(recipe, name, **SHORT | {name: folder})
            assert (used == folder) == kept, (name, used)


def test_rays_workers_run_at_the_niceness_of_the_run(recipe):
    assert exported(recipe, "RAY_worker_niceness")[0] == "0"
    assert exported(recipe, "RAY_worker_niceness", RAY_worker_niceness="5")[0] == "5"


@pytest.mark.parametrize(("version", "status"), [("3 2", 1), ("4 3", 1), ("4 4", 0), ("5 2", 0)])
def test_bash_before_4_4_is_named(version, status):
    """Its empty arrays are unset. The version of this bash is read-only, so the test renames it."""
    script = (ROOT / "run.sh").read_text(encoding="utf-8").split("set -euo pipefail")[0]
    script = f"version=({version})\n" + script.replace("BASH_VERSINFO", "version")
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == status and ("version 4.4 or later is needed" in done.stderr) == bool(status)


def test_gpus_are_those_that_the_shell_may_use(recipe):
    cosyvoice2 = {"profile": "cosyvoice2", "num_gpus": "2", "gpu_memory_gib": "80"}
    shown = recipe.run("--dry-run", "2", CUDA_VISIBLE_DEVICES="GPU-1a, 5,7", **cosyvoice2)
    assert "CUDA_VISIBLE_DEVICES=GPU-1a\\,5 " in shown.stdout, shown.stderr
    for visible in ("", "3", "3,-1", "NoDevFiles"):
        refused = recipe.run("--dry-run", "2", CUDA_VISIBLE_DEVICES=visible, **cosyvoice2)
        assert refused.returncode == 1 and f"CUDA_VISIBLE_DEVICES='{visible}' allows" in refused.stderr


def test_ray_gets_a_python_whose_path_needs_no_quotes(recipe):
    """Ray does not quote the path of Python in its workers' commands, and this recipe's path has a space."""
    assert recipe.run("0", "2").returncode == 0
    (line,) = [line for line in recipe.calls_path.read_text().splitlines() if "main_ppo" in line]
    python = line.split(" -m verl.trainer.main_ppo")[0].split(" -- ")[-1]
    assert re.fullmatch(r"[\w./+-]+", python), python
    assert Path(python).parent.parent.resolve() == (recipe.root / "venv/trainer").resolve()


TOOLS = (
    "basename", "bash", "cat", "curl", "cut", "date", "df", "dirname", "env", "git", "grep", "head", "ln", "mkdir",
    "mktemp", "mv", "paste", "python3", "realpath", "rm", "rmdir", "sed", "seq", "sha256sum", "sleep", "sort", "stat",
    "tail", "tr", "wc", "xargs",
)  # fmt: skip
BSD = '#!/bin/sh\necho "$0: illegal option" >&2\nexit 1\n'


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        ("curl", "tools are missing: curl: install them"),
        ("git", "tools are missing: git: install them"),
        ("sha256sum", "tools are missing: sha256sum: install them"),
        ("sed", "tools are missing: sed (GNU): install them"),
        ("mv", "tools are missing: mv (GNU, with -T): install them"),
        ("ln", "tools are missing: ln (GNU, with -T): install them"),
        ("df", "tools are missing: df (GNU, with --output): install them"),
        ("python3", "base_python=python3 does not run: set base_python"),
    ],
)
@pytest.mark.parametrize("fault", ["missing", "BSD"])
def test_missing_tools_are_named_before_any_work(recipe, tmp_path, tool, message, fault):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in TOOLS:
        (tools / name).symlink_to(sys.executable if name == "python3" else shutil.which(name))
    if fault == "BSD" and tool in ("curl", "git", "sha256sum"):
        pytest.skip("every version of it will do")
    assert recipe.run("--dry-run", "-1", "5", PATH=str(tools)).returncode == 0
    (tools / tool).unlink()
    if fault == "BSD":
        (tools / tool).write_text(BSD)
        (tools / tool).chmod(0o755)
    for arguments in (("-1", "5"), ("--check",)):
        done = recipe.run(*arguments, PATH=str(tools))
        assert done.returncode == 1 and message in done.stderr, done.stderr
    assert recipe.calls() == [] and not recipe.exp_dir.exists()


def test_a_python_without_shared_library_is_named_before_anything_is_installed(recipe, tmp_path):
    python = tmp_path / "python"
    fault = "has no shared library: set base_python"
    python.write_text(
        f'#!/bin/bash\n[[ $* != *libpython.py ]] || {{ echo "{fault}" >&2; exit 1; }}\nexec python3 "$@"\n'
    )
    python.chmod(0o755)
    done = recipe.run("-1", "-1", base_python=str(python))
    assert done.returncode == 1 and fault in done.stderr and recipe.calls() == []
    assert recipe.run("-1", "-1", base_python=str(python), make_envs="0").returncode == 0


def show_faults(recipe) -> None:
    """Make --check print the faults that run.sh passes to scripts/check.py."""
    program = recipe.root / "bin/python3"
    program.write_text(f'#!/bin/sh\n[ "$1" = -IS ] && exec {sys.executable} "$@"\necho "$@"\nexit 1\n')
    program.chmod(0o755)


def in_mount_namespace(recipe, script: str, *arguments: str, **variables) -> subprocess.CompletedProcess:
    """Run a script that may mount file systems. Its $0 is run.sh; it exits with 99 if it cannot mount."""
    recipe.calls_path.write_text("")
    command = ["unshare", "--map-root-user", "--mount", "bash", "-c", script, str(recipe.root / "run.sh"), *arguments]
    done = subprocess.run(command, env=recipe.environment(**variables), capture_output=True, text=True, timeout=120)
    if "unshare: " in done.stderr or done.returncode == 99:
        pytest.skip("this machine does not allow a mount namespace")
    return done


@pytest.mark.parametrize("subfolder", ["", "data", "checkpoints"])
def test_an_experiment_folder_that_cannot_be_written_to_is_named_before_any_work(recipe, subfolder):
    exp_dir = Path("/proc/experiment")
    if subfolder:
        exp_dir = recipe.exp_dir
        exp_dir.mkdir(parents=True)
        (exp_dir / subfolder).symlink_to("/proc/data")
    faulty = exp_dir / subfolder if subfolder else Path("/proc")
    show_faults(recipe)
    for arguments in (("0", "5"), ("--check",)):
        done = recipe.run(*arguments, exp_dir=str(exp_dir))
        fault = f"{faulty} cannot be written to (No such file or directory): set exp_dir to a folder that can"
        assert done.returncode == 1 and fault in done.stderr + done.stdout, done.stderr
    assert recipe.calls() == []


def test_other_folders_that_cannot_be_written_to_are_named_or_replaced(recipe, tmp_path):
    done = recipe.run("-1", "-1", venv_root="/proc/venv")
    assert done.returncode == 1 and recipe.calls() == []
    assert "/proc cannot be written to (No such file or directory): set venv_root" in done.stderr
    done = recipe.run("--dry-run", "-1", "-1", venv_root="/proc/venv")
    assert done.returncode == 0
    variables = SHORT | {"XDG_CACHE_HOME": "/proc/cache", "HOME": str(tmp_path)}
    used, log = exported(recipe, "XDG_CACHE_HOME", **variables)
    assert used == f"/tmp/tts-grpo-cache-{os.getuid()}" and "the cache folder /proc cannot be written to" in log
    used, log = exported(recipe, "PYTRITON_HOME", **SHORT | {"PYTRITON_HOME": "/proc/pytriton"})
    assert used == f"/tmp/pytriton-{os.getuid()}" and "PYTRITON_HOME=/proc/pytriton is" in log


ON_A_SMALL_DISK = """
mkdir -p "$exp_dir" && mount -t tmpfs -o size=4m tmpfs "$exp_dir" || exit 99
FILL=$1 bash "$0" 0 4
echo "status $?" >&2
rm "$exp_dir/fill"
bash "$0" 0 4
"""


@pytest.mark.parametrize("program", ["prepare_data.py", "main_ppo", "merge.py", "infer_dist.py", "summarise.py"])
def test_a_full_disk_is_named_and_the_next_run_completes(recipe, program):
    done = in_mount_namespace(recipe, ON_A_SMALL_DISK, program)
    first = done.stderr.split("status ")[0]
    assert f"the disk of {recipe.exp_dir} has only 0 MiB left" in first and "run the same command again" in first
    assert "status 0" not in done.stderr and done.returncode == 0, done.stderr
    assert recipe.calls()[-1] == "report.py"


@pytest.mark.parametrize(
    ("options", "settings", "fault"),
    [
        ("size=64m", {}, None),
        ("size=20m", {}, "/dev/shm has 20 MiB free, but 28 are needed: mount a larger one (Docker: --shm-size=1g)"),
        ("size=64m", {"server_instances": "12"}, "64 MiB free, but 68 are needed"),
        ("ro", {}, "/dev/shm cannot be written to (Read-only file system), but the reward server and Ray need it"),
    ],
)
def test_shared_memory_that_is_too_small_is_named_before_any_work(recipe, options, settings, fault):
    script = f'mount -t tmpfs -o {options} tmpfs /dev/shm || exit 99; bash "$0" "$@"'
    done = in_mount_namespace(recipe, script, "0", "2", **settings)
    if fault is None:
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 1 and fault in done.stderr and recipe.calls() == [], done.stderr
    show_faults(recipe)
    assert fault in in_mount_namespace(recipe, script, "--check", **settings).stdout
    assert in_mount_namespace(recipe, script, "0", "0", **settings).returncode == 0, "stage 0 needs none"
