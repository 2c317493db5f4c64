import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import encode_prompts, prepare_eval_set
from tts_grpo.jsonl import read_jsonl

ROOT = Path(__file__).resolve().parent.parent


def test_seed_tts_list(assets, tmp_path):
    shutil.copytree(assets / "prompts", tmp_path / "in")
    rows = read_jsonl(assets / "prompts/prompts.jsonl")
    lines = [f"utt{i}|{r['prompt_text']}|{r['prompt_audio']}|你好{i}" for i, r in enumerate(rows)]
    (tmp_path / "in/meta.lst").write_text("\n".join([*lines, "", ""]), encoding="utf-8")
    output = tmp_path / "out/test_zh.jsonl"
    prepare_eval_set.main(["--source", str(tmp_path / "in/meta.lst"), "--output", str(output)])
    made = read_jsonl(output)
    assert [r["target_text"] for r in made] == ["你好0", "你好1", "你好2"]
    for row, source in zip(made, rows, strict=True):
        expected = (assets / "prompts" / source["prompt_audio"]).read_bytes()
        assert (output.parent / row["prompt_audio"]).read_bytes() == expected and row["prompt_audio"].endswith(".ogg")

    known = tmp_path / "known.jsonl"
    encode_prompts.main(
        ["--eval-set", str(output), "--token2wav-dir", str(assets / "token2wav"), "--output", str(known)]
    )
    assert [r["text"] for r in read_jsonl(known)] == [r["prompt_text"] for r in rows]
    assert all(50 < len(r["speech_tokens"]) < 120 for r in read_jsonl(known))


@pytest.mark.parametrize(
    ("text", "message"),
    [("a|b|c", "line 1"), ("a|b|none.wav|c", "none.wav is missing"), ("\n", "empty"), ("a/b|x|meta.lst|y", "a/b"),
     ("a|x|meta.lst|y", "no wav, flac")],
)  # fmt: skip
def test_bad_lists_are_named(text, message, tmp_path):
    (tmp_path / "meta.lst").write_text(text)
    with pytest.raises(SystemExit, match=message):
        prepare_eval_set.main(["--source", str(tmp_path / "meta.lst"), "--output", str(tmp_path / "out.jsonl")])
    assert not (tmp_path / "out.jsonl").exists()


def test_parquet_of_the_hub(trainer_python, assets, tmp_path):
    """pyarrow is in the trainer's environment only."""
    script = """
import sys, pyarrow as pa, pyarrow.parquet as pq
audio = {"bytes": open(sys.argv[2], "rb").read(), "path": "x.ogg"}
rows = [{"id": f"u{i}", "prompt_text": "在", "target_text": f"你好{i}", "prompt_audio": audio} for i in range(3)]
pq.write_table(pa.Table.from_pylist(rows), sys.argv[1] + "/zero_shot_zh-00000-of-00001.parquet")
pq.write_table(pa.Table.from_pylist([{"id": 1}]), sys.argv[1] + "/other.parquet")
"""
    audio = sorted((assets / "prompts").glob("*.ogg"))[0]
    subprocess.run([trainer_python, "-c", script, str(tmp_path), str(audio)], check=True)
    output = tmp_path / "set.jsonl"
    command = [
        trainer_python,
        str(ROOT / "scripts/prepare_eval_set.py"),
        "--source",
        str(tmp_path),
        "--output",
        str(output),
    ]
    environment = {"PYTHONPATH": str(ROOT), "PATH": str(Path(sys.executable).parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "other.parquet: no column" in done.stderr
    done = subprocess.run([*command, "--split", "zero_shot"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [r["id"] for r in rows] == ["u0", "u1", "u2"]
    assert (tmp_path / rows[2]["prompt_audio"]).read_bytes() == audio.read_bytes()
