"""Paraformer and SeACo-Paraformer through funasr."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tts_grpo.speech.asr.funasr_model import load_funasr
from tts_grpo.speech.asr.recogniser import recognise_in_batches
from tts_grpo.speech.model_folders import PARAFORMER_FILES, language_fault


class Paraformer:
    """A recogniser of the Paraformer family (Paraformer, SeACo-Paraformer), such as funasr's "paraformer-zh".

    Args:
        model_dir: folder with config.yaml, model.pt, am.mvn, tokens.json and configuration.json.
        device: torch device.
        batch_size: maximum number of recordings per batch.

    Raises:
        ValueError: see :func:`load_funasr`.
    """

    def __init__(self, model_dir: str | Path, device: str = "cpu", batch_size: int = 32):
        self.batch_size, self.model_dir = batch_size, model_dir
        self._model = load_funasr(model_dir, device, PARAFORMER_FILES)

    def transcribe(self, recordings: Sequence[np.ndarray], languages: Sequence[str] | None = None) -> list[str]:
        """Transcripts of recordings, each float32 (T,) at 16 kHz; "" if no speech is recognised.

        Raises:
            ValueError: the vocabulary has no words of a language. (The network is not told the language.)
        """
        for language in set(languages or ()):
            if fault := language_fault(self.model_dir, language):
                raise ValueError(fault)
        return recognise_in_batches(recordings, self._decode, self.batch_size, "")

    def _decode(self, batch: list[np.ndarray]) -> list[str]:
        results = self._model.generate(input=batch, batch_size=len(batch), cache={})
        texts = [result.get("text", "") for result in results]
        # If no speech is recognised in a whole batch, funasr returns one result for it, or none (SeACo-Paraformer).
        if not any(texts):
            return [""] * len(batch)
        if len(texts) != len(batch):
            raise RuntimeError(f"funasr returned {len(texts)} transcripts for {len(batch)} recordings")
        return texts
