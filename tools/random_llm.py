"""Write a language model with random weights, in the same format as a model that the full-size profiles train.

    python tools/random_llm.py --output DIR [--model cosyvoice3] [--mean-tokens 124]

It is used to measure speed and memory, and for tests, without a download.

llasa: the folder has the files, tensor names and dtypes of a checkpoint of yuekai/llasa_cosyvoice2_token_qwen_0.5b
written by transformers 4: Qwen2.5-0.5B-Instruct, to whose tokenizer 6,561 speech tokens and
``<|SPEECH_GENERATION_START|>`` were added with ``add_tokens``, and whose embedding was resized to 158,227 ids (icefall,
egs/emilia/TTS/llasa_cosyvoice2_token/train.py); LM head tied to the embedding, float16, Qwen's default chat template
with its system prompt, and Qwen's generation config with a repetition penalty of 1.1.

cosyvoice3: the language model's part of Fun-CosyVoice3-0.5B-2512, ``llm.pt`` (the state of ``CosyVoice3LM`` in
cosyvoice/llm/llm.py, float32) and ``CosyVoice-BlankEN`` (Qwen2-0.5B-Instruct); with --token2wav also the files of its
decoder, so that the folder is complete. Convert the language model for training:

    python scripts/convert_llm.py to-hf --cosyvoice-dir DIR --output HF_DIR

The text vocabulary is Qwen's own: its 151,643 byte-pair ranks are in the package ``dashscope``
(``pip install --no-deps dashscope``), or in the file of ``--qwen-ranks``.

The model generates random speech tokens and nothing else. Responses have ``--mean-tokens`` tokens on average (a
geometric distribution), so that rollouts cause a realistic load for trainer and reward server. To achieve this, the
first layer converts component 0, which is equal in all embeddings, to a constant in component 1 of the residual stream,
and no later layer writes to either. The final norm removes component 0, so that component 1 of the head (or of the
embedding, to which it may be tied) determines the logit of each id. The rows of CosyVoice3's head that cannot be
sampled have the logit of a speech token, so that an error in their exclusion changes the mean length.
"""

import argparse
import base64
import importlib.util
import itertools
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tts_grpo.text.jsonl import write_json
from tts_grpo.text.prompts import GENERATION_START, IM_END
from tts_grpo.text.tokens import NUM_SPEECH_TOKENS, speech_token_str

PAD = "<|endoftext|>"
# Qwen2.5's added tokens, from id 151,643 on: special tokens, and tokens that are not special to the tokenizer.
SPECIAL_TOKENS = (
    PAD, "<|im_start|>", IM_END, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
NAMED_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
# Renders like Qwen2.5-Instruct's template without tools.
DEFAULT_CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}"
    "{%- else %}{%- set system = 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' %}{%- endif %}"
    "{{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}"
    "{%- for message in messages %}{%- if not (loop.first and message['role'] == 'system') %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
SHAPES = {  # Qwen2.5-0.5B; "tiny" is for tests
    "0.5b": {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
             "intermediate_size": 4864},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
             "intermediate_size": 128},
}  # fmt: skip
BLANK_EN = "CosyVoice-BlankEN"
TEXT_ROWS = 151_936  # rows of Qwen2-0.5B's embedding; its tokenizer has 151,646 tokens
COSYVOICE3_ROWS = NUM_SPEECH_TOKENS + 200  # CosyVoice3LM: speech tokens, sos, eos, task id, fill, unused
COSYVOICE3_EOS = NUM_SPEECH_TOKENS + 1
# Renders as Qwen2-Instruct's template does: with a system prompt first, even if the messages have none.
QWEN2_CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
NEVER = -50.0  # logit of ids that are never sampled
GAIN = 8.0  # gain of component 1 in the final norm; a large gain allows small values in the embeddings
CONSTANT = 10.0  # value of components 0 and 1 of the residual stream, much larger than all others


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--model", choices=("llasa", "cosyvoice3"), default="llasa", help="model whose format it has")
    parser.add_argument("--token2wav", action="store_true", help="with cosyvoice3: also write the decoder's files")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="0.5b", help="size of the network")
    parser.add_argument("--mean-tokens", type=float, default=124.0, help="mean number of speech tokens per response")
    parser.add_argument("--seed", type=int, default=0, help="random seed for the weights")
    parser.add_argument(
        "--qwen-ranks", type=Path, default=None, help="qwen.tiktoken (default: that of the package dashscope)"
    )
    return parser.parse_args(argv)


