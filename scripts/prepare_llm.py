"""Prepare a language model's folder for training: what veRL and vLLM read from it is made what the recipe needs.

    python scripts/prepare_llm.py --sft-path DIR --output-dir exp/NAME/sft_model

The new folder links to the model's own files, which stay as they are. Three files are written anew:

- ``chat_template.jinja``, the template that ends a prompt with the token that starts speech. The SFT model of the
  recipe was published with Qwen2.5's default template; veRL takes no other than the tokenizer's.
- ``tokenizer_config.json``, without a template of its own.
- ``generation_config.json`` with the end tokens alone. Qwen2.5's has a repetition penalty and narrower sampling, which
  must act neither in rollouts nor in the evaluation unless a setting of the recipe says so.

Prints as JSON what was changed.
"""

import argparse
import json
import shutil
from pathlib import Path

from tts_grpo.speech.model_folders import as_list, check_llm_folder, generation_config, read_json
from tts_grpo.text.jsonl import write_json, write_text
from tts_grpo.text.prompts import load_tokenizer

REWRITTEN = ("chat_template.jinja", "tokenizer_config.json", "generation_config.json")


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft-path", type=Path, required=True, help="Hugging Face folder of the language model")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder to write; an older one is replaced")
    return parser.parse_args(argv)


def prepare(sft_path: Path, output_dir: Path) -> dict:
    """Write the folder; returns what was changed.

    Raises:
        ValueError: ``sft_path`` is no folder of a language model that can be trained; the message says why.
    """
    check_llm_folder(sft_path)
    tokenizer, source = load_tokenizer(sft_path), sft_path.resolve()
    generation, left_out = generation_config(source, tokenizer)
    tokenizer_config = read_json(source / "tokenizer_config.json")
    own_template = source / "chat_template.jinja"
    own = own_template.read_text(encoding="utf-8") if own_template.exists() else tokenizer_config.get("chat_template")
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
        "output": str(output_dir), "chat_template": "kept" if own == tokenizer.chat_template else "replaced",
        "end_tokens": tokenizer.convert_ids_to_tokens(as_list(generation["eos_token_id"])),
        "generation_settings_left_out": left_out,
    }  # fmt: skip


def main(argv=None):
    args = get_args(argv)
    try:
        changed = prepare(args.sft_path, args.output_dir)
    except (ValueError, OSError) as error:
        raise SystemExit(f"prepare_llm.py: {error}") from error
    print(json.dumps(changed, ensure_ascii=False))


if __name__ == "__main__":
    main()
