"""Make an evaluation set: JSONL of id, prompt_text, prompt_audio and target_text, with the prompts' recordings.

    python scripts/prepare_eval_set.py --source FOLDER_OF_PARQUET --split zero_shot_zh --output data/zero_shot_zh.jsonl
    python scripts/prepare_eval_set.py --source seedtts_testset/en/meta.lst --output data/test_en.jsonl --language en
    python scripts/prepare_eval_set.py --source FOLDER_OF_PARQUET --voices 200 --output data/voices.jsonl

Sources: a folder of parquet files with the columns id, prompt_text, target_text and prompt_audio (bytes of an encoded
file), such as the Hugging Face data sets yuekai/CV3-Eval and yuekai/seed_tts_cosy2; or the meta.lst of seed-tts-eval,
whose lines are ``id|prompt text|prompt wav|target text``. Recordings are written to a folder next to the JSONL, named
after it. For a row without a recording, prompt_audio is null and prompt_text is omitted.

With --voices the output is a list of voices for the reward instead: JSONL of prompt_text and prompt_audio. The parquet
files then have the columns text and audio, as in the Hugging Face data set yuekai/aishell. Spaces between the words of
a text are removed, as get_random_prompt_from_dataset does in token2wav_asr_server.py of
github.com/nvidia-china-sae/mair-hub, rl-tutorial/cosyvoice_llm (374bc49). The set is sorted by speaker, so recordings
are taken at even distances to include every speaker.
"""

import argparse
import fnmatch
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tts_grpo.text.input_files import checked_text, new_id
from tts_grpo.text.jsonl import numbered_lines, write_jsonl

VOICE_COLUMNS = ("text", "audio")
COLUMNS = ("id", "prompt_text", "target_text", "prompt_audio")
# The characters that infer_dataset.py of github.com/nvidia-china-sae/mair-hub, rl-tutorial/cosyvoice_llm (374bc49),
# removes from the texts before it passes them to the language model. It does not remove a closing single quote.
QUOTES = str.maketrans("", "", "\"'()“”‘（）")
FORMATS = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"ID3": ".mp3"}
Row = tuple[str, dict, bytes | None]  # position in the source; id and texts; encoded recording or None


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder of parquet files, or a meta.lst")
    parser.add_argument("--split", default="", help="split whose parquet files are read (default: all files)")
    parser.add_argument("--voices", type=int, default=0, help="write a list of this many voices instead of a set")
    parser.add_argument("--output", type=Path, required=True, help="JSONL to write")
    parser.add_argument("--language", choices=("zh", "en"), help="language of the set, written to each line")
    parser.add_argument(
        "--strip-quotes", action="store_true", help="remove quotes and brackets from the texts, as mair-hub does"
    )
    return parser.parse_args(argv)


def suffix(audio: bytes, where: str) -> str:
    """File name extension for an encoded recording.

    Raises:
        ValueError: the bytes are not a wav, flac, ogg or mp3 file.
    """
    for magic, extension in FORMATS.items():
        if audio.startswith(magic):
            return extension
    # An MP3 without tags begins with a frame: 11 sync bits, two version bits, layer III (ISO 11172-3, 2.4.1.3).
    if len(audio) > 1 and audio[0] == 0xFF and audio[1] & 0xE6 == 0xE2:
        return ".mp3"
    raise ValueError(
        f"{where}: the prompt's audio is not a wav, flac, ogg or mp3 file (it begins with {audio[:4].hex(' ')})"
    )


def split_patterns(folder: Path, split: str) -> list[str]:
    """Path patterns of a split's files from the folder's README.md (``configs: data_files``); empty if it has none."""
    import yaml

    readme = folder / "README.md"
    header = readme.read_text(encoding="utf-8-sig").split("---\n") if readme.exists() else []
    configs = (yaml.safe_load(header[1]) or {}).get("configs", []) if len(header) > 2 and not header[0] else []
    files = [f for config in configs for f in config.get("data_files", []) if isinstance(f, dict)]
    paths = [f["path"] for f in files if f.get("split") == split]
    return [pattern for path in paths for pattern in ([path] if isinstance(path, str) else path)]


def parquet_files(folder: Path, split: str) -> list[Path]:
    """The files of a split: those that the README.md lists, otherwise those with the split's name in their path.

    Raises:
        ValueError: there are no files.
    """
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.parquet"))
    chosen = names
    if split:
        patterns = split_patterns(folder, split)
        chosen = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
        whole = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(split)}(?![A-Za-z0-9_])")  # test_zh is not test_zh_hard
        chosen = chosen or [name for name in names if whole.search(name)]
    if not chosen:
        found = f"; there are {', '.join(names[:5])}" if names else ""
        raise ValueError(f"{folder}: no parquet file" + (f" of the split {split!r}{found}" if split else ""))
    return [folder / name for name in chosen]


def open_parquet(folder: Path, split: str, columns: Sequence[str]) -> list:
    """Open the parquet files of a split, in order.

    Raises:
        ValueError: there are no files, or a column is missing.
    """
    import pyarrow.parquet as pq

    paths = parquet_files(folder, split)
    files = [pq.ParquetFile(path) for path in paths]
    for path, file in zip(paths, files, strict=True):
        missing = [name for name in columns if name not in file.schema_arrow.names]
        if missing:
            raise ValueError(f"{path}: no column {', '.join(missing)}")
    return files


