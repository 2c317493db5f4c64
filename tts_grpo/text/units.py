"""Units of a text: Chinese characters and words, with their accepted pronunciations and their offsets.

A transcript is compared with its reference by pronunciation, so homophones, which a recogniser cannot distinguish, are
not errors. A unit has a set of pronunciations: those in its word if pypinyin's dictionary has the word, otherwise all
usual ones of the character. The function :func:`sentence` segments references and transcripts in the same way.
"""

import functools
import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass

from pypinyin import Style, load_phrases_dict
from pypinyin import pinyin as pypinyin_readings

from tts_grpo.text.clean import HAN, is_han
from tts_grpo.text.spoken import spoken_form

_PIECE = re.compile(rf"\[([{HAN}]+)\]|([{HAN}])|([^\s\[\]{HAN}]+)")
_NOT_WORDS = re.compile(r"[\W_]+")
FILLERS = frozenset("嗯呃唔") | {"uh", "um", "uhm", "er", "erm", "hmm", "mm", "mhm"}
# A sound is usual for a single character if at least this share of its words in pypinyin's dictionary has it.
MIN_SHARE = 0.1

# Words that pypinyin 0.55 lacks or pronounces differently.
load_phrases_dict({
    word: [[syllable] for syllable in sounds.split()]
    for word, sounds in {
        "总行": "zǒng háng", "分行": "fēn háng", "支行": "zhī háng", "央行": "yāng háng", "商行": "shāng háng",
        "同行": "tóng háng", "行情": "háng qíng", "行业": "háng yè", "行长": "háng zhǎng", "各行各业": "gè háng gè yè",
        "天气": "tiān qì", "公园": "gōng yuán", "朝阳": "cháo yáng", "调休": "tiáo xiū", "空调": "kōng tiáo",
        "重启": "chóng qǐ", "重播": "chóng bō", "重名": "chóng míng", "还款": "huán kuǎn", "还钱": "huán qián",
        "长胖": "zhǎng pàng", "长高": "zhǎng gāo", "长得": "zhǎng de", "乐团": "yuè tuán", "声乐": "shēng yuè",
    }.items()
})  # fmt: skip
# Pronunciations of single characters for which the dictionary's words are not representative.
_ALONE = {
    "了": "le5 liao3", "的": "de5", "地": "de5 di4", "得": "de5 de2 dei3", "着": "zhe5 zhao2", "著": "zhu4 zhe5 zhuo2",
    "和": "he2", "没": "mei2", "给": "gei3", "还": "hai2 huan2", "什": "shen2", "么": "me5", "呢": "ne5", "吧": "ba5",
    "吗": "ma5", "啊": "a1 a5", "要": "yao4", "更": "geng4", "朝": "chao2", "都": "dou1 du1", "觉": "jue2 jiao4",
    "相": "xiang1 xiang4", "假": "jia3 jia4", "教": "jiao1 jiao4", "便": "bian4", "种": "zhong3 zhong4",
    "中": "zhong1",
}  # fmt: skip
# Characters whose listed pronunciations are interchangeable in every word.
_FREE = {
    "谁": "shei2 shui2", "这": "zhe4 zhei4", "那": "na4 nei4", "哪": "na3 nei3", "血": "xue4 xie3 xue3",
    "熟": "shu2 shou2", "薄": "bao2 bo2", "露": "lu4 lou4", "壳": "ke2 qiao4", "嗯": "en1 en4 en5", "呃": "e4",
    "一": "yi1 yi2 yi4", "不": "bu4 bu2", "亚": "ya4 ya3", "质": "zhi4 zhi2", "危": "wei1 wei2", "期": "qi1 qi2",
    "俩": "lia3",
}  # fmt: skip
_CHILD_BEFORE = frozenset("女婴幼少孤胎健侄育托宠男血患产弃孙小生")  # 女儿 has no erhua
_CHILD_AFTER = frozenset("子童女歌媳科戏时孙")


