"""The files of model folders, for the loaders and for ``run.sh --check``. Does not import torch."""

import json
from collections.abc import Sequence
from pathlib import Path

TOKEN2WAV_FILES = {  # the first file identifies the kind; others, such as config.json or flow.pt, may be in several
    "tiny": ("token_decoder.safetensors", "speech_tokenizer.safetensors", "config.json"),
    "cosyvoice3": ("cosyvoice3.yaml", "flow.pt", "hift.pt", "campplus.onnx", "speech_tokenizer_v3.onnx"),
    "cosyvoice2": ("flow.pt", "hift.pt", "cosyvoice2.yaml", "campplus.onnx", "speech_tokenizer_v2.onnx"),
}
SENSEVOICE_FILES = ("config.yaml", "model.pt", "am.mvn", "configuration.json")
PARAFORMER_FILES = (*SENSEVOICE_FILES, "tokens.json")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # keys in a generation config


def token2wav_kind(folder: str | Path) -> str | None:
    """A key of ``TOKEN2WAV_FILES``, or None if the folder has no decoder."""
    return next((kind for kind, files in TOKEN2WAV_FILES.items() if (Path(folder) / files[0]).exists()), None)


def missing_files(folder: str | Path, names: Sequence[str]) -> list[Path]:
    """Paths of the files that are missing in a folder."""
    return [path for path in (Path(folder) / name for name in names) if not path.exists()]


def describe(paths: Sequence[Path]) -> str:
    """File names for a sentence: "model.pt and am.mvn are"."""
    names = [path.name for path in paths]
    return f"{' and '.join(filter(None, [', '.join(names[:-1]), names[-1]]))} {'is' if len(names) == 1 else 'are'}"


def check_llm_folder(folder: Path) -> None:
    """Raise ValueError if a folder is not a model's; the message names checkpoints inside it that may be meant."""
    if not (folder / "config.json").is_file():
        found = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = (
            f"it has {', '.join(found)}: set sft_path to one of them" if found else "set sft_path to a model's folder"
        )
        raise ValueError(f"{folder} has no config.json; {hint}")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise ValueError(f"{folder} has no weights (*.safetensors or *.bin)")


def read_json(path: Path) -> dict:
    """The JSON object in a file, or an empty one if the file does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def generation_config(folder: Path, tokenizer) -> tuple[dict, dict]:
    """The generation config to write, and the settings of the folder's generation config that it drops.

    Raises:
        ValueError: neither generation_config.json nor config.json names an end token.
    """
    existing, config = read_json(folder / "generation_config.json"), read_json(folder / "config.json")
    ids = {name: existing.get(name, config.get(name)) for name in TOKEN_IDS}
    if ids["eos_token_id"] is None:
        raise ValueError(f"{folder}: neither generation_config.json nor config.json has an eos_token_id")
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = tokenizer.pad_token_id
    dropped = {name: value for name, value in existing.items() if name not in (*TOKEN_IDS, "transformers_version")}
    return {name: value for name, value in ids.items() if value is not None}, dropped


def as_list(value) -> list:
    """``value`` if it is a list, else a list with ``value`` as its only item."""
    return value if isinstance(value, list) else [value]
