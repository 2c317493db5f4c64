"""JSON Lines files: one object per line. A JSON array of objects is read too; a byte order mark is skipped."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

BOM = b"\xef\xbb\xbf"  # UTF-8's byte order mark, which editors on Windows put in front


def numbered_rows(path: str | Path, progress: Callable[[int], Any] = lambda size: None) -> Iterator[tuple[int, Any]]:
    """``(number, value)`` of each line that is not blank, or of each element of a JSON array; numbers begin at 1.

    Lines are streamed; an array is read as a whole. A line that is no JSON has its :class:`ValueError` as value, so
    that the caller decides whether one bad line stops everything.

    Args:
        path: the file; it is an array if its first character is ``[``.
        progress: called with the bytes of each line as they are read.

    Raises:
        ValueError: the file begins like an array and is not one.
    """
    with Path(path).open("rb") as file:
        if file.read(len(BOM)) != BOM:
            file.seek(0)
        begin = file.tell()
        first = next((line for line in file if line.strip()), b"")
        file.seek(begin)
        if first.lstrip().startswith(b"["):
            yield from enumerate(_array(path, file.read(), progress), 1)
            return
        for number, line in enumerate(file, 1):
            progress(len(line))
            if line.strip():
                yield number, _parsed(line)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        return ValueError(f"not JSON: {error}")


def _array(path: str | Path, data: bytes, progress: Callable[[int], Any]) -> list:
    rows = _parsed(data)
    if isinstance(rows, ValueError):
        raise ValueError(f"{path} begins with '[' but is no JSON array ({rows}): mend it, or write one object per line")
    progress(len(data))
    return rows


def read_jsonl(path: str | Path) -> list[dict]:
    """The objects of a file; empty lines are skipped.

    Raises:
        ValueError: a line is no JSON object; the message names file and line.
    """
    rows = []
    for number, row in numbered_rows(path):
        if isinstance(row, ValueError):
            raise ValueError(f"{path}, line {number}: {row}")
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: not a JSON object")
        rows.append(row)
    return rows


def dump_line(row: dict) -> str:
    """One object as a line, with its line end."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Write objects; the file appears under its name only when whole."""
    write_text(path, "".join(dump_line(row) for row in rows))


def write_json(path: str | Path, value) -> None:
    """Write one value as indented JSON; the file appears under its name only when whole."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file; it appears under its name only when whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + ".part")
    tmp.write_text(text, encoding="utf-8")
    tmp.replace(path)
