"""Load the recogniser of a model folder; the files in the folder determine its kind."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import yaml

from tts_grpo.speech.asr.paraformer import Paraformer
from tts_grpo.speech.asr.recogniser import Recogniser
from tts_grpo.speech.asr.sensevoice import SenseVoice
from tts_grpo.speech.asr.sherpa import SherpaOnnx, sherpa_model
from tts_grpo.speech.asr.whisper import Whisper
from tts_grpo.speech.model_folders import language_fault


@dataclass(frozen=True)
class LoadedAsr:
    """A recogniser and the properties that scores.json records."""

    recogniser: Recogniser
    backend: str  # funasr, sherpa-onnx or faster-whisper
    model: str  # kind of model, such as SenseVoiceSmall
    weights: Path  # file of its weights

    def describe(self) -> dict:
        """The properties, for scores.json."""
        with self.weights.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        return {"backend": self.backend, "model": self.model, "weights": self.weights.name, "sha256": checksum}


def load_asr(model_dir: str | Path, device: str = "cpu", language: str = "zh") -> LoadedAsr:
    """Load the recogniser of a folder.

    Args:
        model_dir: folder in the format of funasr (config.yaml, model.pt), faster-whisper (model.bin) or sherpa-onnx
            (tokens.txt, *.onnx).
        device: torch device; sherpa-onnx always runs on the CPU.
        language: language of recordings without one of their own. SenseVoice and Whisper are told it; the vocabulary of
            each must have its words.

    Raises:
        ValueError: the folder has none of these formats, is incomplete, has a funasr model of an unsupported kind, or
            does not know the language.
        ImportError: the package for this format is not installed.
    """
    folder = Path(model_dir)
    if fault := language_fault(folder, language):
        raise ValueError(fault)
    try:
        return _load(folder, device, language)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{folder} needs the package {error.name}: install requirements-asr.txt as its header says"
        ) from error


def _load(folder: Path, device: str, language: str) -> LoadedAsr:
    if (folder / "config.yaml").exists():
        kind = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")).get("model", "")
        if kind == "SenseVoiceSmall":
            return LoadedAsr(SenseVoice(folder, device, language=language), "funasr", kind, folder / "model.pt")
        if kind.endswith("Paraformer"):
            return LoadedAsr(Paraformer(folder, device), "funasr", kind, folder / "model.pt")
        raise ValueError(f"{folder}/config.yaml: model {kind!r} is neither SenseVoiceSmall nor a Paraformer")
    if (folder / "model.bin").exists():
        return LoadedAsr(Whisper(folder, device, language), "faster-whisper", "Whisper", folder / "model.bin")
    if (folder / "tokens.txt").exists():
        path = sherpa_model(folder)
        return LoadedAsr(SherpaOnnx(folder, language), "sherpa-onnx", path.name, path)
    raise ValueError(
        f"{folder}: no supported ASR model found: expected config.yaml (funasr), model.bin (faster-whisper) or "
        "tokens.txt (sherpa-onnx)"
    )
