"""Paraformer and SenseVoice as ONNX models, with sherpa-onnx."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from tts_grpo.speech.asr.recogniser import MIN_SAMPLES
from tts_grpo.speech.audio import ASR_HZ
from tts_grpo.speech.model_folders import language_fault


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
        language: language of recordings without one of their own. SenseVoice is told it: the model is loaded once per
            language. A Paraformer is not told.

    Raises:
        ValueError: a file is missing, the model is neither Paraformer nor SenseVoice, or its vocabulary has no words of
            the language.
    """

    def __init__(self, model_dir: str | Path, language: str = "zh"):
        import onnx

        folder = Path(model_dir)
        path, tokens = sherpa_model(folder), folder / "tokens.txt"
        if not tokens.exists():
            raise ValueError(f"{folder}: not a sherpa-onnx model folder: tokens.txt is missing")
        # sherpa-onnx exits the process if the model is of another kind.
        kinds = {p.key: p.value for p in onnx.load(str(path), load_external_data=False).metadata_props}
        kind = kinds.get("model_type", "")
        if "paraformer" not in kind and not kind.startswith("sense_voice"):
            raise ValueError(f"{path}: model_type {kind!r} in its metadata is neither Paraformer nor SenseVoice")
        self.folder, self.path, self.kind, self.language, self._models = folder, path, kind, language, {}
        self._model(language)

    def _model(self, language: str):
        """The model for a language."""
        import sherpa_onnx

        key = language if self.kind.startswith("sense_voice") else ""
        if fault := language_fault(self.folder, language):
            raise ValueError(fault)
        if key not in self._models:
            settings = {"tokens": str(self.folder / "tokens.txt"), "num_threads": torch.get_num_threads()}
            if key:
                self._models[key] = sherpa_onnx.OfflineRecognizer.from_sense_voice(
                    model=str(self.path), language=language, use_itn=False, **settings
                )
            else:
                self._models[key] = sherpa_onnx.OfflineRecognizer.from_paraformer(paraformer=str(self.path), **settings)
        return self._models[key]

    def transcribe(self, recordings: Sequence[np.ndarray], languages: Sequence[str] | None = None) -> list[str]:
        """Transcripts of recordings, each float32 (T,) at 16 kHz; "" if shorter than one analysis frame.

        Raises:
            ValueError: the vocabulary has no words of a language.
        """
        languages = languages or [self.language] * len(recordings)
        models = {language: self._model(language) for language in set(languages)}
        return [
            self._transcribe(np.asarray(r, dtype=np.float32), models[language]) if len(r) >= MIN_SAMPLES else ""
            for r, language in zip(recordings, languages, strict=True)
        ]

    @staticmethod
    def _transcribe(recording: np.ndarray, model) -> str:
        # One at a time: in a batch, the padding of shorter recordings may be recognised as text.
        stream = model.create_stream()
        stream.accept_waveform(ASR_HZ, recording)
        model.decode_stream(stream)
        return stream.result.text
