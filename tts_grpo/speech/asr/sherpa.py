"""Paraformer and SenseVoice as ONNX models, through sherpa-onnx."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from tts_grpo.speech.asr.recogniser import MIN_SAMPLES
from tts_grpo.speech.audio import ASR_HZ


def sherpa_model(folder: Path) -> Path:
    """The ONNX file of a folder of sherpa-onnx.

    Raises:
        ValueError: there is none.
    """
    for name in ("model.int8.onnx", "model.onnx"):
        if (folder / name).exists():
            return folder / name
    raise ValueError(f"{folder}: no model.int8.onnx or model.onnx here: not a folder of sherpa-onnx")


class SherpaOnnx:
    """A Paraformer or SenseVoice model as sherpa-onnx has them, on the CPU.

    Args:
        model_dir: folder with tokens.txt and model.int8.onnx or model.onnx; the first, if both are there, as in the
            original recipe.
        language: "zh" or "en", for SenseVoice.

    Raises:
        ValueError: a file is missing, or the model is neither of the two.
    """

    def __init__(self, model_dir: str | Path, language: str = "zh"):
        import onnx
        import sherpa_onnx

        folder = Path(model_dir)
        path, tokens = sherpa_model(folder), folder / "tokens.txt"
        if not tokens.exists():
            raise ValueError(f"{folder}: no tokens.txt here: not a folder of sherpa-onnx")
        # sherpa-onnx ends the process on a model of another kind.
        kinds = {p.key: p.value for p in onnx.load(str(path), load_external_data=False).metadata_props}
        kind = kinds.get("model_type", "")
        settings = {"tokens": str(tokens), "num_threads": torch.get_num_threads()}
        if "paraformer" in kind:
            self._model = sherpa_onnx.OfflineRecognizer.from_paraformer(paraformer=str(path), **settings)
        elif kind.startswith("sense_voice"):
            self._model = sherpa_onnx.OfflineRecognizer.from_sense_voice(
                model=str(path), language=language, use_itn=False, **settings
            )
        else:
            raise ValueError(f"{path}: model_type {kind!r} in its metadata: neither Paraformer nor SenseVoice")

    def transcribe(self, recordings: Sequence[np.ndarray]) -> list[str]:
        """Transcripts of recordings, each float32 (T,) at 16 kHz; "" for one shorter than an analysis frame."""
        return [self._hear(np.asarray(r, dtype=np.float32)) if len(r) >= MIN_SAMPLES else "" for r in recordings]

    def _hear(self, recording: np.ndarray) -> str:
        # One at a time: in a batch the padding of the shorter ones may be heard as text.
        stream = self._model.create_stream()
        stream.accept_waveform(ASR_HZ, recording)
        self._model.decode_stream(stream)
        return stream.result.text
