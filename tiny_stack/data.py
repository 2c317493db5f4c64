"""Pack the corpus's FLAC files into one array (this script), and draw batches from it on the training device."""

import argparse
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from pypinyin.contrib.tone_convert import to_finals_tone3, to_initials

from tts_grpo.speech.audio import ASR_HZ
from tts_grpo.speech.tiny.codec import SAMPLES_PER_TOKEN
from tts_grpo.text.jsonl import read_jsonl, write_jsonl

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
        sequences = [self.unit_ids[row] for row in rows]
        return torch.tensor([u for s in sequences for u in s]), torch.tensor([len(s) for s in sequences])

    def batches(self, rows: np.ndarray, batch_s: float, rng: np.random.Generator):
        """Endless batches of recordings of similar length, as row numbers; at most ``batch_s`` padded seconds each."""
        while True:
            order = rng.permutation(rows)
            # Sort by length with random jitter, so that batches differ from epoch to epoch.
            order = order[np.argsort(self.samples[order] * rng.uniform(0.9, 1.1, len(order)), kind="stable")]
            batches, batch, longest = [], [], 0
            for row in order:
                longest = max(longest, self.samples[row])
                if batch and longest * (len(batch) + 1) > batch_s * ASR_HZ:
                    batches.append(np.array(batch))
                    batch, longest = [], self.samples[row]
                batch.append(row)
            batches.append(np.array(batch))
            for i in rng.permutation(len(batches)):
                yield batches[i]


def main(argv=None):
    pack(get_args(argv).work_dir)


if __name__ == "__main__":
    main()
