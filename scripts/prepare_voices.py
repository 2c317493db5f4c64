"""Make a list of voices for the reward: JSONL of prompt_text and prompt_audio, with the recordings.

    python scripts/prepare_voices.py --source FOLDER_OF_PARQUET --split test --count 200 --output voices.jsonl

The parquet files have the columns text and audio (an encoded file), as the Hugging Face set yuekai/aishell. Spaces
between the words of a text are removed, as by get_random_prompt_from_dataset of token2wav_asr_server.py in
github.com/nvidia-china-sae/mair-hub, rl-tutorial/cosyvoice_llm (374bc49). The recordings are taken evenly over the
set, which is in the order of its speakers, so that each speaker is among them.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from scripts.prepare_eval_set import suffix
from tts_grpo.jsonl import write_jsonl

COLUMNS = ["text", "audio"]


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder of parquet files")
    parser.add_argument("--split", default="", help="take only parquet files with this in their path")
    parser.add_argument("--count", type=int, required=True, help="voices to take")
    parser.add_argument(
        "--output", type=Path, required=True, help="JSONL to write; recordings go into a folder of its name"
    )
    args = parser.parse_args(argv)
    if args.count < 1:
        parser.error("--count must be at least 1")
    return args


def recordings(folder: Path, split: str, count: int) -> Iterator[tuple[str, str, bytes]]:
    """``(name, text, encoded recording)`` of ``count`` rows, evenly over all files.

    Raises:
        ValueError: there are no files or fewer rows, or a column is missing.
    """
    import pyarrow.parquet as pq

    paths = [path for path in sorted(folder.rglob("*.parquet")) if split in str(path.relative_to(folder))]
    files = [pq.ParquetFile(path) for path in paths]
    total = sum(file.metadata.num_rows for file in files)
    if total < count:
        raise ValueError(
            f"{folder}: {total} recordings in {len(files)} parquet files of {split!r}, {count} are asked for"
        )
    wanted, row_number = {i * total // count for i in range(count)}, 0
    for path, file in zip(paths, files, strict=True):
        missing = [name for name in COLUMNS if name not in file.schema_arrow.names]
        if missing:
            raise ValueError(f"{path}: no column {', '.join(missing)}")
        for batch in file.iter_batches(batch_size=64, columns=COLUMNS):
            chosen = [i for i in range(batch.num_rows) if row_number + i in wanted]
            for i, row in zip(chosen, batch.take(chosen).to_pylist(), strict=True):
                audio = (row["audio"] or {}).get("bytes")
                text = (row["text"] or "").replace(" ", "")
                if not audio or not text:
                    raise ValueError(f"{path}: row {row_number + i} of the set has no text or no audio")
                yield f"{row_number + i:06d}", text, audio
            row_number += batch.num_rows


def main(argv=None):
    args = get_args(argv)
    folder, rows = args.output.with_suffix(""), []
    try:
        for name, text, audio in recordings(args.source, args.split, args.count):
            wav = folder / f"{name}{suffix(audio, name)}"
            wav.parent.mkdir(parents=True, exist_ok=True)
            wav.write_bytes(audio)
            rows.append({"prompt_text": text, "prompt_audio": str(wav.relative_to(args.output.parent))})
    except (ValueError, OSError) as error:
        raise SystemExit(f"prepare_voices.py: {error}") from error
    write_jsonl(args.output, rows)
    print(f"{len(rows)} voices: {args.output}")


if __name__ == "__main__":
    main()
