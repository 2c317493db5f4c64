"""Text files as users have them: JSON Lines (one object per line), JSON arrays of objects, and plain lines.

Every text file of the recipe is read here. UTF-8, UTF-16 with a byte order mark, and GB18030 (which contains GBK and
GB 2312) are read, with or without byte order mark, with line ends of any system. What cannot be read is a
:class:`ValueError` that names file and line; no bytes whatsoever cause another exception.
"""

import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

SAMPLE_BYTES = 1 << 20  # the start of a file, which tells its encoding
COMMON_SHARE = 0.8  # least share of GB 2312's characters in what is taken for GB18030: other encodings give rare ones


def numbered_rows(path: str | Path, progress: Callable[[int], Any] = lambda size: None) -> Iterator[tuple[int, Any]]:
    """``(number, value)`` of each line that is not blank, or of each element of a JSON array; numbers begin at 1.

    Lines are streamed; an array is read as a whole. A line that is no JSON has its :class:`ValueError` as value, so
    that the caller decides whether one bad line stops everything.

    Args:
        path: the file; it is an array if its first character is ``[``.
        progress: called with the bytes of each line as they are read.

    Raises:
        ValueError: the file begins like an array and is not one.
        OSError: the file cannot be opened.
    """
    if is_array(path):
        yield from enumerate(_array(path, progress), 1)
        return
    for number, line in numbered_lines(path, progress):
        yield number, line if isinstance(line, ValueError) else _parsed(line)


def numbered_lines(
    path: str | Path, progress: Callable[[int], Any] = lambda size: None
) -> Iterator[tuple[int, str | ValueError]]:
    """``(number, line)`` of each line that is not blank, without white space at its ends; numbers begin at 1.

    A line in no encoding that is read has its :class:`ValueError` as value.

    Args:
        path: any text file.
        progress: called with the bytes of each line as they are read.

    Raises:
        OSError: the file cannot be opened.
    """
    number = 0
    with Path(path).open("rb") as file:
        encoding = _encoding(file.read(SAMPLE_BYTES))
        file.seek(0)
        for piece in [file.read()] if encoding == "utf-16" else file:
            progress(len(piece))
            for raw in (_utf16_to_utf8(piece) if encoding == "utf-16" else piece).splitlines():  # \n, \r\n or \r
                number += 1
                line = _decoded(raw, encoding)
                if isinstance(line, ValueError) or line:
                    yield number, line


def _utf16_to_utf8(data: bytes) -> bytes:
    """A UTF-16 file in UTF-8; halves of surrogate pairs stay what they are, so that their lines cannot be decoded."""
    return data[: len(data) // 2 * 2].decode("utf-16", "surrogatepass").encode("utf-8", "surrogatepass")


def _decoded(raw: bytes, encoding: str) -> str | ValueError:
    """A line as text, without white space and byte order marks at its ends (joined files have some inside)."""
    try:
        return raw.decode("gb18030" if encoding == "gb18030" else "utf-8").strip("\ufeff \t\r\n")
    except UnicodeDecodeError as error:
        wanted = "GB18030, as the lines before it" if encoding == "gb18030" else "UTF-8"
        return ValueError(f"not {wanted} (byte {error.start} is {raw[error.start]:#04x}): save the file as UTF-8")


def _encoding(sample: bytes) -> str:
    """The encoding of a file that begins with ``sample``: that of most lines with more than ASCII.

    Nearly all bytes can be read as GB18030. It is taken only if that gives common characters, and Korean does not.
    """
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    lines = [line for line in sample.splitlines() if not line.isascii()]
    as_utf8 = [text for text in (_without_cut(line, "utf-8") for line in lines) if text is not None]
    if 2 * len(as_utf8) >= len(lines):
        return "utf-8"
    characters = "".join(filter(None, (_without_cut(line, "gb18030") for line in lines)))
    characters = [c for c in characters if not c.isascii()]
    common = [c for c in characters if c.encode("gb2312", "ignore") and not "ぁ" <= c <= "ヶ"]  # kana: also of EUC-JP
    korean = [c for c in b"".join(lines).decode("euc_kr", "ignore") if c.isalpha() and not c.isascii()]
    if len(common) < COMMON_SHARE * len(characters) or sum("가" <= c <= "힣" for c in korean) > 0.9 * len(korean):
        return "utf-8"  # it is neither: each line is an error
    return "gb18030"


def _without_cut(line: bytes, encoding: str) -> str | None:
    """A line as text, but for a last character that is cut off; None if it is not in the encoding."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(line)
    except UnicodeDecodeError:
        return None


def _parsed(line: str) -> Any:
    try:
        return _checked(json.loads(line)) if "\\u" in line else json.loads(line)
    except json.JSONDecodeError as error:
        return ValueError(f"not JSON ({error}): one JSON object per line is wanted")
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        return ValueError(f"not JSON that can be read ({error})")


def _checked(value: Any) -> Any:
    """The value, or a ValueError if a text in it holds half a surrogate pair, which no text file can hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        return ValueError(f"{half} is half of a surrogate pair and no character: write the character itself")
    return value


def is_array(path: str | Path) -> bool:
    """Whether a file's first character, but for white space, is ``[``."""
    _, line = next(numbered_lines(path), (0, ""))
    return isinstance(line, str) and line.startswith("[")


def _array(path: str | Path, progress: Callable[[int], Any]) -> list:
    """The elements of a JSON array; one that holds half a surrogate pair is a ValueError."""
    data = Path(path).read_bytes()
    progress(len(data))
    encoding = _encoding(data[:SAMPLE_BYTES])
    text = _decoded(_utf16_to_utf8(data) if encoding == "utf-16" else data, encoding)
    if isinstance(text, ValueError):
        raise ValueError(f"{path}: {text}")
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} begins with '[' but is no JSON array ({error}): mend it, or write one object per line"
        ) from error
    return [_checked(row) for row in rows] if "\\u" in text else rows


def named(path: str | Path, number: int, fault: object) -> ValueError:
    """The error about an entry of a file: it names the file, and the line or the array's element."""
    return ValueError(f"{path}, {'element' if is_array(path) else 'line'} {number}: {fault}")


def read_jsonl(path: str | Path) -> list[dict]:
    """The objects of a file; empty lines are skipped.

    Raises:
        ValueError: an entry is no JSON object; the message names file and line.
        OSError: the file cannot be opened.
    """
    rows = []
    for number, row in numbered_rows(path):
        try:
            rows.append(as_object(row))
        except ValueError as fault:
            raise named(path, number, fault) from None
    return rows


def as_object(row: Any) -> dict:
    """A value of :func:`numbered_rows`, if it is an object.

    Raises:
        ValueError: it is none.
    """
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError('not a JSON object, such as {"text": "..."}')
    return row


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
