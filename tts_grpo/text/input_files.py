"""Validation of users' files: texts, evaluation sets, voices and known answers.

One error lists the faults of a whole file. This module imports the standard library only, because scripts/check.py
reads these files before any environment exists.
"""

import collections
import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tts_grpo.text.jsonl import as_object, named, numbered_rows
from tts_grpo.text.tags import find_tags
from tts_grpo.text.tokens import NUM_SPEECH_TOKENS

LANGUAGES = ("zh", "en")  # whose texts can be read; zh: Chinese, which may contain English words
FAULTS_SHOWN = 5
MAX_ID_BYTES = 200  # a file name has at most 255 bytes, and a suffix follows the id
TOKENS_PER_UNIT = 4  # speech tokens per syllable or word in fast speech: 25 tokens and 6 syllables per second
LOST_CHARACTER = "\ufffd"  # replacement character, which decoders insert for bytes that they cannot decode

_WORD = re.compile(r"[^\W_]")
_UNIT = re.compile(r"[㐀-䶿一-鿿]|[^\W_㐀-䶿一-鿿]+")


def split_paths(text: str) -> list[str]:
    r"""Return the paths of a setting, which are separated by spaces; "\ " is a space within a path."""
    return [path.replace("\\ ", " ") for path in re.split(r"(?<!\\) +", text.strip())]


def checked_text(row: dict, *keys: str) -> str:
    """Return the text under the first of ``keys`` that the entry has, stripped of white space.

    Raises:
        ValueError: there is none, it is not a string, it contains U+FFFD, or it has no word; the message says which.
    """
    key = next((key for key in keys if row.get(key) is not None), None)
    if key is None:
        raise ValueError(f"no {keys[0]}")
    text = row[key]
    if not isinstance(text, str):
        raise ValueError(f"{key} is {_kind(text)}, not a text in quotation marks")
    if LOST_CHARACTER in text:
        raise ValueError(f"{key} contains U+FFFD, which replaces a character that a conversion has lost: {text[:40]!r}")
    if not _WORD.search(unicodedata.normalize("NFKC", text)):
        raise ValueError(f"{key} has no word: {text[:40]!r}")
    return text.strip()


def checked_language(row: dict, default: str) -> str:
    """Return the language of an entry: its ``language``, such as "en" or "en-US", or ``default`` if it has none.

    Raises:
        ValueError: it is none of ``LANGUAGES``.
    """
    given = row.get("language")
    if given is None:
        return default
    language = re.split("[-_]", given)[0].lower() if isinstance(given, str) else ""
    if language not in LANGUAGES:
        raise ValueError(f"language is {given!r}, not {' or '.join(LANGUAGES)}")
    return language


def checked_instruct(row: dict) -> str:
    """Return the instruction of an entry that says how to speak, such as "请用广东话表达。", or "" if it has none.

    Raises:
        ValueError: it is not a text with a word, or it has a tag such as <|endofprompt|>.
    """
    if row.get("instruct") in (None, ""):
        return ""
    instruct = checked_text(row, "instruct")
    if tags := find_tags(instruct):
        raise ValueError(f"instruct contains {tags[0]}: write the instruction only, such as 请用广东话表达。")
    return instruct


def _kind(value: Any) -> str:
    """Describe the type of a JSON value for an error message."""
    if isinstance(value, (dict, list, str)):
        return {dict: "an object", list: "an array", str: "a text"}[type(value)]
    return "null" if value is None else f"the number {value}" if not isinstance(value, bool) else str(value).lower()


def read_eval_set(
    path: str | Path, prepare: Callable[[str], str] = lambda text: text, language: str = "zh"
) -> list[dict[str, str | None]]:
    """Read an evaluation set: utterances with ``id``, ``target_text``, ``language``, ``prompt_text``, ``prompt_audio``.

    ``target_text`` may be called ``text`` in the file. An integer id is converted to a string. An utterance without a
    prompt has the ``prompt_text`` "" and the ``prompt_audio`` None. One with an instruction also has ``instruct``.

    Args:
        path: the file.
        prepare: function applied to each target text and prompt text; it may raise a ValueError.
        language: language of utterances without one of their own.

    Raises:
        ValueError: an utterance lacks its id or text, a text has no word, a language is unknown, a prompt is incomplete
            or its recording is missing, an id is not usable as a file name or is not unique, or there is no utterance.
            The message lists the faults (the first ``FAULTS_SHOWN``, and the number of the others).
        OSError: the file cannot be opened.
    """
    ids: dict[str, tuple[int, str]] = {}

    def utterance(number: int, row: dict) -> dict[str, str | None]:
        found = {"id": new_id(row.get("id"), number, ids), "target_text": checked_text(row, "target_text", "text")}
        found["language"] = checked_language(row, language)
        found |= _prompt(Path(path).parent, row) or {"prompt_text": "", "prompt_audio": None}
        texts = {name: prepare(found[name]) for name in ("target_text", "prompt_text") if found[name]}
        checked_text(texts, "target_text")  # it must still have a word
        instruct = checked_instruct(row)
        return found | texts | ({"instruct": instruct} if instruct else {})

    return _read(path, utterance, "utterance")


