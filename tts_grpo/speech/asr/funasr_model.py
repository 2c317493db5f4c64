"""Load networks with funasr, without dither, and check that all weights were loaded."""

import importlib
import unittest.mock
from collections.abc import Sequence
from pathlib import Path

import torch

from tts_grpo.speech.model_folders import describe, missing_files

# funasr's modules with the classes named in config.yaml of SenseVoiceSmall, Paraformer and SeACo-Paraformer
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
    """funasr's ``AutoModel``, without importing all of funasr's models.

    ``import funasr`` imports all its modules, which takes 6 s of CPU time per process, and ``AutoModel`` finds classes
    only in imported modules. If ``AutoModel`` fails with ``_MODULES``, for example because config.yaml names another
    class, all modules are imported and it is called again.
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
    """funasr's ``AutoModel`` for a model folder, with dither 0 and with all weights loaded.

    Dither is random noise that the filter bank adds to the samples. ``WavFrontend`` uses 1.0 by default and draws new
    noise at each call (funasr 1.4.16, funasr/frontends/wav_frontend.py, lines 106 and 176), and SenseVoiceSmall's
    published config.yaml does not set it, so that transcripts would vary between calls. Here it is always 0, as in
    sherpa-onnx and wenet.

    Args:
        model_dir: the model folder.
        device: torch device.
        names: files that the folder must contain.

    Raises:
        ValueError: a file is missing, or ``model.pt`` lacks a weight of the network or has it in another shape. (funasr
            itself would leave such a weight randomly initialised, without an error.)
        RuntimeError: funasr did not set dither to 0.
    """
    if missing := missing_files(model_dir, names):
        raise ValueError(f"{model_dir}: not a folder of this recogniser: {describe(missing)} missing")
    model = _auto_model(
        model=str(model_dir), device=device, disable_update=True, disable_pbar=True, ncpu=torch.get_num_threads(),
        frontend_conf={"dither": 0.0},  # overrides config.yaml; if it were set later, each generate() would reset it
    )  # fmt: skip
    if model.kwargs["frontend"].dither != 0:
        raise RuntimeError(f"{model_dir}: funasr ignored dither=0, so that transcripts would be random")
    check_weights(model.model, Path(model_dir) / "model.pt")
    return model


def check_weights(network: torch.nn.Module, path: Path) -> None:
    """Raise ValueError if a weight of the network is not in the file ``path``, or was not loaded from it."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    saved = saved.get("state_dict", saved)
    for name, value in network.state_dict().items():
        if name not in saved or saved[name].shape != value.shape:
            raise ValueError(f"{path}: weight {name} {tuple(value.shape)} is missing or of another shape")
        if not torch.equal(saved[name].float(), value.cpu().float()):
            raise ValueError(f"{path}: weight {name} was not loaded")
