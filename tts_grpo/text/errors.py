"""Alignments, error counts and error rates of transcripts against reference texts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tts_grpo.text.units import Sentence, Unit, sentence

MATCHES = ("toned", "toneless", "written")
MAX_TRIES = 48  # at most this many alternative readings of a transcript's numbers are aligned


@dataclass(frozen=True)
class ErrorCounts:
    """Numbers of edits that turn a reference into a hypothesis, and the length of the reference in units."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    length: int = 0

    def __add__(self, other: "ErrorCounts") -> "ErrorCounts":
        return ErrorCounts(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.length + other.length,
        )

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    def clipped(self) -> "ErrorCounts":
        """The counts with so few insertions that the rate is at most 1, as after a transcript that loops."""
        fewest = min(self.insertions, max(0, self.length - self.substitutions - self.deletions))
        return replace(self, insertions=fewest)

    @property
    def rate(self) -> float:
        """Errors per reference unit; may exceed 1.

        Raises:
            ValueError: the reference is empty, so the rate is undefined.
        """
        if self.length == 0:
            raise ValueError("no error rate against an empty reference")
        return self.errors / self.length


@dataclass(frozen=True)
class Pair:
    """One pair of aligned units.

    Attributes:
        reference, hypothesis: the two units; None for an insertion or a deletion. If the transcript splits a word,
            ``hypothesis`` is its first part; if it joins letters into one word, ``hypothesis`` is the letter.
        error: 1, or 0 if the units match or the unpaired unit is optional.
        place: index of the unit in the reference's usual reading to which the pair belongs.
    """

    reference: Unit | None
    hypothesis: Unit | None
    error: int
    place: int


@dataclass(frozen=True)
class Alignment:
    """Aligned pairs in order, and the number of units in the reference's usual reading."""

    pairs: tuple[Pair, ...]
    length: int

    @property
    def errors(self) -> int:
        return sum(pair.error for pair in self.pairs)

    @property
    def counts(self) -> ErrorCounts:
        wrong = [pair for pair in self.pairs if pair.error]
        deletions, insertions = sum(p.hypothesis is None for p in wrong), sum(p.reference is None for p in wrong)
        return ErrorCounts(len(wrong) - deletions - insertions, deletions, insertions, self.length)


def _keys(unit: Unit, match: str) -> frozenset[str]:
    sounds = unit.toned if match == "toned" else unit.toneless if match == "toneless" else ()
    return frozenset(unit.written) | frozenset(sounds)


class _HypothesisUnits:
    """The units of a transcript on an axis of character positions, so that words can match across spaces.

    A Chinese character takes one position, a word one per letter. The unit at position p ends at ``ends[p]``.
    """

    def __init__(self, units: Sequence[Unit], match: str):
        self.units = units
        sizes = [1 if unit.toned else len(unit.text) for unit in units]
        self.bounds = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.size = int(self.bounds[-1])
        self.unit_at = np.repeat(np.arange(len(units)), sizes)
        self.ends = self.bounds[1:][self.unit_at] if units else np.zeros(0, np.int64)
        self.costs = np.concatenate([[0], np.cumsum([0 if unit.optional else 1 for unit in units])]).astype(np.int64)
        self.inside = np.setdiff1d(np.arange(self.size), self.bounds)
        self.letters = "".join("\0" if unit.toned else unit.text for unit in units)
        self.by_key: dict[str, list[int]] = {}
        for unit, place in zip(units, self.bounds.tolist()):
            for key in _keys(unit, match) if unit.toned else ():
                self.by_key.setdefault(key, []).append(place)

    def matches(self, unit: Unit, match: str) -> tuple[list[int], int]:
        """Return the positions in the transcript at which a reference unit matches, and its length in positions."""
        if unit.toned:
            return sorted({place for key in _keys(unit, match) for place in self.by_key.get(key, ())}), 1
        word, found, at = unit.text, [], -1
        while (at := self.letters.find(word, at + 1)) >= 0:
            found.append(at)
        return found, len(word)

    def insert(self, row: np.ndarray) -> None:
        """Relax a row of edit costs, in place, with insertions: transcript units that the reference lacks."""
        if len(self.inside):
            np.minimum.at(row, self.ends[self.inside], row[self.inside] + 1)
        at_bounds = np.minimum.accumulate(row[self.bounds] - self.costs) + self.costs
        row[self.bounds] = np.minimum(row[self.bounds], at_bounds)

    def step(self, row: np.ndarray, unit: Unit, match: str) -> np.ndarray:
        """Return the next row of edit costs, after one more reference unit."""
        new = row + int(not unit.optional)
        if len(self.inside):
            np.minimum.at(new, self.ends, row[:-1] + 1)
        elif self.size:
            np.minimum(new[1:], row[:-1] + 1, out=new[1:])
        places, size = self.matches(unit, match)
        if places:
            ends = np.array(places) + size
            new[ends] = np.minimum(new[ends], row[places])
        self.insert(new)
        return new

    def part(self, begin: int, end: int) -> Unit:
        """Return a unit for the transcript from ``begin`` to ``end``: the unit at ``begin`` if that is whole."""
        unit = self.units[self.unit_at[begin]]
        first = int(self.bounds[self.unit_at[begin]])
        if unit.toned or (begin == first and end >= int(self.ends[begin])):
            return unit
        start = min(unit.start + begin - first, unit.end - 1)
        return replace(unit, written=(self.letters[begin:end],), start=start)


