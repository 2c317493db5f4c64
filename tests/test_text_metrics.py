import math
import random

import jiwer
import pytest

from tts_grpo.reward.curves import REWARD_CURVES, reward
from tts_grpo.text.errors import ErrorCounts, align_texts, pinyin_error_rate, pinyin_errors
from tts_grpo.text.units import normalise, pinyin


def test_normalise():
    assert normalise("  你好，Ｗｏｒｌｄ！It's　３ 次…") == "你好 world it s 3 次"
    assert normalise("。，！") == ""


def test_pinyin():
    assert pinyin("你好，World 3次", tones=True) == ["ni3", "hao3", "world", "san1", "ci4"]
    assert pinyin("绿色的女儿", tones=False) == ["lv", "se", "de", "nv", "er"]
    assert pinyin("行长在银行", tones=True) == ["hang2", "zhang3", "zai4", "yin2", "hang2"]
    assert pinyin("！", tones=True) == []


def test_homophones_are_not_errors_but_tones_may_be():
    assert pinyin_errors("他买东西", "她买东西", tones=True).errors == 0
    assert pinyin_errors("他买", "他卖", tones=True).errors == 1
    assert pinyin_errors("他买", "他卖", tones=False).errors == 0


def test_rates_equal_jiwer():
    rng = random.Random(0)
    characters = "我你他是不在有大小上下来去好天人中国"  # one sound each: our rates accept all of a character's
    truths = ["".join(rng.choices(characters, k=rng.randint(1, 12))) for _ in range(300)]
    hypotheses = ["".join(rng.choices(characters, k=rng.randint(0, 12))) for _ in truths]
    ours = pinyin_error_rate(truths, hypotheses, tones=False)
    spaced = lambda texts: [" ".join(pinyin(text, tones=False)) for text in texts]  # noqa: E731
    assert ours == pytest.approx(jiwer.wer(spaced(truths), spaced(hypotheses)), abs=1e-12)


def test_missing_speech_is_all_deletions():
    assert pinyin_error_rate(["你好吗", "好"], ["", "好"], tones=True) == 3 / 4


def test_no_rate_without_reference():
    with pytest.raises(ValueError, match="empty reference"):
        _ = ErrorCounts(insertions=1).rate
    with pytest.raises(ValueError):
        pinyin_error_rate(["你", "好"], ["你"], tones=True)


def test_clipped_errors():
    assert ErrorCounts(1, 2, 30, 10).clipped() == ErrorCounts(1, 2, 7, 10)
    assert ErrorCounts(1, 2, 3, 10).clipped() == ErrorCounts(1, 2, 3, 10)


def test_alignment_and_counts():
    pairs = align_texts("天山水火", "天人水火风", "toneless").pairs
    aligned = [
        (pair.reference and pair.reference.text, pair.hypothesis and pair.hypothesis.text, pair.error) for pair in pairs
    ]
    assert aligned == [("天", "天", 0), ("山", "人", 1), ("水", "水", 0), ("火", "火", 0), (None, "风", 1)]
    assert align_texts("天山水火", "人水火风", "toneless").counts == ErrorCounts(1, 1, 1, 4)
    assert align_texts("天山水", "", "toneless").counts == ErrorCounts(0, 3, 0, 3)


def test_reward_curves():
    for curve in REWARD_CURVES:
        values = [reward(e, curve) for e in (0.0, 0.1, 0.3, 1.0, 5.0)]
        assert values[0] == 1.0 and values == sorted(values, reverse=True) and values[-1] >= 0.0
    assert reward(0.2, "tanh") == pytest.approx(1 - math.tanh(0.6))
    assert reward(0.25, "exp") == pytest.approx(math.exp(-12 * 0.125))
