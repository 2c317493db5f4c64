"""Tests that users' text files are read in all usual forms; errors name the file, the line and the expected form."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tts_grpo.text.input_files import over_token_limit, read_eval_set, read_known_answers, read_voices
from tts_grpo.text.jsonl import numbered_rows, read_jsonl

ROWS = [{"text": "今天天气很好。"}, {"text": "我们明天早上出发。"}, {"text": "这本书在国学热中火起来了，你看过吗？"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
READERS = (read_jsonl, read_eval_set, read_known_answers, read_voices)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gbk", "gb2312", "gb18030"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "text", [LINES, json.dumps(ROWS, ensure_ascii=False), json.dumps(ROWS, ensure_ascii=False, indent=1), "\n" + LINES]
)
def test_usual_forms_are_read(tmp_path, encoding, line_end, text):
    (tmp_path / "x").write_bytes(text.replace("\n", line_end).encode(encoding))
    assert read_jsonl(tmp_path / "x") == ROWS


def test_gb18030_has_all_characters_and_joined_files_have_marks_inside(tmp_path):
    rows = [*ROWS, {"text": "𠮷野家㐀😀"}]
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "x").write_bytes(data.encode("gb18030"))
    assert read_jsonl(tmp_path / "x") == rows
    (tmp_path / "x").write_bytes(LINES.encode("utf-8-sig") * 2)
    assert read_jsonl(tmp_path / "x") == ROWS * 2


@pytest.mark.parametrize("encoding", ["big5", "shift_jis", "euc_kr", "utf-16-le"])
def test_other_encodings_are_not_guessed(tmp_path, encoding):
    texts = {"big5": "這一天下午我們都在學校裡讀書。", "shift_jis": "きのうは雨でした、明日は晴れます。",
             "euc_kr": "안녕하세요 여러분 반갑습니다.", "utf-16-le": "今天天气很好。"}  # fmt: skip
    (tmp_path / "x").write_bytes(json.dumps({"text": texts[encoding]}, ensure_ascii=False).encode(encoding))
    with pytest.raises(ValueError, match="x, line 1: not "):
        read_jsonl(tmp_path / "x")


def test_a_line_in_another_encoding_than_the_file(tmp_path):
    lines = LINES.splitlines(keepends=True)
    (tmp_path / "x").write_bytes("".join(lines[:2]).encode() + lines[2].encode("gbk"))
    with pytest.raises(ValueError, match=r"x, line 3: not UTF-8 \(byte 10 is 0xd5\): save the file as UTF-8"):
        read_jsonl(tmp_path / "x")
    (tmp_path / "x").write_bytes("".join(lines[:2]).encode("gbk") + b'{"text": "\xff"}')
    with pytest.raises(ValueError, match="x, line 3: not GB18030, as the lines before it"):
        read_jsonl(tmp_path / "x")


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"text": "\\ud83d"}', r"\\ud83d is half of a surrogate pair, not a character"),
        ('{"\\udc00": 1}', r"\\udc00 is half of a surrogate pair"),
        ("今天天气很好。", "not JSON .*: expected one JSON object per line"),
        ('{"text": "a"}{"text": "b"}', "not JSON .*Extra data"),
        ('"今天"', "not a JSON object"),
        ("[" * 100_000, "begins with"),
        ('{"a": ' + "[" * 100_000, "not JSON that can be read"),
        ('{"a": ' + "1" * 5000 + "}", "not JSON that can be read"),
    ],
)
def test_errors_name_the_expected_value(tmp_path, line, fault):
    (tmp_path / "x").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"x(, line 1:)? {fault}"):
        read_jsonl(tmp_path / "x")


def test_one_bad_element_of_an_array_is_one_bad_row(tmp_path):
    (tmp_path / "x").write_text('[{"text": "\\ud83d\\ude00"}, {"text": "\\ud83d"}, 5]')
    (_, first), (_, second), (_, third) = numbered_rows(tmp_path / "x")
    assert first == {"text": "😀"} and isinstance(second, ValueError) and third == 5


def write(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_an_evaluation_set(tmp_path):
    (tmp_path / "a.wav").touch()
    prompt = {"prompt_text": "在。", "prompt_audio": "a.wav"}
    rows = [{"id": 7, "text": " 今天 "}, {"id": "b c", "target_text": "ok", "text": 5, "language": "EN"} | prompt]
    path = write(tmp_path / "x", *rows)
    assert read_eval_set(path) == [
        {"id": "7", "target_text": "今天", "language": "zh", "prompt_text": "", "prompt_audio": None},
        {"id": "b c", "target_text": "ok", "language": "en"} | prompt,
    ]
    with pytest.raises(ValueError, match="line 2: language is 'fr', not zh or en"):
        read_eval_set(write(tmp_path / "x", rows[0], rows[1] | {"language": "fr"}))


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"target_text": "好"}, "no id"),
        ({"id": 1.5, "target_text": "好"}, "the id is the number 1.5, not a text or an integer"),
        ({"id": True, "target_text": "好"}, "the id is true, not"),
        ({"id": "a/b", "target_text": "好"}, "'a/b' cannot be a file name"),
        ({"id": "..", "target_text": "好"}, "'..' cannot be a file name"),
        ({"id": "a\\b", "target_text": "好"}, "cannot be a file name"),
        ({"id": "a\nb", "target_text": "好"}, "cannot be a file name"),
        ({"id": "好" * 70, "target_text": "好"}, "more than 200 bytes"),
        ({"id": "first", "target_text": "好"}, "the id 'first' occurs twice, first in entry 1"),
        (
            {"id": "First", "target_text": "好"},
            "'First' differs only in upper and lower case from the id 'first' in entry 1",
        ),
        ({"id": "a"}, "no target_text"),
        ({"id": "a", "target_text": 5}, "target_text is the number 5, not a text in quotation marks"),
        ({"id": "a", "target_text": ["好"]}, "target_text is an array"),
        ({"id": "a", "target_text": "……"}, "target_text has no word: '……'"),
        ({"id": "a", "text": ""}, "text has no word"),
        ({"id": "a", "text": "好\ufffd"}, "U\\+FFFD"),
        ({"id": "a", "text": "好", "prompt_text": "好"}, "a prompt needs both"),
        ({"id": "a", "text": "好", "prompt_audio": "first.wav"}, "a prompt needs both"),
        ({"id": "a", "text": "好", "prompt_text": "！", "prompt_audio": "x"}, "prompt_text has no word"),
        ({"id": "a", "text": "好", "prompt_text": "好", "prompt_audio": "none.wav"}, "none.wav is missing"),
        ({"id": "a", "text": "好", "prompt_text": "好", "prompt_audio": 5}, "prompt_audio is the number 5"),
        ({"id": "a", "text": "好", "prompt_text": "好", "prompt_audio": "n" * 5000}, "is missing"),
    ],
)
def test_faults_of_an_evaluation_set(tmp_path, row, fault):
    path = write(tmp_path / "x", {"id": "first", "target_text": "好"}, row)
    with pytest.raises(ValueError, match=f"x, line 2: .*{fault}"):
        read_eval_set(path)


def test_all_faults_are_named_at_once(tmp_path):
    path = write(tmp_path / "x", *({"id": i} for i in range(8)))
    with pytest.raises(ValueError) as error:
        read_eval_set(path)
    lines = str(error.value).splitlines()
    assert [line.split(": ")[0][-6:] for line in lines[:5]] == [f"line {i}" for i in range(1, 6)]
    assert lines[5:] == ["and 3 more like these"]
    with pytest.raises(ValueError, match="x: no utterance"):
        read_eval_set(write(tmp_path / "x"))


@pytest.mark.parametrize("tokens", [None, [], "1", [1, "2"], [True], [6561], [-1], [1.0]])
def test_known_answers_need_speech_tokens(tmp_path, tokens):
    good = {"text": "好", "speech_tokens": [0, 6560], "id": "kept"}
    assert read_known_answers(write(tmp_path / "x", good, {"text": "好"}), limit=1) == [good | {"language": "zh"}]
    with pytest.raises(ValueError, match="x, line 2: .*speech.token"):
        read_known_answers(write(tmp_path / "x", good, good | {"speech_tokens": tokens}))


def test_voices_need_text_and_recording(tmp_path):
    (tmp_path / "a.wav").touch()
    good = {"prompt_text": "好", "prompt_audio": "a.wav"}
    assert read_voices(write(tmp_path / "x", good | {"other": 1})) == [good]
    with pytest.raises(ValueError, match="x, line 1: needs prompt_text and prompt_audio"):
        read_voices(write(tmp_path / "x", {"text": "好"}))


def test_texts_over_the_token_limit():
    rows = [{"target_text": text} for text in ("我" * 40, "我" * 41, "hello, " * 40, "hello " * 41, "，" * 99 + "我")]
    assert over_token_limit(rows, 160) == [rows[1], rows[3]]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None, categories=None)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
KEYS = ("id", "text", "target_text", "prompt_text", "prompt_audio", "speech_tokens")
ENTRIES = st.dictionaries(st.sampled_from(KEYS), JSON | st.just("今天") | st.lists(st.integers(0, 7000))) | JSON
PIECES = st.sampled_from(
    ['{"text": "今天"}'.encode(), '{"text": "今天"}'.encode("gbk"), b"\xef\xbb\xbf", b"\xff\xfe", b"\r\n", b"\n", b"\r",
     b"[", b"]", b",", b'"', b"\\ud800", "今天天气".encode("utf-16-le"), b"\x84\x31\x95\x33", b"\xed\xa0\x80"]
)  # fmt: skip


def read_all_ways(path):
    for read in READERS:
        try:
            rows = read(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            json.dumps(rows, ensure_ascii=False).encode("utf-8")


@given(st.binary(max_size=200) | st.lists(PIECES | st.binary(max_size=4), max_size=12).map(b"".join))
def test_any_bytes_give_rows_or_a_named_fault(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any bytes"
    path.write_bytes(data)
    read_all_ways(path)


@given(st.lists(ENTRIES, max_size=4), st.booleans())
def test_any_json_gives_rows_or_a_named_fault(tmp_path_factory, rows, array):
    path = tmp_path_factory.getbasetemp() / "any JSON"
    path.write_text(json.dumps(rows) if array else "".join(json.dumps(row) + "\n" for row in rows))
    read_all_ways(path)
