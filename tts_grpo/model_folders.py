"""What the folders of speech models hold, by which loaders and ``run.sh --check`` know them. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path

TOKEN2WAV_FILES = {  # the first file of each is its mark: other files, such as config.json, may be in both
    "tiny": ("token_decoder.safetensors", "speech_tokenizer.safetensors", "config.json"),
    "cosyvoice2": ("flow.pt", "hift.pt", "cosyvoice2.yaml", "campplus.onnx", "speech_tokenizer_v2.onnx"),
}
SENSEVOICE_FILES = ("config.yaml", "model.pt", "am.mvn", "configuration.json")
PARAFORMER_FILES = (*SENSEVOICE_FILES, "tokens.json")


def token2wav_kind(folder: str | Path) -> str | None:
    """``tiny`` or ``cosyvoice2``, by the mark that the folder holds; None if it holds neither."""
    return next((kind for kind, files in TOKEN2WAV_FILES.items() if (Path(folder) / files[0]).exists()), None)


def missing_files(folder: str | Path, names: Sequence[str]) -> list[Path]:
    """The paths of the files that a folder lacks."""
    return [path for path in (Path(folder) / name for name in names) if not path.exists()]


def describe(paths: Sequence[Path]) -> str:
    """Names of files in a sentence: "model.pt and am.mvn are"."""
    names = [path.name for path in paths]
    return f"{' and '.join(filter(None, [', '.join(names[:-1]), names[-1]]))} {'is' if len(names) == 1 else 'are'}"
