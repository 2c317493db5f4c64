"""What an error rate does not see of speech: voice, sound, pauses, pace, melody.

The cheap figures are of every utterance. Speaker similarity, DNSMOS and F0 need networks and are measured on a part of
the utterances. A figure that is good or bad has a worst value, which an utterance without usable audio gets: a failure
cannot improve it. The others only describe; utterances without audio have none.
"""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tts_grpo.speech.audio import ASR_HZ, load_audio

FRAME_S = 0.02  # of the silence detector; frames do not overlap
SILENCE_DB = -40.0  # below the loud frames (95th percentile) of the recording
FLOOR_DB = -60.0  # full scale is 0: quieter is silence whatever the rest
CLIPPED = 32767 / 32768  # of full scale, the largest 16-bit sample
REPEAT_UNITS = range(2, 11)  # lengths of immediate repetition; one unit twice is ordinary Chinese
MIN_VOICED_FRAMES = 10  # of 16 ms, to say something of the melody


@dataclass(frozen=True)
class Figure:
    """One figure: its name for people, unit, which direction is better (None: neither) and the worst value."""

    title: str
    unit: str
    better: str | None = None
    worst: float | None = None


CHEAP = {
    "duration_s": Figure("duration", "s"),
    "speech_rate": Figure("speech rate between the ends", "units/s"),
    "leading_silence_s": Figure("silence before the speech", "s"),
    "trailing_silence_s": Figure("silence after the speech", "s"),
    "inner_silence_share": Figure("silence within the speech", "share"),
    "eos_share": Figure("ended by the end token", "share", "higher", 0.0),
    "repetition": Figure("transcript said again at once", "share", "lower", 1.0),
    "clipped_share": Figure("clipped samples", "share", "lower", 1.0),
}
COSTLY = {
    "speaker_similarity": Figure("speaker similarity to the prompt", "cosine", "higher", -1.0),
    "dnsmos_ovrl": Figure("DNSMOS overall", "MOS", "higher", 1.0),
    "dnsmos_sig": Figure("DNSMOS signal", "MOS", "higher", 1.0),
    "dnsmos_bak": Figure("DNSMOS background", "MOS", "higher", 1.0),
    "f0_median_hz": Figure("F0, median", "Hz"),
    "f0_range_semitones": Figure("F0 range (5th to 95th percentile)", "semitones"),
    "f0_std_semitones": Figure("F0 deviation (low: monotonous)", "semitones"),
}
FIGURES = CHEAP | COSTLY


