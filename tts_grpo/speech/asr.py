"""Speech recognition with a model folder: SenseVoice and Paraformer through funasr, sherpa-onnx, faster-whisper.

Each recogniser has ``transcribe``. :func:`load_asr` chooses by what the folder holds. Nothing is downloaded.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch.nn.utils.rnn import pad_sequence

from tts_grpo.speech.audio import ASR_HZ
from tts_grpo.speech.model_folders import PARAFORMER_FILES, SENSEVOICE_FILES, describe, missing_files
from tts_grpo.text.units import characters, written_units

MIN_SAMPLES = 400  # one analysis frame: funasr fails on less


@dataclass(frozen=True)
class Heard:
    """What was heard of a recording.

    Attributes:
        text: the transcript.
        onsets_s: when each of its units (:func:`tts_grpo.text.units.written_units`) came up, in seconds.
    """

    text: str = ""
    onsets_s: tuple[float, ...] = ()


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
    from funasr import AutoModel

    if missing := missing_files(model_dir, names):
        raise ValueError(f"{model_dir}: not a folder of this recogniser: {describe(missing)} missing")
    model = AutoModel(
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


class SenseVoice:
    """A recogniser of 16 kHz speech.

    Args:
        model_dir: folder with config.yaml, model.pt, am.mvn and the SentencePiece model.
        device: torch device.
        batch_size: recordings decoded at once; None is 64 on a GPU, where a batch takes as long as the launches of its
            70 layers, and 32 on a CPU, where padding costs.

    Raises:
        ValueError: see :func:`load_funasr`.
    """

    def __init__(self, model_dir: str | Path, device: str = "cpu", batch_size: int | None = None):
        self.device = torch.device(device)
        self.batch_size = batch_size or (32 if self.device.type == "cpu" else 64)
        self._model = load_funasr(model_dir, device, SENSEVOICE_FILES)
        frontend = self._model.kwargs["frontend"]
        self._frame_s = frontend.lfr_n * frontend.frame_shift / 1000

    def transcribe(self, recordings: Sequence[np.ndarray | torch.Tensor]) -> list[str]:
        """Transcripts of recordings, each float32 (T,) at 16 kHz, without SenseVoice's tags.

        One shorter than an analysis frame has the transcript "".
        """
        return [heard.text for heard in self.hear(recordings)]

    def hear(self, recordings: Sequence[np.ndarray | torch.Tensor]) -> list[Heard]:
        """:meth:`transcribe`, with the time of each unit."""
        heard = [Heard()] * len(recordings)
        # Like lengths together: less padding, and the same result.
        order = sorted((i for i, r in enumerate(recordings) if len(r) >= MIN_SAMPLES), key=lambda i: len(recordings[i]))
        for first in range(0, len(order), self.batch_size):
            batch = order[first : first + self.batch_size]
            for i, one in zip(batch, self._recognise([recordings[i] for i in batch]), strict=True):
                heard[i] = one
        return heard

    @torch.inference_mode()
    def _recognise(self, recordings) -> list[Heard]:
        """``AutoModel.generate``, with features and decoding of a batch computed together on the network's device."""
        from funasr.utils.postprocess_utils import rich_transcription_postprocess

        model, tokenizer = self._model.model, self._model.kwargs["tokenizer"]
        features, lens = self._features([torch.as_tensor(r, device=self.device) for r in recordings])
        # The queries that SenseVoiceSmall.inference puts before the speech: language, event, emotion, written form
        ids = [model.lid_dict["zh"], 1, 2, model.textnorm_dict["woitn"]]
        queries = model.embed(torch.tensor([ids], device=self.device)).expand(len(features), -1, -1)
        ends = lens + len(ids)
        encoded, _ = model.encoder(torch.cat([queries, features], dim=1), ends.to(self.device))
        heard = []
        for pieces, end in zip(model.ctc.ctc_lo(encoded).argmax(-1).tolist(), ends.tolist(), strict=True):
            runs = (next(run) for _, run in itertools.groupby(enumerate(pieces[:end]), key=lambda frame: frame[1]))
            said = [(begin, piece) for begin, piece in runs if piece != model.blank_id]
            text = rich_transcription_postprocess(tokenizer.decode([piece for _, piece in said]))
            spoken = [(begin - len(ids), piece) for begin, piece in said if begin >= len(ids)]
            heard.append(Heard(text, self._onsets(text, spoken)))
        return heard

    def _onsets(self, text: str, spoken: Sequence[tuple[int, int]]) -> tuple[float, ...]:
        """When each unit of a transcript came up, by its pieces and the frames with which they begin."""
        onsets = []  # one for each character of the pieces
        for begin, piece in spoken:
            written = self._model.kwargs["tokenizer"].decode([piece])
            onsets += [begin * self._frame_s] * len(characters(written))
        sizes = [len(unit) for unit in written_units(text)]
        if not onsets:
            return (0.0,) * len(sizes)
        # The scale is 1 unless post-processing took characters away.
        firsts = np.cumsum([0, *sizes[:-1]]) * len(onsets) // max(1, sum(sizes))
        return tuple(onsets[first] for first in firsts[: len(sizes)])

    def _features(self, recordings: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """``WavFrontend.forward``, its filter bank once for all: (B, T, bands) and int64 (B,)."""
        from funasr.frontends.wav_frontend import apply_cmvn, apply_lfr
        from funasr.utils import fbank as kaldi

        frontend = self._model.kwargs["frontend"]
        hop = frontend.fs * frontend.frame_shift // 1000
        size = frontend.fs * frontend.frame_length // 1000
        parts = [F.pad(r, (0, -len(r) % hop + size)) for r in recordings]  # so that each begins a frame
        parts = [F.pad(part, (0, -len(part) % hop)) for part in parts]
        mel = kaldi.fbank(
            torch.cat(parts)[None] * (1 << 15), num_mel_bins=frontend.n_mels, frame_length=frontend.frame_length,
            frame_shift=frontend.frame_shift, dither=0.0, energy_floor=0.0, window_type=frontend.window,
            sample_frequency=frontend.fs,
        )  # fmt: skip
        features, begin = [], 0
        for recording, part in zip(recordings, parts, strict=True):
            frames = mel[begin : begin + (len(recording) - size) // hop + 1]
            features.append(apply_cmvn(apply_lfr(frames, frontend.lfr_m, frontend.lfr_n), frontend.cmvn))
            begin += len(part) // hop
        return pad_sequence(features, batch_first=True), torch.tensor([len(f) for f in features])


class Paraformer:
    """A recogniser of the Paraformer family (Paraformer, SeACo-Paraformer), as funasr's "paraformer-zh".

    Args:
        model_dir: folder with config.yaml, model.pt, am.mvn, tokens.json and configuration.json.
        device: torch device.
        batch_size: recordings decoded at once.

    Raises:
        ValueError: see :func:`load_funasr`.
    """

    def __init__(self, model_dir: str | Path, device: str = "cpu", batch_size: int = 32):
        self.batch_size = batch_size
        self._model = load_funasr(model_dir, device, PARAFORMER_FILES)

    def transcribe(self, recordings: Sequence[np.ndarray]) -> list[str]:
        """Transcripts of recordings, each float32 (T,) at 16 kHz; "" where nothing is heard."""
        transcripts = [""] * len(recordings)
        order = sorted((i for i, r in enumerate(recordings) if len(r) >= MIN_SAMPLES), key=lambda i: len(recordings[i]))
        for first in range(0, len(order), self.batch_size):
            batch = order[first : first + self.batch_size]
            for i, text in zip(batch, self._decode([recordings[i] for i in batch]), strict=True):
                transcripts[i] = text
        return transcripts

    def _decode(self, batch: list[np.ndarray]) -> list[str]:
        results = self._model.generate(input=batch, batch_size=len(batch), cache={})
        texts = [result.get("text", "") for result in results]
        # Where nothing is heard in a whole batch, funasr answers once for all of it, or not at all (SeACo-Paraformer).
        if not any(texts):
            return [""] * len(batch)
        if len(texts) != len(batch):
            raise RuntimeError(f"funasr gave {len(texts)} transcripts of {len(batch)} recordings")
        return texts


class SherpaOnnx:
    """A Paraformer or SenseVoice model as sherpa-onnx has them, on the CPU.

    Args:
        model_dir: folder with tokens.txt and model.int8.onnx or model.onnx; the first, if both are there, as in the
            original recipe.
        language: "zh" or "en", for SenseVoice.

    Raises:
        ValueError: a file is missing, or the model is neither of the two.
    """

    def __init__(self, model_dir: str | Path, language: str = "zh"):
        import onnx
        import sherpa_onnx

        folder = Path(model_dir)
        path, tokens = sherpa_model(folder), folder / "tokens.txt"
        if not tokens.exists():
            raise ValueError(f"{folder}: no tokens.txt here: not a folder of sherpa-onnx")
        # sherpa-onnx ends the process on a model of another kind.
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
            raise ValueError(f"{path}: model_type {kind!r} in its metadata: neither Paraformer nor SenseVoice")

    def transcribe(self, recordings: Sequence[np.ndarray]) -> list[str]:
        """Transcripts of recordings, each float32 (T,) at 16 kHz; "" for one shorter than an analysis frame."""
        return [self._hear(np.asarray(r, dtype=np.float32)) if len(r) >= MIN_SAMPLES else "" for r in recordings]

    def _hear(self, recording: np.ndarray) -> str:
        # One at a time: in a batch the padding of the shorter ones may be heard as text.
        stream = self._model.create_stream()
        stream.accept_waveform(ASR_HZ, recording)
        self._model.decode_stream(stream)
        return stream.result.text


class Whisper:
    """A Whisper model converted for CTranslate2, through faster-whisper: greedy, told the language.

    Args:
        model_dir: folder with model.bin, config.json, tokenizer.json and preprocessor_config.json.
        device: "cpu", "cuda" or "cuda:N".
        language: of the speech, such as "en".

    Raises:
        ValueError: a file is missing (faster-whisper would download the tokenizer, or guess the number of mel bands).
        RuntimeError: weights do not match; CTranslate2 names them.
    """

    def __init__(self, model_dir: str | Path, device: str = "cpu", language: str = "en"):
        from faster_whisper import WhisperModel

        folder = Path(model_dir)
        for name in ("model.bin", "config.json", "tokenizer.json", "preprocessor_config.json"):
            if not (folder / name).exists():
                raise ValueError(f"{folder}: no {name} here: not a faster-whisper folder")
        kind, _, index = device.partition(":")
        self.language = language
        self._model = WhisperModel(
            str(folder), device=kind, device_index=int(index or 0), cpu_threads=torch.get_num_threads(),
            compute_type="float16" if kind == "cuda" else "float32", local_files_only=True,
        )  # fmt: skip
        bands = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8")).get("feature_size", 80)
        if bands != self._model.model.n_mels:
            raise ValueError(f"{folder}: preprocessor_config.json has {bands} mel bands, model.bin another number")

    def transcribe(self, recordings: Sequence[np.ndarray]) -> list[str]:
        """Transcripts of recordings, each float32 (T,) at 16 kHz; "" for one shorter than an analysis frame."""
        return [self._hear(np.asarray(r, dtype=np.float32)) if len(r) >= MIN_SAMPLES else "" for r in recordings]

    def _hear(self, recording: np.ndarray) -> str:
        # One temperature: the others are tried with unseeded sampling.
        segments, _ = self._model.transcribe(
            recording, language=self.language, beam_size=1, temperature=0.0, condition_on_previous_text=False,
            without_timestamps=True,
        )  # fmt: skip
        return "".join(segment.text for segment in segments).strip()


class Recogniser(Protocol):
    """What all recognisers have in common."""

    def transcribe(self, recordings: Sequence[np.ndarray]) -> list[str]: ...


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


def sherpa_model(folder: Path) -> Path:
    """The ONNX file of a folder of sherpa-onnx.

    Raises:
        ValueError: there is none.
    """
    for name in ("model.int8.onnx", "model.onnx"):
        if (folder / name).exists():
            return folder / name
    raise ValueError(f"{folder}: no model.int8.onnx or model.onnx here: not a folder of sherpa-onnx")


def load_asr(model_dir: str | Path, device: str = "cpu", language: str = "zh") -> LoadedAsr:
    """The recogniser of a folder.

    Args:
        model_dir: folder of funasr (config.yaml, model.pt), of faster-whisper (model.bin) or of sherpa-onnx
            (tokens.txt, *.onnx).
        device: torch device; sherpa-onnx stays on the CPU.
        language: "zh" or "en".

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
            return LoadedAsr(SenseVoice(folder, device), "funasr", kind, folder / "model.pt")
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
