"""Convert the official CosyVoice2 or CosyVoice3 language model to a Hugging Face folder, and back after training.

    python scripts/convert_llm.py to-hf --cosyvoice-dir CosyVoice2-0.5B [--llm llm.pt] --output DIR
    python scripts/convert_llm.py to-official --hf DIR --like CosyVoice2-0.5B/llm.pt --output llm.pt

The number of rows of the LM head tells which of the two models a state dict is. It may be a checkpoint of CosyVoice's
own trainer, whose entries ``epoch`` and ``step`` are left out. A conversion to Hugging Face and back is bit-exact.

The vocabulary is the text tokens followed by the model's own rows. Names and ids are those of the CosyVoice
repository's own conversions, so that their results can also be trained and converted back:

- CosyVoice2 (examples/grpo/cosyvoice2/pretrained_to_huggingface.py, such as ``yuekai/cosyvoice2_llm``): ``<|s_0|>``...,
  three end tokens, ``<|sos|>`` and ``<|task_id|>``.
- CosyVoice3 (runtime/triton_trtllm/scripts/convert_cosyvoice3_to_hf.py, such as
  ``yuekai/Fun-CosyVoice3-0.5B-2512-LLM-HF``): ``<|s_0|>``..., ``<|sos|>``, ``<|eos1|>``, ``<|task_id|>``, ``<|fill|>``
  and 196 unused rows.

Unused rows of the text embedding are not in the folder; to-official copies them from --like.

The folder has the weights of a stock Qwen2, whose head has an output for each id. ``head_bias.safetensors`` restricts
sampling to speech and end tokens (tts_grpo/speech/head_bias.py describes where it is used). CosyVoice2's head has such
outputs only, with a bias; thus rollouts, training and inference have exactly the official model's probabilities. A
folder without a bias, such as one trained by CosyVoice's own recipe, is exported with a bias of 0. CosyVoice3's head
has no bias, and outputs for ``<|sos|>``, ``<|task_id|>``, ``<|fill|>`` and the unused rows, too. CosyVoice ends a
response at any of them; here they have probability 0. Their weights are kept. The bias is not trained.

Errors that grow on the way back to CosyVoice, causes by measurement (tools/export_gap.py; figures in docs/export.md):

- Sampling changes the error rate most. CosyVoice's repetition aware sampling removes the tail that rollouts at
  temperature 1 draw from. Compare an exported model with the official one under the same sampling, not with its own
  rollouts or with another program's top_p and top_k.
- Rounding weights to bfloat16, as veRL's merger does, made no significant difference.
- End tokens. CosyVoice2's rollouts end at any of the three. Older releases of CosyVoice stop at the first one only and
  skip the others, so that a model that learned to end with another one does not stop.
"""

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config
from transformers import Qwen2ForCausalLM as Qwen2

from tts_grpo.speech.head_bias import NAME as BIAS
from tts_grpo.speech.head_bias import UNREACHABLE, load_head_bias, save_head_bias
from tts_grpo.text.prompts import COSYVOICE_CHAT_TEMPLATE, END_OF_SYSTEM, SOS, TASK_ID
from tts_grpo.text.tokens import NUM_SPEECH_TOKENS, speech_token_str

TEXT_CONFIG_DIR = "CosyVoice-BlankEN"  # folder with configuration and text tokenizer, next to llm.pt
TEXT_SPECIAL_TOKENS = (  # CosyVoice2Tokenizer in cosyvoice/tokenizer/tokenizer.py
    "<|im_start|>", "<|im_end|>", "<|endofprompt|>", "[breath]", "<strong>", "</strong>", "[noise]", "[laughter]",
    "[cough]", "[clucking]", "[accent]", "[quick_breath]", "<laughter>", "</laughter>", "[hissing]", "[sigh]",
    "[vocalized-noise]", "[lipsmack]", "[mn]",
)  # fmt: skip
# CosyVoice3Tokenizer has these in addition, in this order: ARPAbet with stress, and parts of Pinyin syllables.
VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW"
CONSONANTS = "B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH"
PINYIN = """
    a ai an ang ao b c ch d e ei en eng f g h i ian in ing iu ià iàn iàng iào iá ián iáng iáo iè ié iòng ióng iù iú iā
    iān iāng iāo iē iě iōng iū iǎ iǎn iǎng iǎo iǒng iǔ j k l m n o ong ou p q r s sh t u uang ue un uo uà uài uàn uàng
    uá uái uán uáng uè ué uì uí uò uó uā uāi uān uāng uē uě uī uō uǎ uǎi uǎn uǎng uǐ uǒ vè w x y z zh à ài àn àng ào á
    ái án áng áo è èi èn èng èr é éi én éng ér ì ìn ìng í ín íng ò òng òu ó óng óu ù ùn ú ún ā āi ān āng āo ē ēi ēn ēng
    ě ěi ěn ěng ěr ī īn īng ō ōng ōu ū ūn ǎ ǎi ǎn ǎng ǎo ǐ ǐn ǐng ǒ ǒng ǒu ǔ ǔn ǘ ǚ ǜ
"""
ARPABET = sorted([v + stress for v in VOWELS.split() for stress in ("", "0", "1", "2")] + CONSONANTS.split())
PHONES = tuple(f"[{phone}]" for phone in (*ARPABET, *PINYIN.split()))