def silences(speech: np.ndarray) -> tuple[float, float, float]:
    """Seconds of silence before and after the speech, and the share of silence between its ends.

    Args:
        speech: float32 (T,) at 16 kHz. Where all is silence, both ends have its full length, and the share is 0.
    """
    size = int(FRAME_S * ASR_HZ)
    frames = speech[: len(speech) // size * size].reshape(-1, size).astype(np.float64)
    level = 10 * np.log10(np.mean(frames**2, axis=1) + 1e-12)
    if not len(level) or level.max() < FLOOR_DB:
        return len(speech) / ASR_HZ, len(speech) / ASR_HZ, 0.0
    loud = level > max(FLOOR_DB, np.percentile(level, 95) + SILENCE_DB)
    first, last = np.flatnonzero(loud)[[0, -1]]
    return first * FRAME_S, (len(speech) / ASR_HZ) - (last + 1) * FRAME_S, float(1 - loud[first : last + 1].mean())


def repeated_share(units: Sequence[str]) -> float:
    """Share of units that are the second or a later saying of 2 to 10 units said just before."""
    again = np.zeros(len(units), bool)
    for size in REPEAT_UNITS:
        for i in range(size, len(units) - size + 1):
            if units[i - size : i] == units[i : i + size]:
                again[i : i + size] = True
    return float(again.mean()) if len(units) else 0.0


def cheap_figures(
    speech: np.ndarray, target_units: list[str], heard_units: list[str], finish_reason: str | None
) -> dict[str, float | None]:
    """The figures of ``CHEAP`` of one utterance.

    Args:
        speech: float32 (T,) at 16 kHz.
        target_units: syllables or words that should be said.
        heard_units: those that were heard.
        finish_reason: "eos" where the language model ended the utterance by itself.
    """
    leading, trailing, inner = silences(speech)
    duration = len(speech) / ASR_HZ
    spoken = duration - leading - trailing
    return {
        "duration_s": duration,
        "speech_rate": len(target_units) / spoken if spoken > 0 else None,
        "leading_silence_s": leading,
        "trailing_silence_s": trailing,
        "inner_silence_share": inner,
        "eos_share": float(finish_reason == "eos"),
        "repetition": max(0.0, repeated_share(heard_units) - repeated_share(target_units)),
        "clipped_share": float(np.mean(np.abs(speech) >= CLIPPED)) if len(speech) else 1.0,
    }


def failed_figures(costly: object | None) -> dict[str, float | None]:
    """The figures of an utterance without usable audio, the costly ones if they are measured on it: worst, or none."""
    return {name: figure.worst for name, figure in (FIGURES if costly else CHEAP).items()}


class DnsMos:
    """DNSMOS P.835 (Reddy, Gopal and Cutler, ICASSP 2022): the network and the polynomials of the package speechmos.

    The package's own function also runs a second network, for P.808, and takes all cores for each recording.
    """

    def __init__(self):
        import onnxruntime
        from speechmos import dnsmos

        self.name = f"DNSMOS P.835 (speechmos {importlib.metadata.version('speechmos')})"
        self._package = dnsmos
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # leaves idle cores to others
        path = Path(dnsmos.__file__).parent / "dnsmos_models" / "sig_bak_ovr.onnx"
        self._network = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def measure(self, speech: np.ndarray) -> dict[str, float]:
        """Scores of a recording, float32 (T,) at 16 kHz; not below 1, where the scale begins.

        The network hears 9.01 s: shorter recordings are doubled until they suffice, of longer ones every second's
        window is heard and the scores are averaged.
        """
        size = int(self._package.INPUT_LENGTH * ASR_HZ)
        while len(speech) < size:
            speech = np.concatenate([speech, speech])
        hops = int(len(speech) // ASR_HZ - self._package.INPUT_LENGTH) + 1
        windows = [speech[i * ASR_HZ : i * ASR_HZ + size] for i in range(hops)]
        raw = np.concatenate([self._network.run(None, {"input_1": w[None]})[0] for w in windows if len(w) == size])
        scores = [self._package.DNSMOS.get_polyfit_val(None, *window, False) for window in raw]
        signal, background, overall = np.mean(scores, axis=0)
        means = {"dnsmos_ovrl": overall, "dnsmos_sig": signal, "dnsmos_bak": background}
        return {name: max(COSTLY[name].worst, float(value)) for name, value in means.items()}


class Melody:
    """F0 by SwiftF0 (Nieradzik, arXiv:2508.18440), the network within the package swift-f0."""

    def __init__(self):
        from swift_f0 import SwiftF0

        self.name = f"SwiftF0 {importlib.metadata.version('swift-f0')}"
        self._detector = SwiftF0(threads=1, spin=False)

    def measure(self, speech: np.ndarray) -> dict[str, float | None]:
        """Median, range and deviation of F0 of a recording, float32 (T,) at 16 kHz; None with hardly any voice."""
        found = self._detector.detect(speech, ASR_HZ, fmin=60.0, fmax=600.0)
        f0 = found.pitch_hz[found.confidence >= 0.5]
        if len(f0) < MIN_VOICED_FRAMES:
            return dict.fromkeys(("f0_median_hz", "f0_range_semitones", "f0_std_semitones"))
        low, median, high = np.percentile(f0, (5, 50, 95))
        return {
            "f0_median_hz": float(median),
            "f0_range_semitones": float(12 * np.log2(high / low)),
            "f0_std_semitones": float(np.std(12 * np.log2(f0))),
        }


class Resemblyzer:
    """Speaker embedding of the package Resemblyzer (GE2E; Wan et al., ICASSP 2018), its weights within it."""

    def __init__(self, device: str = "cpu"):
        from resemblyzer import VoiceEncoder

        self.name = f"Resemblyzer {importlib.metadata.version('Resemblyzer')}"
        self._encoder = VoiceEncoder(device, verbose=False)

    def embed(self, speech: np.ndarray) -> np.ndarray | None:
        """Unit vector (256,) of a recording, float32 (T,) at 16 kHz; None where no speech is found in it."""
        from resemblyzer import preprocess_wav

        if not np.any(speech):
            return None
        speech = preprocess_wav(speech)
        embedding = self._encoder.embed_utterance(speech) if len(speech) else np.array([np.nan])
        return embedding if np.isfinite(embedding).all() else None  # the network may answer 0 / 0


class WavLm:
    """Speaker embedding of a Hugging Face folder of a WavLM with an x-vector head, such as wavlm-base-plus-sv.

    Raises:
        ValueError: the folder is of another model, or its weights do not match.
    """

    def __init__(self, model_dir: Path, device: str = "cpu"):
        from transformers import AutoConfig, AutoFeatureExtractor, WavLMForXVector

        kinds = AutoConfig.from_pretrained(model_dir).architectures
        if kinds != ["WavLMForXVector"]:
            raise ValueError(f"{model_dir}: {kinds} in config.json: not a WavLMForXVector")
        self._model, report = WavLMForXVector.from_pretrained(model_dir, output_loading_info=True)
        wrong = [*report["missing_keys"], *report["mismatched_keys"]]
        if wrong:
            raise ValueError(f"{model_dir}: weights are missing or of another shape: {wrong[:3]}")
        self._model.to(device).eval()
        self._features = AutoFeatureExtractor.from_pretrained(model_dir)
        self.name = f"WavLM {Path(model_dir).name}"

    @torch.inference_mode()
    def embed(self, speech: np.ndarray) -> np.ndarray | None:
        """Unit vector of a recording, float32 (T,) at 16 kHz; None for one too short or silent."""
        if len(speech) < ASR_HZ // 4 or not np.any(speech):
            return None
        inputs = self._features(speech, sampling_rate=ASR_HZ, return_tensors="pt").to(self._model.device)
        return torch.nn.functional.normalize(self._model(**inputs).embeddings, dim=-1)[0].cpu().numpy()


class Similarity:
    """Cosine of the speaker embeddings of an utterance and of its prompt.

    Args:
        encoder: with ``embed`` and ``name``.
        reference: recordings of the voice for utterances without a prompt; their embeddings are averaged.
    """

    def __init__(self, encoder: Resemblyzer | WavLm, reference: Sequence[Path] = ()):
        self.name, self._embed, self._known = encoder.name, encoder.embed, {}
        self.reference = tuple(reference)

    def _voice(self, paths: tuple[Path, ...]) -> np.ndarray:
        if paths not in self._known:
            embeddings = [self._embed(load_audio(path)) for path in paths]
            if any(e is None for e in embeddings):
                raise ValueError(f"no speech to compare with in {', '.join(map(str, paths))}")
            mean = np.mean(embeddings, axis=0)
            self._known[paths] = mean / np.linalg.norm(mean)
        return self._known[paths]

    def measure(self, speech: np.ndarray, prompt_audio: str | None) -> dict[str, float]:
        """``speaker_similarity``, or nothing where there is neither prompt nor reference."""
        paths = (Path(prompt_audio),) if prompt_audio else self.reference
        if not paths:
            return {}
        embedding = self._embed(speech)
        worst = COSTLY["speaker_similarity"].worst
        return {"speaker_similarity": worst if embedding is None else float(embedding @ self._voice(paths))}


class CostlyFigures:
    """All figures of ``COSTLY``, and the names of the networks that give them."""

    def __init__(self, device: str = "cpu", speaker_model_dir: Path | None = None, reference: Sequence[Path] = ()):
        encoder = WavLm(speaker_model_dir, device) if speaker_model_dir else Resemblyzer(device)
        self._similarity, self._mos, self._melody = Similarity(encoder, reference), DnsMos(), Melody()

    def model(self, name: str) -> str | None:
        """The network behind a figure; None where there is none."""
        for prefix, part in (("speaker", self._similarity), ("dnsmos", self._mos), ("f0", self._melody)):
            if name.startswith(prefix):
                return part.name
        return None

    def measure(self, speech: np.ndarray, prompt_audio: str | None) -> dict[str, float | None]:
        """Figures of one recording, float32 (T,) at 16 kHz; ``prompt_audio`` is the path of its prompt."""
        return self._similarity.measure(speech, prompt_audio) | self._mos.measure(speech) | self._melody.measure(speech)


def spread(count: int, size: int) -> list[int]:
    """Positions of ``count`` of ``size`` utterances, evenly spread; all where there are no more."""
    return sorted({int(i) for i in np.linspace(0, size - 1, min(count, size)).round()}) if count else []
