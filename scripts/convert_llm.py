"""Convert the official CosyVoice2 language model to a Hugging Face folder, and back after training.

    python scripts/convert_llm.py to-hf --cosyvoice-dir CosyVoice2-0.5B --output DIR
    python scripts/convert_llm.py to-official --hf DIR --like CosyVoice2-0.5B/llm.pt --output llm.pt

The vocabulary is the text tokens, ``<|s_0|>``..., three end tokens, ``<|sos|>`` and ``<|task_id|>``; names and ids are
those of the CosyVoice repository's own conversion (examples/grpo/cosyvoice2/pretrained_to_huggingface.py). Its result,
such as ``yuekai/cosyvoice2_llm``, can also be trained and converted back. Unused rows of the text embedding are not in
the folder; to-official copies them from --like. A conversion to Hugging Face and back is bit-exact.

The folder has the weights of a stock Qwen2. The official LM head has a bias, and outputs for speech and end tokens
only; ``head_bias.safetensors`` represents both (tts_grpo/speech/head_bias.py describes where it is used). Thus
rollouts, training and inference have exactly the official model's probabilities: text ids have probability 0, whatever
the weights are. The bias is not trained. A folder without a bias, such as one trained by CosyVoice's own recipe, is
exported with a bias of 0.

Errors that grow on the way back to CosyVoice, causes by measurement (tools/export_gap.py; figures in docs/export.md):

- Sampling changes the error rate most. CosyVoice's repetition aware sampling removes the tail that rollouts at
  temperature 1 draw from. Compare an exported model with the official one under the same sampling, not with its own
  rollouts or with another program's top_p and top_k.
- Rounding weights to bfloat16, as veRL's merger does, made no significant difference.
- End tokens. Rollouts end at any of the three. Older releases of CosyVoice stop at the first one only and skip the
  others, so that a model that learned to end with another one does not stop.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config
from transformers import Qwen2ForCausalLM as Qwen2

from tts_grpo.speech.head_bias import NAME as BIAS
from tts_grpo.speech.head_bias import UNREACHABLE, load_head_bias, save_head_bias
from tts_grpo.text.prompts import COSYVOICE2_CHAT_TEMPLATE, SOS, TASK_ID
from tts_grpo.text.tokens import NUM_SPEECH_TOKENS, speech_token_str

TEXT_CONFIG_DIR = "CosyVoice-BlankEN"  # folder with configuration and text tokenizer, next to llm.pt
ENDS = ("<|eos1|>", "<|eos2|>", "<|eos3|>")
NUM_OUTPUTS = NUM_SPEECH_TOKENS + len(ENDS)  # outputs of the official LM head: Qwen2LM in cosyvoice/llm/llm.py
TEXT_SPECIAL_TOKENS = [  # CosyVoice2Tokenizer in cosyvoice/tokenizer/tokenizer.py
    "<|im_start|>", "<|im_end|>", "<|endofprompt|>", "[breath]", "<strong>", "</strong>", "[noise]", "[laughter]",
    "[cough]", "[clucking]", "[accent]", "[quick_breath]", "<laughter>", "</laughter>", "[hissing]", "[sigh]",
    "[vocalized-noise]", "[lipsmack]", "[mn]",
]  # fmt: skip
PAD = "<|endoftext|>"
ROW_MULTIPLE = 128
QWEN, EMBEDDING, HEAD = "llm.model.", "model.embed_tokens.weight", "lm_head.weight"
# Entries that CosyVoice's trainer adds to the state dict (cosyvoice/utils/train_utils.py).
TRAINING_STATE = ("epoch", "step")


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    to_hf = commands.add_parser("to-hf", help="convert from the official format to Hugging Face")
    to_hf.add_argument("--cosyvoice-dir", type=Path, required=True, help=f"folder with llm.pt and {TEXT_CONFIG_DIR}")
    to_hf.add_argument("--output", type=Path, required=True, help="folder to write")
    to_official = commands.add_parser("to-official", help="convert from Hugging Face to the official format")
    to_official.add_argument("--hf", type=Path, required=True, help="converted (and possibly trained) folder")
    to_official.add_argument("--like", type=Path, required=True, help="the llm.pt that the folder was made from")
    to_official.add_argument("--output", type=Path, required=True, help="state dict to write")
    return parser.parse_args(argv)


def expected_shapes(config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an official state dict whose Qwen2 has this configuration."""
    with torch.device("meta"):
        qwen = Qwen2(config)
    shapes = {QWEN + name: tuple(tensor.shape) for name, tensor in qwen.state_dict().items()}
    return shapes | {
        "speech_embedding.weight": (NUM_OUTPUTS, config.hidden_size),
        "llm_embedding.weight": (2, config.hidden_size),
        "llm_decoder.weight": (NUM_OUTPUTS, config.hidden_size),
        "llm_decoder.bias": (NUM_OUTPUTS,),
    }


