import dataclasses

import pytest
import torch
from cosyvoice.utils.common import nucleus_sampling
from transformers import GenerationConfig

from tts_grpo.speech.generation import OFFICIAL, Sampling, _next, _warpers, generate, generate_speech_tokens
from tts_grpo.speech.token2wav import decode
from tts_grpo.speech.voices import load_prompt_voice
from tts_grpo.text.prompts import render_prompt

pytestmark = pytest.mark.slow

SAMPLING = Sampling(max_new_tokens=200)


@pytest.fixture(scope="module")
def prompts(tokenizer, test_rows):
    return [render_prompt(tokenizer, row["text"]) for row in test_rows[:10]]


def test_sampling_does_not_depend_on_the_batch(lm, tokenizer, prompts):
    seeds = list(range(10))
    together = generate_speech_tokens(lm, tokenizer, prompts, seeds, SAMPLING)
    in_threes = generate_speech_tokens(lm, tokenizer, prompts, seeds, SAMPLING, batch_size=3)
    backwards = generate_speech_tokens(lm, tokenizer, prompts[::-1], seeds[::-1], SAMPLING)
    assert together == in_threes == backwards[::-1]
    assert all(utterance.finish_reason == "eos" and utterance.speech_tokens for utterance in together)


def test_seeds_and_temperature(lm, tokenizer, prompts):
    same = [prompts[0]] * 4
    sampled = generate_speech_tokens(lm, tokenizer, same, [1, 1, 2, 3], SAMPLING)
    assert sampled[0] == sampled[1]
    assert len({tuple(u.speech_tokens) for u in sampled}) == 3
    greedy = Sampling(temperature=0, max_new_tokens=200)
    greedy_utterances = generate_speech_tokens(lm, tokenizer, same[:2], [1, 2], greedy)
    assert greedy_utterances[0] == greedy_utterances[1]
    top_1 = Sampling(top_k=1, max_new_tokens=200)
    assert generate_speech_tokens(lm, tokenizer, same[:1], [5], top_1) == greedy_utterances[:1]


def test_truncated_utterance_has_finish_reason_length(lm, tokenizer, prompts):
    (truncated,) = generate_speech_tokens(lm, tokenizer, prompts[:1], [0], Sampling(max_new_tokens=5))
    assert (truncated.finish_reason, len(truncated.speech_tokens)) == ("length", 5)


def test_zero_shot_prompting_synthesises_the_text_only(lm, tokenizer, token2wav, asr, assets, test_rows):
    from tts_grpo.text.errors import pinyin_error_rate
    from tts_grpo.text.jsonl import read_jsonl

    row = read_jsonl(assets / "prompts" / "prompts.jsonl")[0]
    voice = load_prompt_voice(token2wav, assets / "prompts" / row["prompt_audio"], row["prompt_text"])
    texts = [r["text"] for r in test_rows[:24]]
    prompts = [render_prompt(tokenizer, text, voice.prompt_text, voice.prompt_speech_tokens) for text in texts]
    utterances = generate_speech_tokens(lm, tokenizer, prompts, range(24), Sampling(temperature=0, max_new_tokens=200))
    transcripts = asr.transcribe(decode(token2wav, [utterance.speech_tokens for utterance in utterances]))
    assert pinyin_error_rate(texts, transcripts, tones=False) < 0.25


def test_on_end_is_called_as_soon_as_a_response_ends(lm, tokenizer, prompts):
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    calls = []
    on_end = lambda i, response: calls.append((i, response))  # noqa: E731
    responses = generate(lm, ids, range(10), SAMPLING, on_end)
    assert [response for _, response in sorted(calls, key=lambda call: call[0])] == responses
    lens = [len(response.token_ids) for _, response in calls]
    assert lens == sorted(lens) and len(set(lens)) > 1  # the shortest first
    calls.clear()
    truncated = generate(lm, ids, range(10), Sampling(max_new_tokens=3), on_end)
    assert sorted(i for i, _ in calls) == list(range(10)) and all(response in truncated for _, response in calls)


def official_probabilities(logits: torch.Tensor, history: list[int], top_p: float, top_k: int, window: int):
    """Token probabilities of CosyVoice's ``ras_sampling`` at ace7c47 with tau_r = 1 / window, and of the nucleus.

    A token of the nucleus that is among the last ``window`` tokens is replaced: its probability is distributed over all
    other tokens, in proportion to their probabilities. (Earlier releases could draw the same token again.)
    """
    probs = logits.softmax(0)
    order = probs.argsort(descending=True)[:top_k]
    before = probs[order].cumsum(0) - probs[order]
    nucleus = torch.zeros_like(probs)
    nucleus[order] = probs[order] * (before < top_p)
    nucleus /= nucleus.sum()
    result = nucleus.clone()
    for token in set(history[-window:]):
        result[token] = 0.0
    for token in set(history[-window:]):
        others = probs.clone()
        others[token] = 0.0
        result += nucleus[token] * others / others.sum()
    return result, nucleus


