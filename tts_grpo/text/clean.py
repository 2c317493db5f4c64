"""Convert raw text to plain text, and record the offsets of each character in the raw text.

Compatibility forms (full width, circled and Roman numbers, ligatures) are normalised by Unicode's NFKC. Traditional
characters are converted to simplified ones (zhconv's table zh-hans: characters only, no regional vocabulary). 〇
becomes the ordinary 零, and digits of other scripts become ASCII. Numbers and signs are not converted to words here.
"""

import re
import unicodedata
from dataclasses import dataclass

import zhconv

# Replaced before NFKC, which would convert 10² to 102 and 2½ to 21/2.
_BEFORE = {
    **{chr(code): f"^{digit}" for digit, code in enumerate((0x2070, 0xB9, 0xB2, 0xB3, *range(0x2074, 0x207A)))},
    **{fraction: f" {unicodedata.normalize('NFKC', fraction).replace('⁄', '/')}" for fraction in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"},
    **{chr(0x2160 + i): f" {i + 1}" for i in range(12)},
    "㎡": "m^2", "㎥": "m^3", "㎢": "km^2", "〇": "零", "’": "'", "‘": "'", "＇": "'", "−": "-", "–": "-",
    "‐": "-", "‑": "-", "〜": "~", "～": "~", "∶": ":",
    "™": "", "®": "", "©": "", "℡": "", "⁻": "^-",
}  # fmt: skip
_SUPERSCRIPTS = frozenset(c for c, plain in _BEFORE.items() if plain[:1] == "^" and c != "^")
HAN = "\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_HAN = re.compile(f"[{HAN}]")
# CosyVoice's tags for sounds and stress, tags of other programs, and special tokens of language models.
TAG = re.compile(r"<\|[^|<>\n]{0,60}\|>|</?[A-Za-z][A-Za-z0-9_ -]{0,40}/?>|\[[a-z][a-z_-]{1,30}\]")
END_OF_PROMPT = "<|endofprompt|>"  # the text before it is an instruction, not spoken (CosyVoice2, CosyVoice3)


@dataclass(frozen=True)
class PlainText:
    """A plain text of N characters; ``starts`` and ``ends`` (N each) are their offsets in the raw text."""

    text: str
    starts: tuple[int, ...]
    ends: tuple[int, ...]


def is_han(character: str) -> bool:
    """Return whether the character is a Chinese character, in any plane of Unicode."""
    return bool(_HAN.match(character))


def find_tags(raw: str) -> list[tuple[int, int]]:
    """Return offsets of the parts that are not spoken: tags, and an instruction before ``<|endofprompt|>``."""
    begin = raw.rfind(END_OF_PROMPT) + len(END_OF_PROMPT) if END_OF_PROMPT in raw else 0
    return ([(0, begin)] if begin else []) + [(m.start(), m.end()) for m in TAG.finditer(raw, begin)]


def _clusters(raw: str):
    """Yield the offsets of each character together with the combining marks that follow it."""
    begin = 0
    for end in range(1, len(raw) + 1):
        if end == len(raw) or not unicodedata.combining(raw[end]):
            yield begin, end
            begin = end


def _plain(cluster: str) -> str:
    if cluster in _BEFORE:
        return _BEFORE[cluster]
    if cluster.isascii():
        return cluster
    plain = unicodedata.normalize("NFKC", cluster)
    return "".join(
        str(unicodedata.decimal(c)) if c.isdecimal() else _BEFORE.get(c, c)
        for c in plain
        if unicodedata.category(c) not in ("Cf", "Cs", "Co", "Cn")
    )


def simplified(text: str) -> str:
    """Convert ``text`` to simplified characters without changing its length."""
    if text.isascii():
        return text
    converted = zhconv.convert(text, "zh-hans")
    if len(converted) != len(text):
        converted = "".join(one if len(one := zhconv.convert(c, "zh-hans")) == 1 else c for c in text)
    if "著" not in converted:
        return converted
    return "".join(_particle(converted, i) if c == "著" else c for i, c in enumerate(converted))


def _particle(text: str, i: int) -> str:
    """Return 著 or 着 for the 著 at index i, as simplified text has it: 看着, but 著名.

    Only zhconv's table zh-cn contains these words.
    """
    part = zhconv.convert(text[max(0, i - 1) : i + 2], "zh-cn")
    return "着" if "着" in part and "著" not in part else "著"


def clean(raw: str, simplify: bool = True) -> PlainText:
    """Convert a raw text to plain text; each tag is replaced by a space.

    Args:
        raw: any text.
        simplify: convert traditional characters to simplified ones.
    """
    tags, characters = find_tags(raw), []
    for begin, end in _clusters(raw):
        while tags and tags[0][1] <= begin:
            characters.append((" ", tags[0][0], tags[0][1]))
            tags.pop(0)
        if not tags or end <= tags[0][0]:
            plain = _plain(raw[begin:end])
            if plain[:1] == "^" and raw[begin - 1 : begin] in _SUPERSCRIPTS:
                plain = plain[1:]  # 10⁻¹² becomes 10^-12
            characters += [(c, begin, end) for c in plain]
    text, starts, ends = zip(*characters, strict=True) if characters else ((), (), ())
    plain = "".join(text)
    return PlainText(simplified(plain) if simplify else plain, starts, ends)
