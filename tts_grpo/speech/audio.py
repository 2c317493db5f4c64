"""Audio files and the sample rates of the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile as sf
from scipy.signal import firwin, resample_poly

if TYPE_CHECKING:  # the evaluation's tables and report do not need torch, whose import takes seconds
    import torch

ASR_HZ = 16_000  # sample rate of all recognisers and of the speech tokenizer
MAX_PADDED_S = 256.0  # seconds of speech in a batch of a network, with padding, which limits its memory


def resample(speech: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """Resample ``speech`` (..., T); the result is float32."""
    if from_hz == to_hz:
        return speech.astype(np.float32, copy=False)
    divisor = np.gcd(from_hz, to_hz)
    return resample_poly(speech, to_hz // divisor, from_hz // divisor, axis=-1).astype(np.float32)


def resample_batch(speech: torch.Tensor, from_hz: int, to_hz: int) -> torch.Tensor:
    """Same as :func:`resample` for float32 (B, T), on its device: the same filter as one strided convolution."""
    import torch

    if from_hz == to_hz:
        return speech
    up, down = (rate // np.gcd(from_hz, to_hz) for rate in (to_hz, from_hz))
    half = 10 * max(up, down)  # scipy.signal.resample_poly's filter
    taps = up * firwin(2 * half + 1, 1 / max(up, down), window=("kaiser", 5.0))
    upsampled = torch.zeros(*speech.shape, int(up), device=speech.device)
    upsampled[..., 0] = speech
    weight = torch.tensor(taps, dtype=torch.float32, device=speech.device)[None, None]
    resampled = torch.nn.functional.conv1d(upsampled.flatten(1)[:, None], weight, stride=int(down), padding=half)[:, 0]
    return resampled[:, : -(-speech.shape[1] * int(up) // int(down))]


def batches_of_similar_length(lens: Sequence[int], size: int) -> list[list[int]]:
    """Indices of recordings by ascending length, in batches of at most ``size`` and ``MAX_PADDED_S`` with padding.

    A recording longer than ``MAX_PADDED_S`` is a batch of its own.

    Args:
        lens: lengths in samples at 16 kHz.
        size: largest number of recordings in a batch.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lens)), key=lens.__getitem__):
        full = not batches or len(batches[-1]) == size
        if full or (len(batches[-1]) + 1) * lens[i] > MAX_PADDED_S * ASR_HZ:
            batches.append([])
        batches[-1].append(i)
    return batches


def load_audio(path: str | Path, sample_rate_hz: int = ASR_HZ) -> np.ndarray:
    """Load a recording as mono float32 (T,) in [-1, 1]; channels are averaged.

    Raises:
        ValueError: the file is missing, cannot be decoded, has no samples, or has NaN or infinite samples.
    """
    try:
        speech, rate = sf.read(path, dtype="float32", always_2d=True)
    except (sf.LibsndfileError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as audio: {error}") from error
    if len(speech) == 0:
        raise ValueError(f"{path}: has no samples")
    if not np.isfinite(speech).all():
        raise ValueError(f"{path}: has NaN or infinite samples")
    return resample(speech.mean(axis=1), rate, sample_rate_hz)


def check_audio(path: str | Path) -> None:
    """Read the header of a recording, which takes a millisecond.

    Raises:
        ValueError: the file is missing, is no audio that can be decoded, or has no samples.
    """
    try:
        frames = sf.info(path).frames
    except (sf.LibsndfileError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as audio: {error}") from error
    if frames == 0:
        raise ValueError(f"{path}: has no samples")


def save_audio(path: str | Path, speech: np.ndarray, sample_rate_hz: int) -> None:
    """Write mono float32 (T,) as 16-bit WAV, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + ".part")
    sf.write(tmp, np.clip(speech, -1.0, 1.0), sample_rate_hz, format="WAV", subtype="PCM_16")
    tmp.replace(path)
