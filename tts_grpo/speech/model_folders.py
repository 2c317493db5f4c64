"""What the folders of models hold, by which loaders and ``run.sh --check`` know them. Imports no torch."""

import json
from collections.abc import Sequence
from pathlib import Path

TOKEN2WAV_FILES = {  # the first file of each is its mark: other files, such as config.json, may be in both
    "tiny": ("token_decoder.safetensors", "speech_tokenizer.safetensors", "config.json"),
    "cosyvoice2": ("flow.pt", "hift.pt", "cosyvoice2.yaml", "campplus.onnx", "speech_tokenizer_v2.onnx"),
}
SENSEVOICE_FILES = ("config.yaml", "model.pt", "am.mvn", "configuration.json")
PARAFORMER_FILES = (*SENSEVOICE_FILES, "tokens.json")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # of a generation config


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


def check_llm_folder(folder: Path) -> None:
    """Raises ValueError if a folder is no model's, and names the checkpoints in it that may have been meant."""
    if not (folder / "config.json").is_file():
        found = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = (
            f"it has {', '.join(found)}: set sft_path to one of them" if found else "set sft_path to a model's folder"
        )
        raise ValueError(f"{folder} has no config.json; {hint}")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise ValueError(f"{folder} has no weights (*.safetensors or *.bin)")


def read_json(path: Path) -> dict:
    """The object in a file; an empty one if there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def generation_config(folder: Path, tokenizer) -> tuple[dict, dict]:
    """The generation config to write, and the settings of the folder's own that it leaves out.

    Raises:
        ValueError: neither generation_config.json nor config.json names an end token.
    """
    own, config = read_json(folder / "generation_config.json"), read_json(folder / "config.json")
    ids = {name: own.get(name, config.get(name)) for name in TOKEN_IDS}
    if ids["eos_token_id"] is None:
        raise ValueError(f"{folder}: neither generation_config.json nor config.json has an eos_token_id")
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = tokenizer.pad_token_id
    left_out = {name: value for name, value in own.items() if name not in (*TOKEN_IDS, "transformers_version")}
    return {name: value for name, value in ids.items() if value is not None}, left_out


def as_list(value) -> list:
    """A list as it is, anything else as the only item of one."""
    return value if isinstance(value, list) else [value]
