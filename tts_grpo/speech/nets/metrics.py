"""Measure all metrics that need a network on one recording."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tts_grpo.speech.nets.dnsmos import DnsMos
from tts_grpo.speech.nets.f0 import F0Metrics
from tts_grpo.speech.nets.speaker import Resemblyzer, SpeakerSimilarity, WavLm


class NetworkMetrics:
    """Measures all metrics of ``NETWORK_METRICS``."""

    def __init__(self, device: str = "cpu", speaker_model_dir: Path | None = None, reference: Sequence[Path] = ()):
        encoder = WavLm(speaker_model_dir, device) if speaker_model_dir else Resemblyzer(device)
        self._similarity, self._dnsmos, self._f0 = SpeakerSimilarity(encoder, reference), DnsMos(), F0Metrics(device)

    def model(self, name: str) -> str | None:
        """Name of the network that computes a metric; None if it needs no network."""
        for prefix, network in (("speaker", self._similarity), ("dnsmos", self._dnsmos), ("f0", self._f0)):
            if name.startswith(prefix):
                return network.name
        return None

    def measure(self, speech: np.ndarray, prompt_audio: str | None) -> dict[str, float | None]:
        """Metrics of one recording, float32 (T,) at 16 kHz; ``prompt_audio`` is the path of its prompt recording."""
        return self._similarity.measure(speech, prompt_audio) | self._dnsmos.measure(speech) | self._f0.measure(speech)
