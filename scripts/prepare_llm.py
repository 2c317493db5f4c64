"""Prepare a language model's folder for training, with the chat template and generation config of the recipe.

    python scripts/prepare_llm.py --sft-path DIR --output-dir exp/NAME/sft_model

The new folder has links to the model's own files, which are not changed. Three files are rewritten:

- ``chat_template.jinja``: the template that ends a prompt with the token that starts speech. The recipe's SFT model was
  published with Qwen2.5's default template, and veRL always uses the tokenizer's template.
- ``tokenizer_config.json``: the original without its chat template.
- ``generation_config.json``: only the token ids. Qwen2.5's generation config has a repetition penalty and restricts
  sampling, which must not affect rollouts and evaluation; the recipe has settings for that.

Prints the changes as JSON.
"""

import argparse
import json
import shutil
from pathlib import Path

from tts_grpo.speech.model_folders import LLM_FOLDER, as_list, check_llm_folder, generation_config, read_json
from tts_grpo.text.jsonl import write_json, write_text
from tts_grpo.text.prompts import load_tokenizer, with_speech_role
from tts_grpo.text.tokens import first_speech_id

REWRITTEN = ("chat_template.jinja", "tokenizer_config.json", "generation_config.json")


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft-path", type=Path, required=True, help="Hugging Face folder of the language model")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder to write; replaced if it exists")
    parser.add_argument("--speech-role", action="store_true", help="render speech tokens that a response continues")
    return parser.parse_args(argv)


def prepare(sft_path: Path, output_dir: Path, speech_role: bool = False) -> dict:
    """Write the folder; returns the changes.

    With ``speech_role``, the template renders messages of the role "speech" (tts_grpo/text/prompts.py).

    Raises:
        ValueError: ``sft_path`` is not the folder of a language model that can be trained; the message says why.
    """
    check_llm_folder(sft_path)
    tokenizer, source = load_tokenizer(sft_path), sft_path.resolve()
    try:
        first_speech_id(tokenizer)
    except ValueError as error:
        raise ValueError(f"{sft_path}: {error}. {LLM_FOLDER}") from None
    if speech_role:
        tokenizer.chat_template = with_speech_role(tokenizer.chat_template)
    generation, dropped = generation_config(source, tokenizer)
    tokenizer_config = read_json(source / "tokenizer_config.json")
    template_path = source / "chat_template.jinja"
    if template_path.exists():
        original = template_path.read_text(encoding="utf-8")
    else:
        original = tokenizer_config.get("chat_template")
    tokenizer_config.pop("chat_template", None)
    part = output_dir.with_name(output_dir.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and path.name not in REWRITTEN and not path.name.startswith("."):
            (part / path.name).symlink_to(path)
    write_text(part / "chat_template.jinja", tokenizer.chat_template)
    write_json(part / "tokenizer_config.json", tokenizer_config)
    write_json(part / "generation_config.json", generation)
    shutil.rmtree(output_dir, ignore_errors=True)
    part.rename(output_dir)
    return {
        "output": str(output_dir), "chat_template": "kept" if original == tokenizer.chat_template else "replaced",
        "end_tokens": tokenizer.convert_ids_to_tokens(as_list(generation["eos_token_id"])),
        "generation_settings_left_out": dropped,
    }  # fmt: skip


def main(argv=None):
    args = get_args(argv)
    try:
        changed = prepare(args.sft_path, args.output_dir, args.speech_role)
    except (ValueError, OSError) as error:
        raise SystemExit(f"prepare_llm.py: {error}") from error
    print(json.dumps(changed, ensure_ascii=False))


if __name__ == "__main__":
    main()
