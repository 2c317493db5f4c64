"""Tests of the pre-flight check: it passes if a run would succeed, and otherwise reports all faults at once."""

import json
import os
import re
import shutil
import socket
import subprocess

import pytest
from transformers import AddedToken, AutoTokenizer, GenerationConfig

from scripts import check
from tests.asr_folders import make_small_sensevoice
from tests.conftest import ROOT, free_ports
from tests.hub_repositories import make_cosyvoice2
from tts_grpo.reward import libpython
from tts_grpo.speech.cosyvoice2.token2wav import CosyVoice2Token2Wav
from tts_grpo.speech.token2wav import load_token2wav
from tts_grpo.text.tokens import speech_token_str

pytestmark = pytest.mark.slow


def run_check(*arguments, **variables) -> subprocess.CompletedProcess:
    http, grpc, metrics = map(str, free_ports(3))
    environment = os.environ | {"http_port": http, "grpc_port": grpc, "metrics_port": metrics} | variables
    command = ["bash", str(ROOT / "run.sh"), "--check", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_tiny_profile_passes(venv_root, tmp_path):
    done = run_check(venv_root=str(venv_root), exp_dir=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checks passed" in done.stdout and "WRONG" not in done.stdout
    assert "ids from 4833 on" in done.stdout and not list(tmp_path.iterdir())


def test_a_running_server_is_asked_for_known_answers(reward_server, venv_root, tmp_path):
    port = str(reward_server.http)
    done = run_check(venv_root=str(venv_root), exp_dir=str(tmp_path), http_port=port, grpc_port=port)
    assert done.returncode == 0, done.stdout
    assert "known answers of" in done.stdout and '"mean_reward_of_wrong_texts"' in done.stdout


def test_all_faults_are_reported_at_once(tmp_path, assets):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run_check(
            "--", "trainer.v1.trainer_mode=sync", venv_root=str(tmp_path / "none"),
            http_port=str(taken.getsockname()[1]), eval_jsonl="/nowhere/set.jsonl",
            train_jsonl=str(tmp_path / "train.jsonl"), sft_path=str(tmp_path / "llm"), train_batch_size="3",
            reward_asr_dir=str(assets / "asr_eval"), max_checkpoints="1000000000", prompt_text="你好",
            server_urls="http://127.0.0.1:9", exp_dir=str(tmp_path), rollout_n="3", language="en",
        )  # fmt: skip
    assert done.returncode == 1
    for text in (
        "environment speech: ", "environment trainer: ", "/nowhere/set.jsonl is missing", "train_jsonl ",
        "asr_eval is a recogniser of the reward and of the evaluation", "prompt_audio and prompt_text",
        "9 rollouts are not a multiple of",
        "http_port ", "no reward server is ready at http://127.0.0.1:9", "llm is missing",
        "-- trainer.v1.trainer_mode=sync is refused",
        "asr_eval does not know the language en: its vocabulary has zh only",
    ):  # fmt: skip
        assert any(line.startswith("WRONG") and text in line for line in done.stdout.splitlines()), (text, done.stdout)


@pytest.mark.parametrize("hub", ["modelscope", "huggingface"])
def test_cosyvoice2_of_both_hubs_is_recognised(tmp_path, assets, venv_root, hub):
    """Hugging Face's repository has a config.json, as the tiny token2wav does."""
    folder = make_cosyvoice2(tmp_path, hub)
    s = {"token2wav_dir": str(folder), "reward_asr_dir": str(assets / "asr_reward"), "prompt_text": "",
         "eval_asr_dir": str(assets / "asr_eval"), "eval_sets": [], "prompt_audio": "",
         "prompt_list": "", "reward_asr_dirs": "", "judge_asr_dir": "", "eval_asr_dir_en": "",
         "venv_root": str(venv_root), "language": "zh"}  # fmt: skip
    assert [text for good, text in check.check_files(s) if not good] == []
    assert isinstance(load_token2wav(folder), CosyVoice2Token2Wav)
    (folder / "hift.pt").unlink()
    assert [text for good, text in check.check_files(s) if not good] == [
        f"{folder / 'hift.pt'} is missing: run bash run.sh -1 -1 to download it, or set its variable"
    ]


def described_sets(files, **settings) -> list[tuple[str, str, str]]:
    """File, language and recogniser of evaluation sets, as run.sh passes them to the check."""
    script = (
        'set -u; root=$1; source "$root/scripts/eval_sets.sh"; shift; eval_sets=("$@"); '
        'set_name() { basename "$1" .jsonl; }; described_sets'
    )
    command = ["bash", "-c", script, "-", str(ROOT), *map(str, files)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=True)
    return check.get_args(["--settings", '{"x": ""}', "--eval-sets", *done.stdout.splitlines()]).settings["eval_sets"]


def test_each_set_needs_a_recogniser_that_knows_its_languages(tmp_path, assets):
    """Sets in English have their own recogniser; a set with lines in both languages needs one that knows both."""
    english, chinese = make_small_sensevoice(tmp_path / "english"), str(assets / "asr_eval")
    rows = [{"id": 1, "text": "今天"}, {"id": 2, "text": "today", "language": "en"}]
    for name, used in (("test_en", rows[1:]), ("mine", rows[:1]), ("both", rows)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in used))
    settings = {"language": "zh", "eval_asr_dir": chinese, "eval_asr_dir_en": str(english), "reward_asr_dir": chinese}
    s = settings | {"judge_asr_dir": ""}
    for sets, fault in (("test_en mine", ""), ("both", "language en: the recogniser")):
        s["eval_sets"] = described_sets([tmp_path / f"{name}.jsonl" for name in sets.split()], **settings)
        found = [text for _, text in check.check_languages(s, [chinese])]
        assert len(found) == bool(fault) and all(fault in text and "asr_eval" in text for text in found), found
    settings["eval_asr_dir_en"] = ""
    s["eval_sets"] = described_sets([tmp_path / "test_en.jsonl"], **settings)
    assert "language en" in next(check.check_languages(s, []))[1]


def test_the_recogniser_of_english_sets_must_not_be_the_rewards(tmp_path, assets):
    (tmp_path / "test_en.jsonl").write_text('{"id": 1, "text": "today"}\n')
    done = run_check(exp_dir=str(tmp_path), eval_jsonl=str(tmp_path / "test_en.jsonl"),
                     eval_asr_dir_en=str(assets / "asr_reward"))  # fmt: skip
    assert "WRONG  " + str((assets / "asr_reward").resolve()) + " is a recogniser of the reward and of" in done.stdout


def data_findings(tmp_path, venv_root="none", flags=(), **files) -> list[tuple[bool, str]]:
    texts = {"train_jsonl": "今天", "test_jsonl": "明天", "known_answer_jsonl": "后天", "eval_jsonl": "昨天"}
    s = {"venv_root": str(venv_root), "sft_path": str(ROOT / "assets/tiny/llm"), "prompt_list": ""}
    for name, text in texts.items():
        row = {"text": text, "speech_tokens": [1], "id": 1}
        rows = files.get(name, [row] * (1 if name == "eval_jsonl" else 2))
        s[name] = str(tmp_path / name)
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8-sig")
    s["eval_sets"] = [(s["eval_jsonl"], "zh", "")]
    return list(check.check_data(s, flags))


def test_all_lines_of_data_files_are_read_without_an_environment(tmp_path):
    assert [good for good, _ in data_findings(tmp_path)] == [True] * 4
    bad = {"text": "……", "id": 2}
    good = {"text": "今天", "speech_tokens": [1], "id": 1}
    found = data_findings(tmp_path, train_jsonl=[good, bad], eval_jsonl=[good, bad], known_answer_jsonl=[good, bad])
    wrong = [text for good, text in found if not good]
    assert len(wrong) == 3 and all(", line 2: " in text for text in wrong), wrong
    assert sum("text has no word" in text for text in wrong) == 2 and any("speech_tokens" in text for text in wrong)


def test_with_an_environment_data_are_read_as_stage_0_does(tmp_path, venv_root):
    flags = ["--batch-size", "3", "--eval-set", str(tmp_path / "eval_jsonl")]
    wrong = [text for good, text in data_findings(tmp_path, venv_root, flags) if not good]
    assert len(wrong) == 1 and "has 2 usable texts, fewer than the 3 of a training step" in wrong[0]
    rows = [{"id": i, "text": "……"} for i in (1, 2)]
    wrong = [text for good, text in data_findings(tmp_path, venv_root, flags[2:], eval_jsonl=rows) if not good]
    assert len(wrong) == 1 and "eval_jsonl, line 1: text has no word" in wrong[0] and "line 2: " in wrong[0]


def wrong_of_model(folder) -> list[str]:
    return [text for good, text in check.language_model_findings(folder) if not good]


def without_template(folder, tokenizer):
    tokenizer.chat_template = "{{ messages[0]['content'] }}"


def without_a_speech_token(folder, tokenizer):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace("<|s_77|>", "<|t_77|>"), encoding="utf-8")
    return False


