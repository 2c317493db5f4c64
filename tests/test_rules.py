"""Tests of the text rules: accepted texts, handling of tags, and the language model's input."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tts_grpo.text.clean import find_tags as tags_of_the_front_end
from tts_grpo.text.jsonl import write_jsonl
from tts_grpo.text.rules import TextRules, comparison_key, is_plain, model_text, usable_eval_set, usable_text
from tts_grpo.text.spoken import spoken_form
from tts_grpo.text.tags import find_control_tokens, find_tags, remove_tags

SPOKEN = TextRules(llm_text="spoken")


@pytest.mark.parametrize(
    ("text", "language", "reason"),
    [
        ("きのうは雨でした。", "zh", "another script"), ("안녕하세요 여러분", "zh", "another script"),
        ("今日は天気", "zh", "another script"), ("Guten Tag, schöne Grüße", "zh", "no Chinese"),
        ("Hello world, how are you?", "zh", "no Chinese"), ("今天 meeting 取消了", "zh", None), ("119", "zh", None),
        ("重慶", "zh", None), ("α波", "zh", None), ("他在café里", "zh", None), ("Hello world", "en", None),
        ("today 今天", "en", "chinese"), ("今天", "en", "chinese"), ("Привет, мир", "en", "another script"),
        ("今天[laughter]", "zh", r"contains \[laughter\], which is a tag, not a word"),
        ("用四川话说<|endofprompt|>好", "zh", "contains"),
    ],
)  # fmt: skip
def test_accepted_texts(text, language, reason):
    rules = TextRules(language)
    if reason is None:
        assert usable_text(text, rules) == text
    else:
        with pytest.raises(ValueError, match=reason):
            usable_text(text, rules)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("[laughter]哈哈[breath]", "哈哈"), ("<strong>今天</strong>好", "今天好"), ("今天<|im_end|>好", "今天好"),
        ("用四川话说<|endofprompt|>今天好", "今天好"), ("<|zh|><|HAPPY|>今天", "今天"),
        ("＜｜ｉｍ＿ｅｎｄ｜＞今天", "今天"),
        ("<|im<|s_1|>_end|>今天", "今天"), ("<<|endofprompt|>|im_end|>今天", "|im_end|>今天"),
        ("good[laugh]bye", "good bye"),
        ('<break time="500ms"/>你好<!-- x -->', "你好"), ("[uv_break]好[oral_2]", "好"),
        ("<laughter>是吗</laughter>", "是吗"),
        ("3<5，7>2", None), ("他说[注1]好", None), ("【笑】好", None), ("a < b", None),
        ("[2024]年", None), ("（OK）", None),
    ],
)  # fmt: skip
def test_tags(text, left):
    assert bool(find_tags(text)) == (left is not None)
    assert remove_tags(text) == (text if left is None else left)
    assert usable_text(text + "好", TextRules(text_tags="remove")) == (text if left is None else left) + "好"


PIECES = st.sampled_from(
    ["<|", "|>", "im_end", "s_1", "<", ">", "[", "]", "laughter", "endofprompt", "strong", "/", "好", " ", "｜", "＜",
     "<|im_end|>", "<|endofprompt|>", "<|s_12|>", "<|endoftext|>", "[laughter]"]
)  # fmt: skip
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.lists(PIECES, max_size=12).map("".join)


@given(TEXTS)
def test_no_text_without_tags_changes_a_prompt(tokenizer, text):
    left = remove_tags(text)
    assert not find_tags(left) and remove_tags(left) == left
    assert not tags_of_the_front_end(left), "the front end would leave out what stays in the prompt"
    assert find_control_tokens(tokenizer, [left, model_text(left, SPOKEN)]) == ["", ""]


@pytest.mark.parametrize(
    ("text", "language", "read"),
    [
        ("2024年，有50%的人。", "zh", "二零二四年，有百分之五十的人。"),
        ("气温是-5℃，重慶！", "zh", "气温是负五摄氏度，重庆！"),
        ("用GPT-4，好吗？", "zh", "用GPT-四，好吗？"), ("“下午14:30”开会……", "zh", "“下午十四点三十分”开会……"),
        ("It costs $100, really.", "en", "It costs one hundred dollars, really."),
        ("No digits here.", "en", "No digits here."),
        ("重10kg/箱", "zh", "重十千克每箱"),
    ],
)  # fmt: skip
def test_what_the_language_model_reads(text, language, read):
    assert model_text(text, TextRules(language, llm_text="spoken")) == read
    assert model_text(text, TextRules(language, llm_text="raw")) == text


@given(st.text("一二两重庆天气，。！？、：“”…乾著2年a", max_size=8))
def test_plain_texts_are_their_own_spoken_form(text):
    if is_plain(text):
        assert comparison_key(text, SPOKEN) == spoken_form(text).text.replace(" ", "")
    assert comparison_key(model_text(text, SPOKEN), SPOKEN) == comparison_key(text, SPOKEN)


def test_tags_of_an_evaluation_set(tmp_path):
    (tmp_path / "a.wav").touch()
    prompt = {"prompt_text": "[breath]在", "prompt_audio": "a.wav"}
    write_jsonl(tmp_path / "x", [{"id": 1, "text": "好[laughter]"} | prompt, {"id": 2, "text": "Hello"}])
    with pytest.raises(ValueError, match=r"line 1: contains \[laughter\]"):
        usable_eval_set(tmp_path / "x", TextRules())
    first, second = usable_eval_set(tmp_path / "x", TextRules(text_tags="remove"))
    assert (first["target_text"], first["prompt_text"]) == ("好", "在")
    assert second["target_text"] == "Hello", "a published set is taken whole"
    write_jsonl(tmp_path / "x", [{"id": 1, "text": "[laughter]"}])
    with pytest.raises(ValueError, match="line 1: target_text has no word"):
        usable_eval_set(tmp_path / "x", TextRules(text_tags="remove"))
