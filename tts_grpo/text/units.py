"""Text as it is compared: normalisation and pinyin.

A transcript is compared with its ground truth by pronunciation, so that homophones, which a recogniser cannot tell
apart, are no errors.
"""

import re
import unicodedata

from pypinyin import Style, lazy_pinyin

_NOT_WORDS = re.compile(r"[\W_]+")
_UNITS = re.compile(r"[㐀-䶿一-鿿]|[^\s㐀-䶿一-鿿]+")


def normalise(text: str) -> str:
    """``text`` in NFKC and lower case, each run of punctuation, symbols and spaces made one space, none at the ends."""
    return _NOT_WORDS.sub(" ", unicodedata.normalize("NFKC", text).lower()).strip()


def characters(text: str) -> list[str]:
    """The characters of ``text`` once normalised, without spaces: the units of the CER."""
    return list(normalise(text).replace(" ", ""))


def pinyin(text: str, tones: bool) -> list[str]:
    """Pronunciation of ``text``: a syllable for each Chinese character, other words as they are.

    Args:
        text: any text; it is normalised first.
        tones: whether syllables carry their tone as a digit, 5 for the neutral one ("ni3"), or none ("ni").
    """
    style = Style.TONE3 if tones else Style.NORMAL
    units = lazy_pinyin(normalise(text), style=style, neutral_tone_with_five=tones, errors=_UNITS.findall)
    return [unit for unit in units if unit.strip()]


def written_units(text: str) -> list[str]:
    """``text`` once normalised, as the units that ``pinyin`` gives a sound to: Chinese characters and other words."""
    return _UNITS.findall(normalise(text))
