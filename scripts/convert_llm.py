"""The official CosyVoice2 language model as a Hugging Face folder, and back after training.

    python scripts/convert_llm.py to-hf --cosyvoice-dir CosyVoice2-0.5B --output DIR [--without-head-bias]
    python scripts/convert_llm.py to-official --hf DIR --like CosyVoice2-0.5B/llm.pt --output llm.pt

The vocabulary is the text tokens, ``<|s_0|>``..., three end tokens, ``<|sos|>`` and ``<|task_id|>``; names and ids are
those of the CosyVoice repository's own conversion (examples/grpo/cosyvoice2/pretrained_to_huggingface.py). Rows of the
text embedding that no token has are not in the folder; the way back takes them from --like. Both ways are bit-equal.

The official head has a bias, and says speech and end tokens only. Stock Qwen2 has no such bias and no exact substitute:
its head sees the output of an RMSNorm, in which no component is constant, and what a row of weights gives for a hidden
state h it gives negated for -h, so that no row is low for all h. Hence two kinds of folder:

- By default a model type of its own (tts_grpo/cosyvoice2_lm.py): same logits as the official model, other ids have
  probability 0. Inference here loads it. veRL and vLLM stop with an error, as they do not know the type.
- With --without-head-bias a stock Qwen2, which veRL and vLLM load. The bias is gone: a probability changes by a factor
  of at most exp(range of the bias), the KL divergence is at most range^2 / 8 (Hoeffding's lemma); both are printed.
  Text ids get a direction of the hidden states that is negative at every state this model has: it is fitted to what the
  model says, and the folder is written only if on other sentences all those ids together stay under MAX_TEXT_MASS.
  That is a measurement, no guarantee. On the way back the bias is 0, as in the trained model.

Errors that grow on the way back to CosyVoice, causes by measurement (scripts/export_gap.py; figures in README.md):

- Sampling is what changes the error most. CosyVoice's repetition aware sampling cuts the tail that rollouts at
  temperature 1 draw from, before training as after it: an exported model is to be compared with the official one under
  the same sampling, not with its own rollouts or another program's top_p and top_k.
- The bias and the type matter less: a random bias that training had not seen, and weights rounded to the merger's
  bfloat16, changed nothing beyond chance there. What was trained without the bias still gets 0 back.
- End tokens. Rollouts end at any of the three; older releases of CosyVoice end at the first only and pass over the
  others, so that a model that learned to end with another one speaks on.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config
from transformers import Qwen2ForCausalLM as Qwen2

from tts_grpo.cosyvoice2_lm import UNREACHABLE, CosyVoice2LMConfig, CosyVoice2LMForCausalLM
from tts_grpo.generate import Sampling, generate
from tts_grpo.prompts import COSYVOICE2_CHAT_TEMPLATE, SOS, TASK_ID, render_prompt
from tts_grpo.tokens import NUM_SPEECH_TOKENS, speech_token_str

TEXT_CONFIG_DIR = "CosyVoice-BlankEN"  # configuration and text tokenizer, beside llm.pt
ENDS = ("<|eos1|>", "<|eos2|>", "<|eos3|>")
NUM_OUTPUTS = NUM_SPEECH_TOKENS + len(ENDS)  # of the official head: Qwen2LM in cosyvoice/llm/llm.py
TEXT_SPECIAL_TOKENS = [  # CosyVoice2Tokenizer in cosyvoice/tokenizer/tokenizer.py
    "<|im_start|>", "<|im_end|>", "<|endofprompt|>", "[breath]", "<strong>", "</strong>", "[noise]", "[laughter]",
    "[cough]", "[clucking]", "[accent]", "[quick_breath]", "<laughter>", "</laughter>", "[hissing]", "[sigh]",
    "[vocalized-noise]", "[lipsmack]", "[mn]",
]  # fmt: skip
PAD = "<|endoftext|>"
ROW_MULTIPLE = 128
QWEN, EMBEDDING, HEAD = "llm.model.", "model.embed_tokens.weight", "lm_head.weight"

SENTENCES = (  # the model says them, for the states that --without-head-bias fits and measures
    "今天天气很好。", "我们明天早上八点出发。", "请问去火车站怎么走？", "他昨天买了三本书。", "这个问题不难回答。",
    "妈妈在厨房里做饭。", "孩子们在公园里放风筝。", "会议改到下周二下午。", "你喝茶还是喝咖啡？", "北京的冬天非常冷。",
    "医生让他多休息几天。", "她会说英语和法语。", "飞机晚点了两个小时。", "老师表扬了那个学生。", "手机放在桌子上了。",
    "春天到了，花都开了。", "我忘了带雨伞。", "比赛的结果还没有公布。", "这里禁止停车。", "祝你生日快乐！",
    "山上的空气很新鲜。", "他一边走路一边唱歌。", "图书馆晚上九点关门。", "谢谢大家的帮助。",
)  # fmt: skip
SAMPLES, MAX_TOKENS = 4, 40  # of each sentence
TEXT_LOGIT = -100.0  # what text ids get, on average
RIDGE = 1e-3
MAX_TEXT_MASS = 1e-6


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    to_hf = commands.add_parser("to-hf", help="official to Hugging Face")
    to_hf.add_argument("--cosyvoice-dir", type=Path, required=True, help=f"folder of llm.pt and {TEXT_CONFIG_DIR}")
    to_hf.add_argument("--output", type=Path, required=True, help="folder to write")
    to_hf.add_argument("--without-head-bias", action="store_true", help="a stock Qwen2, for veRL; drops the bias")
    to_official = commands.add_parser("to-official", help="Hugging Face to official")
    to_official.add_argument("--hf", type=Path, required=True, help="converted folder, trained or not")
    to_official.add_argument("--like", type=Path, required=True, help="llm.pt that the folder was made of")
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
    """The state dict at ``path``.

    Raises:
        ValueError: it is not exactly what ``config`` asks for; names every tensor that differs.
    """
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
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
        raise ValueError(f"{path} is no CosyVoice2 language model: {'; '.join(sorted(problems))}")
    return state


def make_tokenizer(folder: Path, text_rows: int):
    """Text tokenizer plus what the model says, and the id of ``<|s_0|>``.

    Raises:
        ValueError: it has more tokens than the embedding has rows, or writes a line break with several.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": PAD, "pad_token": PAD})
    tokenizer.add_tokens(TEXT_SPECIAL_TOKENS, special_tokens=True)
    first = len(tokenizer)
    if first > text_rows:
        raise ValueError(f"{folder}: {first} text tokens, but {QWEN}{EMBEDDING} has {text_rows} rows")
    if len(tokenizer("\n", add_special_tokens=False)["input_ids"]) != 1:
        raise ValueError(f"{folder}: a line break is not one token, which veRL needs")
    # veRL decodes without special tokens: as such, speech tokens would be gone
    tokenizer.add_tokens([speech_token_str(i) for i in range(NUM_SPEECH_TOKENS)])
    tokenizer.add_tokens([*ENDS, SOS, TASK_ID], special_tokens=True)
    tokenizer.eos_token, tokenizer.chat_template = ENDS[0], COSYVOICE2_CHAT_TEMPLATE
    check_ids(tokenizer, folder)
    return tokenizer, first


