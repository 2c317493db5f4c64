"""The recogniser of a model folder, chosen by the files in it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import yaml

from tts_grpo.speech.asr.paraformer import Paraformer
from tts_grpo.speech.asr.recogniser import Recogniser
from tts_grpo.speech.asr.sensevoice import SenseVoice
from tts_grpo.speech.asr.sherpa import SherpaOnnx, sherpa_model
from tts_grpo.speech.asr.whisper import Whisper


@dataclass(frozen=True)
class LoadedAsr:
    """A recogniser, and what is said of it beside its figures."""

    recogniser: Recogniser
    backend: str  # funasr, sherpa-onnx or faster-whisper
    model: str  # the model's kind
    weights: Path  # its file of weights

    def describe(self) -> dict:
        """For scores.json."""
        with self.weights.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        return {"backend": self.backend, "model": self.model, "weights": self.weights.name, "sha256": checksum}


def load_asr(model_dir: str | Path, device: str = "cpu", language: str = "zh") -> LoadedAsr:
    """The recogniser of a folder.

    Args:
        model_dir: folder of funasr (config.yaml, model.pt), of faster-whisper (model.bin) or of sherpa-onnx
            (tokens.txt, *.onnx).
        device: torch device; sherpa-onnx stays on the CPU.
        language: "zh" or "en", for SenseVoice and Whisper; a Paraformer has its own.

    Raises:
        ValueError: the folder holds none of them, or not all of one; or funasr's network is of another kind.
        ImportError: the package for it is not installed.
    """
    folder = Path(model_dir)
    try:
        return _load(folder, device, language)
    except ModuleNotFoundError as error:
        raise ImportError(f"{folder} needs {error.name}: install requirements-asr.txt as it says") from error


def _load(folder: Path, device: str, language: str) -> LoadedAsr:
    if (folder / "config.yaml").exists():
        kind = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")).get("model", "")
        if kind == "SenseVoiceSmall":
            return LoadedAsr(SenseVoice(folder, device, language=language), "funasr", kind, folder / "model.pt")
        if kind.endswith("Paraformer"):
            return LoadedAsr(Paraformer(folder, device), "funasr", kind, folder / "model.pt")
        raise ValueError(f"{folder}/config.yaml: model {kind!r}: neither SenseVoiceSmall nor a Paraformer")
    if (folder / "model.bin").exists():
        return LoadedAsr(Whisper(folder, device, language), "faster-whisper", "Whisper", folder / "model.bin")
    if (folder / "tokens.txt").exists():
        path = sherpa_model(folder)
        return LoadedAsr(SherpaOnnx(folder, language), "sherpa-onnx", path.name, path)
    raise ValueError(
        f"{folder}: no recogniser here: wants config.yaml (of funasr), model.bin (of faster-whisper) or tokens.txt "
        "(of sherpa-onnx)"
    )
