"""Continuous batching draws the responses of ``generate``, whatever the number of slots and the order of prompts."""

import copy
import dataclasses

import pytest
import torch

from tts_grpo.speech import continuous_batching
from tts_grpo.speech.continuous_batching import ContinuousBatching, slot_attention
from tts_grpo.speech.decode_attention import decode_attention
from tts_grpo.speech.generation import OFFICIAL, Sampling, generate
from tts_grpo.speech.head_bias import UNREACHABLE, add_head_bias
from tts_grpo.text.prompts import render_prompt

pytestmark = pytest.mark.slow

PLAIN = Sampling(max_new_tokens=120)
LIMITED = dataclasses.replace(OFFICIAL, top_k=3, min_token_text_ratio=4.0, max_token_text_ratio=6.0)
TRUNCATED = Sampling(max_new_tokens=50, temperature=0.8, top_k=50, top_p=0.95, repetition_penalty=1.1)


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    """Batches of prompts that a CPU computes fast; prompts have several lengths."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continuous_batching, "PREFILL_TOKENS", 64)
        patch.setattr(continuous_batching, "BUCKET", 16)
        yield


@pytest.fixture(scope="module")
def prompts(tokenizer, test_rows):
    texts = [row["text"] for row in test_rows[:10]]
    return [tokenizer(render_prompt(tokenizer, text), add_special_tokens=False)["input_ids"] for text in texts]


def engine(lm, sampling, slots, longest_prompt=60):
    return ContinuousBatching(copy.deepcopy(lm), sampling, slots, longest_prompt)


def assert_equal(response, expected):
    assert (response.token_ids, response.finish_reason) == (expected.token_ids, expected.finish_reason)
    assert response.log_probs == pytest.approx(expected.log_probs, abs=1e-3)


@pytest.mark.parametrize("sampling", [PLAIN, TRUNCATED, Sampling(temperature=0, max_new_tokens=40)])
def test_responses_equal_those_of_single_prompts(lm, prompts, sampling):
    expected = [generate(lm, [prompt], [seed], sampling)[0] for seed, prompt in enumerate(prompts)]
    found = list(engine(lm, sampling, 4).generate(prompts, range(10)))
    assert sorted(i for i, _ in found) == list(range(10))
    for i, response in found:
        assert_equal(response, expected[i])
    if sampling is PLAIN:
        assert {response.finish_reason for response in expected} == {"eos"} and len(prompts[0]) != len(prompts[1])


def test_responses_depend_neither_on_the_order_nor_on_the_other_prompts(lm, prompts):
    generator = engine(lm, PLAIN, 3)
    together = dict(generator.generate(prompts, range(10)))
    again = dict(generator.generate(prompts[::-1], range(9, -1, -1)))  # in slots that were used before
    assert together == {9 - i: response for i, response in again.items()}
    assert dict(generator.generate(prompts[4:5], [4])) == {0: together[4]}
    two_processes = [dict(engine(lm, PLAIN, 3).generate(prompts[i::2], range(i, 10, 2))) for i in range(2)]
    assert together == {
        2 * i + rank: response for rank, part in enumerate(two_processes) for i, response in part.items()
    }


def test_a_response_is_yielded_before_all_have_ended(lm, prompts):
    first = next(engine(lm, PLAIN, 2).generate(prompts, range(10)))
    assert_equal(first[1], generate(lm, [prompts[first[0]]], [first[0]], PLAIN)[0])


def test_the_bias_of_the_head_restricts_the_ids(lm, prompts):
    biased = copy.deepcopy(lm)
    bias = torch.full((lm.config.vocab_size,), UNREACHABLE)
    bias[700:720] = 0.0
    add_head_bias(biased, bias)
    found = dict(engine(biased, Sampling(max_new_tokens=20), 4).generate(prompts[:4], range(4)))
    assert all(700 <= id_ < 720 for response in found.values() for id_ in response.token_ids)
    assert_equal(found[3], generate(biased, prompts[3:4], [3], Sampling(max_new_tokens=20))[0])


def test_a_prompt_of_one_token_needs_no_keys(lm, prompts):
    sampling = Sampling(max_new_tokens=5)
    (found,) = engine(lm, sampling, 2).generate([prompts[0][:1]], [0])
    assert_equal(found[1], generate(lm, [prompts[0][:1]], [0], sampling)[0])


@pytest.mark.parametrize("biased", [False, True])
def test_repetition_aware_sampling_with_limits_by_the_text(lm, tokenizer, prompts, test_rows, biased):
    """With a bias, most ids are left out, as for CosyVoice's own models. 8 prompts share 3 slots."""
    model, end = copy.deepcopy(lm), lm.generation_config.eos_token_id
    if biased:
        first = tokenizer.convert_tokens_to_ids("<|s_0|>")
        bias = torch.full((lm.config.vocab_size,), UNREACHABLE)
        bias[torch.arange(first, first + 6561)], bias[torch.as_tensor(end)] = 0.0, 3.0
        add_head_bias(model, bias)
    text_lens = [len(tokenizer(row["text"])["input_ids"]) for row in test_rows[:8]]
    expected = [
        generate(model, [prompt], [i], LIMITED, text_lens=[text_len])[0]
        for i, (prompt, text_len) in enumerate(zip(prompts, text_lens, strict=False))
    ]
    longest = max(LIMITED.limits(text_len)[1] for text_len in text_lens)
    found = dict(ContinuousBatching(model, LIMITED, 3, 60, longest).generate(prompts[:8], range(8), text_lens))
    assert sorted(found) == list(range(8))
    for i, response in found.items():
        assert_equal(response, expected[i])
    assert len({response.finish_reason for response in expected}) == 2


def test_a_prompt_for_which_there_is_no_room_is_refused(lm, prompts):
    with pytest.raises(ValueError, match="prompt 1 has 300 tokens and its response up to 120; there is room for"):
        list(engine(lm, PLAIN, 2).generate([prompts[0], [1] * 300], [0, 1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernel_equals_attention_and_reads_no_other_keys(dtype):
    torch.manual_seed(0)
    query, lens = torch.randn(3, 14, 64, dtype=dtype), torch.tensor([1, 64, 201])
    keys, values = (torch.randn(3, 2, 256, 64, dtype=dtype) for _ in range(2))
    expected = slot_attention(None, query[:, :, None], keys, values, lens)[0][:, 0]
    for i, n in enumerate(lens):
        keys[i, :, n:], values[i, :, n:] = torch.nan, torch.nan
    found = decode_attention(query, keys, values, lens, 64**-0.5)
    assert (found - expected).abs().max() < (1e-5 if dtype == torch.float32 else 2e-3)