class _Table:
    """The edit cost table (dynamic programming) of a reference and a transcript, and the backtrace through it."""

    def __init__(self, reference: Sentence, hypothesis: _HypothesisUnits, match: str):
        self.reference, self.hypothesis, self.match = reference, hypothesis, match
        row = np.full(hypothesis.size + 1, 1 << 30, np.int64)
        row[0] = 0
        hypothesis.insert(row)
        self.first, self.groups = row, []  # per group: rows of each alternative, best one per position
        for alternatives in reference.groups:
            chains = []
            for units in alternatives:
                rows = [row]
                for unit in units:
                    rows.append(hypothesis.step(rows[-1], unit, match))
                chains.append(rows)
            ends = np.stack([rows[-1] for rows in chains])
            row, taken = ends.min(0), ends.argmin(0)
            self.groups.append((chains, taken))

    def pairs(self) -> list[Pair]:
        """Return an alignment with the least cost."""
        backwards, at, base = [], self.hypothesis.size, len(self.reference.units)
        groups = zip(reversed(self.reference.groups), reversed(self.groups), strict=True)
        for alternatives, (chains, taken) in groups:
            units, rows = alternatives[taken[at]], chains[taken[at]]
            base -= len(alternatives[0])
            for i in range(len(units) - 1, -1, -1):
                place = base + i * len(alternatives[0]) // len(units) if alternatives[0] else base - 1
                at = self._unit(rows[i], rows[i + 1], units[i], at, max(0, place), backwards)
        while at:
            at = self._insertion(self.first, at, 0, backwards)
        return backwards[::-1]

    def _unit(self, before: np.ndarray, after: np.ndarray, unit: Unit, at: int, place: int, pairs: list[Pair]) -> int:
        """Backtrace over one reference unit and the insertions after it; return the position before the unit."""
        places, size = self.hypothesis.matches(unit, self.match)
        while True:
            if at - size in places and before[at - size] == after[at]:
                pairs.append(Pair(unit, self.hypothesis.part(at - size, at), 0, place))
                return at - size
            drop = int(not unit.optional)
            if before[at] + drop == after[at]:
                pairs.append(Pair(unit, None, drop, place))
                return at
            for begin in self._begins(at):
                if before[begin] + 1 == after[at]:
                    pairs.append(Pair(unit, self.hypothesis.part(begin, at), 1, place))
                    return begin
            at = self._insertion(after, at, place, pairs)

    def _begins(self, at: int) -> range:
        """Return the positions at which a unit that ends at ``at``, or its remainder, can begin; empty if none ends."""
        if not at or self.hypothesis.ends[at - 1] != at:
            return range(0)
        return range(int(self.hypothesis.bounds[self.hypothesis.unit_at[at - 1]]), at)

    def _insertion(self, row: np.ndarray, at: int, place: int, pairs: list[Pair]) -> int:
        for begin in self._begins(at):
            whole = begin == self.hypothesis.bounds[self.hypothesis.unit_at[begin]]
            cost = 0 if whole and self.hypothesis.units[self.hypothesis.unit_at[begin]].optional else 1
            if row[begin] + cost == row[at]:
                pairs.append(Pair(None, self.hypothesis.part(begin, at), cost, place))
                return begin
        raise AssertionError(f"no alignment found for {self.reference.raw!r}: please report this text")


