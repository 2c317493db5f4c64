import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from scripts import encode_prompts, prepare_eval_set
from tests.hub_repositories import CV3_EVAL, SEED_TTS, encoded, make_evaluation_sets, write_parquet
from tts_grpo.speech.audio import load_audio
from tts_grpo.speech.voices import load_prompt_voices
from tts_grpo.text.jsonl import read_jsonl

pytestmark = pytest.mark.slow

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

    voices = tmp_path / "voices.jsonl"  # of speech_prefix=voice: all, in order
    source = str(assets / "prompts/prompts.jsonl")
    encode_prompts.main(["--voices", source, "--token2wav-dir", str(assets / "token2wav"), "--output", str(voices)])
    assert read_jsonl(voices) == [{k: v for k, v in row.items() if k != "language"} for row in read_jsonl(known)]


def test_quotes_and_brackets_are_removed_on_request(assets, tmp_path):
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
     ("a|x|meta.lst|y", "not a wav, flac")],
)  # fmt: skip
def test_bad_lists_are_named(text, message, tmp_path):
    (tmp_path / "meta.lst").write_text(text)
    with pytest.raises(SystemExit, match=message):
        prepare_eval_set.main(["--source", str(tmp_path / "meta.lst"), "--output", str(tmp_path / "out.jsonl")])
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("rate", "kind", "begin"), [(48_000, "MP3", b"\xff\xfb"), (24_000, "MP3", b"\xff\xf3"), (24_000, "WAV", b"RIFF")]
)  # fmt: skip
def test_formats_of_recordings(tmp_path, rate, kind, begin):
    """An MP3 of MPEG-2 (below 32 kHz) begins with other bytes than one of MPEG-1."""
    data = encoded(np.sin(np.arange(rate) / 20).astype(np.float32), rate, kind)
    assert data.startswith(begin)
    (tmp_path / "a.bin").write_bytes(data)
    (tmp_path / "meta.lst").write_text("a|在|a.bin|你好\n", encoding="utf-8-sig")
    prepare_eval_set.main(["--source", str(tmp_path / "meta.lst"), "--output", str(tmp_path / "out/set.jsonl")])
    (row,) = read_jsonl(tmp_path / "out/set.jsonl")
    assert row["id"] == "a" and row["prompt_audio"] == f"set/a.{kind.lower()}"
    assert len(load_audio(tmp_path / "out" / row["prompt_audio"])) == pytest.approx(16_000, abs=2_000)


@pytest.mark.parametrize(
    ("begin", "expected"),
    [(b"\xff\xf2", ".mp3"), (b"\xff\xfa", ".mp3"), (b"\xff\xe3", ".mp3"), (b"ID3\x04", ".mp3"), (b"\xff\xf1", None),
     (b"\xff\xd8", None), (b"", None)],
)  # fmt: skip
def test_first_bytes(begin, expected):
    """ADTS (AAC, layer 0) and JPEG files also begin with ff."""
    if expected:
        assert prepare_eval_set.suffix(begin, "x") == expected
    else:
        with pytest.raises(ValueError, match="x: the prompt's audio is not a wav"):
            prepare_eval_set.suffix(begin, "x")


def from_parquet(trainer_python, source: Path, output: Path, split: str, *flags: str) -> subprocess.CompletedProcess:
    """Runs in the trainer environment, because only this has pyarrow."""
    script = [trainer_python, str(ROOT / "scripts/prepare_eval_set.py")]
    environment = {"PYTHONPATH": str(ROOT), "PATH": str(Path(sys.executable).parent)}
    command = [*script, "--source", str(source), "--split", split, "--output", str(output), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("repository", "split"),
    [(CV3_EVAL, "zero_shot_zh"), (CV3_EVAL, "zero_shot_hard_en"), (SEED_TTS, "test_zh"), (SEED_TTS, "test_en")],
)
def test_the_published_sets(trainer_python, published, tmp_path, repository, split):
    output = tmp_path / "data/set.jsonl"
    language = split[-2:]
    done = from_parquet(trainer_python, published / repository, output, split, "--language", language)
    assert done.returncode == 0, done.stderr
    rows = read_jsonl(output)
    assert {row["language"] for row in rows} == {language}
    assert [r["id"] for r in rows] == [f"{split}-{i}" for i in range(3)]
    assert [Path(r["prompt_audio"]).suffix for r in rows] == [".wav", ".mp3", ".flac"]
    assert all(len(load_audio(output.parent / r["prompt_audio"])) > 16_000 for r in rows)


