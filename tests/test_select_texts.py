"""Tests of the selection of texts from a corpus's metadata."""

import json

import pytest

from scripts import select_texts
from tts_grpo.text.jsonl import read_jsonl


def line(text, duration=3.0, language="zh"):
    """A line of metadata with the keys of voxbox that are used, and one other key."""
    return {"index": "EMILIA_ZH_0", "language": language, "duration": duration, "text": text}


def select(tmp_path, rows, *flags, num_train=100, num_test=1):
    source = tmp_path / "emilia_zh.jsonl"
    source.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    train, test = tmp_path / "out/train.jsonl", tmp_path / "out/test.jsonl"
    select_texts.main([
        "--source", str(source), "--num-train", str(num_train), "--num-test", str(num_test),
        "--train-output", str(train), "--test-output", str(test), *flags,
    ])  # fmt: skip
    return [row["text"] for row in read_jsonl(train)], [row["text"] for row in read_jsonl(test)]


def test_filter_of_the_original_recipe(tmp_path):
    rows = [
        line("一"), line("二", 29.99), line("三", 30.0), line("说OK"), line("四", language="en"), line("五ａ"),
        line("六6个"), line("“七”。"), line("最后一句ok", 99.0, "en"),
    ]  # fmt: skip
    flags = ("--max-duration-s", "30", "--excludes", "[A-Za-z]")
    assert select(tmp_path, rows, *flags) == (["一", "二", "六6个", "“七”。"], ["最后一句ok"])
    # dropped texts count among the candidates
    assert select(tmp_path, rows, *flags, num_train=4)[0] == ["一", "二"]
    assert select(tmp_path, rows, *flags[:3], "[A-Za-z0-9]")[0] == ["一", "二", "“七”。"]


def test_without_filters_first_and_last_lines_are_selected(tmp_path, capsys):
    rows = [line(f"第{i}句ok", 40.0) for i in range(9)]
    train, test = select(tmp_path, rows, num_train=5, num_test=2)
    assert train == [row["text"] for row in rows[:5]] and test == [row["text"] for row in rows[-2:]]
    train, test = select(tmp_path, rows, num_train=50, num_test=2)
    assert train == [row["text"] for row in rows[:7]], "validation texts are trained on"
    assert "requested 50" in capsys.readouterr().out
    assert read_jsonl(tmp_path / "out/train.jsonl")[0] == rows[0], "a line was changed"


def test_last_lines_of_a_large_file(tmp_path, monkeypatch):
    monkeypatch.setattr(select_texts, "TAIL_BLOCK", 64)
    rows = [line(f"第{i}句") for i in range(200)]
    train, test = select(tmp_path, rows, num_train=300, num_test=30)
    assert train == [row["text"] for row in rows[:170]] and test == [row["text"] for row in rows[170:]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "一"}, line("二")], "line 1: needs text, language and duration"),
        ([line("一"), {"language": "zh", "duration": 1.0}, line("二")], "line 2: "),
        ([line("一", language="en"), line("二")], "none of 0 texts in zh is left"),
    ],
)
def test_bad_metadata_is_an_error_and_nothing_is_written(tmp_path, rows, message):
    with pytest.raises(SystemExit, match=message):
        select(tmp_path, rows, "--max-duration-s", "30")
    assert not list((tmp_path / "out").iterdir())
