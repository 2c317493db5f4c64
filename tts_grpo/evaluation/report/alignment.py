"""Alignment of transcript and reference, unit by unit, with the kind of each difference in pronunciation."""

import dataclasses

from tts_grpo.text.errors import Pair, align_texts
from tts_grpo.text.units import Unit, toneless


@dataclasses.dataclass(frozen=True)
class Sound:
    """A Chinese character or a word, and its pronunciation with and without tone."""

    written: str
    toned: str
    toneless: str


@dataclasses.dataclass(frozen=True)
class Cell:
    """One pair of aligned units.

    Attributes:
        kind: "same"; "homophone" (another character with the same pronunciation); "tone" (only the tone differs);
            "other" (any other substitution); "missing" (deletion); "extra" (insertion); "optional" (erhua or a filler
            that only one side has).
        said, heard: the reference unit and the transcript unit; None for an insertion or a deletion.
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
    """Return the alignment of ``pinyin_error_rate_toneless`` as pairs of units with their kind."""
    pairs = align_texts(target_text, hypothesis, "toneless", language).pairs
    return [Cell(_kind(pair), _sound(pair.said), _sound(pair.heard)) for pair in pairs]
