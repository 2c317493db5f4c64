"""Measure all metrics that need a network on one recording."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tts_grpo.speech.nets.dnsmos import DnsMos
from tts_grpo.speech.nets.melody import Melody
from tts_grpo.speech.nets.speaker import Resemblyzer, Similarity, WavLm


class CostlyFigures:
    """Measures all metrics of ``COSTLY``."""

    def __init__(self, device: str = "cpu", speaker_model_dir: Path | None = None, reference: Sequence[Path] = ()):
        encoder = WavLm(speaker_model_dir, device) if speaker_model_dir else Resemblyzer(device)
        self._similarity, self._mos, self._melody = Similarity(encoder, reference), DnsMos(), Melody()

    def model(self, name: str) -> str | None:
        """Name of the network that computes a metric; None if it needs no network."""
        for prefix, network in (("speaker", self._similarity), ("dnsmos", self._mos), ("f0", self._melody)):
            if name.startswith(prefix):
                return network.name
        return None

    def measure(self, speech: np.ndarray, prompt_audio: str | None) -> dict[str, float | None]:
        """Metrics of one recording, float32 (T,) at 16 kHz; ``prompt_audio`` is the path of its prompt recording."""
        return self._similarity.measure(speech, prompt_audio) | self._mos.measure(speech) | self._melody.measure(speech)
