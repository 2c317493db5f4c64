import json
import subprocess
from pathlib import Path

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


def test_missing_file(trainer_python, tmp_path):
    done = prepare(trainer_python, tmp_path, [line("你好")], [line("你好")], "--test-file", str(tmp_path / "no.jsonl"))
    assert done.returncode == 1 and "no.jsonl is missing" in done.stderr