def test_repetition_aware_sampling_equals_the_official_one():
    """Compares frequencies of drawn tokens with the probabilities in the pinned source."""
    torch.manual_seed(0)
    logits, history = torch.randn(12) * 2, [3, 7, 7, 1]
    for likely in history[:2]:
        logits[likely] = 3.0  # recent tokens are probable again
    sampling = Sampling(top_p=0.8, top_k=4, repetition_window=3)
    recent = torch.tensor([history[-3:]]).expand(50000, -1)
    drawn, log_probs = _next(logits.expand(50000, -1), _warpers(sampling), recent, torch.rand(50000, 2), sampling)
    expected, nucleus = official_probabilities(logits, history, 0.8, 4, 3)
    frequencies = torch.bincount(drawn, minlength=12) / len(drawn)
    assert (frequencies - expected).abs().max() < 0.01
    official = torch.tensor([nucleus_sampling(logits.log_softmax(0), 0.8, 4) for _ in range(9000)])
    assert (torch.bincount(official, minlength=12) / 9000 - nucleus).abs().max() < 0.02
    # The test detects both a missing second draw and a second draw that includes the repeated token.
    assert (frequencies - nucleus).abs().max() > 0.1
    assert expected[7] < 0.01 < nucleus[7] * logits.softmax(0)[7]
    assert log_probs.max() <= 0


def test_repetition_aware_sampling_does_not_depend_on_the_batch(lm, tokenizer, prompts, test_rows):
    texts = [row["text"] for row in test_rows[:10]]
    together = generate_speech_tokens(lm, tokenizer, prompts, range(10), OFFICIAL, texts=texts)
    assert together == generate_speech_tokens(lm, tokenizer, prompts, range(10), OFFICIAL, batch_size=3, texts=texts)


@pytest.fixture
def lm_with_bias(lm):
    yield lm
    lm.lm_head.bias = None


def test_official_lengths(lm_with_bias, tokenizer, prompts, test_rows):
    """A response has 2 to 20 tokens per token of its own text (Qwen2LM.inference)."""
    texts = [row["text"] for row in test_rows[:10]]
    text_lens = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    assert len(set(text_lens)) > 2
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    lm = lm_with_bias
    ends = lm.generation_config.eos_token_id
    for end, change in ((ends[0], 1e4), (ends[1], 1e4), (ends[0], -1e4)):
        bias = torch.zeros(lm.config.vocab_size)
        bias[ends] = -1e4
        bias[end] = change
        lm.lm_head.bias = torch.nn.Parameter(bias)
        ended = []
        responses = generate(lm, ids, range(10), OFFICIAL, lambda i, response: ended.append(i), text_lens)  # noqa: B023
        assert sorted(ended) == list(range(10))
        for response, text_len in zip(responses, text_lens, strict=True):
            length = len(response.token_ids) - (response.finish_reason == "eos")
            if change < 0:
                assert (length, response.finish_reason) == (20 * text_len, "length")
            else:  # CosyVoice applies the minimum to the first of its end tokens only
                assert (length, response.finish_reason) == (2 * text_len if end == ends[0] else 0, "eos")


def test_official_lengths_need_the_texts(lm, tokenizer, prompts):
    with pytest.raises(ValueError, match="pass texts"):
        generate_speech_tokens(lm, tokenizer, prompts[:1], [0], OFFICIAL)


def test_repetition_penalty_equals_transformers(lm, tokenizer):
    """The penalty of ``Sampling`` is used; that of the model's generation config is ignored."""
    prompt = tokenizer(render_prompt(tokenizer, "今天天气很好"), return_tensors="pt", add_special_tokens=False)
    greedy = Sampling(temperature=0, max_new_tokens=40, repetition_penalty=1.3)
    (penalised,) = generate(lm, prompt["input_ids"].tolist(), [0], greedy)
    config = GenerationConfig(
        do_sample=False, repetition_penalty=1.3, max_new_tokens=40, pad_token_id=lm.generation_config.pad_token_id,
        eos_token_id=lm.generation_config.eos_token_id,
    )  # fmt: skip
    expected = lm.generate(**prompt, generation_config=config)[0, prompt["input_ids"].shape[1] :].tolist()
    assert penalised.token_ids == expected
    (plain,) = generate(lm, prompt["input_ids"].tolist(), [0], dataclasses.replace(greedy, repetition_penalty=1.0))
    assert plain.token_ids != expected
    lm.generation_config.repetition_penalty = 1.3
    try:
        again = generate(lm, prompt["input_ids"].tolist(), [0], dataclasses.replace(greedy, repetition_penalty=1.0))
    finally:
        lm.generation_config.repetition_penalty = None
    assert again == [plain]
