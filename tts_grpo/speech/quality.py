"""Speech-quality metrics that error rates miss: voice, sound, pauses, speech rate, intonation.

The basic metrics are measured on every utterance. Speaker similarity, DNSMOS and F0 need networks (``nets``) and are
measured on a subset of the utterances. A metric with a direction (higher or lower is better) has a worst value, which
is used for utterances without usable audio, so that failures cannot improve it. Metrics without a direction are
descriptive, and are None for utterances without audio.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tts_grpo.speech.audio import ASR_HZ

FRAME_S = 0.02  # frames of the silence detector, without overlap
SILENCE_DB = -40.0  # silence threshold relative to the 95th percentile of the recording's frame levels
FLOOR_DB = -60.0  # frames below this level, in dB relative to full scale, are always silence
CLIPPED = 32767 / 32768  # the largest 16-bit sample, relative to full scale
REPEAT_UNITS = range(2, 11)  # lengths of repeated sequences; repeating a single unit is normal in Chinese


@dataclass(frozen=True)
class QualityMetric:
    """A metric: its title, unit, better direction ("higher", "lower" or None) and worst value."""

    title: str
    unit: str
    better: str | None = None
    worst: float | None = None


BASIC_METRICS = {
    "duration_s": QualityMetric("duration", "s"),
    "speech_rate": QualityMetric("speech rate without pauses at the ends", "units/s"),
    "leading_silence_s": QualityMetric("silence before the speech", "s"),
    "trailing_silence_s": QualityMetric("silence after the speech", "s"),
    "inner_silence_share": QualityMetric("silence within the speech", "share"),
    "eos_share": QualityMetric("EOS rate", "share", "higher", 0.0),
    "repetition": QualityMetric("immediately repeated units in the transcript", "share", "lower", 1.0),
    "clipped_share": QualityMetric("clipped samples", "share", "lower", 1.0),
}
NETWORK_METRICS = {
    "speaker_similarity": QualityMetric("speaker similarity to the prompt", "cosine", "higher", -1.0),
    "dnsmos_ovrl": QualityMetric("DNSMOS overall", "MOS", "higher", 1.0),
    "dnsmos_sig": QualityMetric("DNSMOS signal", "MOS", "higher", 1.0),
    "dnsmos_bak": QualityMetric("DNSMOS background", "MOS", "higher", 1.0),
    "f0_median_hz": QualityMetric("F0, median", "Hz"),
    "f0_range_semitones": QualityMetric("F0 range (5th to 95th percentile)", "semitones"),
    "f0_std_semitones": QualityMetric("F0 standard deviation (low: monotonous)", "semitones"),
}
QUALITY_METRICS = BASIC_METRICS | NETWORK_METRICS


def silences(speech: np.ndarray) -> tuple[float, float, float]:
    """Seconds of silence before and after the speech, and the share of silence within it.

    If the whole recording is silent, both durations are its length, and the share is 0.

    Args:
        speech: float32 (T,) at 16 kHz.
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
    """Share of units that repeat the 2 to 10 units immediately before them."""
    repeated = np.zeros(len(units), bool)
    for size in REPEAT_UNITS:
        for i in range(size, len(units) - size + 1):
            if units[i - size : i] == units[i : i + size]:
                repeated[i : i + size] = True
    return float(repeated.mean()) if len(units) else 0.0


def basic_metrics(
    speech: np.ndarray, target_units: list[str], hypothesis_units: list[str], finish_reason: str | None
) -> dict[str, float | None]:
    """The metrics of ``BASIC_METRICS`` for one utterance.

    Args:
        speech: float32 (T,) at 16 kHz.
        target_units: syllables or words of the target text.
        hypothesis_units: syllables or words of the transcript.
        finish_reason: "eos" if the language model generated an end token.
    """
    leading, trailing, inner = silences(speech)
    duration = len(speech) / ASR_HZ
    speech_s = duration - leading - trailing
    return {
        "duration_s": duration,
        "speech_rate": len(target_units) / speech_s if speech_s > 0 else None,
        "leading_silence_s": leading,
        "trailing_silence_s": trailing,
        "inner_silence_share": inner,
        "eos_share": float(finish_reason == "eos"),
        "repetition": max(0.0, repeated_share(hypothesis_units) - repeated_share(target_units)),
        "clipped_share": float(np.mean(np.abs(speech) >= CLIPPED)) if len(speech) else 1.0,
    }


def worst_values(networks: object | None) -> dict[str, float | None]:
    """Worst values for an utterance without usable audio; includes ``NETWORK_METRICS`` if ``networks`` is not None."""
    return {name: metric.worst for name, metric in (QUALITY_METRICS if networks else BASIC_METRICS).items()}


def evenly_spaced(count: int, size: int) -> list[int]:
    """Indices of ``count`` evenly spaced utterances of ``size``; all indices if ``size`` is not larger."""
    return sorted({int(i) for i in np.linspace(0, size - 1, min(count, size)).round()}) if count else []
