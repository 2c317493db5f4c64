"""Preparation of the published SFT model for training, in both environments, without changing it."""

import copy
import hashlib
import json
import subprocess
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from scripts import prepare_llm
from tests.conftest import ROOT
from tools.random_llm import DEFAULT_CHAT_TEMPLATE
from tts_grpo.text.prompts import (
    COSYVOICE_CHAT_TEMPLATE,
    chat_messages,
    load_tokenizer,
    render_prompt,
    with_speech_role,
)

pytestmark = pytest.mark.slow

# Renders like the template that the original recipe passes with each call: it adds instruction and start token.
UPSTREAM_CHAT_TEMPLATE = (
    "{%- for message in messages %}{%- if message.role == 'user' %}"
    "{{- '<|im_start|>user\\nConvert the text to speech: ' + message.content + '<|im_end|>\\n' }}"
    "{%- elif message.role == 'assistant' %}"
    "{{- '<|im_start|>assistant\\n<|SPEECH_GENERATION_START|>' + message.content }}"
    "{%- endif %}{%- endfor %}"
)
PROMPT_IDS = [  # <|im_start|>user\nConvert the text to speech: 你好<|im_end|>\n<|im_start|>assistant\n<|SPEECH_GEN...
    151644, 872, 198, 12012, 279, 1467, 311, 8806, 25, 220, 108386, 151645, 198, 151644, 77091, 198, 158226,
]  # fmt: skip


def copy_with_template(folder: Path, checkpoint: Path, template: str | None) -> Path:
    """Make a folder with links to a checkpoint's files and another chat template."""
    folder.mkdir(parents=True)
    for path in checkpoint.iterdir():
        if path.name != "tokenizer_config.json":
            (folder / path.name).symlink_to(path)
    config = json.loads((checkpoint / "tokenizer_config.json").read_text(encoding="utf-8")) | {
        "chat_template": template
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("template", [DEFAULT_CHAT_TEMPLATE, UPSTREAM_CHAT_TEMPLATE, None])
def test_prompts_equal_those_of_the_original_recipe(sft_checkpoint, template, tmp_path):
    source = copy_with_template(tmp_path / "sft", sft_checkpoint, template)
    before = digests(source)
    changed = prepare_llm.prepare(source, tmp_path / "out")
    assert changed["chat_template"] == "replaced" and digests(source) == before
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")  # as veRL loads it
    ids = tokenizer.apply_chat_template(chat_messages(tokenizer, "你好"), add_generation_prompt=True)["input_ids"]
    assert ids == PROMPT_IDS
    zero_shot = render_prompt(tokenizer, "好", "你", [0, 6560])
    assert tokenizer(zero_shot, add_special_tokens=False)["input_ids"] == [*PROMPT_IDS, 151665, 158225]
    assert render_prompt(load_tokenizer(source), "好", "你", [0, 6560]) == zero_shot


def test_result_is_the_same_in_the_trainer_environment(trainer_python, sft_checkpoint, tmp_path):
    command = [trainer_python, str(ROOT / "scripts/prepare_llm.py"), "--sft-path", str(sft_checkpoint)]
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--output-dir", str(tmp_path / "out")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    changes = json.loads(done.stdout)
    assert changes["end_tokens"] == ["<|im_end|>", "<|endoftext|>"]
    assert changes["generation_settings_left_out"]["repetition_penalty"] == 1.1
    read = """if True:
        import sys
        from transformers import AutoTokenizer, GenerationConfig
        tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
        messages = [{"role": "user", "content": "Convert the text to speech: 你好"}]
        print(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])
    """
    done = subprocess.run([trainer_python, "-c", read, str(tmp_path / "out")], capture_output=True, text=True)
    assert json.loads(done.stdout) == PROMPT_IDS, done.stderr[-2000:]


def test_sampling_settings_of_qwen_are_dropped(sft_checkpoint, tmp_path):
    prepare_llm.prepare(sft_checkpoint, tmp_path / "out")
    config = GenerationConfig.from_pretrained(tmp_path / "out")
    assert config.eos_token_id == [151645, 151643] and config.pad_token_id == 151643
    assert not config.repetition_penalty and not config.top_k and not config.temperature


def test_matching_template_is_kept_and_existing_output_replaced(assets, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/stale").touch()
    changed = prepare_llm.prepare(assets / "llm", tmp_path / "out")
    assert changed["chat_template"] == "kept" and not (tmp_path / "out/stale").exists()
    assert (tmp_path / "out/model.safetensors").resolve() == (assets / "llm/model.safetensors").resolve()
    assert render_prompt(AutoTokenizer.from_pretrained(tmp_path / "out"), "好").endswith("GENERATION_START|>")


@pytest.mark.parametrize("official", [False, True])
def test_speech_that_a_rollout_continues_ends_the_prompt(assets, tokenizer, tmp_path, official):
    """All other prompts stay the same, those of messages without a role, which veRL renders, too."""
    plain, wrapped = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    if official:
        plain.chat_template = COSYVOICE_CHAT_TEMPLATE
        wrapped.chat_template = with_speech_role(COSYVOICE_CHAT_TEMPLATE)
    else:
        prepare_llm.main(["--sft-path", str(assets / "llm"), "--output-dir", str(tmp_path / "out"), "--speech-role"])
        wrapped = load_tokenizer(tmp_path / "out")
    assert wrapped.chat_template == with_speech_role(wrapped.chat_template) != plain.chat_template

    def render(tokenizer, messages):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    assert render(wrapped, [{}]) == render(plain, [{}])
    for before in ("", "我是"):
        prompt = render(plain, chat_messages(plain, "你好", before))
        assert render(wrapped, chat_messages(wrapped, "你好", before)) == prompt
        assert render(wrapped, chat_messages(wrapped, "你好", before, [1, 22])) == f"{prompt}<|s_1|><|s_22|>"
    assert render_prompt(wrapped, "你好", "我是", [1, 22]) == f"{prompt}<|s_1|><|s_22|>"


def test_folders_that_cannot_be_trained_are_refused(sft_checkpoint, tmp_path):
    (tmp_path / "repository/checkpoint-5").mkdir(parents=True)
    (tmp_path / "repository/checkpoint-5/config.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"has no config.json; it has checkpoint-5: set sft_path"):
        prepare_llm.main(["--sft-path", str(tmp_path / "repository"), "--output-dir", str(tmp_path / "out")])
    with pytest.raises(ValueError, match=r"no weights .*; it has no tokenizer .*; it names no end token.*export.md"):
        prepare_llm.prepare(tmp_path / "repository/checkpoint-5", tmp_path / "out")
    (tmp_path / "own").mkdir()
    (tmp_path / "own/epoch_3_whole.pt").touch()
    with pytest.raises(ValueError, match=r"set llm=official llm_pt=.*/own/epoch_3_whole.pt"):
        prepare_llm.prepare(tmp_path / "own", tmp_path / "out")
    foreign = copy_with_template(tmp_path / "foreign", sft_checkpoint, "[INST] {{ messages[0]['content'] }} [/INST]")
    with pytest.raises(ValueError, match=r"foreign: the tokenizer's chat template renders .*\[INST\]"):
        prepare_llm.prepare(foreign, tmp_path / "out")
    assert not (tmp_path / "out").exists()
