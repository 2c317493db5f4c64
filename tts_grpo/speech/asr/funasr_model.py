"""Networks loaded through funasr: without dither, and with every weight checked."""

import importlib
import unittest.mock
from collections.abc import Sequence
from pathlib import Path

import torch

from tts_grpo.speech.model_folders import describe, missing_files

# funasr's modules with the classes that config.yaml of SenseVoiceSmall, Paraformer and SeACo-Paraformer names
_MODULES = (
    "funasr.frontends.wav_frontend",
    "funasr.models.bicif_paraformer.cif_predictor",
    "funasr.models.paraformer.decoder",
    "funasr.models.paraformer.model",
    "funasr.models.sanm.encoder",
    "funasr.models.seaco_paraformer.model",
    "funasr.models.sense_voice.model",
    "funasr.models.specaug.specaug",
    "funasr.tokenizer.char_tokenizer",
    "funasr.tokenizer.sentencepiece_tokenizer",
)


def _auto_model(**settings):
    """funasr's ``AutoModel``, without the import of all models that funasr has.

    ``import funasr`` imports each of its modules, which takes 6 s of CPU time per process; AutoModel finds the classes
    of those that were imported. If it fails with these alone, for example because a folder names another class, all
    modules are imported and it is tried once more.
    """
    with unittest.mock.patch("pkgutil.walk_packages", return_value=[]):
        import funasr
    for name in _MODULES:
        importlib.import_module(name)
    try:
        return funasr.AutoModel(**settings)
    except Exception:
        funasr.import_submodules("funasr")
        return funasr.AutoModel(**settings)


def load_funasr(model_dir: str | Path, device: str, names: Sequence[str]):
    """funasr's ``AutoModel`` of a folder, all weights loaded, its features without dither.

    Dither is noise that the filter bank adds to the samples. ``WavFrontend`` has 1.0 of it by default and draws it
    anew at each call (funasr 1.4.16, funasr/frontends/wav_frontend.py, lines 106 and 176), and SenseVoiceSmall's
    published config.yaml does not set it: one recording would have several transcripts. Here it is 0, whatever the
    config says, as in sherpa-onnx and wenet.

    Args:
        model_dir: the folder.
        device: torch device.
        names: files that it must hold.

    Raises:
        ValueError: a file is missing, or a weight of the network is not in ``model.pt`` in its shape. (funasr itself
            would leave such a weight at its random start, without an error.)
        RuntimeError: funasr's features have dither all the same.
    """
    if missing := missing_files(model_dir, names):
        raise ValueError(f"{model_dir}: not a folder of this recogniser: {describe(missing)} missing")
    model = _auto_model(
        model=str(model_dir), device=device, disable_update=True, disable_pbar=True, ncpu=torch.get_num_threads(),
        frontend_conf={"dither": 0.0},  # merged over config.yaml; set later, it would be undone by each generate()
    )  # fmt: skip
    if model.kwargs["frontend"].dither != 0:
        raise RuntimeError(f"{model_dir}: funasr has not taken over dither 0: transcripts would be random")
    check_weights(model.model, Path(model_dir) / "model.pt")
    return model


def check_weights(network: torch.nn.Module, path: Path) -> None:
    """Raises ValueError if a weight of the network is not in the file ``path``, or was not loaded from it."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    saved = saved.get("state_dict", saved)
    for name, value in network.state_dict().items():
        if name not in saved or saved[name].shape != value.shape:
            raise ValueError(f"{path}: weight {name} {tuple(value.shape)} is missing or of another shape")
        if not torch.equal(saved[name].float(), value.cpu().float()):
            raise ValueError(f"{path}: weight {name} was not loaded")
