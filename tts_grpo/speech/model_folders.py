"""The files of model folders, for the loaders and for ``run.sh --check``. Needs the standard library only."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from tts_grpo.text.input_files import LANGUAGES

TOKEN2WAV_FILES = {  # the first file identifies the kind; others, such as config.json or flow.pt, may be in several
    "tiny": ("token_decoder.safetensors", "speech_tokenizer.safetensors", "config.json"),
    "cosyvoice3": ("cosyvoice3.yaml", "flow.pt", "hift.pt", "campplus.onnx", "speech_tokenizer_v3.onnx"),
    "cosyvoice2": ("flow.pt", "hift.pt", "cosyvoice2.yaml", "campplus.onnx", "speech_tokenizer_v2.onnx"),
}
SENSEVOICE_FILES = ("config.yaml", "model.pt", "am.mvn", "configuration.json")
PARAFORMER_FILES = (*SENSEVOICE_FILES, "tokens.json")
LLM_FOLDER = "The list of what a language model's folder must have is in docs/export.md, Your own model"
CONFIGS = ("generation_config.json", "config.json")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # keys in a generation config


def token2wav_kind(folder: str | Path) -> str | None:
    """A key of ``TOKEN2WAV_FILES``, or None if the folder has no decoder."""
    return next((kind for kind, files in TOKEN2WAV_FILES.items() if (Path(folder) / files[0]).exists()), None)


def known_languages(folder: str | Path) -> tuple[str, ...]:
    """The languages of ``LANGUAGES`` that a recogniser can write, by its vocabulary.

    The vocabulary is SenseVoice's SentencePiece model, Paraformer's tokens.json or sherpa-onnx's tokens.txt. For a
    folder without these files, such as Whisper's, all languages are returned; Whisper's loader checks them itself.
    """
    folder = Path(folder)
    if path := next(folder.glob("*.bpe.model"), None):
        pieces = _sentence_pieces(path.read_bytes())
    elif (folder / "tokens.json").is_file():
        pieces = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
    elif (folder / "tokens.txt").is_file():
        pieces = (folder / "tokens.txt").read_text(encoding="utf-8").splitlines()
    else:
        return LANGUAGES
    text = "".join(piece for piece in pieces if not piece.startswith("<"))  # without tags, such as <|zh|>
    writes = {"zh": any("\u4e00" <= c <= "\u9fff" for c in text), "en": any(c.isascii() and c.isalpha() for c in text)}
    return tuple(language for language in LANGUAGES if writes[language])


def language_fault(folder: str | Path, language: str) -> str:
    """Why a recogniser cannot be told a language; "" if it can."""
    known = known_languages(folder)
    if language in known:
        return ""
    return (
        f"the recogniser {folder} does not know the language {language}: its vocabulary has {' and '.join(known)} only"
    )


def _sentence_pieces(model: bytes) -> Iterator[str]:
    """The pieces of a SentencePiece model: field 1 of its protobuf message, of which field 1 is the text.

    Source: sentencepiece_model.proto of github.com/google/sentencepiece; fields are written in ascending order.
    """

    def number(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            value |= (model[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if model[at - 1] < 0x80:
                return value, at

    at = 0
    while at < len(model) and model[at] == 0x0A:
        size, begin = number(at + 1)
        text_size, text_begin = number(begin + 1)
        yield model[text_begin : text_begin + text_size].decode("utf-8")
        at = begin + size


def missing_files(folder: str | Path, names: Sequence[str]) -> list[Path]:
    """Paths of the files that are missing in a folder."""
    return [path for path in (Path(folder) / name for name in names) if not path.exists()]


def describe(paths: Sequence[Path]) -> str:
    """File names for a sentence: "model.pt and am.mvn are"."""
    names = [path.name for path in paths]
    return f"{' and '.join(filter(None, [', '.join(names[:-1]), names[-1]]))} {'is' if len(names) == 1 else 'are'}"


def check_llm_folder(folder: Path) -> None:
    """Check that a language model's folder has all files.

    Raises:
        ValueError: files are missing; the message lists them, and names what may be meant: checkpoints inside the
            folder, or a state dict in CosyVoice's format.
    """
    if not (folder / "config.json").is_file():
        found, official = sorted(path.parent.name for path in folder.glob("*/config.json")), sorted(folder.glob("*.pt"))
        hint = "set sft_path to a model's folder"
        if found:
            hint = f"it has {', '.join(found)}: set sft_path to one of them"
        elif official:
            hint = f"it has {official[0].name}: for a file in CosyVoice's format, set llm=official llm_pt={official[0]}"
        raise ValueError(f"{folder} has no config.json; {hint}. {LLM_FOLDER}")
    missing = []
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        missing.append("has no weights (*.safetensors or *.bin)")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        missing.append("has no tokenizer (tokenizer.json, or vocab.json and merges.txt)")
    if not any(read_json(folder / name).get("eos_token_id") is not None for name in CONFIGS):
        missing.append(f"names no end token: neither {' nor '.join(CONFIGS)} has an eos_token_id")
    if missing:
        raise ValueError(f"{folder} {'; it '.join(missing)}. {LLM_FOLDER}")


def read_json(path: Path) -> dict:
    """The JSON object in a file, or an empty one if the file does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def generation_config(folder: Path, tokenizer) -> tuple[dict, dict]:
    """The generation config to write, and the settings of the folder's generation config that it drops.

    The folder has an end token (:func:`check_llm_folder`).
    """
    existing, config = (read_json(folder / name) for name in CONFIGS)
    ids = {name: existing.get(name, config.get(name)) for name in TOKEN_IDS}
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = tokenizer.pad_token_id
    dropped = {name: value for name, value in existing.items() if name not in (*TOKEN_IDS, "transformers_version")}
    return {name: value for name, value in ids.items() if value is not None}, dropped


def as_list(value) -> list:
    """``value`` if it is a list, else a list with ``value`` as its only item."""
    return value if isinstance(value, list) else [value]