@dataclasses.dataclass(frozen=True)
class Layout:
    """The rows of an official language model, in their order in the vocabulary of the converted model.

    Attributes:
        name: name of the model.
        text_tokens: tokens that its text tokenizer adds to Qwen's.
        rows: tokens after the speech tokens.
        num_outputs: rows of the speech embedding and of the LM head; ``llm_embedding`` has those that follow.
        ends: the tokens of ``rows`` that end a response; the others cannot be sampled.
        biased: whether the LM head has a bias.
    """

    name: str
    text_tokens: tuple[str, ...]
    rows: tuple[str, ...]
    num_outputs: int
    ends: tuple[str, ...]
    biased: bool

    @property
    def names(self) -> list[str]:
        """The speech tokens and ``rows``."""
        return [*map(speech_token_str, range(NUM_SPEECH_TOKENS)), *self.rows]


ENDS = ("<|eos1|>", "<|eos2|>", "<|eos3|>")
COSYVOICE2 = Layout(  # Qwen2LM in cosyvoice/llm/llm.py
    "CosyVoice2", TEXT_SPECIAL_TOKENS, (*ENDS, SOS, TASK_ID), NUM_SPEECH_TOKENS + 3, ENDS, biased=True
)  # fmt: skip
COSYVOICE3 = Layout(  # CosyVoice3LM
    "CosyVoice3", (*TEXT_SPECIAL_TOKENS, END_OF_SYSTEM, *PHONES),
    (SOS, ENDS[0], TASK_ID, "<|fill|>", *(f"<|s_{i}|>" for i in range(NUM_SPEECH_TOKENS + 4, NUM_SPEECH_TOKENS + 200))),
    NUM_SPEECH_TOKENS + 200, ENDS[:1], biased=False,
)  # fmt: skip
LAYOUTS = (COSYVOICE2, COSYVOICE3)
PAD = "<|endoftext|>"
ROW_MULTIPLE = 128
QWEN, EMBEDDING, HEAD = "llm.model.", "model.embed_tokens.weight", "lm_head.weight"
OFFICIAL_HEAD = "llm_decoder.weight"
# Entries that CosyVoice's trainer adds to the state dict (cosyvoice/utils/train_utils.py).
TRAINING_STATE = ("epoch", "step")


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    to_hf = commands.add_parser("to-hf", help="convert from the official format to Hugging Face")
    to_hf.add_argument("--cosyvoice-dir", type=Path, required=True, help=f"folder with llm.pt and {TEXT_CONFIG_DIR}")
    to_hf.add_argument(
        "--llm", type=Path, default=Path("llm.pt"), help="state dict to convert, relative to that folder"
    )
    to_hf.add_argument("--output", type=Path, required=True, help="folder to write")
    to_official = commands.add_parser("to-official", help="convert from Hugging Face to the official format")
    to_official.add_argument("--hf", type=Path, required=True, help="converted (and possibly trained) folder")
    to_official.add_argument("--like", type=Path, required=True, help="the llm.pt that the folder was made from")
    to_official.add_argument("--output", type=Path, required=True, help="state dict to write")
    return parser.parse_args(argv)