def load_official(path: Path, config) -> dict[str, torch.Tensor]:
    """The state dict at ``path``, without the trainer's epoch and step.

    Raises:
        ValueError: names or shapes differ from those that ``config`` implies; the message lists all differences.
    """
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    state = {name: tensor for name, tensor in state.items() if name not in TRAINING_STATE}
    expected = expected_shapes(config)
    problems = [f"{name} is missing" for name in expected.keys() - state.keys()]
    problems += [f"{name} is unknown" for name in state.keys() - expected.keys()]
    for name in expected.keys() & state.keys():
        shape = tuple(state[name].shape) if isinstance(state[name], torch.Tensor) else type(state[name]).__name__
        if shape != expected[name]:
            problems.append(f"{name} is {shape}, not {expected[name]}")
        elif not state[name].isfinite().all():
            problems.append(f"{name} is not finite")
    if problems:
        raise ValueError(f"{path} is not a CosyVoice2 language model: {'; '.join(sorted(problems))}")
    return state


def make_tokenizer(folder: Path, text_rows: int):
    """The text tokenizer extended with the model's output tokens, and the id of ``<|s_0|>``.

    Raises:
        ValueError: the text tokenizer has more tokens than the embedding has rows, or a line break is not one token.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": PAD, "pad_token": PAD})
    tokenizer.add_tokens(TEXT_SPECIAL_TOKENS, special_tokens=True)
    first = len(tokenizer)
    if first > text_rows:
        raise ValueError(f"{folder}: {first} text tokens, but {QWEN}{EMBEDDING} has {text_rows} rows")
    if len(tokenizer("\n", add_special_tokens=False)["input_ids"]) != 1:
        raise ValueError(f"{folder}: the tokenizer splits a line break into several tokens, but veRL needs one")
    # Speech tokens must not be special: veRL skips special tokens when it decodes.
    tokenizer.add_tokens([speech_token_str(i) for i in range(NUM_SPEECH_TOKENS)])
    tokenizer.add_tokens([*ENDS, SOS, TASK_ID], special_tokens=True)
    tokenizer.eos_token, tokenizer.chat_template = ENDS[0], COSYVOICE2_CHAT_TEMPLATE
    check_ids(tokenizer, folder)
    return tokenizer, first


def check_ids(tokenizer, folder: Path) -> int:
    """Check the ids of the output tokens; returns the id of ``<|s_0|>``.

    Raises:
        ValueError: the ids of speech, end, sos and task tokens are not consecutive.
    """
    names = [*map(speech_token_str, range(NUM_SPEECH_TOKENS)), *ENDS, SOS, TASK_ID]
    ids = tokenizer.convert_tokens_to_ids(names)
    first = ids[0] if ids[0] is not None else 0
    for i, (name, id_) in enumerate(zip(names, ids, strict=True)):
        if id_ != first + i or id_ == tokenizer.unk_token_id:
            raise ValueError(f"{folder}: {name} has id {id_} in the tokenizer, not {first + i}")
    return first


def converted_config(config, tokenizer, first: int) -> Qwen2Config:
    """``config`` with the vocabulary of the converted model."""
    values = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures", "auto_map")}
    rows = -(-(first + NUM_OUTPUTS + 2) // ROW_MULTIPLE) * ROW_MULTIPLE
    values |= {"vocab_size": rows, "tie_word_embeddings": False, "bos_token_id": None, "dtype": "float32"}
    values |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return Qwen2Config(**values)


def converted_weights(state: dict[str, torch.Tensor], first: int, rows: int) -> dict[str, torch.Tensor]:
    """State dict of a Qwen2 with ``rows`` ids, and the LM head's bias; float32."""
    weights = {name[len(QWEN) :]: tensor.float() for name, tensor in state.items() if name.startswith(QWEN)}
    outputs, size = slice(first, first + NUM_OUTPUTS), state["llm_decoder.weight"].shape[1]
    embedding, head, bias = torch.zeros(rows, size), torch.zeros(rows, size), torch.full((rows,), UNREACHABLE)
    embedding[:first] = state[QWEN + EMBEDDING][:first]
    embedding[outputs] = state["speech_embedding.weight"]
    embedding[outputs.stop : outputs.stop + 2] = state["llm_embedding.weight"]
    head[outputs], bias[outputs] = state["llm_decoder.weight"], state["llm_decoder.bias"]
    return weights | {EMBEDDING: embedding, HEAD: head, BIAS: bias}


