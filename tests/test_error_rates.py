"""Compares error rates with implementations of the published rules that use jiwer, zhconv and zhon."""

import random
import string

import jiwer
import numpy as np
import pytest
import zhconv
from hypothesis import given
from hypothesis import strategies as st
from zhon.hanzi import punctuation

from tts_grpo.evaluation.protocols import METRICS, count_all, mixed_units, pool, prepare_hypothesis
from tts_grpo.text.jsonl import read_jsonl

NUM_UTTERANCES = 600


def without_punctuation(text):
    for mark in punctuation + string.punctuation:
        if mark != "'":
            text = text.replace(mark, "")
    return text


def seed_reference(truths, hypotheses, language):
    """seed-tts-eval: the mean over utterances of jiwer's rate."""
    rates = []
    for truth, hypothesis in zip(truths, hypotheses, strict=True):
        if language == "zh":
            hypothesis = zhconv.convert(hypothesis, "zh-cn")
        truth, hypothesis = without_punctuation(truth), without_punctuation(hypothesis)
        if language == "zh":
            truth, hypothesis = " ".join(truth), " ".join(hypothesis)
        else:
            truth, hypothesis = truth.lower(), hypothesis.lower()
        rates.append(jiwer.process_words(truth, hypothesis).wer)
    return np.mean(rates)


def micro_reference(truths, hypotheses):
    """Total errors over total characters: no spaces, no punctuation, upper case."""
    plain = lambda text: without_punctuation(text).replace(" ", "").upper()  # noqa: E731
    hypothesis = [plain(zhconv.convert(text, "zh-cn")) for text in hypotheses]
    return jiwer.cer([plain(text) for text in truths], hypothesis)


def damaged(text, rng):
    """A transcript with typical ASR differences: characters lost, changed, doubled or traditional, and punctuation."""
    hypothesis = []
    for character in text:
        draw = rng.random()
        if draw < 0.08:
            continue
        hypothesis.append(rng.choice("我你他是不在有，。 abC3") if draw < 0.2 else character)
        hypothesis += [rng.choice("的了嗎體 ")] if draw > 0.95 else []
    return zhconv.convert("".join(hypothesis), "zh-hant") if rng.random() < 0.3 else "".join(hypothesis)


def rate_of(truths, hypotheses, metric, language):
    counts = [count_all(t, prepare_hypothesis(h, language), language)[metric] for t, h in zip(truths, hypotheses)]
    return pool(counts, METRICS[language][metric].macro)[0]


@pytest.fixture(scope="module")
def chinese(assets):
    rng = random.Random(0)
    truths = [row["text"] for name in ("test", "dev", "train") for row in read_jsonl(assets / f"data/{name}.jsonl")]
    truths = truths[:NUM_UTTERANCES]
    truths[::7] = [f"{text}It's CD，{text}！Ok" for text in truths[::7]]
    hypotheses = [damaged(text, rng) for text in truths]
    hypotheses[::50] = [""] * len(hypotheses[::50])
    assert len(truths) == NUM_UTTERANCES
    return truths, hypotheses


def test_seed_tts_eval_equals_the_reference_to_the_last_digit(chinese):
    expected = seed_reference(*chinese, "zh")
    assert 0.1 < expected < 0.5
    assert rate_of(*chinese, "seed-tts-eval", "zh") == expected == rate_of(*chinese, "cv3-eval", "zh")


def test_micro_equals_the_reference_to_the_last_digit(chinese):
    expected = micro_reference(*chinese)
    assert rate_of(*chinese, "cer", "zh") == expected
    assert expected != seed_reference(*chinese, "zh")


def test_english_equals_the_reference_to_the_last_digit():
    rng = random.Random(1)
    words = ["The", "quick,", "brown", "", "fox", "don't", "jump", "Lazy", "dogs.", "It's", "3", "o'clock!"]
    truths = [" ".join(rng.choices(words, k=rng.randint(3, 15))) for _ in range(NUM_UTTERANCES)]
    hypotheses = [" ".join(rng.choice([w, w.upper(), "uh", ""]) for w in text.split()) for text in truths]
    assert rate_of(truths, hypotheses, "seed-tts-eval", "en") == seed_reference(truths, hypotheses, "en")
    plain = [[without_punctuation(t).lower() for t in texts] for texts in (truths, hypotheses)]
    assert rate_of(truths, hypotheses, "wer", "en") == jiwer.wer(*plain)


@pytest.mark.parametrize(
    ("truth", "hypothesis", "metric", "errors", "length"),
    [
        ("你好吗？", "你 好嗎", "seed-tts-eval", 0, 3),
        ("说OK", "说ok", "seed-tts-eval", 2, 3),  # case counts in the published rules
        ("说OK", "说ok", "cer", 0, 3),
        ("３个", "3个", "seed-tts-eval", 1, 2),
        ("３个", "3个", "cer", 0, 2),
        ("It's", "its", "cer", 1, 4),  # the apostrophe stays
        ("银行", "银 行", "pinyin_error_rate", 0, 2),  # pypinyin would read 银 行 with a space as yin2 xing2
        ("他买", "她卖", "pinyin_error_rate", 1, 2),
        ("他买", "她卖", "pinyin_error_rate_toneless", 0, 2),
        ("他买", "她卖", "cer", 2, 2),
    ],
)
def test_known_answers(truth, hypothesis, metric, errors, length):
    counts = count_all(truth, prepare_hypothesis(hypothesis, "zh"), "zh")[metric]
    assert (counts.errors, counts.length) == (errors, length)


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("我们用GPT-4写Python，it's 好！", ["我", "们", "用", "gpt4", "写", "python", "it's", "好"]),
        ("Ｈｅｌｌｏ, world。", ["hello", "world"]), ("……", []),
        ("It’s 'late', the dogs' ‘晚’了'", ["it's", "late", "the", "dogs", "晚", "了"]),
    ],
)  # fmt: skip
def test_units_of_mixed_text_are_characters_and_words(text, units):
    assert mixed_units(text) == units


def test_macro_and_micro_weigh_utterances_differently():
    truths, hypothesis = ["一", "一二三四五六七八九"], ["", "一二三四五六七八九"]
    assert rate_of(truths, hypothesis, "seed-tts-eval", "zh") == 0.5
    assert rate_of(truths, hypothesis, "cer", "zh") == 0.1


def test_a_text_without_units_is_an_error():
    with pytest.raises(ValueError, match="has no unit"):
        count_all("……！", "", "zh")


texts = st.text("你好我们去，。 aB'3嗎", min_size=1, max_size=12).filter(lambda t: any(c.isalnum() for c in t))


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=8), st.data())
def test_no_failed_audio_improves_a_rate(pairs, data):
    """Failed audio counts as an empty hypothesis, which is better only than one with more errors than units."""
    position = data.draw(st.integers(0, len(pairs) - 1))
    counts = [count_all(t, prepare_hypothesis(h, "zh"), "zh") for t, h in pairs]
    failed = count_all(pairs[position][0], "", "zh")
    for name, metric in METRICS["zh"].items():
        assert failed[name].deletions == failed[name].length and failed[name].rate == 1.0
        if counts[position][name].rate > 1.0:
            continue
        before = [c[name] for c in counts]
        after = [failed[name] if i == position else c for i, c in enumerate(before)]
        assert pool(after, metric.macro)[0] >= pool(before, metric.macro)[0] - 1e-12