def read_ranks(path: Path | None) -> dict[bytes, int]:
    """Qwen's byte-pair ranks, ``{token: rank}``, from a file in tiktoken's format.

    Raises:
        SystemExit: ``path`` is None and the package ``dashscope``, which contains the file, is not installed.
    """
    if path is None:
        package = importlib.util.find_spec("dashscope")
        if package is None:
            raise SystemExit(
                "random_llm.py: Qwen's vocabulary is missing: run pip install --no-deps dashscope, which contains it, "
                "or pass --qwen-ranks"
            )
        path = Path(package.submodule_search_locations[0]) / "resources/qwen.tiktoken"
    pairs = (line.split() for line in path.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that byte-pair encoding merges last to ``token``; merges with lower ranks come first."""
    splits = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
    if len(splits) == 1:
        return splits[0]
    pieces = [token[i : i + 1] for i in range(len(token))]
    while len(pieces) > 2:
        merged = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(pieces)]
        i = merged.index(min(merged))
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces[0], pieces[1]


def vocabulary(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Contents of vocab.json and merges.txt: ids by token, and the merges in order."""
    letters = bytes_to_unicode()
    name = lambda token: "".join(letters[byte] for byte in token)  # noqa: E731
    longer = sorted((rank, token) for token, rank in ranks.items() if len(token) > 1)
    merges = [tuple(map(name, last_merge(token, ranks))) for _, token in longer]
    return {name(token): rank for token, rank in ranks.items()}, merges


def make_tokenizer(ranks: dict[bytes, int]) -> Qwen2Tokenizer:
    """Qwen2.5's tokenizer plus the SFT model's speech tokens (ids 151,665 to 158,225) and its start token (158,226)."""
    vocab, merges = vocabulary(ranks)
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, unk_token=None, eos_token=PAD, pad_token=PAD)  # PAD is first
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    tokenizer.eos_token = IM_END
    tokenizer.add_tokens(list(NAMED_TOKENS))
    tokenizer.add_tokens([*map(speech_token_str, range(NUM_SPEECH_TOKENS)), GENERATION_START])
    return tokenizer


def save_tokenizer(tokenizer: Qwen2Tokenizer, folder: Path) -> None:
    """Write the files that transformers 4 writes for a Qwen2 tokenizer."""
    backend = tokenizer.backend_tokenizer
    backend.save(str(folder / "tokenizer.json"))
    backend.model.save(str(folder))  # vocab.json and merges.txt
    added = tokenizer.added_tokens_decoder
    write_json(folder / "added_tokens.json", {token.content: index for index, token in added.items()})
    attributes = ("content", "lstrip", "normalized", "rstrip", "single_word")
    described = {
        str(i): {name: getattr(token, name) for name in attributes} | {"special": token.special}
        for i, token in added.items()
    }
    write_json(folder / "tokenizer_config.json", {
        "add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": described,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]), "bos_token": None,
        "chat_template": DEFAULT_CHAT_TEMPLATE, "clean_up_tokenization_spaces": False, "eos_token": IM_END,
        "errors": "replace", "extra_special_tokens": {}, "model_max_length": 131072, "pad_token": PAD,
        "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
    })  # fmt: skip
    names = {"eos_token": IM_END, "pad_token": PAD}
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    write_json(
        folder / "special_tokens_map.json",
        {"additional_special_tokens": list(SPECIAL_TOKENS[1:])}
        | {kind: {"content": content} | plain for kind, content in names.items()},
    )


def make_model(tokenizer, shape: dict[str, int], mean_tokens: float, seed: int) -> Qwen2ForCausalLM:
    """A model that generates uniformly distributed speech tokens, and the end token with ``1 / mean_tokens``.

    Args:
        tokenizer: result of :func:`make_tokenizer`.
        shape: an entry of ``SHAPES``.
        mean_tokens: mean number of tokens per response, including the end token.
        seed: random seed for the weights.
    """
    rows, end = len(tokenizer), tokenizer.eos_token_id
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=rows, tie_word_embeddings=True, max_position_embeddings=32768, **shape)
    )
    first = tokenizer.convert_tokens_to_ids(speech_token_str(0))
    logits = torch.full((rows,), NEVER)
    logits[first : first + NUM_SPEECH_TOKENS] = 0.0
    logits[end] = end_logit(mean_tokens)
    add_constant(model.model)
    embedding = model.model.embed_tokens.weight.detach()
    embedding[:, 0] = CONSTANT
    set_logits(embedding, logits)
    return model.to(torch.float16)


def end_logit(mean_tokens: float) -> float:
    """Logit of the end token beside speech tokens with logit 0, for a mean number of tokens per response."""
    return math.log(NUM_SPEECH_TOKENS / (mean_tokens - 1))


def add_constant(network) -> None:
    """Make component 1 of the final hidden states a constant, if component 0 of all embeddings is ``CONSTANT``."""
    root = math.sqrt(network.config.hidden_size)
    with torch.no_grad():
        for layer in network.layers:
            for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                weight.mul_(0.01)  # keep the random components of all layers small
                weight[:2] = 0.0
        mlp = network.layers[0].mlp
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
            weight[0] = 0.0
            weight[0, 0] = 2.0 / root  # RMSNorm scales the only large component to sqrt(size)
        mlp.down_proj.weight[:, 0] = 0.0
        mlp.down_proj.weight[1, 0] = CONSTANT / (2.0 * torch.nn.functional.silu(torch.tensor(2.0)))
        network.norm.weight[0], network.norm.weight[1] = 0.0, GAIN


def set_logits(head: torch.Tensor, logits: torch.Tensor) -> None:
    """Set the logits (V,) of a head (V, D) after :func:`add_constant`, but for small random components."""
    # Components 0 and 1 are equal, so that the norm scales each of them to sqrt(D / 2).
    head[:, 1] = logits / (GAIN * math.sqrt(head.shape[1] / 2.0))


