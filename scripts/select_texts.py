"""Select training and validation texts from a corpus's metadata: JSONL, one recording per line (SparkAudio/voxbox).

    python scripts/select_texts.py --source emilia_zh.jsonl --num-train 80000 --num-test 100 --max-duration-s 30 \
        --excludes '[A-Za-z0-9]' --train-output train.jsonl --test-output test.jsonl

The last ``--num-test`` lines are the validation texts. Of the lines before them, the first ``--num-train`` lines in the
language and below the maximum duration are candidates for training; those whose text matches ``--excludes`` after NFKC
normalisation (which converts full-width letters) are dropped. This is what filter_data.py of
github.com/nvidia-china-sae/mair-hub, rl-tutorial/cosyvoice_llm (374bc49) does: its "80k" texts are counted before those
with letters are dropped. Lines are copied unchanged.
"""

import argparse
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

TAIL_BLOCK = 1 << 20


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="JSONL with text, language and duration")
    parser.add_argument("--num-train", type=int, required=True, help="number of candidates for training")
    parser.add_argument("--num-test", type=int, required=True, help="number of validation texts")
    parser.add_argument("--language", default="zh", help="required value of the key language")
    parser.add_argument("--max-duration-s", type=float, default=0.0, help="maximum duration, exclusive; 0: no limit")
    parser.add_argument("--excludes", default="", help="regular expression; matching texts are not trained on")
    parser.add_argument("--train-output", type=Path, required=True, help="JSONL to write")
    parser.add_argument("--test-output", type=Path, required=True, help="JSONL to write")
    args = parser.parse_args(argv)
    if args.num_train < 1 or args.num_test < 1:
        parser.error("--num-train and --num-test must be at least 1")
    try:
        re.compile(args.excludes)
    except re.error as error:
        parser.error(f"--excludes {args.excludes!r} is not a regular expression: {error}")
    return args


def last_lines(path: Path, count: int) -> tuple[list[bytes], int]:
    """The last ``count`` lines that are not blank, and the file offset of the first of them; reads from the end."""
    size, block = path.stat().st_size, b""
    with path.open("rb") as file:
        while size > len(block) and block.rstrip().count(b"\n") < count:
            begin = max(0, size - len(block) - TAIL_BLOCK)
            file.seek(begin)
            block = file.read(size - len(block) - begin) + block
    ends = [match.end() for match in re.finditer(rb"\n", block.rstrip())]
    begin = ends[-count] if len(ends) >= count else 0
    return [line for line in block[begin:].splitlines() if line.strip()], size - len(block) + begin


def candidates(path: Path, end: int, language: str, max_duration_s: float) -> Iterator[tuple[bytes, str]]:
    """Yield ``(line, text)`` of the lines before offset ``end`` that match language and maximum duration.

    Raises:
        ValueError: a line is not a JSON object with the required keys; the message has its number.
    """
    position = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            position += len(line)
            if position > end:
                return
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                matches = row["language"] == language
                matches = matches and (not max_duration_s or float(row["duration"]) < max_duration_s)
                text = row["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: needs text, language and duration ({type(error).__name__}: {error})"
                ) from error
            if matches:
                yield line.rstrip() + b"\n", text


def select(args) -> tuple[int, int]:
    """Write both files. Returns the number of candidates for training and the number of selected ones.

    Raises:
        ValueError: a line cannot be read, or no text is selected.
    """
    test, end = last_lines(args.source, args.num_test)
    excluded, considered, kept = re.compile(args.excludes) if args.excludes else None, 0, 0
    part = args.train_output.with_name(f"{args.train_output.name}.part")
    for path in (args.train_output, args.test_output):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with part.open("wb") as output:
            for line, text in candidates(args.source, end, args.language, args.max_duration_s):
                considered += 1
                if excluded is None or not excluded.search(unicodedata.normalize("NFKC", text)):
                    kept += 1
                    output.write(line)
                if considered == args.num_train:
                    break
        if not kept:
            raise ValueError(
                f"{args.source}: none of {considered} texts in {args.language} is left for training: check --excludes"
            )
        test_part = args.test_output.with_name(f"{args.test_output.name}.part")
        test_part.write_bytes(b"".join(line + b"\n" for line in test))
        test_part.replace(args.test_output)
        part.replace(args.train_output)
    finally:
        part.unlink(missing_ok=True)
    return considered, kept


def main(argv=None):
    args = get_args(argv)
    try:
        considered, kept = select(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"select_texts.py: {error}") from error
    fewer = "" if considered == args.num_train else f" (requested {args.num_train}, but the file has no more)"
    print(f"{kept} training texts of {considered} considered{fewer}: {args.train_output}")


if __name__ == "__main__":
    main()