@dataclass(frozen=True, slots=True)
class Unit:
    """A Chinese character or a word.

    Attributes:
        written: accepted spellings, the usual one first: a simplified character, or a word in lower case.
        start, end: offsets in the raw text; all units of a number have the offsets of the number.
        toned, toneless: accepted pronunciations of a character ("ni3", "ni"; neutral tone 5); empty for a word.
        optional: whether neither its absence nor its presence is an error, as for erhua and fillers.
        sound: the usual pronunciation with tone; empty for a word.
    """

    written: tuple[str, ...]
    start: int
    end: int
    toned: frozenset[str] = frozenset()
    toneless: frozenset[str] = frozenset()
    optional: bool = False
    sound: str = ""

    @property
    def text(self) -> str:
        return self.written[0]


Alternatives = tuple[tuple[Unit, ...], ...]
Piece = tuple[tuple[str, ...], int, int]  # accepted spellings of a unit, and its start and end


@dataclass(frozen=True)
class Sentence:
    """A text as units: a sequence of groups, each with alternatives, the usual one first."""

    raw: str
    groups: tuple[Alternatives, ...]
    units: tuple[Unit, ...]  # units of the usual reading


def normalise(text: str) -> str:
    """Return ``text`` in NFKC and lower case, each run of punctuation, symbols and spaces as one space, stripped."""
    return _NOT_WORDS.sub(" ", unicodedata.normalize("NFKC", text).lower()).strip()


def characters(text: str) -> list[str]:
    """Return the characters of ``text`` after normalisation, without spaces, as a measure of its length."""
    return list(normalise(text).replace(" ", ""))


@functools.cache
def _word_counts() -> dict[str, Counter]:
    """Count how often each pronunciation of a character occurs in pypinyin's dictionary of words."""
    from pypinyin.contrib.tone_convert import to_tone3
    from pypinyin.phrases_dict import phrases_dict

    tone3 = functools.cache(lambda syllable: to_tone3(syllable, neutral_tone_with_five=True))
    counts: dict[str, Counter] = defaultdict(Counter)
    for word, sounds in phrases_dict.items():
        for character, (sound, *_) in zip(word, sounds):
            counts[character][tone3(sound)] += 1
    return counts


def _all_sounds(text: str) -> list[list[str]]:
    """Return the pronunciation of each character in the words of ``text``, or all if it is in none."""
    found = pypinyin_readings(
        text, style=Style.TONE3, heteronym=True, neutral_tone_with_five=True, errors=lambda unknown: list(unknown)
    )
    return found if len(found) == len(text) else [_all_sounds(c)[0] if len(text) > 1 else [c] for c in text]


@functools.lru_cache(maxsize=32768)
def _usual(character: str, sounds: tuple[str, ...]) -> tuple[str, ...]:
    """Select the pronunciations that are accepted for a single character, the usual one first."""
    if len(sounds) > 1:
        if character in _ALONE:
            sounds = tuple(_ALONE[character].split())
        else:
            counts = _word_counts()[character]
            least = MIN_SHARE * counts.total()
            sounds = (sounds[0], *(s for s in sounds[1:] if counts[s] > 1 and counts[s] >= least))
    return tuple(dict.fromkeys(sounds + tuple(_FREE.get(character, "").split())))


@functools.lru_cache(maxsize=32768)
def _variants(character: str, sounds: tuple[str, ...], before_third: bool) -> tuple[frozenset[str], frozenset[str]]:
    """Return accepted toned and toneless pronunciations, with tone sandhi.

    A third tone before another third tone may be a second tone; a neutral tone may be the full tone.

    Source: Y. R. Chao, A Grammar of Spoken Chinese (1968), 1.3.4 (third tone), 1.3.6 (neutral tone).
    """
    toned = set(sounds)
    if before_third:
        toned |= {f"{sound[:-1]}2" for sound in sounds if sound.endswith("3")}
    for sound in sounds:
        if sound.endswith("5"):
            toned |= {other for other in _all_sounds(character)[0] if other[:-1] == sound[:-1]}
    return frozenset(toned), frozenset(map(toneless, toned))


