"""Which texts a recipe takes, and how its language model reads them: the same rules for training and evaluation.

Most texts hold Chinese characters and punctuation only. They are told by a set of characters, which takes a
microsecond; the text front end (tts_grpo/text/spoken.py) takes a millisecond and reads the others only.
"""

import functools
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import zhconv

from tts_grpo.text.input_files import read_eval_set, too_long_to_speak
from tts_grpo.text.spoken import Spoken, has_language, spoken_form, text_fault
from tts_grpo.text.tags import apply_tags

PUNCTUATION = "，。！？、；：“”…"
_NO_SOUND = re.compile(r"[\W_]+")
_LATIN = re.compile("[A-Za-z0-9]")
_ITSELF = ("word", "mark", "other")  # kinds of spans that stay in a prompt as they are written


@dataclass(frozen=True)
class TextRules:
    """Settings of run.sh that texts are under.

    Attributes:
        language: "zh": Chinese, with English words in it; "en": English.
        text_tags: "reject" or "remove", see :func:`tts_grpo.text.tags.apply_tags`.
        llm_text: what the language model reads: "raw", the text as it is, or "spoken", its numbers and signs in words.
    """

    language: str = "zh"
    text_tags: str = "reject"
    llm_text: str = "raw"


@functools.cache
def plain_characters() -> frozenset[str]:
    """Punctuation, and the characters of GB 2312 that conversion to simplified ones does not change."""
    han = bytes(itertools.chain.from_iterable((row, cell) for row in range(0xB0, 0xF8) for cell in range(0xA1, 0xFF)))
    same = {c for c in han.decode("gb2312", "ignore") if zhconv.convert(c, "zh-hans") == c}
    return frozenset(PUNCTUATION) | same - {"著"}  # 著 is 着 in some words: tts_grpo/text/clean.py


def is_plain(text: str) -> bool:
    """Whether a text is its own spoken form: simplified characters and punctuation."""
    return plain_characters().issuperset(text)


def usable_text(text: str, rules: TextRules) -> str:
    """A text as it is trained on and scored against: without tags, if they are removed.

    Raises:
        ValueError: it holds tags and these are rejected, or is not in the language; the message is the reason.
    """
    if rules.language == "zh" and is_plain(text):
        return text
    text = apply_tags(text, rules.text_tags)
    if fault := text_fault(text, rules.language):
        raise ValueError(fault)
    if not has_language(text, rules.language):
        raise ValueError("no Chinese character (language=zh)")
    return text


def model_text(text: str, rules: TextRules) -> str:
    """A usable text as the language model reads it; with "spoken", numbers and signs are in words, marks stay.

    As CosyVoice's own front end does before its language model (cosyvoice/cli/frontend.py, text_normalize, at ace7c47).
    """
    if rules.llm_text == "raw" or (rules.language == "zh" and is_plain(text)):
        return text
    pieces, end = [], 0
    spans = spoken_form(text, rules.language).spans
    for (begin, stop, kind), group in itertools.groupby(spans, lambda span: (span.start, span.end, span.kind)):
        pieces.append(text[end:begin])
        said = Spoken(text, rules.language, tuple(group)).text
        pieces.append(said if said and kind not in _ITSELF else text[begin:stop])
        end = stop
    return "".join(_spaced([*pieces, text[end:]]))


def _spaced(pieces: Iterable[str]) -> Iterator[str]:
    """Pieces, with spaces between words of Latin letters and digits."""
    before = ""
    for piece in filter(None, pieces):
        yield f" {piece}" if _LATIN.fullmatch(before) and _LATIN.match(piece) else piece
        before = piece[-1]


def spoken_text(text: str, rules: TextRules) -> str:
    """The usual reading of a text, without punctuation."""
    if rules.language == "zh" and is_plain(text):
        return _NO_SOUND.sub("", text)
    return spoken_form(text, rules.language).text


def comparison_key(text: str, rules: TextRules) -> str:
    """The same for texts that are read the same."""
    return spoken_text(text, rules).replace(" ", "").lower()


def usable_eval_set(path: str | Path, rules: TextRules) -> list[dict[str, str | None]]:
    """The utterances of an evaluation set (:func:`tts_grpo.text.input_files.read_eval_set`), by the rules for tags.

    Texts in another language are no fault, as a published set is taken whole: :func:`warnings_of` names them.

    Raises:
        ValueError: an utterance cannot be used, or holds tags and these are rejected; the faults are named.
        OSError: the file cannot be opened.
    """
    return read_eval_set(path, lambda text: apply_tags(text, rules.text_tags))


def warnings_of(rows: list[dict], path: str | Path, max_new_tokens: int, rules: TextRules) -> list[str]:
    """What is odd about an evaluation set, and no fault."""
    found = []
    if long := too_long_to_speak(rows, max_new_tokens):
        found.append(
            f"{path}: {len(long)} texts are too long for max_new_tokens={max_new_tokens} and will be cut, "
            f"{long[0]['id']} ({len(long[0]['target_text'])} characters) first: raise it, or take them out"
        )
    odd = []
    for row in rows:
        try:
            usable_text(row["target_text"], rules)
        except ValueError as fault:
            odd.append((row["id"], fault))
    if odd:
        found.append(f"{path}: {len(odd)} texts are not of this recipe, {odd[0][0]} first: {odd[0][1]}")
    return found
