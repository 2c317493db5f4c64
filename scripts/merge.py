"""Merge veRL's FSDP shards into a Hugging Face folder with the SFT model's tokenizer and generation config.

veRL's merger writes the weights. Of a training with LoRA, it writes the weights before the training and, in the folder
lora_adapter, the adapter: they are added up here. Tokenizer, chat template, generation config (all end tokens) and, if
there is one, the bias of the LM head (tts_grpo/speech/head_bias.py) are copied from the folder that was trained
(scripts/prepare_llm.py).
The merged folder is loaded once to check it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tts_grpo.speech.head_bias import load_head_bias, save_head_bias
from tts_grpo.text.prompts import render_prompt

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder with the shards, global_step_N/actor")
    parser.add_argument("--sft-path", type=Path, required=True, help="the folder that was trained, exp/NAME/sft_model")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder to write")
    return parser.parse_args(argv)


def merge_adapter(folder: Path) -> None:
    """Add the LoRA adapter in ``folder/lora_adapter`` to the weights in ``folder``; the adapter's folder is kept.

    Raises:
        ValueError: the adapter's scale is unknown, because the checkpoint has no lora_train_meta.json.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = folder / "lora_adapter"
    if not json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["lora_alpha"]:
        raise ValueError(
            f"{folder}: lora_alpha is unknown, because the checkpoint has no lora_train_meta.json: restore it"
        )
    model = AutoModelForCausalLM.from_pretrained(folder)
    dtype = model.dtype
    model = PeftModel.from_pretrained(model.to(torch.float32), adapter).merge_and_unload()
    model.to(dtype).save_pretrained(folder)


def check(folder: Path, sft_path: Path) -> None:
    """Check the merged folder by loading it.

    Raises:
        ValueError: a weight is missing, or the chat template or the end tokens differ from the SFT model's.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    problems = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]]
    if problems:
        raise ValueError(f"{folder}: missing or unexpected weights: {problems}")
    tokenizer, sft_tokenizer = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(sft_path)
    if render_prompt(tokenizer, "你好") != render_prompt(sft_tokenizer, "你好"):
        raise ValueError(f"{folder}: the chat template differs from that of {sft_path}")
    ends, sft_ends = model.generation_config.eos_token_id, GenerationConfig.from_pretrained(sft_path).eos_token_id
    if ends != sft_ends:
        raise ValueError(f"{folder}: end tokens {ends}, but {sft_path} has {sft_ends}")


def main(argv=None):
    args = get_args(argv)
    merger = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", "fsdp"]
    # The checkpoint's config.json names the attention of the training, which Transformers must know; veRL imports the
    # module. The merged folder's config.json does not name it.
    environment = os.environ | {"VERL_USE_EXTERNAL_MODULES": "tts_grpo.training.varlen"}
    command = [*merger, "--local_dir", args.checkpoint, "--target_dir", args.output_dir]
    subprocess.run(command, check=True, env=environment)
    if (args.output_dir / "lora_adapter").exists():
        merge_adapter(args.output_dir)
    for name in TOKENIZER_FILES:
        (args.output_dir / name).unlink(missing_ok=True)
        if (args.sft_path / name).exists():
            shutil.copy(args.sft_path / name, args.output_dir / name)
    bias = load_head_bias(args.sft_path)
    if bias is not None:
        save_head_bias(bias, args.output_dir)
    check(args.output_dir, args.sft_path)


if __name__ == "__main__":
    main()
