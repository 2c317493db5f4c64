"""Convert raw text to its spoken form: numbers, signs and units in words, with all accepted readings.

``2024年有50%的人`` is read 二零二四年有百分之五十的人. If several readings are correct, all are kept, and the alignment
chooses the one with the fewest errors (tts_grpo/text/errors.py). docs/evaluation.md lists how texts are read.
"""

import functools
import re
import unicodedata
from dataclasses import dataclass

from tts_grpo.text.clean import clean, find_tags, is_han
from tts_grpo.text.input_files import LANGUAGES
from tts_grpo.text.readings import tokens

_SLOT = re.compile(r"\[(.)[^\]]*\]")
_PLAIN_KINDS = ("han", "word", "other", "mark")
_SCRIPTS = ("LATIN", "GREEK", "MICRO", "MODIFIER")  # scripts of names, of signs in formulas, and of phonetic symbols


@dataclass(frozen=True)
class Span:
    """A span of a raw text, with its readings.

    Attributes:
        start, end: offsets in the raw text.
        kind: a kind of token in tts_grpo/text/readings.py: "han", "word", "number", "date", ...
        readings: alternatives, the usual one first; "" is not read. ``[二两]`` is one character that may be either.
    """

    start: int
    end: int
    kind: str
    readings: tuple[str, ...]


@dataclass(frozen=True)
class SpokenForm:
    """A raw text and its spans in order; text between the spans is not read."""

    raw: str
    language: str
    spans: tuple[Span, ...]

    @property
    def text(self) -> str:
        """Return the usual reading, without punctuation."""
        words = ""
        for span in self.spans:
            usual = _SLOT.sub(r"\1", span.readings[0])
            close = words and usual and is_han(words[-1]) and is_han(usual[0])
            words += usual if close or not words else f" {usual}"
        return " ".join(words.split())

    @property
    def read(self) -> tuple[Span, ...]:
        """Return the spans that are not written in words, such as numbers, dates and signs, and have a reading."""
        return tuple(s for s in self.spans if s.kind not in _PLAIN_KINDS and any(s.readings))

    @property
    def tags(self) -> tuple[str, ...]:
        """Return the tags in the raw text, such as ``[laughter]``; they are not read."""
        return tuple(self.raw[begin:end] for begin, end in find_tags(self.raw))


@functools.lru_cache(maxsize=8192)
def spoken_form(raw: str, language: str = "zh") -> SpokenForm:
    """Convert a raw text to its spoken form.

    Args:
        raw: any text, such as a line of a file or a transcript.
        language: language of the text, one of ``LANGUAGES``, in which numbers are read. In a Chinese text, a number
            next to Latin letters may also be read in English.

    Raises:
        ValueError: the language is not supported.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language {language!r}: the text front end reads {' and '.join(LANGUAGES)}")
    plain, spans = clean(raw), []
    for token in tokens(plain.text, language):
        start, end = plain.starts[token.start], plain.ends[token.end - 1]
        spans += [Span(start, end, token.kind, readings) for readings in token.groups]
    return SpokenForm(raw, language, tuple(spans))


def foreign_scripts(raw: str, language: str = "zh") -> list[str]:
    """Return the scripts of a text, tags excluded, that its language does not accept, such as ["HANGUL"]."""
    found = set()
    for character in clean(raw).text:
        if is_han(character):
            found |= {"CHINESE"} if language == "en" else set()
        elif character.isalpha() and not character.isascii():
            script = unicodedata.name(character, "UNKNOWN").split()[0].split("-")[0]
            found |= set() if script in _SCRIPTS else {script}
    return sorted(found)


def text_fault(raw: str, language: str = "zh") -> str:
    """Return why a text cannot be used for training or scoring; "" if it can.

    English words in a Chinese text are accepted, even without any Chinese; :func:`has_language` detects the latter.
    """
    spoken = spoken_form(raw, language)
    if scripts := foreign_scripts(raw, language):
        mixed = "; a text that mixes Chinese and English has language zh" if scripts == ["CHINESE"] else ""
        return f"letters of another script than {language}'s: {', '.join(scripts).lower()}{mixed}"
    if not any(c.isalnum() for c in spoken.text):
        return "nothing to synthesise: no letter, digit or Chinese character"
    return ""


def has_language(raw: str, language: str = "zh") -> bool:
    """Return whether a text has a letter of the language (Chinese character or not), or no letter at all."""
    letters = [c for c in clean(raw).text if c.isalpha()]
    return not letters or any(is_han(c) == (language == "zh") for c in letters)