def with_special_speech_tokens(folder, tokenizer):
    tokenizer.add_tokens([AddedToken(speech_token_str(0), special=True)], special_tokens=True)


def without_its_end(folder, tokenizer):
    GenerationConfig(eos_token_id=5).save_pretrained(folder)


def without_weights(folder, tokenizer):
    (folder / "model.safetensors").unlink()


def test_the_published_sft_model_passes(sft_checkpoint):
    findings = list(check.language_model_findings(sft_checkpoint))
    assert all(good for good, _ in findings), findings
    texts = "\n".join(text for _, text in findings)
    assert "ids from 151665 on" in texts and "'<|im_end|>'" in texts and '"repetition_penalty": 1.1' in texts


def test_faults_of_the_published_form_are_named(sft_checkpoint, tmp_path):
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "checkpoint-885000").symlink_to(sft_checkpoint)
    assert any("it has checkpoint-885000: set sft_path" in text for text in wrong_of_model(repository))
    folder = tmp_path / "llm"
    shutil.copytree(sft_checkpoint, folder)
    GenerationConfig(eos_token_id=151643).save_pretrained(folder)
    assert any("lack <|im_end|>" in text for text in wrong_of_model(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_template, "chat template renders"),
        (without_a_speech_token, "not consecutive"),
        (with_special_speech_tokens, "veRL removes"),
        (without_its_end, "lack <|SPEECH_GENERATION_END|>"),
        (without_weights, "has no weights"),
    ],
)
def test_language_model(assets, tmp_path, change, message):
    folder = tmp_path / "llm"
    shutil.copytree(assets / "llm", folder)
    assert wrong_of_model(folder) == []
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if change(folder, tokenizer) is not False:
        tokenizer.save_pretrained(folder)
    assert any(message in text for text in wrong_of_model(folder)), wrong_of_model(folder)