def write_blank_en(folder: Path, ranks: dict[bytes, int], shape: dict[str, int], seed: int) -> Qwen2ForCausalLM:
    """Write CosyVoice-BlankEN: Qwen2-0.5B-Instruct's files and template, in bfloat16, without a tokenizer.json."""
    names, merges = vocabulary(ranks)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pad, end = len(names), len(names) + 2
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=TEXT_ROWS, tie_word_embeddings=True, max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}, **shape,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    write_json(folder / "config.json", {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": pad, "eos_token_id": end,
        "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 32768, "max_window_layers": 24,
        "model_type": "qwen2", "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True,
        "use_sliding_window": False, "vocab_size": TEXT_ROWS, **shape,
    })  # fmt: skip
    write_json(folder / "generation_config.json", {
        "bos_token_id": pad, "pad_token_id": pad, "do_sample": True, "eos_token_id": [end, pad],
        "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "transformers_version": "4.37.0",
    })  # fmt: skip
    (folder / "vocab.json").write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    write_json(folder / "tokenizer_config.json", {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(pad + i): {"content": name} | plain for i, name in enumerate(special)},
        "additional_special_tokens": special[1:], "bos_token": None, "chat_template": QWEN2_CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>", "errors": "replace",
        "model_max_length": 32768, "pad_token": "<|endoftext|>", "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
    })  # fmt: skip
    return model


def cosyvoice3_state(model: Qwen2ForCausalLM, mean_tokens: float) -> dict[str, torch.Tensor]:
    """State of a ``CosyVoice3LM``, float32, whose network and text embedding are those of CosyVoice-BlankEN.

    Args:
        model: result of :func:`write_blank_en`; it is changed, as training would change it.
        mean_tokens: mean number of tokens per response, including the end token.
    """
    size = model.config.hidden_size
    model.float()
    add_constant(model.model)
    head, speech = 0.02 * torch.randn(2, COSYVOICE3_ROWS, size)
    for embedding in (model.model.embed_tokens.weight.detach(), speech):
        embedding[:, 0], embedding[:, 1] = CONSTANT, 0.0
    logits = torch.zeros(COSYVOICE3_ROWS)
    logits[COSYVOICE3_EOS] = end_logit(mean_tokens)
    set_logits(head, logits)
    state = {f"llm.model.{name}": tensor for name, tensor in model.state_dict().items()}
    # clone(), because torch.save writes the whole storage of a slice
    return state | {"llm_decoder.weight": head.clone(), "speech_embedding.weight": speech.clone()}


def write_cosyvoice3(
    folder: Path, ranks: dict[bytes, int], shape: dict[str, int], mean_tokens: float, seed: int
) -> int:
    """Write llm.pt and CosyVoice-BlankEN; returns the number of parameters."""
    model = write_blank_en(folder / BLANK_EN, ranks, shape, seed)
    state = cosyvoice3_state(model, mean_tokens)
    torch.save(state, folder / "llm.pt")
    return model.num_parameters() + 2 * COSYVOICE3_ROWS * shape["hidden_size"]


def save_model(model: Qwen2ForCausalLM, folder: Path, tokenizer) -> None:
    """Write weights and configs like transformers 4 does, without the tied LM head."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config, pad, end = model.config, tokenizer.pad_token_id, tokenizer.eos_token_id
    shape = {name: getattr(config, name) for name in SHAPES["0.5b"]}
    write_json(folder / "config.json", {
        "_name_or_path": "./Qwen2.5-0.5B-Instruct", "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0,
        "bos_token_id": pad, "eos_token_id": end, "hidden_act": "silu", "initializer_range": 0.02,
        "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": True,
        "torch_dtype": "float16", "transformers_version": "4.48.3", "use_cache": True, "use_sliding_window": False,
        "vocab_size": config.vocab_size, **shape,
    })  # fmt: skip
    write_json(folder / "generation_config.json", {
        "bos_token_id": pad, "do_sample": True, "eos_token_id": [end, pad], "pad_token_id": pad,
        "repetition_penalty": 1.1, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "transformers_version": "4.48.3",
    })  # fmt: skip


def main(argv=None):
    args = get_args(argv)
    ranks, shape = read_ranks(args.qwen_ranks), SHAPES[args.shape]
    args.output.mkdir(parents=True, exist_ok=True)
    if args.model == "cosyvoice3":
        parameters = write_cosyvoice3(args.output, ranks, shape, args.mean_tokens, args.seed)
        if args.token2wav:
            from tts_grpo.speech.cosyvoice3.random_weights import write_token2wav  # needs onnx

            write_token2wav(args.output, args.seed, small=args.shape == "tiny")
    else:
        tokenizer = make_tokenizer(ranks)
        model = make_model(tokenizer, shape, args.mean_tokens, args.seed)
        save_tokenizer(tokenizer, args.output)
        save_model(model, args.output, tokenizer)
        parameters = model.num_parameters()
    print(json.dumps({"output": str(args.output), "parameters": parameters}))


if __name__ == "__main__":
    main()
