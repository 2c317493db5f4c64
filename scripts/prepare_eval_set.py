"""Make an evaluation set: JSONL of id, prompt_text, prompt_audio and target_text, with the prompts' recordings.

    python scripts/prepare_eval_set.py --source FOLDER_OF_PARQUET --output data/zero_shot_zh.jsonl
    python scripts/prepare_eval_set.py --source seedtts_testset/zh/meta.lst --output data/test_zh.jsonl
    python scripts/prepare_eval_set.py --source FOLDER_OF_PARQUET --voices 200 --output data/voices.jsonl

Sources: a folder of parquet files with the columns id, prompt_text, target_text and prompt_audio (an encoded file), as
the Hugging Face sets yuekai/CV3-Eval and yuekai/seed_tts_cosy2 have them; or the meta.lst of seed-tts-eval, whose lines
are ``id|prompt text|prompt wav|target text``. Recordings go into a folder beside the JSONL, of its name.

With --voices the output is a list of voices for the reward instead: JSONL of prompt_text and prompt_audio. The parquet
files then have the columns text and audio, as the Hugging Face set yuekai/aishell. Spaces between the words of a text
are removed, as by get_random_prompt_from_dataset of token2wav_asr_server.py in github.com/nvidia-china-sae/mair-hub,
rl-tutorial/cosyvoice_llm (374bc49). The recordings are taken evenly over the set, which is in the order of its
speakers, so that each speaker is among them.
"""

import argparse
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from tts_grpo.jsonl import write_jsonl

VOICE_COLUMNS = ("text", "audio")
COLUMNS = ("id", "prompt_text", "target_text", "prompt_audio")
# What infer_dataset.py of github.com/nvidia-china-sae/mair-hub, rl-tutorial/cosyvoice_llm (374bc49), takes out of the
# texts before it gives them to the language model; a closing single quote is not among them.
QUOTES = str.maketrans("", "", "\"'()“”‘（）")
FORMATS = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"ID3": ".mp3", b"\xff\xfb": ".mp3"}


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder of parquet files, or a meta.lst")
    parser.add_argument("--split", default="", help="take only parquet files with this in their name")
    parser.add_argument("--voices", type=int, default=0, help="make a list of so many voices instead of a set")
    parser.add_argument("--output", type=Path, required=True, help="JSONL to write")
    parser.add_argument(
        "--strip-quotes", action="store_true", help="take quotes and brackets out of the texts, as mair-hub does"
    )
    return parser.parse_args(argv)


def suffix(audio: bytes, where: str) -> str:
    """File ending of an encoded recording.

    Raises:
        ValueError: the bytes are of no audio file that is known.
    """
    for magic, ending in FORMATS.items():
        if audio.startswith(magic):
            return ending
    raise ValueError(f"{where}: the prompt's audio is no wav, flac, ogg or mp3 file")


def parquet_files(folder: Path, split: str, columns: Sequence[str]) -> list:
    """The parquet files of a split, in order.

    Raises:
        ValueError: there are none, or a column is missing.
    """
    import pyarrow.parquet as pq

    paths = [path for path in sorted(folder.rglob("*.parquet")) if split in path.name]
    if not paths:
        raise ValueError(f"{folder}: no parquet file with {split!r} in its name" if split else f"{folder}: no parquet")
    files = [pq.ParquetFile(path) for path in paths]
    for path, file in zip(paths, files, strict=True):
        missing = [name for name in columns if name not in file.schema_arrow.names]
        if missing:
            raise ValueError(f"{path}: no column {', '.join(missing)}")
    return files


def from_parquet(folder: Path, split: str) -> Iterator[tuple[str, str, str, bytes]]:
    """``(id, prompt text, target text, encoded recording)`` of each row.

    Raises:
        ValueError: there are no files, or a column is missing.
    """
    for file in parquet_files(folder, split, COLUMNS):
        for batch in file.iter_batches(batch_size=64, columns=list(COLUMNS)):
            for row in batch.to_pylist():
                yield str(row["id"]), row["prompt_text"], row["target_text"], row["prompt_audio"]["bytes"]


def from_meta(path: Path) -> Iterator[tuple[str, str, str, bytes]]:
    """As :func:`from_parquet`, of seed-tts-eval's list.

    Raises:
        ValueError: a line has not its four parts, or a recording is missing.
    """
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        parts = line.strip().split("|")
        if len(parts) < 4:
            raise ValueError(f"{path}, line {number}: wants id|prompt text|prompt wav|target text")
        wav = path.parent / parts[2]
        if not wav.exists():
            raise ValueError(f"{path}, line {number}: {wav} is missing")
        yield parts[0], parts[1], parts[3], wav.read_bytes()


def without_quotes(
    rows: Iterator[tuple[str, str, str, bytes]],
) -> Iterator[tuple[str, str, str, bytes]]:
    """Rows whose texts have no quotes and brackets."""
    for utt_id, prompt_text, target_text, audio in rows:
        yield utt_id, prompt_text.translate(QUOTES), target_text.translate(QUOTES), audio


def write_set(rows: Iterator[tuple[str, str, str, bytes]], output: Path) -> int:
    """Write recordings, then the JSONL; the number of utterances.

    Raises:
        ValueError: an id is no file name or comes twice, a text is missing, or there is no row.
    """
    folder, lines = output.with_suffix(""), {}
    folder.mkdir(parents=True, exist_ok=True)
    for utt_id, prompt_text, target_text, audio in rows:
        if not re.fullmatch(r"[\w][\w.\-]*", utt_id) or utt_id in lines:
            raise ValueError(f"the id {utt_id!r} comes twice or is no file name")
        if not (prompt_text and target_text and audio):
            raise ValueError(f"{utt_id}: prompt_text, target_text or prompt_audio is empty")
        wav = folder / f"{utt_id}{suffix(audio, utt_id)}"
        wav.write_bytes(audio)
        prompt_audio = str(wav.relative_to(output.parent))
        lines[utt_id] = {
            "id": utt_id,
            "prompt_text": prompt_text,
            "prompt_audio": prompt_audio,
            "target_text": target_text,
        }
    if not lines:
        raise ValueError("the set is empty")
    write_jsonl(output, lines.values())
    return len(lines)


def voices_from_parquet(folder: Path, split: str, count: int) -> Iterator[tuple[str, str, bytes]]:
    """``(name, text, encoded recording)`` of ``count`` rows, evenly over all files.

    Raises:
        ValueError: there are fewer rows, or one lacks its text or recording.
    """
    files = parquet_files(folder, split, VOICE_COLUMNS)
    total = sum(file.metadata.num_rows for file in files)
    if total < count:
        raise ValueError(f"{folder}: {total} recordings in its parquet files, {count} voices are asked for")
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
    """Write recordings, then the JSONL; the number of voices."""
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
        count = write_set(without_quotes(rows) if args.strip_quotes else rows, args.output)
    except (ValueError, OSError) as error:
        raise SystemExit(f"prepare_eval_set.py: {error}") from error
    print(f"{count} utterances: {args.output}")


if __name__ == "__main__":
    main()