def test_a_model_type_that_verl_does_not_know(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "cosyvoice2_lm_of_old"}))
    assert any("llm=official" in text for text in wrong_of_model(tmp_path))


TWO = (81920, 81920)  # MiB of each GPU


@pytest.mark.parametrize(
    ("gpus", "settings", "message"),
    [
        (TWO, {}, None),
        (TWO, {"num_gpus": "4"}, "need 4"),
        (TWO, {"server_devices": "cuda:2"}, "need 3"),
        (TWO, {"server_gib": "60"}, "GPU 0: 79 GiB free, 104 needed"),
        (TWO, {"server_gib": "60", "server_devices": "cuda:1"}, None),
        (TWO, {"vllm_memory_share": "0.04"}, "leaves 3 GiB for vLLM"),
        ((), {}, "nvidia-smi does not run"),
        ((24576, 81920), {}, "GPU 0: 23 GiB free"),
        ((24576, 81920), {"visible": "1"}, None),
        ((24576, 81920), {"visible": "GPU-1a"}, None),
        ((24576, 81920), {"visible": "1", "num_gpus": "2"}, "1 GPUs: .*need 2"),
        (TWO, {"visible": "0,5"}, "names 5, which nvidia-smi does not list"),
        (TWO, {"visible": "MIG-7f2c"}, None),  # its memory is not reported
        (TWO, {"visible": "MIG-7f2c", "num_gpus": "2"}, "1 GPUs: .*need 2"),
        (TWO, {"visible": ""}, "need 1"),
        (("[N/A]",), {}, None),
    ],
)
def test_gpus(tmp_path, monkeypatch, gpus, settings, message):
    smi = tmp_path / "nvidia-smi"
    lines = [f'echo "{i}, GPU-{i}abc, NVIDIA H100 80GB HBM3, {memory}, 1024"\n' for i, memory in enumerate(gpus)]
    smi.write_text(f"#!/bin/sh\n{''.join(lines)}exit {int(not gpus)}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if (visible := settings.pop("visible", None)) is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    s = {"train_device": "cuda", "num_gpus": "1", "server_devices": "cuda:0", "server_instances": "1",
         "server_gib": "8", "vllm_memory_share": "0.40", "http_port": "9"} | settings  # fmt: skip
    wrong = [text for good, text in check.check_gpus(s) if not good]
    assert (wrong == []) if message is None else any(re.search(message, text) for text in wrong), wrong


