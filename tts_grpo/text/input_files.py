"""What users' files must hold: texts, evaluation sets, voices, known answers. All faults of a file are named at once.

Python's standard library only: scripts/check.py reads these files before there is an environment.
"""

import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tts_grpo.text.jsonl import as_object, named, numbered_rows
from tts_grpo.text.tokens import NUM_SPEECH_TOKENS

FAULTS_SHOWN = 5
MAX_ID_BYTES = 200  # file names have at most 255 bytes, and endings come after the id
TOKENS_PER_UNIT = 4  # speech tokens of a syllable or word, at 25 per second: fast speech, 6 syllables per second
LOST_CHARACTER = "\ufffd"  # what conversions put in the place of bytes that they could not read

_WORD = re.compile(r"[^\W_]")
_UNIT = re.compile(r"[㐀-䶿一-鿿]|[^\W_㐀-䶿一-鿿]+")


def checked_text(row: dict, *keys: str) -> str:
    """The text of an entry under the first of ``keys`` that it has, without white space at its ends.

    Raises:
        ValueError: there is none, or it is no text, or has no word; the message says so.
    """
    key = next((key for key in keys if row.get(key) is not None), None)
    if key is None:
        raise ValueError(f"no {keys[0]}")
    text = row[key]
    if not isinstance(text, str):
        raise ValueError(f"{key} is {_kind(text)}, not a text in quotation marks")
    if LOST_CHARACTER in text:
        raise ValueError(f"{key} holds U+FFFD, in the place of a character that a conversion lost: {text[:40]!r}")
    if not _WORD.search(unicodedata.normalize("NFKC", text)):
        raise ValueError(f"{key} has no word: {text[:40]!r}")
    return text.strip()


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if isinstance(value, (dict, list, str)):
        return {dict: "an object", list: "an array", str: "a text"}[type(value)]
    return "null" if value is None else f"the number {value}" if not isinstance(value, bool) else str(value).lower()


def read_eval_set(path: str | Path, prepare: Callable[[str], str] = lambda text: text) -> list[dict[str, str | None]]:
    """The utterances of an evaluation set, each with ``id``, ``target_text``, ``prompt_text`` and ``prompt_audio``.

    ``target_text`` may be called ``text``. An id may be an integer; it becomes text. Utterances without a prompt have
    the ``prompt_text`` "" and the ``prompt_audio`` None.

    Args:
        path: the file.
        prepare: what is done to each text of target or prompt; it may raise a ValueError.

    Raises:
        ValueError: an utterance lacks its id or text, a text has no word, a prompt is not complete or its recording is
            missing, an id is not fit for a file name or comes twice, or there is no utterance; all are named.
        OSError: the file cannot be opened.
    """
    ids: dict[str, tuple[int, str]] = {}

    def utterance(number: int, row: dict) -> dict[str, str | None]:
        found = {"id": new_id(row.get("id"), number, ids), "target_text": checked_text(row, "target_text", "text")}
        found |= _prompt(Path(path).parent, row) or {"prompt_text": "", "prompt_audio": None}
        texts = {name: prepare(found[name]) for name in ("target_text", "prompt_text") if found[name]}
        checked_text(texts, "target_text")  # what is left of it
        return found | texts

    return _read(path, utterance, "utterance")


def _prompt(folder: Path, row: dict) -> dict[str, str] | None:
    """Prompt of an entry, if it has one: its text, and the path of its recording relative to ``folder``."""
    audio = row.get("prompt_audio")
    if bool(row.get("prompt_text")) != bool(audio):
        raise ValueError("a prompt needs both prompt_text and prompt_audio")
    if not audio:
        return None
    if not isinstance(audio, str):
        raise ValueError(f"prompt_audio is {_kind(audio)}, not a path in quotation marks")
    if not os.path.isfile(folder / audio):  # noqa: PTH113 (is_file() fails on names that are too long)
        raise ValueError(f"the recording {folder / audio} is missing (paths are relative to the file's folder)")
    return {"prompt_text": checked_text(row, "prompt_text"), "prompt_audio": audio}