def from_parquet(folder: Path, split: str) -> Iterator[Row]:
    """The rows of a split.

    Raises:
        ValueError: there are no files, or a column is missing.
    """
    for file in open_parquet(folder, split, COLUMNS):
        rows = (row for batch in file.iter_batches(64, columns=list(COLUMNS)) for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield f"{folder}, row {number} of {split or 'a file'}", row, embedded(row["prompt_audio"], row["id"])


def embedded(audio: dict | None, utt_id: str) -> bytes | None:
    """The bytes in a cell of type ``Audio`` (Hugging Face datasets); None if the cell is null.

    Raises:
        ValueError: the cell has the path of a file, but not its bytes.
    """
    if not audio or not (audio.get("bytes") or audio.get("path")):
        return None
    if not audio.get("bytes"):
        raise ValueError(f"{utt_id}: its recording {audio['path']} is not in the parquet file")
    return audio["bytes"]


def from_meta(path: Path) -> Iterator[Row]:
    """As :func:`from_parquet`, but from seed-tts-eval's meta.lst.

    Raises:
        ValueError: a line does not have four fields, or a recording is missing.
    """
    for number, line in numbered_lines(path):
        where = f"{path}, line {number}"
        if isinstance(line, ValueError):
            raise ValueError(f"{where}: {line}")
        parts = [part.strip() for part in line.split("|")]
        if len(parts) < 4:
            raise ValueError(f"{where}: expected id|prompt text|prompt wav|target text")
        wav = path.parent / parts[2]
        if not wav.is_file():
            raise ValueError(f"{where}: the recording {wav} is missing")
        yield where, {"id": parts[0], "prompt_text": parts[1], "target_text": parts[3]}, wav.read_bytes()


def without_quotes(rows: Iterator[Row]) -> Iterator[Row]:
    """The rows, with quotes and brackets removed from their texts."""
    for where, row, audio in rows:
        texts = {name: (row[name] or "").translate(QUOTES) for name in ("prompt_text", "target_text")}
        yield where, row | texts, audio


def write_set(rows: Iterator[Row], output: Path, language: str | None = None) -> tuple[int, int]:
    """Write recordings, then the JSONL, with ``language`` in each line if given.

    Returns the number of utterances, and how many of them have no prompt.

    Raises:
        ValueError: an id cannot be a file name or occurs twice, a text is missing or has no word, or there is no row.
    """
    folder, lines, ids = output.with_suffix(""), [], {}
    folder.mkdir(parents=True, exist_ok=True)
    for number, (where, row, audio) in enumerate(rows, 1):
        try:
            utt_id, prompt_text, prompt_audio = new_id(row["id"], number, ids), "", None
            target_text = checked_text(row, "target_text")
            if audio is not None:
                prompt_text = checked_text(row, "prompt_text")
                wav = folder / f"{utt_id}{suffix(audio, utt_id)}"
                wav.write_bytes(audio)
                prompt_audio = str(wav.relative_to(output.parent))
        except ValueError as fault:
            raise ValueError(f"{where}: {fault}") from fault
        lines.append({"id": utt_id, "prompt_text": prompt_text, "prompt_audio": prompt_audio,
                      "target_text": target_text} | ({"language": language} if language else {}))  # fmt: skip
    if not lines:
        raise ValueError("the set is empty")
    write_jsonl(output, lines)
    return len(lines), sum(line["prompt_audio"] is None for line in lines)


def voices_from_parquet(folder: Path, split: str, count: int) -> Iterator[tuple[str, str, bytes]]:
    """``(name, text, encoded recording)`` of ``count`` rows, evenly spaced over all files.

    Raises:
        ValueError: there are fewer rows, or one lacks its text or recording.
    """
    files = open_parquet(folder, split, VOICE_COLUMNS)
    total = sum(file.metadata.num_rows for file in files)
    if total < count:
        raise ValueError(f"{folder}: {total} recordings in its parquet files, but {count} voices are requested")
    wanted, first = {i * total // count for i in range(count)}, 0
    for batch in itertools.chain.from_iterable(f.iter_batches(64, columns=list(VOICE_COLUMNS)) for f in files):
        chosen = [i for i in range(batch.num_rows) if first + i in wanted]
        for i, row in zip(chosen, batch.take(chosen).to_pylist(), strict=True):
            text, audio = (row["text"] or "").replace(" ", ""), (row["audio"] or {}).get("bytes")
            if not text or not audio:
                raise ValueError(f"{folder}: recording {first + i} has no text or no audio")
            yield f"{first + i:06d}", text, audio
        first += batch.num_rows


def write_voices(rows: Iterator[tuple[str, str, bytes]], output: Path) -> int:
    """Write recordings, then the JSONL. Returns the number of voices."""
    folder, lines = output.with_suffix(""), []
    for name, text, audio in rows:
        wav = folder / f"{name}{suffix(audio, name)}"
        wav.parent.mkdir(parents=True, exist_ok=True)
        wav.write_bytes(audio)
        lines.append({"prompt_text": text, "prompt_audio": str(wav.relative_to(output.parent))})
    write_jsonl(output, lines)
    return len(lines)


def main(argv=None):
    args = get_args(argv)
    try:
        if args.voices:
            count = write_voices(voices_from_parquet(args.source, args.split, args.voices), args.output)
            print(f"{count} voices: {args.output}")
            return
        rows = from_meta(args.source) if args.source.is_file() else from_parquet(args.source, args.split)
        count, without = write_set(without_quotes(rows) if args.strip_quotes else rows, args.output, args.language)
    except (ValueError, OSError) as error:
        raise SystemExit(f"prepare_eval_set.py: {error}") from error
    if without:
        print(f"{without} utterances have no prompt: CosyVoice2 cannot synthesise them", file=sys.stderr)
    print(f"{count} utterances: {args.output}")


if __name__ == "__main__":
    main()
