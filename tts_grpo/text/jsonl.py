"""Readers and writers for users' text files: JSON Lines (one object per line), JSON arrays of objects, plain lines.

All text files of users are read by this module. The encodings are UTF-8, UTF-16 with a byte order mark, and GB18030
(which contains GBK and GB 2312); in the others the mark is optional. Line ends of all systems are accepted.
Text that cannot be read gives a :class:`ValueError` with file and line; no byte sequence raises any other exception.
"""

import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

SAMPLE_BYTES = 1 << 20  # bytes at the start of a file from which the encoding is detected
COMMON_SHARE = 0.8  # least share of GB 2312 characters in GB18030 text; other encodings decode to rarer characters


def numbered_rows(path: str | Path, progress: Callable[[int], Any] = lambda size: None) -> Iterator[tuple[int, Any]]:
    """Yield ``(number, value)`` for each line that is not blank, or each element of a JSON array, numbered from 1.

    Lines are streamed; an array is read as a whole. For a line that is not JSON, the value is a :class:`ValueError`,
    so that the caller decides whether one bad line is fatal.

    Args:
        path: the file; it is an array if its first character is ``[``.
        progress: called with the bytes of each line as they are read.

    Raises:
        ValueError: the file begins with ``[`` but is not a JSON array.
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
    """Yield ``(number, line)`` for each line that is not blank, stripped of white space and numbered from 1.

    For a line that cannot be decoded, the value is a :class:`ValueError`.

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
    """Convert a UTF-16 file to UTF-8; lone surrogates are kept, so that their lines fail to decode."""
    return data[: len(data) // 2 * 2].decode("utf-16", "surrogatepass").encode("utf-8", "surrogatepass")


def _decoded(raw: bytes, encoding: str) -> str | ValueError:
    """Decode a line and strip white space and byte order marks (concatenated files have some in the middle)."""
    try:
        return raw.decode("gb18030" if encoding == "gb18030" else "utf-8").strip("\ufeff \t\r\n")
    except UnicodeDecodeError as error:
        wanted = "GB18030, as the lines before it" if encoding == "gb18030" else "UTF-8"
        return ValueError(f"not {wanted} (byte {error.start} is {raw[error.start]:#04x}): save the file as UTF-8")


def _encoding(sample: bytes) -> str:
    """Detect the encoding of a file from its start: the encoding of most lines that are not ASCII.

    Nearly all byte sequences decode as GB18030. It is accepted only if most characters are common ones (GB 2312) and
    the bytes do not decode to Korean as EUC-KR.
    """
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    lines = [line for line in sample.splitlines() if not line.isascii()]
    as_utf8 = [text for text in (_without_cut(line, "utf-8") for line in lines) if text is not None]
    if 2 * len(as_utf8) >= len(lines):
        return "utf-8"
    characters = "".join(filter(None, (_without_cut(line, "gb18030") for line in lines)))
    characters = [c for c in characters if not c.isascii()]
    common = [c for c in characters if c.encode("gb2312", "ignore") and not "ぁ" <= c <= "ヶ"]  # kana: EUC-JP too
    korean = [c for c in b"".join(lines).decode("euc_kr", "ignore") if c.isalpha() and not c.isascii()]
    if len(common) < COMMON_SHARE * len(characters) or sum("가" <= c <= "힣" for c in korean) > 0.9 * len(korean):
        return "utf-8"  # neither encoding fits, so each such line gives an error
    return "gb18030"


def _without_cut(line: bytes, encoding: str) -> str | None:
    """Decode a line, ignoring an incomplete last character; return None if the line is not in the encoding."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(line)
    except UnicodeDecodeError:
        return None


def _parsed(line: str) -> Any:
    try:
        return _checked(json.loads(line)) if "\\u" in line else json.loads(line)
    except json.JSONDecodeError as error:
        return ValueError(f"not JSON ({error}): expected one JSON object per line")
    except (ValueError, RecursionError) as error:  # numbers with thousands of digits, brackets nested thousands deep
        return ValueError(f"not JSON that can be read ({error})")


def _checked(value: Any) -> Any:
    """Return the value, or a ValueError if a string in it has a lone surrogate, which cannot be encoded as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        return ValueError(f"{half} is half of a surrogate pair, not a character: write the character itself")
    return value


def is_array(path: str | Path) -> bool:
    """Return whether the first character of a file that is not white space is ``[``."""
    _, line = next(numbered_lines(path), (0, ""))
    return isinstance(line, str) and line.startswith("[")


def _array(path: str | Path, progress: Callable[[int], Any]) -> list:
    """Return the elements of a JSON array; an element with a lone surrogate is replaced by a ValueError."""
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
            f"{path} begins with '[' but is not a JSON array ({error}): correct it, or write one object per line"
        ) from error
    return [_checked(row) for row in rows] if "\\u" in text else rows


def named(path: str | Path, number: int, fault: object) -> ValueError:
    """Return an error about an entry that names the file and the line or array element."""
    return ValueError(f"{path}, {'element' if is_array(path) else 'line'} {number}: {fault}")


def read_jsonl(path: str | Path) -> list[dict]:
    """Read the objects of a file; blank lines are skipped.

    Raises:
        ValueError: an entry is not a JSON object; the message names file and line.
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
    """Return a value from :func:`numbered_rows` if it is an object.

    Raises:
        ValueError: it is not an object.
    """
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError('not a JSON object, such as {"text": "..."}')
    return row


def dump_line(row: dict) -> str:
    """Serialise one object as a line of JSON, with its line end."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Write objects as JSON Lines; the file is written atomically."""
    write_text(path, "".join(dump_line(row) for row in rows))


def write_json(path: str | Path, value) -> None:
    """Write one value as indented JSON; the file is written atomically."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + ".part")
    tmp.write_text(text, encoding="utf-8")
    tmp.replace(path)