def new_id(utt_id: Any, number: int, ids: dict[str, tuple[int, str]]) -> str:
    """An utterance's id as text, fit for a file name of its own.

    Args:
        utt_id: as it stands in the file: text or an integer.
        number: of the entry.
        ids: entry and id of each name so far; this one is added.

    Raises:
        ValueError: it is no file name, or an entry before has it; the message says why.
    """
    if isinstance(utt_id, int) and not isinstance(utt_id, bool):
        utt_id = str(utt_id)
    if not utt_id or not isinstance(utt_id, str):
        raise ValueError("no id" if utt_id in (None, "") else f"the id is {_kind(utt_id)}, not a text or an integer")
    if "/" in utt_id or "\\" in utt_id or not utt_id.isprintable() or utt_id[0] in ". " or utt_id[-1] == " ":
        raise ValueError(f"the id {utt_id[:80]!r} is no file name: no slashes, no line breaks, no dot at its start")
    if len(utt_id.encode()) > MAX_ID_BYTES:
        raise ValueError(f"the id {utt_id[:40]!r}... is no file name: it has more than {MAX_ID_BYTES} bytes")
    key = unicodedata.normalize("NFC", utt_id).casefold()  # on some systems, such names are of one file
    before, other = ids.setdefault(key, (number, utt_id))
    if before != number:
        how = "comes twice, first" if other == utt_id else f"is but for upper and lower case the id {other!r}"
        raise ValueError(f"the id {utt_id!r} {how} in entry {before}: each names a file, so change one of them")
    return utt_id


def read_texts(path: str | Path) -> list[dict]:
    """The entries of a file of texts, each with ``text``.

    Raises:
        ValueError: an entry has none, or one without a word, or there is no entry; all are named.
        OSError: the file cannot be opened.
    """
    return _read(path, lambda number, row: row | {"text": checked_text(row, "text")}, "text")


def read_voices(path: str | Path) -> list[dict[str, str]]:
    """The entries of a list of voices, each with ``prompt_text`` and ``prompt_audio`` (relative to the list's folder).

    Raises:
        ValueError: an entry lacks one of them, a recording is missing, or there is no entry; all are named.
        OSError: the file cannot be opened.
    """

    def voice(number: int, row: dict) -> dict[str, str]:
        found = _prompt(Path(path).parent, row)
        if found is None:
            raise ValueError("needs prompt_text and prompt_audio")
        return found

    return _read(path, voice, "voice")


def read_known_answers(path: str | Path, limit: int | None = None) -> list[dict]:
    """Entries with ``text`` and ``speech_tokens``, and whatever else they hold.

    Args:
        path: the file.
        limit: only so many entries are read.

    Raises:
        ValueError: an entry lacks one of them, a token is none, or there is no entry; all are named.
        OSError: the file cannot be opened.
    """
    return _read(path, _known_answer, "entry", limit)


def _known_answer(number: int, row: dict) -> dict:
    tokens = row.get("speech_tokens")
    if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
        raise ValueError("speech_tokens is no list of integers")
    wrong = [token for token in tokens if not 0 <= token < NUM_SPEECH_TOKENS]
    if wrong:
        raise ValueError(f"{wrong[0]} is no speech token: they are from 0 to {NUM_SPEECH_TOKENS - 1}")
    return row | {"text": checked_text(row, "text")}


def _read(path: str | Path, check: Callable[[int, dict], dict], what: str, limit: int | None = None) -> list[dict]:
    """Entries as ``check`` returns them; what it raises of any of them is named with file and line."""
    found, faults = [], []
    for number, row in numbered_rows(path):
        if limit is not None and len(found) + len(faults) == limit:
            break
        try:
            found.append(check(number, as_object(row)))
        except ValueError as fault:
            faults.append((number, fault))
    if faults:
        more = f"\nand {len(faults) - FAULTS_SHOWN} more like these" if len(faults) > FAULTS_SHOWN else ""
        raise ValueError("\n".join(str(named(path, *fault)) for fault in faults[:FAULTS_SHOWN]) + more)
    if not found:
        raise ValueError(f"{path}: no {what}")
    return found


def num_units(text: str) -> int:
    """About how many syllables and words a text has; more, where it has numbers."""
    return len(_UNIT.findall(unicodedata.normalize("NFKC", text)))


def too_long_to_speak(rows: list[dict], max_new_tokens: int) -> list[dict]:
    """The utterances whose speech can hardly fit into ``max_new_tokens``."""
    return [row for row in rows if TOKENS_PER_UNIT * num_units(row["target_text"]) > max_new_tokens]
