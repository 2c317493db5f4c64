"""Recordings for the HTML report: MP3 audio and a spectrogram, as data URIs."""

import base64
import dataclasses
import io
from pathlib import Path

import numpy as np
import soundfile as sf
from PIL import Image
from scipy.signal import stft

from tts_grpo.speech.audio import load_audio

MP3_LEVEL = 0.3  # compression level of soundfile, 0 (best) to 1: about 50 kbit/s for speech at 16 kHz
WINDOW_S, HOP_S = 0.025, 0.01
BANDS = 64  # mel bands of the spectrogram
RANGE_DB = 55.0  # dynamic range below the loudest band
SHADES = 16
PIXELS_PER_HOP = 2


@dataclasses.dataclass(frozen=True)
class Clip:
    """A recording: audio and spectrogram as data URIs, and its duration."""

    audio_uri: str
    picture_uri: str
    duration_s: float


def data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def load_clip(path: Path, rgb: tuple[int, int, int]) -> Clip:
    """Load a recording; its spectrogram has one colour on a transparent background.

    Raises:
        ValueError: the recording cannot be read.
    """
    try:
        rate = sf.info(path).samplerate
    except (sf.LibsndfileError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as audio: {error}") from error
    speech = load_audio(path, rate)
    picture = spectrogram_png(band_levels(speech, rate), rgb)
    return Clip(data_uri("audio/mpeg", mp3(speech, rate)), data_uri("image/png", picture), len(speech) / rate)


def mp3(speech: np.ndarray, rate: int) -> bytes:
    """Encode mono float32 (T,) as MP3, a compressed format that every browser supports."""
    buffer = io.BytesIO()
    sf.write(buffer, np.clip(speech, -1, 1), rate, format="MP3", subtype="MPEG_LAYER_III", compression_level=MP3_LEVEL)
    return buffer.getvalue()


def mel_bands(rate: int, num_bins: int) -> np.ndarray:
    """Triangular filters (BANDS, num_bins), evenly spaced in mel: 2595 log10(1 + f / 700) (O'Shaughnessy, 1987)."""
    mel = lambda f: 2595 * np.log10(1 + f / 700)  # noqa: E731
    centres = 700 * (10 ** (np.linspace(0, mel(rate / 2), BANDS + 2) / 2595) - 1)
    bins = np.linspace(0, rate / 2, num_bins)
    low, mid, high = centres[:-2, None], centres[1:-1, None], centres[2:, None]
    return np.clip(np.minimum((bins - low) / (mid - low), (high - bins) / (high - mid)), 0, None)


def band_levels(speech: np.ndarray, rate: int) -> np.ndarray:
    """Levels (BANDS, hops) on a dB scale: 1 for the loudest, 0 for RANGE_DB or more below it."""
    window = int(WINDOW_S * rate)
    power = np.abs(stft(speech, rate, nperseg=window, noverlap=window - int(HOP_S * rate), nfft=2048)[2]) ** 2
    bands = mel_bands(rate, len(power)) @ power
    loudest = bands.max()
    if loudest <= 0:
        return np.zeros_like(bands)
    return np.clip(1 + 10 * np.log10(np.maximum(bands / loudest, 1e-12)) / RANGE_DB, 0, 1)


def spectrogram_png(levels: np.ndarray, rgb: tuple[int, int, int]) -> bytes:
    """A PNG with low bands at the bottom. Levels are the opacity of one colour, for light and dark backgrounds."""
    shades = np.round(levels[::-1] * (SHADES - 1)).astype(np.uint8).repeat(PIXELS_PER_HOP, axis=1)
    picture = Image.fromarray(shades, mode="P")
    picture.putpalette(list(rgb) * SHADES)
    buffer = io.BytesIO()
    opacity = bytes(round(255 * shade / (SHADES - 1)) for shade in range(SHADES))
    picture.save(buffer, "PNG", transparency=opacity, optimize=True)
    return buffer.getvalue()
