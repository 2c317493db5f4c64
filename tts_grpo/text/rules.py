"""Rules for which texts are accepted and what the language model reads, shared by training and evaluation.

Most texts contain Chinese characters and punctuation only. A character set recognises them within a microsecond; only
the other texts go through the text front end (tts_grpo/text/spoken.py), which takes a millisecond.
"""

import functools
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import zhconv

from tts_grpo.text.input_files import checked_language, over_token_limit, read_eval_set
from tts_grpo.text.spoken import SpokenForm, has_language, spoken_form, text_fault
from tts_grpo.text.tags import apply_tags

PUNCTUATION = "，。！？、；：“”…"
_NO_SOUND = re.compile(r"[\W_]+")
_LATIN = re.compile("[A-Za-z0-9]")
_COPIED_KINDS = ("word", "mark", "other")  # kinds of spans that are copied to a prompt unchanged


@dataclass(frozen=True)
class TextRules:
    """Settings of run.sh that apply to texts.

    Attributes:
        language: language of texts without one of their own. "zh" is Chinese, which may contain English words; "en" is
            English.
        text_tags: "reject" or "remove", see :func:`tts_grpo.text.tags.apply_tags`.
        llm_text: input of the language model: "raw" is the unchanged text; "spoken" has numbers and signs in words.
    """

    language: str = "zh"
    text_tags: str = "reject"
    llm_text: str = "raw"

    def of(self, row: dict) -> "TextRules":
        """Return the rules for an entry of a file, in its language.

        Raises:
            ValueError: the language is unknown.
        """
        return _in_language(self, checked_language(row, self.language))


@functools.lru_cache
def _in_language(rules: TextRules, language: str) -> TextRules:
    return replace(rules, language=language)


@functools.cache
def plain_characters() -> frozenset[str]:
    """Return punctuation and the characters of GB 2312 that conversion to simplified characters does not change."""
    han = bytes(itertools.chain.from_iterable((row, cell) for row in range(0xB0, 0xF8) for cell in range(0xA1, 0xFF)))
    same = {c for c in han.decode("gb2312", "ignore") if zhconv.convert(c, "zh-hans") == c}
    return frozenset(PUNCTUATION) | same - {"著"}  # 著 becomes 着 in some words, see tts_grpo/text/clean.py


def is_plain(text: str) -> bool:
    """Return whether a text has only simplified characters and punctuation, so that it is its own spoken form."""
    return plain_characters().issuperset(text)


def usable_text(text: str, rules: TextRules) -> str:
    """Return a text as used for training and as reference: without tags, if the rules remove them.

    Raises:
        ValueError: the text contains tags and the rules reject them, it has nothing to read, or it is not in the
            language; the message is the reason.
    """
    if rules.language == "zh" and is_plain(text):
        return text
    text = apply_tags(text, rules.text_tags)
    if fault := text_fault(text, rules.language):
        raise ValueError(fault)
    if not has_language(text, rules.language):
        raise ValueError('no Chinese character (language zh; an English text needs "language": "en", or language=en)')
    return text


def model_text(text: str, rules: TextRules) -> str:
    """Return the language model's input for a usable text; "spoken" puts numbers and signs into words.

    Punctuation is kept, as in CosyVoice's front end (cosyvoice/cli/frontend.py, text_normalize, at ace7c47).
    """
    if rules.llm_text == "raw" or (rules.language == "zh" and is_plain(text)):
        return text
    pieces, end = [], 0
    spans = spoken_form(text, rules.language).spans
    for (begin, stop, kind), group in itertools.groupby(spans, lambda span: (span.start, span.end, span.kind)):
        pieces.append(text[end:begin])
        words = SpokenForm(text, rules.language, tuple(group)).text
        pieces.append(words if words and kind not in _COPIED_KINDS else text[begin:stop])
        end = stop
    return "".join(_spaced([*pieces, text[end:]]))


def _spaced(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the pieces, with a space between adjacent pieces of Latin letters or digits."""
    before = ""
    for piece in filter(None, pieces):
        yield f" {piece}" if _LATIN.fullmatch(before) and _LATIN.match(piece) else piece
        before = piece[-1]


def spoken_text(text: str, rules: TextRules) -> str:
    """Return the usual reading of a text, without punctuation."""
    if rules.language == "zh" and is_plain(text):
        return _NO_SOUND.sub("", text)
    return spoken_form(text, rules.language).text


def comparison_key(text: str, rules: TextRules) -> str:
    """Return a key that is equal for texts with the same usual reading."""
    return spoken_text(text, rules).replace(" ", "").lower()


def usable_eval_set(path: str | Path, rules: TextRules) -> list[dict[str, str | None]]:
    """Read an evaluation set (:func:`tts_grpo.text.input_files.read_eval_set`) and apply the rules for tags.

    Texts in another language are accepted, so that a published set stays complete; :func:`warnings_of` lists them.

    Raises:
        ValueError: an utterance cannot be used, or contains tags that the rules reject; the message lists the faults.
        OSError: the file cannot be opened.
    """
    return read_eval_set(path, lambda text: apply_tags(text, rules.text_tags), rules.language)


def warnings_of(rows: list[dict], path: str | Path, max_new_tokens: int, rules: TextRules) -> list[str]:
    """Return warnings about an evaluation set: texts that are too long or not in the language."""
    found = []
    if long := over_token_limit(rows, max_new_tokens):
        found.append(
            f"{path}: {len(long)} texts are too long for max_new_tokens={max_new_tokens} and will be truncated, "
            f"first {long[0]['id']} ({len(long[0]['target_text'])} characters): raise it, or remove them"
        )
    unusual = []
    for row in rows:
        try:
            usable_text(row["target_text"], rules.of(row))
        except ValueError as fault:
            unusual.append((row["id"], fault))
    if unusual:
        found.append(f"{path}: {len(unusual)} texts could not be trained on, first {unusual[0][0]}: {unusual[0][1]}")
    return found
