import pytest
import torch
from cosyvoice.utils.common import ras_sampling

from tts_grpo.generate import Sampling, _next, _warpers, generate, generate_speech_tokens
from tts_grpo.prompts import render_prompt
from tts_grpo.token2wav import decode, load_prompt_voice

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
    likeliest = generate_speech_tokens(lm, tokenizer, same[:2], [1, 2], greedy)
    assert likeliest[0] == likeliest[1]
    assert generate_speech_tokens(lm, tokenizer, same[:1], [5], Sampling(top_k=1, max_new_tokens=200)) == likeliest[:1]


def test_an_utterance_that_is_cut_says_so(lm, tokenizer, prompts):
    (cut,) = generate_speech_tokens(lm, tokenizer, prompts[:1], [0], Sampling(max_new_tokens=5))
    assert (cut.finish_reason, len(cut.speech_tokens)) == ("length", 5)


def test_zero_shot_prompting_speaks_the_text_only(lm, tokenizer, token2wav, asr, assets, test_rows):
    from tts_grpo.jsonl import read_jsonl
    from tts_grpo.metrics import pinyin_error_rate

    row = read_jsonl(assets / "prompts" / "prompts.jsonl")[0]
    voice = load_prompt_voice(token2wav, assets / "prompts" / row["prompt_audio"], row["prompt_text"])
    texts = [r["text"] for r in test_rows[:24]]
    prompts = [render_prompt(tokenizer, text, voice.prompt_text, voice.prompt_speech_tokens) for text in texts]
    said = generate_speech_tokens(lm, tokenizer, prompts, range(24), Sampling(temperature=0, max_new_tokens=200))
    heard = asr.transcribe(decode(token2wav, [utterance.speech_tokens for utterance in said]))
    assert pinyin_error_rate(texts, heard, tones=False) < 0.25


def test_responses_are_told_as_they_end(lm, tokenizer, prompts):
    model, ids = lm, [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    told = []
    responses = generate(model, ids, range(10), SAMPLING, lambda i, response: told.append((i, response)))
    assert [response for _, response in sorted(told, key=lambda pair: pair[0])] == responses
    lens = [len(response.token_ids) for _, response in told]
    assert lens == sorted(lens) and len(set(lens)) > 1  # the shortest first
    told.clear()
    cut = generate(model, ids, range(10), Sampling(max_new_tokens=3), lambda i, response: told.append((i, response)))
    assert sorted(i for i, _ in told) == list(range(10)) and all(response in cut for _, response in told)


def test_repetition_aware_sampling_is_the_official_one():
    """The frequencies of drawn tokens, against CosyVoice's own function."""
    torch.manual_seed(0)
    logits, history = torch.randn(12) * 2, [3, 7, 7, 1]
    for likely in history[:2]:
        logits[likely] = 3.0  # what was said lately is likely again
    sampling = Sampling(top_p=0.8, top_k=4, repetition_window=3)
    recent = torch.tensor([history[-3:]]).expand(20000, -1)
    drawn, log_probs = _next(logits.expand(20000, -1), _warpers(sampling), recent, torch.rand(20000, 2), sampling)
    settings = {"top_p": 0.8, "top_k": 4, "win_size": 3, "tau_r": 1 / 3}
    official = torch.cat([ras_sampling(logits.log_softmax(0), history, 4, **settings) for _ in range(9000)])
    ours, theirs = (torch.bincount(x, minlength=12) / len(x) for x in (drawn, official))
    assert (ours - theirs).abs().max() < 0.02
    plain, _ = _next(logits.expand(20000, -1), _warpers(sampling), recent, torch.rand(20000, 2), Sampling())
    assert (torch.bincount(plain, minlength=12) / 20000 - theirs).abs().max() > 0.1  # it makes a difference here
    assert log_probs.max() <= 0


def test_repetition_aware_sampling_does_not_depend_on_the_batch(lm, tokenizer, prompts):
    sampling = Sampling(top_p=0.8, top_k=25, repetition_window=10, max_new_tokens=200)
    together = generate_speech_tokens(lm, tokenizer, prompts, range(10), sampling)
    assert together == generate_speech_tokens(lm, tokenizer, prompts, range(10), sampling, batch_size=3)
