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
        reference, hypothesis: the two units; None for an insertion or a deletion.
    """

    kind: str
    reference: Sound | None
    hypothesis: Sound | None


def _sound(unit: Unit | None) -> Sound | None:
    return unit and Sound(unit.text, unit.sound or unit.text, toneless(unit.sound) or unit.text)


def _kind(pair: Pair) -> str:
    reference, hypothesis = pair.reference, pair.hypothesis
    if reference is None or hypothesis is None:
        return "optional" if not pair.error else "missing" if hypothesis is None else "extra"
    if pair.error:
        return "other"
    if not reference.toned or set(reference.written) & set(hypothesis.written):
        return "same"
    return "homophone" if reference.toned & hypothesis.toned else "tone"


def cells(target_text: str, hypothesis: str, language: str) -> list[Cell]:
    """Return the alignment of ``pinyin_error_rate_toneless``, or of the words of English, as pairs with their kind."""
    pairs = align_texts(target_text, hypothesis, "toneless", language).pairs
    return [Cell(_kind(pair), _sound(pair.reference), _sound(pair.hypothesis)) for pair in pairs]
