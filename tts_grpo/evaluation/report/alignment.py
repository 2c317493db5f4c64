"""Heard against said, unit by unit, with how far apart they sound."""

import dataclasses

from tts_grpo.text.errors import Pair, align_texts
from tts_grpo.text.units import Unit, toneless


@dataclasses.dataclass(frozen=True)
class Sound:
    """A Chinese character or a word, and how it sounds with and without tone."""

    written: str
    toned: str
    toneless: str


@dataclasses.dataclass(frozen=True)
class Cell:
    """One place of an alignment.

    Attributes:
        kind: "same"; "homophone" (other character, same sound); "tone" (differs in tone only); "other"; "missing"
            (said, not heard); "extra" (heard, not said); "optional" (erhua or a filler that only one side has).
        said, heard: the units, None where there is none.
    """

    kind: str
    said: Sound | None
    heard: Sound | None


def _sound(unit: Unit | None) -> Sound | None:
    return unit and Sound(unit.text, unit.sound or unit.text, toneless(unit.sound) or unit.text)


def _kind(pair: Pair) -> str:
    said, heard = pair.said, pair.heard
    if said is None or heard is None:
        return "optional" if not pair.error else "missing" if heard is None else "extra"
    if pair.error:
        return "other"
    if not said.toned or set(said.written) & set(heard.written):
        return "same"
    return "homophone" if said.toned & heard.toned else "tone"


def cells(target_text: str, hypothesis: str, language: str = "zh") -> list[Cell]:
    """The alignment of ``pinyin_error_rate_toneless``, with what stands at each place."""
    pairs = align_texts(target_text, hypothesis, "toneless", language).pairs
    return [Cell(_kind(pair), _sound(pair.said), _sound(pair.heard)) for pair in pairs]
