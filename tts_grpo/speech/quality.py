"""Speech-quality metrics that error rates miss: voice, sound, pauses, speech rate, intonation.

The cheap figures are measured on every utterance. Speaker similarity, DNSMOS and F0 need networks (``nets``) and are
measured on a part of the utterances. A figure that can be better or worse has a worst value, which an utterance without
usable audio gets: a failure cannot improve it. The others only describe; utterances without audio have none.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tts_grpo.speech.audio import ASR_HZ

FRAME_S = 0.02  # of the silence detector; frames do not overlap
SILENCE_DB = -40.0  # below the loud frames (95th percentile) of the recording
FLOOR_DB = -60.0  # full scale is 0: quieter is silence whatever the rest
CLIPPED = 32767 / 32768  # of full scale, the largest 16-bit sample
REPEAT_UNITS = range(2, 11)  # lengths of immediate repetition; one unit twice is ordinary Chinese


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


def spread(count: int, size: int) -> list[int]:
    """Positions of ``count`` of ``size`` utterances, evenly spread; all where there are no more."""
    return sorted({int(i) for i in np.linspace(0, size - 1, min(count, size)).round()}) if count else []
