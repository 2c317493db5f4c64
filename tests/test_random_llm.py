"""Tests of the language model with random weights: its file format, tokenizer and responses."""

import json

import pytest
import torch
from safetensors import safe_open

from tools.random_llm import SHAPES, make_model, make_tokenizer, read_ranks
from tts_grpo.speech.generation import Sampling, generate, load_lm
from tts_grpo.text.prompts import GENERATION_START, IM_END, render_prompt
from tts_grpo.text.tokens import NUM_SPEECH_TOKENS, speech_token_str

pytestmark = pytest.mark.slow


def test_format_equals_that_of_the_published_model(sft_checkpoint):
    assert {path.name for path in sft_checkpoint.iterdir()} == {
        "added_tokens.json", "config.json", "generation_config.json", "merges.txt", "model.safetensors",
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
    }  # fmt: skip
    config = json.loads((sft_checkpoint / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"], config["torch_dtype"]) == (158_227, True, "float16")
    generation = json.loads((sft_checkpoint / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [151_645, 151_643] and generation["repetition_penalty"] == 1.1
    with safe_open(sft_checkpoint / "model.safetensors", "pt") as weights:
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118
        assert weights.get_slice("model.embed_tokens.weight").get_shape()[0] == 158_227
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}  # noqa: SIM118
    assert len((sft_checkpoint / "merges.txt").read_text(encoding="utf-8").splitlines()) == 1 + 151_387
    added = json.loads((sft_checkpoint / "added_tokens.json").read_text())
    assert added["<|endoftext|>"] == 151_643 and added["<|file_sep|>"] == 151_664
    assert added["<|s_0|>"] == 151_665 and added[GENERATION_START] == 158_226
    template = json.loads((sft_checkpoint / "tokenizer_config.json").read_text())["chat_template"]
    assert "You are Qwen" in template


def test_text_ids_equal_those_of_qwen(sft_checkpoint):
    """Compares with known ids of Qwen's tokenizer."""
    _, tokenizer = load_lm(sft_checkpoint)
    assert tokenizer("你好Hello world\n", add_special_tokens=False)["input_ids"] == [108386, 9707, 1879, 198]
    text = "Convert the text to speech: 四十四只石狮子，it's 3.5 km。"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_responses_are_speech_tokens_of_the_requested_mean_length(sft_checkpoint):
    model, tokenizer = load_lm(sft_checkpoint)
    assert tokenizer.decode(tokenizer.convert_tokens_to_ids(["<|s_7|>"]), skip_special_tokens=True) == "<|s_7|>"
    prompt = tokenizer(render_prompt(tokenizer, "今天"), add_special_tokens=False)["input_ids"]
    first, end = tokenizer.convert_tokens_to_ids([speech_token_str(0), IM_END])
    with torch.inference_mode():
        probabilities = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    assert 1 / 260 < probabilities[end] < 1 / 150
    assert probabilities[first : first + NUM_SPEECH_TOKENS].sum() + probabilities[end] > 0.9999
    responses = generate(model, [prompt] * 20, range(20), Sampling(max_new_tokens=20))
    generated = [token for response in responses for token in response.token_ids if token != end]
    assert all(first <= token < first + NUM_SPEECH_TOKENS for token in generated)
    assert len(set(generated)) > 200  # not the same token repeated


def test_many_wide_layers_do_not_change_the_mean_length():
    """At full size, the sum of all layers may be larger than the component that the head reads."""
    tokenizer = make_tokenizer({bytes([byte]): byte for byte in range(256)})
    shape = SHAPES["0.5b"] | {"hidden_size": 448, "num_attention_heads": 7, "num_key_value_heads": 1}
    model = make_model(tokenizer, shape, 100.0, seed=0).float()
    prompt = tokenizer("今天", return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        ends = model(prompt).logits.softmax(-1)[0, :, tokenizer.eos_token_id]
    assert 0.006 < ends.mean() < 0.015


def test_ranks_equal_those_of_qwen():
    ranks = read_ranks(None)
    assert len(ranks) == 151_643 and ranks["你好".encode()] == 108386