def test_compiler(tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(check.sysconfig, "get_path", lambda name: str(tmp_path))
    wrong = [text for good, text in check.check_compiler({"train_device": "cuda"}) if not good]
    assert len(wrong) == 2 and "install gcc" in wrong[0] and "python3-dev" in wrong[1]
    (tmp_path / "Python.h").touch()
    (tmp_path / "gcc").touch(0o755)
    assert all(good for good, _ in check.check_compiler({"train_device": "cuda"}))
    assert list(check.check_compiler({"train_device": "cpu"})) == []


@pytest.mark.parametrize(
    ("maker", "shared", "library", "remedy"),
    [
        ("conda", 0, "lib", None),
        ("uv", 1, "lib", None),  # its LIBDIR is that of the machine that built it
        ("debian", 1, "lib/x86_64-linux-gnu", None),
        ("debian", 1, None, "apt-get install libpython9.9"),
        (".pyenv/versions", 0, None, "PYTHON_CONFIGURE_OPTS=--enable-shared pyenv install --force"),
        (".pyenv/versions", 1, "lib", None),
        ("source", 0, None, "build Python with --enable-shared"),
    ],
)
def test_libpython_of_each_maker(tmp_path, monkeypatch, maker, shared, library, remedy):
    prefix = tmp_path / maker
    variables = {
        "LIBDIR": "/install/lib" if maker == "uv" else str(prefix / "lib"), "Py_ENABLE_SHARED": shared,
        "MULTIARCH": "x86_64-linux-gnu",
    }  # fmt: skip
    monkeypatch.setattr(libpython, "VERSION", "9.9")
    monkeypatch.setattr(libpython, "NAME", "libpython9.9.so.1.0")
    monkeypatch.setattr(libpython.sysconfig, "get_config_var", variables.get)
    monkeypatch.setattr(libpython.sys, "base_prefix", str(prefix))
    if library:
        (prefix / library).mkdir(parents=True)
        (prefix / library / "libpython9.9.so.1.0").touch()
        assert libpython.libpython_fault() == "" and libpython.libpython_folder() == prefix / library
    else:
        assert libpython.libpython_folder() is None and remedy in libpython.libpython_fault()


def test_a_missing_libpython_is_named(tmp_path, venv_root):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "no libpython: set base_python" >&2\nexit 1\n')
    python.chmod(0o755)
    s = {"venv_root": str(tmp_path), "base_python": str(python), "make_envs": "1", "trainer_requirements": "x"}
    assert (False, "no libpython: set base_python") in check.check_environments(s)
    working = list(check.check_environments(s | {"base_python": str(venv_root / "speech/bin/python")}))
    assert (True, "shared library of Python for the reward server") in working