def _prompt(folder: Path, row: dict) -> dict[str, str] | None:
    """Return the prompt of an entry, if any: its text, and the path of its recording relative to ``folder``."""
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
    """Return an utterance's id as a string that is usable as a unique file name.

    Args:
        utt_id: the id as in the file, a string or an integer.
        number: number of the entry in the file.
        ids: entry number and id for each file name so far; this one is added.

    Raises:
        ValueError: the id is not usable as a file name, or an earlier entry has it; the message says why.
    """
    if isinstance(utt_id, int) and not isinstance(utt_id, bool):
        utt_id = str(utt_id)
    if not utt_id or not isinstance(utt_id, str):
        raise ValueError("no id" if utt_id in (None, "") else f"the id is {_kind(utt_id)}, not a text or an integer")
    if "/" in utt_id or "\\" in utt_id or not utt_id.isprintable() or utt_id[0] in ". " or utt_id[-1] == " ":
        raise ValueError(
            f"the id {utt_id[:80]!r} cannot be a file name: no slashes or line breaks, and no dot at the start"
        )
    if len(utt_id.encode()) > MAX_ID_BYTES:
        raise ValueError(f"the id {utt_id[:40]!r}... cannot be a file name: it has more than {MAX_ID_BYTES} bytes")
    key = unicodedata.normalize("NFC", utt_id).casefold()  # some file systems treat such names as the same
    before, other = ids.setdefault(key, (number, utt_id))
    if before != number:
        how = (
            "occurs twice, first" if other == utt_id else f"differs only in upper and lower case from the id {other!r}"
        )
        raise ValueError(
            f"the id {utt_id!r} {how} in entry {before}: both would name the same file, so change one of them"
        )
    return utt_id


def read_texts(path: str | Path) -> list[dict]:
    """Read a file of texts; each entry has ``text``, and possibly ``language``.

    Raises:
        ValueError: an entry has no text, a text without a word or an unknown language, or there is no entry; the
            message lists the faults.
        OSError: the file cannot be opened.
    """

    def text(number: int, row: dict) -> dict:
        checked_language(row, "zh")
        return row | {"text": checked_text(row, "text")}

    return _read(path, text, "text")


def read_voices(path: str | Path) -> list[dict[str, str]]:
    """Read a list of voices; entries have ``prompt_text`` and ``prompt_audio`` (relative to the list's folder).

    Raises:
        ValueError: an entry lacks one of them, a recording is missing, or there is no entry; the message lists the
            faults.
        OSError: the file cannot be opened.
    """

    def voice(number: int, row: dict) -> dict[str, str]:
        found = _prompt(Path(path).parent, row)
        if found is None:
            raise ValueError("needs prompt_text and prompt_audio")
        return found

    return _read(path, voice, "voice")


def read_known_answers(path: str | Path, limit: int | None = None, language: str = "zh") -> list[dict]:
    """Read known answers; each entry has ``text``, ``language`` and ``speech_tokens``, and other keys are kept.

    Args:
        path: the file.
        limit: largest number of entries of each language; the first ones are taken.
        language: language of entries without one of their own.

    Raises:
        ValueError: an entry has no text or speech tokens, an id is not a speech token, a language is unknown, or there
            is no entry; the message lists the faults.
        OSError: the file cannot be opened.
    """
    counts: collections.Counter[str] = collections.Counter()

    def known_answer(number: int, row: dict) -> dict | None:
        spoken = checked_language(row, language)
        counts[spoken] += 1
        if limit is not None and counts[spoken] > limit:
            return None
        checked_speech_tokens(row)
        return row | {"text": checked_text(row, "text"), "language": spoken}

    return _read(path, known_answer, "entry")


def checked_speech_tokens(row: dict) -> list[int]:
    """Return the speech tokens of an entry.

    Raises:
        ValueError: there are none, they are not a list of integers, or an id is not in the codebook.
    """
    tokens = row.get("speech_tokens")
    if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
        raise ValueError("speech_tokens is not a list of integers")
    wrong = [token for token in tokens if not 0 <= token < NUM_SPEECH_TOKENS]
    if wrong:
        raise ValueError(f"{wrong[0]} is not a speech token: the ids are 0 to {NUM_SPEECH_TOKENS - 1}")
    return tokens


def _read(path: str | Path, check: Callable[[int, dict], dict | None], what: str) -> list[dict]:
    """Return the entries as ``check`` returns them, without None; its ValueErrors are collected, with file and line."""
    found, faults = [], []
    for number, row in numbered_rows(path):
        try:
            if (entry := check(number, as_object(row))) is not None:
                found.append(entry)
        except ValueError as fault:
            faults.append((number, fault))
    if faults:
        more = f"\nand {len(faults) - FAULTS_SHOWN} more like these" if len(faults) > FAULTS_SHOWN else ""
        raise ValueError("\n".join(str(named(path, *fault)) for fault in faults[:FAULTS_SHOWN]) + more)
    if not found:
        raise ValueError(f"{path}: no {what}")
    return found


def num_units(text: str) -> int:
    """Estimate the number of syllables and words in a text; a number in digits counts as one."""
    return len(_UNIT.findall(unicodedata.normalize("NFKC", text)))


def over_token_limit(rows: list[dict], max_new_tokens: int) -> list[dict]:
    """Return the utterances whose speech is unlikely to fit into ``max_new_tokens`` speech tokens."""
    return [row for row in rows if TOKENS_PER_UNIT * num_units(row["target_text"]) > max_new_tokens]
