"""The random language model that speed is measured with: its lengths and what it says."""

import torch

from scripts.random_llm import SHAPES, main, make_model, make_tokenizer
from tts_grpo.generate import Sampling, generate, load_lm
from tts_grpo.prompts import GENERATION_END, render_prompt
from tts_grpo.tokens import NUM_SPEECH_TOKENS, speech_token_str


def test_it_says_speech_tokens_and_ends_as_often_as_asked(tmp_path):
    main(["--output", str(tmp_path), "--shape", "tiny", "--mean-tokens", "20"])
    model, tokenizer = load_lm(tmp_path)
    assert tokenizer.decode(tokenizer.convert_tokens_to_ids(["<|s_7|>"]), skip_special_tokens=True) == "<|s_7|>"
    prompt = tokenizer(render_prompt(tokenizer, "今天"), add_special_tokens=False)["input_ids"]
    responses = generate(model, [prompt] * 200, range(200), Sampling(max_new_tokens=150))
    first, end = tokenizer.convert_tokens_to_ids([speech_token_str(0), GENERATION_END])
    said = [token for response in responses for token in response.token_ids if token != end]
    assert all(first <= token < first + NUM_SPEECH_TOKENS for token in said)
    assert len(set(said)) > 1000  # not one and the same
    mean = sum(len(response.token_ids) for response in responses) / 200
    assert 16 < mean < 24  # the standard error is 1.4


def test_many_wide_layers_do_not_change_how_often_it_ends():
    """At full size all layers together may outweigh the component that the head reads."""
    tokenizer = make_tokenizer(300)
    shape = SHAPES["0.5b"] | {"hidden_size": 448, "num_attention_heads": 7, "num_key_value_heads": 1}
    model = make_model(tokenizer, shape, 100.0, seed=0)
    prompt = tokenizer(render_prompt(tokenizer, "今天"), return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        ends = model(prompt).logits.float().softmax(-1)[0, :, tokenizer.eos_token_id]
    assert 0.006 < ends.mean() < 0.015
