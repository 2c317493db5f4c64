"""Raw text -> spoken form: the words that a reader says, with every reading that is right.

``2024年有50%的人`` is said 二零二四年有百分之五十的人. Where several readings are right, all of them are kept, and the
comparison takes the one that fits (tts_grpo/text/errors.py). docs/evaluation.md lists what is read how.
"""

import functools
import re
import unicodedata
from dataclasses import dataclass

from tts_grpo.text.clean import clean, find_tags, is_han
from tts_grpo.text.readings import tokens

LANGUAGES = ("zh", "en")
_SLOT = re.compile(r"\[(.)[^\]]*\]")
_PLAIN_KINDS = ("han", "word", "other", "mark")
_SCRIPTS = ("LATIN", "GREEK", "MICRO", "MODIFIER")  # those of names, of signs in formulas, of phonetics


@dataclass(frozen=True)
class Span:
    """A stretch of a raw text.

    Attributes:
        start, end: its place in the raw text.
        kind: as in tts_grpo/text/readings.py: "han", "word", "number", "date", ...
        readings: alternatives, the usual one first; "" is silence. ``[二两]`` is one character that may be either.
    """

    start: int
    end: int
    kind: str
    readings: tuple[str, ...]


@dataclass(frozen=True)
class Spoken:
    """A raw text, and its spans in order; what lies between them is not said."""

    raw: str
    language: str
    spans: tuple[Span, ...]

    @property
    def text(self) -> str:
        """The usual reading, without punctuation."""
        said = ""
        for span in self.spans:
            usual = _SLOT.sub(r"\1", span.readings[0])
            close = said and usual and is_han(said[-1]) and is_han(usual[0])
            said += usual if close or not said else f" {usual}"
        return " ".join(said.split())

    @property
    def read(self) -> tuple[Span, ...]:
        """The spans that are written in digits, signs or letters that are spelled, so that a library reads them."""
        return tuple(s for s in self.spans if s.kind not in _PLAIN_KINDS and any(s.readings))

    @property
    def tags(self) -> tuple[str, ...]:
        """Tags in the raw text, such as ``[laughter]``; they are not said."""
        return tuple(self.raw[begin:end] for begin, end in find_tags(self.raw))


@functools.lru_cache(maxsize=8192)
def spoken_form(raw: str, language: str = "zh") -> Spoken:
    """How a raw text is said.

    Args:
        raw: any text, such as a line of a file or a transcript.
        language: of the text, one of ``LANGUAGES``: numbers are read in it. In a Chinese text, a number beside Latin
            letters may be read in English too.

    Raises:
        ValueError: another language.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language {language!r}: the text front end reads {' and '.join(LANGUAGES)}")
    plain, spans = clean(raw), []
    for token in tokens(plain.text, language):
        start, end = plain.starts[token.start], plain.ends[token.end - 1]
        spans += [Span(start, end, token.kind, readings) for readings in token.groups]
    return Spoken(raw, language, tuple(spans))


def foreign_scripts(raw: str, language: str = "zh") -> list[str]:
    """Scripts of a text's letters that neither language is written in, such as ["HANGUL"]; tags are not looked at."""
    found = set()
    for character in clean(raw).text:
        if is_han(character):
            found |= {"CHINESE"} if language == "en" else set()
        elif character.isalpha() and not character.isascii():
            script = unicodedata.name(character, "UNKNOWN").split()[0].split("-")[0]
            found |= set() if script in _SCRIPTS else {script}
    return sorted(found)


def text_fault(raw: str, language: str = "zh") -> str:
    """Why a text cannot be trained on or scored; "" if it can.

    English words in a Chinese text, and a text of nothing else, are no fault; :func:`has_language` finds the latter.
    """
    spoken = spoken_form(raw, language)
    if scripts := foreign_scripts(raw, language):
        return f"letters of another script than {language}'s: {', '.join(scripts).lower()}"
    if not any(c.isalnum() for c in spoken.text):
        return "nothing to be said: no letter, digit or Chinese character"
    return ""


def has_language(raw: str, language: str = "zh") -> bool:
    """Whether any letter of a text is of the language, Chinese characters or others; true where it has no letter."""
    letters = [c for c in clean(raw).text if c.isalpha()]
    return not letters or any(is_han(c) == (language == "zh") for c in letters)
