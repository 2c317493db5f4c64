import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile as sf

from scripts import encode_prompts, prepare_eval_set
from tts_grpo.jsonl import read_jsonl
from tts_grpo.token2wav import load_prompt_voices

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


def test_quotes_and_brackets_are_taken_out_if_asked_for(assets, tmp_path):
    audio = sorted((assets / "prompts").glob("*.ogg"))[0]
    (tmp_path / "meta.lst").write_text(f'u|他说：“好”(真的)|{audio}|‘一’（二）"三"\'四’，《五》\n', encoding="utf-8")
    texts = []
    for flags in ([], ["--strip-quotes"]):
        output = tmp_path / "out.jsonl"
        prepare_eval_set.main(["--source", str(tmp_path / "meta.lst"), "--output", str(output), *flags])
        texts.append(read_jsonl(output)[0])
    assert texts[0]["target_text"] == '‘一’（二）"三"\'四’，《五》'
    assert (texts[1]["prompt_text"], texts[1]["target_text"]) == ("他说：好真的", "一’二三四’，《五》")


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


MAKE_AISHELL = """
import sys, pyarrow as pa, pyarrow.parquet as pq
audio = {"bytes": open(sys.argv[2], "rb").read(), "path": "BAC009S0764W0121.wav"}
for part in range(2):
    rows = [{"audio": audio, "text": f"第 {part * 6 + i} 句"} for i in range(6)]
    pq.write_table(pa.Table.from_pylist(rows), f"{sys.argv[1]}/test-0000{part}-of-00002.parquet")
pq.write_table(pa.Table.from_pylist(rows), sys.argv[1] + "/dev-00000-of-00001.parquet")
"""


def test_voices_are_taken_evenly_and_can_be_read(trainer_python, assets, token2wav, tmp_path):
    audio, _ = sf.read(sorted((assets / "prompts").glob("*.ogg"))[0])
    sf.write(tmp_path / "prompt.wav", audio, 16_000)
    (tmp_path / "set/test").mkdir(parents=True)
    subprocess.run(
        [trainer_python, "-c", MAKE_AISHELL, str(tmp_path / "set/test"), str(tmp_path / "prompt.wav")], check=True
    )
    output = tmp_path / "voices-4.jsonl"

    def prepare(count):
        command = [trainer_python, str(ROOT / "scripts/prepare_eval_set.py"), "--source", str(tmp_path / "set")]
        command += ["--split", "test-", "--voices", str(count), "--output", str(output)]
        return subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)

    done = prepare(13)
    assert done.returncode == 1 and "12 recordings in its parquet files, 13 voices are asked for" in done.stderr
    assert not output.exists()
    done = prepare(4)
    assert done.returncode == 0, done.stderr
    assert [row["prompt_text"] for row in read_jsonl(output)] == ["第0句", "第3句", "第6句", "第9句"]
    voices = load_prompt_voices(token2wav, output)
    assert len(voices) == 4 and all(voice.prompt_speech_tokens for voice in voices)