def expected_shapes(config, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an official state dict whose Qwen2 has this configuration."""
    with torch.device("meta"):
        qwen = Qwen2(config)
    size, num_inputs = config.hidden_size, NUM_SPEECH_TOKENS + len(layout.rows) - layout.num_outputs
    shapes = {QWEN + name: tuple(tensor.shape) for name, tensor in qwen.state_dict().items()}
    shapes |= {"speech_embedding.weight": (layout.num_outputs, size), OFFICIAL_HEAD: (layout.num_outputs, size)}
    shapes |= {"llm_embedding.weight": (num_inputs, size)} if num_inputs else {}
    return shapes | ({"llm_decoder.bias": (layout.num_outputs,)} if layout.biased else {})


def load_official(path: Path, config) -> tuple[dict[str, torch.Tensor], Layout]:
    """The state dict at ``path``, without the trainer's epoch and step, and the model's layout.

    Raises:
        ValueError: names or shapes differ from those that ``config`` implies; the message lists all differences.
    """
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    state = {name: tensor for name, tensor in state.items() if name not in TRAINING_STATE}
    layout = layout_of(path, state)
    expected = expected_shapes(config, layout)
    problems = [f"{name} is missing" for name in expected.keys() - state.keys()]
    problems += [f"{name} is unknown" for name in state.keys() - expected.keys()]
    for name in expected.keys() & state.keys():
        shape = tuple(state[name].shape) if isinstance(state[name], torch.Tensor) else type(state[name]).__name__
        if shape != expected[name]:
            problems.append(f"{name} is {shape}, not {expected[name]}")
        elif not state[name].isfinite().all():
            problems.append(f"{name} is not finite")
    if problems:
        raise ValueError(f"{path} is not a {layout.name} language model: {'; '.join(sorted(problems))}")
    return state, layout


def layout_of(path: Path, state: dict) -> Layout:
    """The layout of the model with the state dict ``state``, by the number of rows of its head.

    Raises:
        ValueError: there is no head, or it has another number of rows; the message names ``path``.
    """
    head = state.get(OFFICIAL_HEAD)
    found = next((layout for layout in LAYOUTS if head is not None and len(head) == layout.num_outputs), None)
    if found is None:
        known = " or ".join(f"{layout.num_outputs} ({layout.name})" for layout in LAYOUTS)
        has = f"has {len(head)}" if head is not None else "is missing"
        hint = ": is it a checkpoint of DeepSpeed? Run its zero_to_fp32.py first" if "module" in state else ""
        raise ValueError(f"{path} is not a CosyVoice language model: {OFFICIAL_HEAD} {has}, not {known} rows{hint}")
    return found


def make_tokenizer(folder: Path, text_rows: int, layout: Layout):
    """The text tokenizer extended with the model's output tokens, and the id of ``<|s_0|>``.

    Raises:
        ValueError: the text tokenizer has more tokens than the embedding has rows, or a line break is not one token.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": PAD, "pad_token": PAD})
    tokenizer.add_tokens(list(layout.text_tokens), special_tokens=True)
    first = len(tokenizer)
    if first > text_rows:
        raise ValueError(f"{folder}: {first} text tokens, but {QWEN}{EMBEDDING} has {text_rows} rows")
    if len(tokenizer("\n", add_special_tokens=False)["input_ids"]) != 1:
        raise ValueError(f"{folder}: the tokenizer splits a line break into several tokens, but veRL needs one")
    # Speech tokens must not be special: veRL skips special tokens when it decodes.
    tokenizer.add_tokens([speech_token_str(i) for i in range(NUM_SPEECH_TOKENS)])
    tokenizer.add_tokens(list(layout.rows), special_tokens=True)
    tokenizer.eos_token, tokenizer.chat_template = layout.ends[0], COSYVOICE_CHAT_TEMPLATE
    check_ids(tokenizer, folder, layout)
    return tokenizer, first


def check_ids(tokenizer, folder: Path, layout: Layout) -> int:
    """Check the ids of the model's own tokens; returns the id of ``<|s_0|>``.

    Raises:
        ValueError: the ids of speech tokens and the tokens after them are not consecutive.
    """
    names = layout.names
    ids = tokenizer.convert_tokens_to_ids(names)
    first = ids[0] if ids[0] is not None else 0
    for i, (name, id_) in enumerate(zip(names, ids, strict=True)):
        if id_ != first + i or id_ == tokenizer.unk_token_id:
            raise ValueError(f"{folder}: {name} has id {id_} in the tokenizer, not {first + i} as for {layout.name}")
    return first


def converted_config(config, tokenizer, first: int, layout: Layout) -> Qwen2Config:
    """``config`` with the vocabulary of the converted model."""
    values = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures", "auto_map")}
    rows = -(-(first + NUM_SPEECH_TOKENS + len(layout.rows)) // ROW_MULTIPLE) * ROW_MULTIPLE
    values |= {"vocab_size": rows, "tie_word_embeddings": False, "bos_token_id": None, "dtype": "float32"}
    values |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return Qwen2Config(**values)


def converted_weights(state: dict[str, torch.Tensor], first: int, rows: int, layout: Layout) -> dict[str, torch.Tensor]:
    """State dict of a Qwen2 with ``rows`` ids, and the LM head's bias; float32."""
    weights = {name[len(QWEN) :]: tensor.float() for name, tensor in state.items() if name.startswith(QWEN)}
    outputs, size = slice(first, first + layout.num_outputs), state[OFFICIAL_HEAD].shape[1]
    embedding, head, bias = torch.zeros(rows, size), torch.zeros(rows, size), torch.full((rows,), UNREACHABLE)
    embedding[:first] = state[QWEN + EMBEDDING][:first]
    embedding[outputs] = state["speech_embedding.weight"]
    head[outputs] = state[OFFICIAL_HEAD]
    if layout.biased:
        bias[outputs] = state["llm_decoder.bias"].float()
    else:
        bias[first : first + NUM_SPEECH_TOKENS] = 0.0
        bias[[first + NUM_SPEECH_TOKENS + layout.rows.index(end) for end in layout.ends]] = 0.0
    if "llm_embedding.weight" in state:
        embedding[outputs.stop : first + len(layout.names)] = state["llm_embedding.weight"]
    return weights | {EMBEDDING: embedding, HEAD: head, BIAS: bias}


def save(output: Path, config, weights: dict[str, torch.Tensor], tokenizer, layout: Layout) -> None:
    """Write a model folder atomically."""
    part = output.with_name(output.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    bias = weights.pop(BIAS)
    model = Qwen2(config).eval()
    model.load_state_dict(weights, assign=True)  # assign=True avoids a second copy of 2 GB
    ends = tokenizer.convert_tokens_to_ids(list(layout.ends))
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(part)
    save_head_bias(bias, part)
    tokenizer.save_pretrained(part)
    part.rename(output)


def to_hf(cosyvoice_dir: Path, output: Path, llm: Path = Path("llm.pt")) -> dict:
    """Write the Hugging Face folder; returns the model's name, its sizes and the range of its bias, if it has one.

    Raises:
        FileExistsError: ``output`` exists.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists: remove it or choose another --output")
    text_dir = cosyvoice_dir / TEXT_CONFIG_DIR
    config = AutoConfig.from_pretrained(text_dir)
    state, layout = load_official(cosyvoice_dir / llm, config)
    tokenizer, first = make_tokenizer(text_dir, config.vocab_size, layout)
    converted = converted_config(config, tokenizer, first, layout)
    save(output, converted, converted_weights(state, first, converted.vocab_size, layout), tokenizer, layout)
    report = {"model": layout.name, "vocab_size": converted.vocab_size, "first_speech_id": first}
    report |= {"outputs": layout.num_outputs}
    if not layout.biased:
        return report
    low, high = (bound.item() for bound in state["llm_decoder.bias"].float().aminmax())
    return report | {"smallest_bias": low, "largest_bias": high}


def official_state(
    weights: dict[str, torch.Tensor], like: dict[str, torch.Tensor], first: int, layout: Layout
) -> dict[str, torch.Tensor]:
    """State dict with the names and types of ``like`` and the values of ``weights``, which include the bias."""
    outputs = slice(first, first + layout.num_outputs)
    new = {QWEN + name: tensor for name, tensor in weights.items() if name not in (HEAD, BIAS)}
    embedding = like[QWEN + EMBEDDING].clone()
    embedding[:first] = weights[EMBEDDING][:first]
    new |= {
        QWEN + EMBEDDING: embedding,
        "speech_embedding.weight": weights[EMBEDDING][outputs],
        "llm_embedding.weight": weights[EMBEDDING][outputs.stop : first + len(layout.names)],
        OFFICIAL_HEAD: weights[HEAD][outputs],
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
    """Write the official state dict; returns the model's name, numbers of tensors and whether the folder has a bias.

    Raises:
        ValueError: a tensor or token in the folder or in ``like_path`` is missing or wrong.
    """
    like = torch.load(like_path, map_location="cpu", weights_only=True, mmap=True)
    layout = layout_of(like_path, like)
    first = check_ids(AutoTokenizer.from_pretrained(hf), hf, layout)
    model, info = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, output_loading_info=True)
    problems = [str(name) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]]
    problems = [name for name in problems if name != BIAS]  # the weights may include the bias
    if problems or model.config.tie_word_embeddings:
        raise ValueError(f"{hf}: missing or unexpected weights: {', '.join(problems) or 'head tied to the embedding'}")
    config = Qwen2Config(**{k: v for k, v in model.config.to_dict().items() if k != "model_type"})
    embedding = like.get(QWEN + EMBEDDING)
    if embedding is None or len(embedding) < first:
        raise ValueError(f"{like_path}: {QWEN}{EMBEDDING} is missing, or has fewer than {first} rows")
    config.vocab_size = len(embedding)
    bias = load_head_bias(hf)
    weights = model.state_dict() | {BIAS: torch.zeros(len(model.lm_head.weight)) if bias is None else bias}
    state = official_state(weights, load_official(like_path, config)[0], first, layout)
    part = output.with_name(output.name + ".part")
    torch.save(state, part)
    part.replace(output)
    changed = sum(not torch.equal(tensor, like[name]) for name, tensor in state.items())
    return {"model": layout.name, "tensors": len(state), "changed_tensors": changed, "head_bias": bias is not None}


def main(argv=None):
    args = get_args(argv)
    if args.command == "to-hf":
        report = to_hf(args.cosyvoice_dir, args.output, args.llm)
    else:
        report = to_official(args.hf, args.like, args.output)
    print(json.dumps({"output": str(args.output)} | report, indent=2))


if __name__ == "__main__":
    main()
