"""Heard against said, unit by unit, with how far apart they sound."""

import dataclasses

from tts_grpo.text.errors import align
from tts_grpo.text.units import pinyin, written_units


@dataclasses.dataclass(frozen=True)
class Unit:
    """A Chinese character or another word, and how it sounds with and without tone."""

    written: str
    toned: str
    toneless: str


@dataclasses.dataclass(frozen=True)
class Cell:
    """One place of an alignment.

    Attributes:
        kind: "same"; "homophone" (other character, same sound); "tone" (differs in tone only); "other"; "missing"
            (said, not heard); "extra" (heard, not said).
        said, heard: the units, None where there is none.
    """

    kind: str
    said: Unit | None
    heard: Unit | None


def units(text: str) -> list[Unit]:
    """The units of a text in order, as the pinyin error rate counts them."""
    toned, toneless = pinyin(text, tones=True), pinyin(text, tones=False)
    written = written_units(text)
    if len(written) != len(toned):  # a sign that pypinyin reads in another way than we split: show the sound alone
        written = toned
    return [Unit(*parts) for parts in zip(written, toned, toneless, strict=True)]


def _kind(said: Unit | None, heard: Unit | None) -> str:
    if heard is None:
        return "missing"
    if said is None:
        return "extra"
    if said.toneless != heard.toneless:
        return "other"  # also of the same character, where its sound depends on its neighbours
    if said.toned != heard.toned:
        return "tone"
    return "same" if said.written == heard.written else "homophone"


def cells(target_text: str, hypothesis: str) -> list[Cell]:
    """The alignment of least edits of the toneless syllables, with the characters at each place."""
    said, heard = units(target_text), units(hypothesis)
    pairs = align([unit.toneless for unit in said], [unit.toneless for unit in heard])
    said_in_turn, heard_in_turn = iter(said), iter(heard)
    aligned = []
    for left, right in pairs:
        a = next(said_in_turn) if left is not None else None
        b = next(heard_in_turn) if right is not None else None
        aligned.append(Cell(_kind(a, b), a, b))
    return aligned
