#!/usr/bin/env python3
"""Prepare GRPO data: JSONL, or a JSON array, of objects with a ``text`` -> train.parquet and test.parquet for veRL.

JSONL is streamed: a million lines need no more memory than a thousand. Lines that cannot be used (not JSON, no text,
nothing left of it after normalisation, too long a prompt) are left out, counted and listed with their number and
reason in rejects.jsonl (in an array, the number of the element); too many of them stop the run, and nothing is written.
Other keys than ``text`` are ignored.

Columns: ``data_source``, ``prompt`` (chat messages; the checkpoint's template renders them), ``ability``,
``reward_model`` (``ground_truth`` is the text), ``extra_info`` (split, index, text).
"""

import argparse
import collections
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from tts_grpo.text.jsonl import dump_line, numbered_rows
from tts_grpo.text.prompts import chat_messages, load_tokenizer, render_prompt
from tts_grpo.text.units import normalise

SPLITS = ("train", "test")
BATCH_LINES = 4096
SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        ("extra_info", pa.struct([("split", pa.string()), ("index", pa.int64()), ("text", pa.string())])),
    ]
)


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-file", type=Path, required=True, help="JSONL or JSON array to train on")
    parser.add_argument("--test-file", type=Path, required=True, help="JSONL or JSON array to validate on")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the parquet and rejects files")
    parser.add_argument("--llm-path", type=Path, required=True, help="checkpoint whose template and tokenizer are used")
    parser.add_argument("--data-source", default="text-to-speech", help="name of the data in veRL's metrics")
    parser.add_argument("--max-prompt-length", type=int, default=512, help="longest prompt, in tokens")
    parser.add_argument("--max-bad-ratio", type=float, default=0.01, help="largest share of unusable lines")
    return parser.parse_args(argv)


def rows_with_progress(path: Path) -> Iterator[tuple[int, Any]]:
    """:func:`tts_grpo.text.jsonl.numbered_rows`, with a progress bar in bytes."""
    with tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.name) as bar:
        try:
            yield from numbered_rows(path, bar.update)
        except ValueError as error:
            raise SystemExit(f"prepare_data.py: {error}") from error


def parse_row(row: Any) -> tuple[str, str]:
    """``(text, "")`` of a row, or ``("", reason)``."""
    if isinstance(row, ValueError):
        return "", "not JSON"
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        return "", "no text"
    text = row["text"].strip()
    return (text, "") if normalise(text) else ("", "nothing left of the text after normalisation")


def too_long(tokenizer, texts: list[str], max_prompt_length: int) -> list[bool]:
    """Whether each text's whole prompt has more tokens than allowed."""
    prompts = [render_prompt(tokenizer, text) for text in texts]
    lengths = map(len, tokenizer(prompts, add_special_tokens=False)["input_ids"]) if prompts else ()
    return [length > max_prompt_length for length in lengths]


def sample(tokenizer, text: str, split: str, index: int, data_source: str) -> dict:
    """One row of the parquet file."""
    return {
        "data_source": data_source,
        "prompt": chat_messages(tokenizer, text),
        "ability": "text-to-speech",
        "reward_model": {"style": "rule", "ground_truth": text},
        "extra_info": {"split": split, "index": index, "text": text},
    }


class Converter:
    """Turns one split after the other into parquet, counting what is left out."""

    def __init__(self, args, tokenizer):
        self.args, self.tokenizer = args, tokenizer
        self.kept, self.bad = collections.Counter(), {split: collections.Counter() for split in SPLITS}
        self.test_texts: set[int] = set()
        self.overlap = 0

    def convert(self, path: Path, split: str, output: Path, rejects) -> None:
        """Stream one file into ``output``; rejected lines go to the file object ``rejects``."""
        with pq.ParquetWriter(output, SCHEMA) as writer:
            for batch in batched(rows_with_progress(path), BATCH_LINES):
                texts = self._usable(batch, path, split, rejects)
                rows = [
                    sample(self.tokenizer, text, split, self.kept[split] + i, self.args.data_source)
                    for i, text in enumerate(texts)
                ]
                self._count(texts, split)
                if rows:
                    writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))

    def _usable(self, batch, path: Path, split: str, rejects) -> list[str]:
        parsed = [(number, *parse_row(row)) for number, row in batch]
        long = iter(too_long(self.tokenizer, [text for _, text, _ in parsed if text], self.args.max_prompt_length))
        texts = []
        for number, text, reason in parsed:
            if text and next(long):
                reason = f"the prompt has more than {self.args.max_prompt_length} tokens"
            if reason:
                self.bad[split][reason] += 1
                rejects.write(dump_line({"file": str(path), "line": number, "reason": reason}))
            else:
                texts.append(text)
        return texts

    def _count(self, texts: list[str], split: str) -> None:
        self.kept[split] += len(texts)
        keys = [hash(normalise(text)) for text in texts]
        if split == "test":
            self.test_texts.update(keys)
        else:
            self.overlap += sum(key in self.test_texts for key in keys)

    def check(self, split: str, path: Path, rejects_path: Path) -> None:
        """Raises SystemExit if too many lines of a split were unusable, or none was left."""
        bad, total = self.bad[split].total(), self.bad[split].total() + self.kept[split]
        if bad > self.args.max_bad_ratio * total:
            raise SystemExit(
                f"prepare_data.py: {bad} of {total} lines of {path} cannot be used ({dict(self.bad[split])}), more "
                f"than --max-bad-ratio {self.args.max_bad_ratio} allows. They are listed in {rejects_path}"
            )
        if not self.kept[split]:
            raise SystemExit(f"prepare_data.py: {path} has no usable line")


def batched(items: Iterator, size: int) -> Iterator[tuple]:
    """``items`` in tuples of ``size``, the last one shorter (itertools has it from Python 3.12 on)."""
    items = iter(items)
    while batch := tuple(itertools.islice(items, size)):
        yield batch


def main(argv=None):
    args = get_args(argv)
    for path in (args.train_file, args.test_file):
        if not path.is_file():
            raise SystemExit(f"prepare_data.py: {path} is missing")
    try:
        tokenizer = load_tokenizer(args.llm_path)
    except (ValueError, OSError) as error:
        raise SystemExit(f"prepare_data.py: {error}") from error
    converter = Converter(args, tokenizer)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rejects_path = args.output_dir / "rejects.jsonl"
    parts = {split: args.output_dir / f"{split}.parquet.part" for split in SPLITS}
    try:
        with rejects_path.open("w", encoding="utf-8") as rejects:
            for split, path in (("test", args.test_file), ("train", args.train_file)):  # test first: for the overlap
                converter.convert(path, split, parts[split], rejects)
                rejects.flush()
                converter.check(split, path, rejects_path)
        for split, part in parts.items():
            part.replace(args.output_dir / f"{split}.parquet")
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    for split in SPLITS:
        print(f"{split}: {converter.kept[split]} samples, {converter.bad[split].total()} lines left out")
    print(f"{converter.overlap} training texts are test texts as well" + (": remove them" if converter.overlap else ""))


if __name__ == "__main__":
    main()
