"""Pack the corpus's FLAC files into one array (this script), and draw batches from it on the training device."""

import argparse
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from pypinyin.contrib.tone_convert import to_finals_tone3, to_initials

from tts_grpo.speech.audio import ASR_HZ
from tts_grpo.speech.tiny.codec import SAMPLES_PER_TOKEN
from tts_grpo.text.jsonl import read_jsonl, write_jsonl

MAX_JOINED_S = 12.0  # recordings that are joined for a recogniser's training have at most so many seconds
SHIFTS = (0, 160, 320, 480)  # samples skipped at the start of an utterance; each shift gives different tokens


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, required=True, help="folder with texts.jsonl and audio/")
    return parser.parse_args(argv)


def syllable_units(syllables: list[str]) -> list[str]:
    """Initials and toned finals: ["ni3"] -> ["n", "i3"]. There are so few of them that CTC learns without a plateau."""
    units = []
    for syllable in syllables:
        initial = to_initials(syllable, strict=False)
        units += [initial] if initial else []
        units.append(to_finals_tone3(syllable, strict=False, neutral_tone_with_five=True))
    return units


def pack(work_dir: Path) -> None:
    """Write audio.npy (all recordings concatenated, int16) and corpus.jsonl (texts with their offsets in it)."""
    rows = read_jsonl(work_dir / "texts.jsonl")
    missing = [row["id"] for row in rows if not (work_dir / "audio" / f"{row['id']}.flac").exists()]
    if missing:
        raise SystemExit(f"{len(missing)} recordings are missing, the first is {missing[0]}: run the corpus stage")
    with ThreadPoolExecutor() as pool:
        speech = list(pool.map(lambda row: sf.read(work_dir / "audio" / f"{row['id']}.flac", dtype="int16")[0], rows))
    start = 0
    for row, samples in zip(rows, speech, strict=True):
        row |= {"start": start, "samples": len(samples), "units": syllable_units(row["syllables"])}
        start += len(samples)
    np.save(work_dir / "audio.npy", np.concatenate(speech))
    write_jsonl(work_dir / "corpus.jsonl", rows)
    print(f"{len(rows)} recordings, {start / ASR_HZ / 3600:.2f} hours packed")


