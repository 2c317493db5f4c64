"""Paraformer and SenseVoice as ONNX models, with sherpa-onnx."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from tts_grpo.speech.asr.recogniser import MIN_SAMPLES
from tts_grpo.speech.audio import ASR_HZ


def sherpa_model(folder: Path) -> Path:
    """The ONNX file in a sherpa-onnx model folder.

    Raises:
        ValueError: there is none.
    """
    for name in ("model.int8.onnx", "model.onnx"):
        if (folder / name).exists():
            return folder / name
    raise ValueError(f"{folder}: not a sherpa-onnx model folder: model.int8.onnx or model.onnx is missing")


class SherpaOnnx:
    """A Paraformer or SenseVoice model in the format of sherpa-onnx, run on the CPU.

    Args:
        model_dir: folder with tokens.txt and model.int8.onnx or model.onnx; if both exist, model.int8.onnx is used, as
            in the original recipe.
        language: "zh" or "en"; used by SenseVoice only.

    Raises:
        ValueError: a file is missing, or the model is neither Paraformer nor SenseVoice.
    """

    def __init__(self, model_dir: str | Path, language: str = "zh"):
        import onnx
        import sherpa_onnx

        folder = Path(model_dir)
        path, tokens = sherpa_model(folder), folder / "tokens.txt"
        if not tokens.exists():
            raise ValueError(f"{folder}: not a sherpa-onnx model folder: tokens.txt is missing")
        # sherpa-onnx exits the process if the model is of another kind.
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
            raise ValueError(f"{path}: model_type {kind!r} in its metadata is neither Paraformer nor SenseVoice")

    def transcribe(self, recordings: Sequence[np.ndarray]) -> list[str]:
        """Transcripts of recordings, each float32 (T,) at 16 kHz; "" if shorter than one analysis frame."""
        return [self._transcribe(np.asarray(r, dtype=np.float32)) if len(r) >= MIN_SAMPLES else "" for r in recordings]

    def _transcribe(self, recording: np.ndarray) -> str:
        # One at a time: in a batch, the padding of shorter recordings may be recognised as text.
        stream = self._model.create_stream()
        stream.accept_waveform(ASR_HZ, recording)
        self._model.decode_stream(stream)
        return stream.result.text