def _same(reference: Sequence[Unit], hypothesis: Sequence[Unit], match: str) -> bool:
    return len(reference) == len(hypothesis) and all(
        unit.written[0] == other.written[0]
        or bool(unit.toned and other.toned and not _keys(unit, match).isdisjoint(_keys(other, match)))
        for unit, other in zip(reference, hypothesis, strict=True)
    )


def _align_units(reference: Sentence, units: Sequence[Unit], match: str) -> Alignment:
    if units and _same(reference.units, units, match):
        pairs = tuple(Pair(*both, 0, i) for i, both in enumerate(zip(reference.units, units, strict=True)))
        return Alignment(pairs, len(reference.units))
    if not units:  # all units of the usual reading are deletions, even if another reading is shorter
        pairs = tuple(Pair(unit, None, 1, i) for i, unit in enumerate(reference.units))
        return Alignment(pairs, len(reference.units))
    return Alignment(tuple(_Table(reference, _HypothesisUnits(units, match), match).pairs()), len(reference.units))


def align_sentences(reference: Sentence, hypothesis: Sentence, match: str) -> Alignment:
    """Return the alignment with the fewest errors over all accepted readings of the reference.

    A transcript unit is correct if it is written like the reference unit, or sounds like it (``match``). Words match by
    their letters, wherever the recogniser put spaces. Numbers in a transcript are taken in their usual reading, or in
    another one if that gives fewer errors.

    Args:
        reference: the reference text.
        hypothesis: the transcript.
        match: "toned" or "toneless" compare pronunciations; "written" compares characters, so homophones are errors.
    """
    best = _align_units(reference, hypothesis.units, match)
    chosen, tries = [group[0] for group in hypothesis.groups], 0
    for i, alternatives in enumerate(hypothesis.groups):
        for other in alternatives[1:]:
            if not best.errors or tries == MAX_TRIES:
                return best
            tries += 1
            units = [unit for group in (*chosen[:i], other, *chosen[i + 1 :]) for unit in group]
            found = _align_units(reference, units, match)
            if found.errors < best.errors:
                best, chosen[i] = found, other
    return best


def align_texts(ground_truth: str, hypothesis: str, match: str, language: str = "zh") -> Alignment:
    """:func:`align_sentences` of raw texts."""
    return align_sentences(sentence(ground_truth, language), sentence(hypothesis, language), match)


def locate_errors(alignment: Alignment, onsets_s: Sequence[float], duration_s: float) -> tuple[list[int], list[float]]:
    """Return the errors at each unit of the reference's usual reading, and the onset of each unit in the audio.

    An insertion counts at the reference unit before it (at the first unit, if there is none before). The onset of a
    deleted unit is interpolated between its neighbours. The errors sum to the number of edits.

    Args:
        alignment: alignment with N reference units.
        onsets_s: onset of each character of the raw transcript, in seconds.
        duration_s: duration of the audio, in seconds.

    Returns:
        N error counts, and N onsets in seconds, ascending.

    Raises:
        ValueError: ``onsets_s`` is too short for the transcript.
    """
    errors, onset_at = [0] * alignment.length, {-1: 0.0, alignment.length: duration_s}
    for pair in alignment.pairs:
        errors[pair.place] += pair.error
        if pair.hypothesis is None:
            continue
        if pair.hypothesis.start >= len(onsets_s):
            raise ValueError(
                f"the transcript has a unit at character {pair.hypothesis.start}, but only {len(onsets_s)} onsets"
            )
        if pair.reference is not None:
            onset_at.setdefault(pair.place, onsets_s[pair.hypothesis.start])
    places = sorted(onset_at)
    times = np.maximum.accumulate([onset_at[place] for place in places])
    return errors, np.interp(range(alignment.length), places, times).tolist()


def pinyin_errors(ground_truth: str, hypothesis: str, tones: bool, language: str = "zh") -> ErrorCounts:
    """Count substitutions, deletions and insertions of syllables and words between two texts."""
    return align_texts(ground_truth, hypothesis, "toned" if tones else "toneless", language).counts


def pinyin_error_rate(ground_truths: Sequence[str], hypotheses: Sequence[str], tones: bool) -> float:
    """Return total errors over total reference units (syllables and words) for paired texts.

    Raises:
        ValueError: the lists differ in length, or no ground truth has a unit.
    """
    pairs = zip(ground_truths, hypotheses, strict=True)
    return sum((pinyin_errors(truth, hyp, tones) for truth, hyp in pairs), ErrorCounts()).rate