def check_ids(tokenizer, folder: Path) -> int:
    """The id of ``<|s_0|>``.

    Raises:
        ValueError: ids of speech, end, sos and task tokens do not follow each other.
    """
    names = [*map(speech_token_str, range(NUM_SPEECH_TOKENS)), *ENDS, SOS, TASK_ID]
    ids = tokenizer.convert_tokens_to_ids(names)
    first = ids[0] if ids[0] is not None else 0
    for i, (name, id_) in enumerate(zip(names, ids, strict=True)):
        if id_ != first + i or id_ == tokenizer.unk_token_id:
            raise ValueError(f"{folder}: {name} has id {id_} in the tokenizer, not {first + i}")
    return first


def converted_config(config, tokenizer, first: int, cls):
    """``config`` with the vocabulary of the converted model, as a ``cls``."""
    values = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures", "auto_map")}
    rows = -(-(first + NUM_OUTPUTS + 2) // ROW_MULTIPLE) * ROW_MULTIPLE
    values |= {"vocab_size": rows, "tie_word_embeddings": False, "bos_token_id": None, "dtype": "float32"}
    values |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return cls(**values)


def converted_weights(state: dict[str, torch.Tensor], first: int, rows: int) -> dict[str, torch.Tensor]:
    """State dict of a :class:`CosyVoice2LMForCausalLM` with ``rows`` ids, float32."""
    weights = {name[len(QWEN) :]: tensor.float() for name, tensor in state.items() if name.startswith(QWEN)}
    said, size = slice(first, first + NUM_OUTPUTS), state["llm_decoder.weight"].shape[1]
    embedding, head, bias = torch.zeros(rows, size), torch.zeros(rows, size), torch.full((rows,), UNREACHABLE)
    embedding[:first] = state[QWEN + EMBEDDING][:first]
    embedding[said] = state["speech_embedding.weight"]
    embedding[said.stop : said.stop + 2] = state["llm_embedding.weight"]
    head[said], bias[said] = state["llm_decoder.weight"], state["llm_decoder.bias"]
    return weights | {EMBEDDING: embedding, HEAD: head, "lm_head.bias": bias}


def filled(cls, config, weights: dict[str, torch.Tensor], tokenizer):
    """A model of class ``cls`` with ``weights`` and the tokenizer's end tokens."""
    model = cls(config).eval()
    model.load_state_dict(weights, assign=True)  # no second copy of 2 GB
    ends = tokenizer.convert_tokens_to_ids(list(ENDS))
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    return model


@torch.inference_mode()
def spoken_states(model, tokenizer) -> list[torch.Tensor]:
    """What the head sees while the model says each of ``SENTENCES``: one float64 (states, D) each."""
    prompts = [tokenizer(render_prompt(tokenizer, text), add_special_tokens=False)["input_ids"] for text in SENTENCES]
    prompts = [prompt for prompt in prompts for _ in range(SAMPLES)]
    responses = generate(model, prompts, range(len(prompts)), Sampling(max_new_tokens=MAX_TOKENS))
    states = []
    for prompt, response in zip(prompts, responses, strict=True):
        hidden = model.model(torch.tensor([prompt + response.token_ids])).last_hidden_state[0]
        states.append(hidden[len(prompt) - 1 : -1].double())
    return [torch.cat(states[i : i + SAMPLES]) for i in range(0, len(states), SAMPLES)]


def constant_direction(states: torch.Tensor) -> torch.Tensor:
    """float64 (D,) whose product with each of ``states`` (N, D) is as near to 1 as ridge regression gets."""
    ridge = RIDGE * states.square().sum(1).mean() * torch.eye(states.shape[1], dtype=states.dtype)
    return torch.linalg.solve(states.T @ states + ridge, states.sum(0))


def without_bias(weights: dict, states: list[torch.Tensor], first: int) -> tuple[dict, dict]:
    """Weights of a stock Qwen2, and what the loss of the bias costs.

    Args:
        weights: of the model with bias.
        states: hidden states of each sentence; of every three sentences, two are fitted and one is measured.
        first: id of ``<|s_0|>``.

    Raises:
        ValueError: on the sentences left for it, other ids than the model says get too much probability.
    """
    said = torch.zeros(len(weights[HEAD]), dtype=torch.bool)
    said[first : first + NUM_OUTPUTS] = True
    direction = constant_direction(torch.cat([s for i, s in enumerate(states) if i % 3]))
    head, bias = weights[HEAD].clone(), weights["lm_head.bias"][said].double()
    head[~said] = (TEXT_LOGIT * direction).to(head.dtype)
    measured = torch.cat(states[::3])
    stock = measured @ head[said].double().T
    text = measured @ head[~said][0].double() + torch.tensor(float((~said).sum())).log()
    official, stock_probs = (stock + bias).log_softmax(-1), stock.log_softmax(-1)
    spread = (bias.max() - bias.min()).item()
    report = {
        "bias_range": spread,
        "kl_bound": spread**2 / 8,
        "kl_mean": (official.exp() * (official - stock_probs)).sum(-1).mean().item(),
        "text_mass_max": torch.sigmoid(text - stock.logsumexp(-1)).max().item(),
        "states_fitted": sum(map(len, states)) - len(measured),
        "states_measured": len(measured),
    }
    if not report["text_mass_max"] < MAX_TEXT_MASS:
        raise ValueError(
            f"without its bias this model would say text ids with probability {report['text_mass_max']:.1e} at worst, "
            f"over {MAX_TEXT_MASS}: leave out --without-head-bias ({json.dumps(report)})"
        )
    return {name: t for name, t in weights.items() if name != "lm_head.bias"} | {HEAD: head}, report


def to_hf(cosyvoice_dir: Path, output: Path, without_head_bias: bool) -> dict:
    """Write the Hugging Face folder; returns what there is to say about it.

    Raises:
        FileExistsError: ``output`` exists.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists: remove it or name another --output")
    text_dir = cosyvoice_dir / TEXT_CONFIG_DIR
    config = AutoConfig.from_pretrained(text_dir)
    state = load_official(cosyvoice_dir / "llm.pt", config)
    tokenizer, first = make_tokenizer(text_dir, config.vocab_size)
    full_config = converted_config(config, tokenizer, first, CosyVoice2LMConfig)
    weights = converted_weights(state, first, full_config.vocab_size)
    model = filled(CosyVoice2LMForCausalLM, full_config, weights, tokenizer)
    report = {"head_bias": not without_head_bias, "vocab_size": full_config.vocab_size, "first_speech_id": first}
    if without_head_bias:
        weights, cost = without_bias(weights, spoken_states(model, tokenizer), first)
        model = filled(Qwen2, converted_config(config, tokenizer, first, Qwen2Config), weights, tokenizer)
        report |= cost
    part = output.with_name(output.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(output)
    return report


def official_state(model, like: dict[str, torch.Tensor], first: int) -> dict[str, torch.Tensor]:
    """State dict with the names and types of ``like`` and the weights of the converted ``model``."""
    weights, said = model.state_dict(), slice(first, first + NUM_OUTPUTS)
    bias = weights.get("lm_head.bias", torch.zeros(len(weights[HEAD])))  # trained without: its logits have none
    new = {QWEN + name: tensor for name, tensor in weights.items() if name not in (HEAD, "lm_head.bias")}
    embedding = like[QWEN + EMBEDDING].clone()
    embedding[:first] = weights[EMBEDDING][:first]
    new |= {
        QWEN + EMBEDDING: embedding,
        "speech_embedding.weight": weights[EMBEDDING][said],
        "llm_embedding.weight": weights[EMBEDDING][said.stop : said.stop + 2],
        "llm_decoder.weight": weights[HEAD][said],
        "llm_decoder.bias": bias[said],
    }
    # Qwen2's own head is tied to the text embedding, or unused
    tied = torch.equal(like[QWEN + HEAD], like[QWEN + EMBEDDING])
    new[QWEN + HEAD] = embedding if tied else like[QWEN + HEAD]
    # clone: torch.save writes the whole storage that a slice belongs to
    result = {name: new[name].detach().to(like[name].dtype).clone() for name in like if name != QWEN + HEAD}
    same = tied and like[QWEN + HEAD].dtype == like[QWEN + EMBEDDING].dtype
    result[QWEN + HEAD] = result[QWEN + EMBEDDING] if same else new[QWEN + HEAD].to(like[QWEN + HEAD].dtype)
    return {name: result[name] for name in like}


def to_official(hf: Path, like_path: Path, output: Path) -> dict:
    """Write the state dict; returns what there is to say about it.

    Raises:
        ValueError: the folder or ``like_path`` is not what it should be; names the tensor or token.
    """
    first = check_ids(AutoTokenizer.from_pretrained(hf), hf)
    model, info = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, output_loading_info=True)
    lacking = [str(name) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]]
    if lacking or model.config.tie_word_embeddings:
        raise ValueError(f"{hf}: weights missing or too many: {', '.join(lacking) or 'head tied to the embedding'}")
    config = Qwen2Config(**{k: v for k, v in model.config.to_dict().items() if k != "model_type"})
    embedding = torch.load(like_path, map_location="cpu", weights_only=True, mmap=True).get(QWEN + EMBEDDING)
    if embedding is None or len(embedding) < first:
        raise ValueError(f"{like_path}: {QWEN}{EMBEDDING} is missing, or has fewer than {first} rows")
    config.vocab_size = len(embedding)
    state = official_state(model, load_official(like_path, config), first)
    part = output.with_name(output.name + ".part")
    torch.save(state, part)
    part.replace(output)
    return {"head_bias": model.lm_head.bias is not None, "tensors": len(state)}


def main(argv=None):
    args = get_args(argv)
    if args.command == "to-hf":
        report = to_hf(args.cosyvoice_dir, args.output, args.without_head_bias)
    else:
        report = to_official(args.hf, args.like, args.output)
    print(json.dumps({"output": str(args.output)} | report, indent=2))


if __name__ == "__main__":
    main()
