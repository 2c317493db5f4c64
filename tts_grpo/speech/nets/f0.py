"""F0 metrics: median, range and standard deviation."""

import importlib.metadata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from tts_grpo.speech.audio import ASR_HZ

MIN_VOICED_FRAMES = 10  # frames of 16 ms; F0 statistics of fewer frames are meaningless


class F0Metrics:
    """F0 by SwiftF0 (Nieradzik, arXiv:2508.18440), whose network is part of the package swift-f0."""

    def __init__(self):
        from swift_f0 import SwiftF0

        self.name = f"SwiftF0 {importlib.metadata.version('swift-f0')}"
        self._detector = SwiftF0(threads=1, spin=False)
        self._pool = ThreadPoolExecutor(torch.get_num_threads())

    def measure_all(self, recordings: Sequence[np.ndarray]) -> list[dict[str, float | None]]:
        """:meth:`measure` for several recordings, on as many threads as torch uses."""
        return list(self._pool.map(self.measure, recordings))

    def measure(self, speech: np.ndarray) -> dict[str, float | None]:
        """F0 metrics of a recording, float32 (T,) at 16 kHz; None if it has too few voiced frames."""
        result = self._detector.detect(speech, ASR_HZ, fmin=60.0, fmax=600.0)
        f0 = result.pitch_hz[result.confidence >= 0.5]
        if len(f0) < MIN_VOICED_FRAMES:
            return dict.fromkeys(("f0_median_hz", "f0_range_semitones", "f0_std_semitones"))
        low, median, high = np.percentile(f0, (5, 50, 95))
        return {
            "f0_median_hz": float(median),
            "f0_range_semitones": float(12 * np.log2(high / low)),
            "f0_std_semitones": float(np.std(12 * np.log2(f0))),
        }