class Corpus:
    """Recordings, texts and units of the corpus.

    Attributes:
        rows: the lines of corpus.jsonl.
        audio: int16, all recordings concatenated, on the device.
        samples: int64 (N,), length of each recording in samples.
        unit_ids: CTC targets of each recording, numbered from 1.
    """

    def __init__(self, work_dir: Path, device: str, max_utterance_s: float = math.inf):
        self.device = device
        self.rows = read_jsonl(work_dir / "corpus.jsonl")
        self.audio = torch.from_numpy(np.load(work_dir / "audio.npy")).to(device)
        self.samples = np.array([row["samples"] for row in self.rows])
        self.starts = np.array([row["start"] for row in self.rows])
        self.splits = np.array([row["split"] for row in self.rows])
        self.recognisers = np.array([row.get("recogniser", "") for row in self.rows])
        self.short = self.samples <= max_utterance_s * ASR_HZ
        self.unit_names = sorted({unit for row in self.rows for unit in row["units"]})
        unit_ids = {unit: i + 1 for i, unit in enumerate(self.unit_names)}
        self.unit_ids = [[unit_ids[unit] for unit in row["units"]] for row in self.rows]

    def indices(self, split: str, recogniser: str | None = None) -> np.ndarray:
        """Row numbers of a split, or only of the half of it that one recogniser may be trained on."""
        chosen = (self.splits == split) & self.short
        return np.flatnonzero(chosen if recogniser is None else chosen & (self.recognisers == recogniser))

    def speech(self, rows: np.ndarray, shifts, audio: torch.Tensor | None = None):
        """A batch of recordings, without their first ``shifts`` samples.

        Args:
            rows: (B,) row numbers.
            shifts: (B,) or one number, samples skipped at the start.
            audio: packed audio to read instead of the original; its recordings have the same lengths.

        Returns:
            float32 (B, T), zero-padded to whole tokens, and int64 (B,) lengths in samples.
        """
        shifts = np.broadcast_to(np.asarray(shifts), rows.shape)
        lens = self.samples[rows] - shifts
        size = math.ceil(lens.max() / SAMPLES_PER_TOKEN) * SAMPLES_PER_TOKEN
        first = torch.as_tensor(self.starts[rows] + shifts, device=self.device)
        lens = torch.as_tensor(lens, device=self.device)
        position = torch.arange(size, device=self.device)
        source = self.audio if audio is None else audio
        index = (first[:, None] + position).clamp(max=len(source) - 1)
        return source[index].float() / 32768 * (position < lens[:, None]), lens

    def targets(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Concatenated CTC targets of rows, and their lengths."""
        return concatenated([self.unit_ids[row] for row in rows])

    def batches(self, rows: np.ndarray, batch_s: float, rng: np.random.Generator):
        """Endless batches of recordings of similar length, as row numbers; at most ``batch_s`` padded seconds each."""
        while True:
            order = rng.permutation(rows)
            for batch in shuffled_batches(self.samples[order], batch_s, rng):
                yield order[batch]

    def joined_batches(self, rows: np.ndarray, batch_s: float, shares: Sequence[float], rng: np.random.Generator):
        """Endless batches like those of :meth:`batches`, of recordings to be joined, as lists of arrays of row numbers.

        Args:
            rows: the recordings; one epoch has each once.
            batch_s: most padded seconds of a batch, without pauses.
            shares: relative frequencies of one, two, ... recordings in a row. No more are joined than ``MAX_JOINED_S``.
            rng: random numbers.
        """
        while True:
            groups, group, number = [], [], 0
            for row in rng.permutation(rows):
                full = self.samples[[*group, row]].sum() > MAX_JOINED_S * ASR_HZ
                if group and (full or len(group) == number):
                    groups.append(np.array(group))
                    group = []
                if not group:
                    number = 1 + rng.choice(len(shares), p=np.divide(shares, sum(shares)))
                group.append(row)
            groups.append(np.array(group))
            lens = np.array([self.samples[group].sum() for group in groups])
            for batch in shuffled_batches(lens, batch_s, rng):
                yield [groups[i] for i in batch]

    def joined_speech(
        self, groups: Sequence[np.ndarray], shift: int, pause_s: tuple[float, float], rng: np.random.Generator,
        audio: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """:meth:`speech` of groups of rows: the recordings of a group in a row, with random pauses between them."""
        rows = np.concatenate(groups)
        speech, _ = self.speech(rows, shift, audio)
        number = np.array([len(group) for group in groups])
        lens = self.samples[rows] - shift
        steps = lens + (rng.uniform(*pause_s, len(rows)) * ASR_HZ).astype(np.int64)
        starts = np.concatenate([np.cumsum(part) - part for part in np.split(steps, np.cumsum(number)[:-1])])
        totals = (starts + lens)[np.cumsum(number) - 1]
        size = math.ceil(totals.max() / SAMPLES_PER_TOKEN) * SAMPLES_PER_TOKEN
        out = torch.zeros(len(groups) * size, device=self.device)
        first = torch.as_tensor(np.repeat(np.arange(len(groups)) * size, number) + starts, device=self.device)
        index = first[:, None] + torch.arange(speech.shape[1], device=self.device)
        # Beyond its end, a recording is zero, so that adding it does not change what follows.
        out.index_add_(0, index.clamp(max=len(out) - 1).flatten(), speech.flatten())
        return out.view(len(groups), size), torch.as_tensor(totals, device=self.device)


def concatenated(sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """CTC targets: all labels in a row, and the length of each sequence."""
    return torch.tensor([label for s in sequences for label in s]), torch.tensor([len(s) for s in sequences])


def shuffled_batches(lens: np.ndarray, batch_s: float, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Batches of one epoch in random order, as indices of ``lens`` (in samples); see :meth:`Corpus.batches`."""
    # Sort by length with random jitter, so that batches differ from epoch to epoch.
    order = np.argsort(lens * rng.uniform(0.9, 1.1, len(lens)), kind="stable")
    batches, batch, longest = [], [], 0
    for i in order:
        longest = max(longest, lens[i])
        if batch and longest * (len(batch) + 1) > batch_s * ASR_HZ:
            batches.append(np.array(batch))
            batch, longest = [], lens[i]
        batch.append(i)
    batches.append(np.array(batch))
    for i in rng.permutation(len(batches)):
        yield batches[i]


def main(argv=None):
    pack(get_args(argv).work_dir)


if __name__ == "__main__":
    main()