@pytest.fixture(scope="module")
def published(trainer_python, assets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    make_evaluation_sets(folder, assets, trainer_python)
    return folder


@pytest.fixture(scope="module")
def splits(trainer_python, assets, tmp_path_factory):
    """A set whose file names differ from those of the published sets."""
    folder = tmp_path_factory.mktemp("splits")
    audio = encoded(load_audio(sorted((assets / "prompts").glob("*.ogg"))[0]), 16_000, "WAV")
    for name in ("default/test_zh/0000", "data/test_zh_hard-00000-of-00001", "data/train-00000-of-00001"):
        row = {"id": name.replace("/", "_"), "prompt_text": "在", "target_text": "你好", "prompt_audio": {"path": None}}
        write_parquet(folder / f"{name}.parquet", [row], [audio], trainer_python)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: all_zh\n    path: data/train-*\n---\n"
    )
    return folder


@pytest.mark.parametrize(
    ("split", "expected"),
    [("test_zh", "default_test_zh_0000"), ("test_zh_hard", "data_test_zh_hard-00000-of-00001"),
     ("all_zh", "data_train-00000-of-00001")],
)  # fmt: skip
def test_a_split_is_found_by_the_readme_or_by_its_path(trainer_python, splits, tmp_path, split, expected):
    done = from_parquet(trainer_python, splits, tmp_path / "set.jsonl", split)
    assert done.returncode == 0, done.stderr
    assert [row["id"] for row in read_jsonl(tmp_path / "set.jsonl")] == [expected]


def test_a_split_that_is_not_there_is_named_with_what_is(trainer_python, splits, tmp_path):
    done = from_parquet(trainer_python, splits, tmp_path / "set.jsonl", "zero_shot_zh")
    assert done.returncode == 1 and "of the split 'zero_shot_zh'; there are data/test_zh_hard-" in done.stderr


def test_rows_without_a_recording(trainer_python, assets, tmp_path):
    audio = sorted((assets / "prompts").glob("*.ogg"))[0].read_bytes()
    rows = [
        {"id": f"u{i}", "prompt_text": "在", "target_text": "你好", "prompt_audio": {"path": "x.ogg"}} for i in (0, 1)
    ]
    write_parquet(tmp_path / "data/test.parquet", rows, [audio, None], trainer_python)
    done = from_parquet(trainer_python, tmp_path, tmp_path / "set.jsonl", "")
    assert done.returncode == 0 and "1 utterances have no prompt" in done.stderr, done.stderr
    first, second = read_jsonl(tmp_path / "set.jsonl")
    assert (tmp_path / first["prompt_audio"]).read_bytes() == audio
    assert (second["prompt_audio"], second["prompt_text"]) == (None, "")
    write_parquet(tmp_path / "data/test.parquet", rows, [audio, b""], trainer_python)
    done = from_parquet(trainer_python, tmp_path, tmp_path / "set.jsonl", "")
    assert done.returncode == 1 and "u1: its recording x.ogg is not in the parquet file" in done.stderr


def test_a_missing_column_is_named(trainer_python, tmp_path):
    write_parquet(tmp_path / "other.parquet", [{"id": 1, "prompt_audio": {"path": "x"}}], [b"x"], trainer_python)
    done = from_parquet(trainer_python, tmp_path, tmp_path / "set.jsonl", "")
    assert done.returncode == 1 and "other.parquet: no column prompt_text, target_text" in done.stderr


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
    (tmp_path / "set/data").mkdir(parents=True)
    subprocess.run(
        [trainer_python, "-c", MAKE_AISHELL, str(tmp_path / "set/data"), str(tmp_path / "prompt.wav")], check=True
    )
    output = tmp_path / "voices-4.jsonl"

    def prepare(count):
        command = [trainer_python, str(ROOT / "scripts/prepare_eval_set.py"), "--source", str(tmp_path / "set")]
        command += ["--split", "test", "--voices", str(count), "--output", str(output)]
        return subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)

    done = prepare(13)
    assert done.returncode == 1 and "12 recordings in its parquet files, but 13 voices are requested" in done.stderr
    assert not output.exists()
    done = prepare(4)
    assert done.returncode == 0, done.stderr
    assert [row["prompt_text"] for row in read_jsonl(output)] == ["第0句", "第3句", "第6句", "第9句"]
    voices = load_prompt_voices(token2wav, output)
    assert len(voices) == 4 and all(voice.prompt_speech_tokens for voice in voices)