@functools.lru_cache(maxsize=16384)
def _sounds(run: str) -> tuple[tuple[str, ...], ...]:
    """Return the usual pronunciations of each character in a run of Chinese characters."""
    return tuple(_usual(character, tuple(found)) for character, found in zip(run, _all_sounds(run), strict=True))


def _han_units(run: list[Piece]) -> list[Unit]:
    """Convert consecutive Chinese characters, given as pieces, to units."""
    text = "".join(written[0] for written, _, _ in run)
    sounds, found = _sounds(text), []
    for i, (written, start, end) in enumerate(run):
        here = sounds[i] + tuple(s for other in written[1:] for s in _sounds(other)[0])
        third = i + 1 < len(run) and any(sound.endswith("3") for sound in sounds[i + 1])
        toned, toneless = _variants(text[i], here, third)
        optional = text[i] in FILLERS or (text[i] == "儿" and _is_erhua(text, i))
        found.append(Unit(written, start, end, toned, toneless, optional, here[0]))
    return found


def _is_erhua(text: str, i: int) -> bool:
    return i > 0 and text[i - 1] not in _CHILD_BEFORE and text[i + 1 : i + 2] not in _CHILD_AFTER


def _written_word(word: str) -> str:
    lowered = unicodedata.normalize("NFKC", word.lower())
    return "".join(c for c in lowered if c.isalnum())


def _pieces(reading: str, start: int, end: int) -> list[Piece]:
    """Split one reading into characters and words, each with the offsets of the reading's span."""
    found = []
    for slot, character, word in _PIECE.findall(reading):
        if written := tuple(slot) or (character or _written_word(word),):
            found += [(written, start, end)] if written[0] else []
    return found


def _to_units(pieces: list[Piece]) -> list[Unit]:
    """Convert pieces to units; adjacent Chinese characters are pronounced as one text."""
    found, run = [], []
    for piece in [*pieces, None]:
        if piece is not None and is_han(piece[0][0]):
            run.append(piece)
            continue
        if run:
            found += _han_units(run)
            run = []
        if piece is not None:
            found.append(Unit(*piece, optional=piece[0][0] in FILLERS))
    return found


@functools.lru_cache(maxsize=8192)
def sentence(raw: str, language: str = "zh") -> Sentence:
    """Segment a raw text, reference or transcript, into units.

    Args:
        raw: any text; see :func:`tts_grpo.text.spoken.spoken_form`.
        language: "zh" or "en".
    """
    spans, usual, sizes = spoken_form(raw, language).spans, [], []
    for span in spans:
        pieces = _pieces(span.readings[0], span.start, span.end)
        usual += pieces
        sizes.append((span, len(pieces)))
    units, groups, at = _to_units(usual), [], 0
    for span, size in sizes:
        first = tuple(units[at : at + size])
        at += size
        others = (tuple(_to_units(_pieces(reading, span.start, span.end))) for reading in span.readings[1:])
        alternatives = tuple(dict.fromkeys((first, *others)))
        if alternatives != ((),):
            groups.append(alternatives)
    return Sentence(raw, tuple(groups), tuple(units))


def pinyin(text: str, tones: bool, language: str = "zh") -> list[str]:
    """Return the usual pronunciation of ``text``: one syllable per Chinese character, other words unchanged.

    Args:
        text: any text.
        tones: whether syllables have their tone as a digit ("ni3"; neutral tone 5) or no tone ("ni").
        language: as in :func:`sentence`.
    """
    units = sentence(text, language).units
    return [(unit.sound if tones else toneless(unit.sound)) or unit.text for unit in units]


def toneless(sound: str) -> str:
    """Return a syllable without its tone."""
    return sound.rstrip("12345")