def save(output: Path, config, weights: dict[str, torch.Tensor], tokenizer) -> None:
    """Write a model folder atomically."""
    part = output.with_name(output.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    bias = weights.pop(BIAS)
    model = Qwen2(config).eval()
    model.load_state_dict(weights, assign=True)  # assign=True avoids a second copy of 2 GB
    ends = tokenizer.convert_tokens_to_ids(list(ENDS))
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(part)
    save_head_bias(bias, part)
    tokenizer.save_pretrained(part)
    part.rename(output)


def to_hf(cosyvoice_dir: Path, output: Path) -> dict:
    """Write the Hugging Face folder; returns its sizes and the range of the bias.

    Raises:
        FileExistsError: ``output`` exists.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists: remove it or choose another --output")
    text_dir = cosyvoice_dir / TEXT_CONFIG_DIR
    config = AutoConfig.from_pretrained(text_dir)
    state = load_official(cosyvoice_dir / "llm.pt", config)
    tokenizer, first = make_tokenizer(text_dir, config.vocab_size)
    converted = converted_config(config, tokenizer, first)
    save(output, converted, converted_weights(state, first, converted.vocab_size), tokenizer)
    low, high = (bound.item() for bound in state["llm_decoder.bias"].float().aminmax())
    sizes = {"vocab_size": converted.vocab_size, "first_speech_id": first, "outputs": NUM_OUTPUTS}
    return sizes | {"smallest_bias": low, "largest_bias": high}


def official_state(
    weights: dict[str, torch.Tensor], like: dict[str, torch.Tensor], first: int
) -> dict[str, torch.Tensor]:
    """State dict with the names and types of ``like`` and the values of ``weights``, which include the bias."""
    outputs = slice(first, first + NUM_OUTPUTS)
    new = {QWEN + name: tensor for name, tensor in weights.items() if name not in (HEAD, BIAS)}
    embedding = like[QWEN + EMBEDDING].clone()
    embedding[:first] = weights[EMBEDDING][:first]
    new |= {
        QWEN + EMBEDDING: embedding,
        "speech_embedding.weight": weights[EMBEDDING][outputs],
        "llm_embedding.weight": weights[EMBEDDING][outputs.stop : outputs.stop + 2],
        "llm_decoder.weight": weights[HEAD][outputs],
        "llm_decoder.bias": weights[BIAS][outputs],
    }
    # Qwen2's own head is tied to the text embedding, or unused
    tied = torch.equal(like[QWEN + HEAD], like[QWEN + EMBEDDING])
    new[QWEN + HEAD] = embedding if tied else like[QWEN + HEAD]
    # clone(), because torch.save writes the whole storage of a slice
    result = {name: new[name].detach().to(like[name].dtype).clone() for name in like if name != QWEN + HEAD}
    same = tied and like[QWEN + HEAD].dtype == like[QWEN + EMBEDDING].dtype
    result[QWEN + HEAD] = result[QWEN + EMBEDDING] if same else new[QWEN + HEAD].to(like[QWEN + HEAD].dtype)
    return {name: result[name] for name in like}


def to_official(hf: Path, like_path: Path, output: Path) -> dict:
    """Write the official state dict; returns the number of tensors and whether the folder has a bias.

    Raises:
        ValueError: a tensor or token in the folder or in ``like_path`` is missing or wrong.
    """
    first = check_ids(AutoTokenizer.from_pretrained(hf), hf)
    model, info = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, output_loading_info=True)
    problems = [str(name) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]]
    problems = [name for name in problems if name != BIAS]  # the weights may include the bias
    if problems or model.config.tie_word_embeddings:
        raise ValueError(f"{hf}: missing or unexpected weights: {', '.join(problems) or 'head tied to the embedding'}")
    config = Qwen2Config(**{k: v for k, v in model.config.to_dict().items() if k != "model_type"})
    embedding = torch.load(like_path, map_location="cpu", weights_only=True, mmap=True).get(QWEN + EMBEDDING)
    if embedding is None or len(embedding) < first:
        raise ValueError(f"{like_path}: {QWEN}{EMBEDDING} is missing, or has fewer than {first} rows")
    config.vocab_size = len(embedding)
    bias = load_head_bias(hf)
    weights = model.state_dict() | {BIAS: torch.zeros(len(model.lm_head.weight)) if bias is None else bias}
    state = official_state(weights, load_official(like_path, config), first)
    part = output.with_name(output.name + ".part")
    torch.save(state, part)
    part.replace(output)
    return {"tensors": len(state), "head_bias": bias is not None}


def main(argv=None):
    args = get_args(argv)
    if args.command == "to-hf":
        report = to_hf(args.cosyvoice_dir, args.output)
    else:
        report = to_official(args.hf, args.like, args.output)
    print(json.dumps({"output": str(args.output)} | report, indent=2))


if __name__ == "__main__":
    main()
