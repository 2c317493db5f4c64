import json
import subprocess
from pathlib import Path

import pytest

from tests.hub_repositories import make_voxbox

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


def prepare(python, tmp_path, train: list[str], test: list[str], *flags):
    for name, lines in (("train", train), ("test", test)):
        (tmp_path / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    command = [
        python, str(ROOT / "prepare_data.py"), "--train-file", str(tmp_path / "train.jsonl"), "--test-file",
        str(tmp_path / "test.jsonl"), "--output-dir", str(tmp_path / "out"), "--llm-path",
        str(ROOT / "assets/tiny/llm"), *flags,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True)


def rows_of(python, path) -> list[dict]:
    code = "import sys, json, pyarrow.parquet as pq; print(json.dumps(pq.read_table(sys.argv[1]).to_pylist()))"
    return json.loads(
        subprocess.run([python, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    )


def line(text) -> str:
    return json.dumps({"text": text, "other": 1}, ensure_ascii=False)


def test_schema_and_overlap(trainer_python, tmp_path):
    done = prepare(trainer_python, tmp_path, [line("你好。"), line("再见"), ""], [line("你好")])
    assert done.returncode == 0, done.stderr
    assert "1 training texts are test texts as well" in done.stdout
    first, second = rows_of(trainer_python, tmp_path / "out/train.parquet")
    assert first == {
        "data_source": "text-to-speech",
        "prompt": [{"role": "user", "content": "Convert the text to speech: 你好。"}],
        "ability": "text-to-speech",
        "reward_model": {"style": "rule", "ground_truth": "你好。"},
        "extra_info": {"split": "train", "index": 0, "text": "你好。"},
    }
    assert second["extra_info"]["index"] == 1
    assert rows_of(trainer_python, tmp_path / "out/test.parquet")[0]["extra_info"]["split"] == "test"


def test_bad_lines_are_listed(trainer_python, tmp_path):
    bad = ["{", '{"txt": "x"}', line("，。！"), line("好" * 200)]
    good = [line(f"你好{i}") for i in range(4)]
    flags = ("--max-bad-ratio", "0.5", "--max-prompt-length", "64")
    done = prepare(trainer_python, tmp_path, bad + good, good, *flags)
    assert done.returncode == 0, done.stderr
    rejects = [json.loads(row) for row in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rejects] == [1, 2, 3, 4]
    reasons = [row["reason"] for row in rejects]
    assert reasons[:2] == ["not JSON", "no text"] and "normalisation" in reasons[2] and "64 tokens" in reasons[3]
    assert len(rows_of(trainer_python, tmp_path / "out/train.parquet")) == 4


def test_too_many_bad_lines_stop_and_leave_nothing(trainer_python, tmp_path):
    done = prepare(trainer_python, tmp_path, ["{", line("你好")], [line("你好")])
    assert done.returncode == 1 and "1 of 2 lines" in done.stderr and "rejects.jsonl" in done.stderr
    assert not list((tmp_path / "out").glob("*.parquet*"))


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_is_read_as_jsonl_is(trainer_python, tmp_path, indent):
    rows = [{"text": "今天天气很好。"}, {"txt": "x"}, {"text": "我们明天出发。"}]
    array = tmp_path / "array.json"
    array.write_text(json.dumps(rows, ensure_ascii=False, indent=indent), encoding="utf-8")
    flags = ("--train-file", str(array), "--max-bad-ratio", "0.5")
    done = prepare(trainer_python, tmp_path, [], [line("你好")], *flags)
    assert done.returncode == 0, done.stderr
    kept = rows_of(trainer_python, tmp_path / "out/train.parquet")
    assert [row["extra_info"]["text"] for row in kept] == ["今天天气很好。", "我们明天出发。"]
    rejects = [json.loads(row) for row in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert [(row["line"], row["reason"]) for row in rejects] == [(2, "no text")]


def test_an_array_that_is_cut_off_stops_with_a_sentence(trainer_python, tmp_path):
    (tmp_path / "array.json").write_text('[{"text": "你好"},\n {"text": "再', encoding="utf-8")
    done = prepare(trainer_python, tmp_path, [], [line("你好")], "--train-file", str(tmp_path / "array.json"))
    assert done.returncode == 1 and "array.json begins with '[' but is no JSON array" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_byte_order_mark_is_skipped(trainer_python, tmp_path):
    (tmp_path / "bom.jsonl").write_text(line("今天") + "\n" + line("明天") + "\n", encoding="utf-8-sig")
    done = prepare(trainer_python, tmp_path, [], [line("你好")], "--train-file", str(tmp_path / "bom.jsonl"))
    assert done.returncode == 0, done.stderr
    assert len(rows_of(trainer_python, tmp_path / "out/train.parquet")) == 2


def test_voxbox_is_read_as_it_is(trainer_python, tmp_path, assets):
    make_voxbox(tmp_path / "voxbox", assets)
    lines = (tmp_path / "voxbox/metadata/aishell-3.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(json.loads(lines[0])) == 15
    done = prepare(trainer_python, tmp_path, lines[:20], lines[-2:])
    assert done.returncode == 0, done.stderr
    assert (
        rows_of(trainer_python, tmp_path / "out/train.parquet")[0]["extra_info"]["text"] == json.loads(lines[0])["text"]
    )


def test_missing_file(trainer_python, tmp_path):
    done = prepare(trainer_python, tmp_path, [line("你好")], [line("你好")], "--test-file", str(tmp_path / "no.jsonl"))
    assert done.returncode == 1 and "no.jsonl is missing" in done.stderr
