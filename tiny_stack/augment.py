"""Augmentation of training speech for the recognisers, on the training device: what varies is drawn per recording."""

import dataclasses
import math

import numpy as np
import torch
import torch.nn.functional as F

from tts_grpo.speech.audio import ASR_HZ

TAIL_S = 0.4  # reverberation that is computed
BEFORE_TAIL_S = 0.002  # from the direct sound to the first reflections
SECONDS_TO_60_DB = (0.1, 0.6)  # decay of the reverberation
DIRECT_TO_TAIL_DB = (0.0, 15.0)
CHANNEL_POINTS, CHANNEL_DB = 8, 6.0  # a channel's response goes through random gains at these many frequencies
LOW_CUT_HZ, HIGH_CUT_HZ = (50.0, 400.0), (3000.0, 8000.0)
CUT_SHARE = 0.3  # of the channels, for each of the two cuts
FFT_BLOCK = 8000  # lengths of transforms are multiples of this, which has small prime factors only


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What one recogniser hears during its training.

    Attributes:
        speed: range of speeds, one for each batch; the pitch changes with it.
        gain_db: range of gains.
        noise_db: range of noise levels relative to full scale.
        noise_share: share of the recordings with noise. Without any, the quiet pauses of a recording have features far
            below all others, which a recogniser that has never heard them takes for syllables.
        noise_slope: range of exponents a of the noise's power spectrum 1/f^a: 0 is white, 2 is brown noise.
        room_share: share of the recordings with synthetic reverberation.
        channel_share: share of the recordings with a random frequency response.
        joined: relative frequencies of one, two, ... recordings in a row with pauses between them.
        pause_s: range of these pauses.
        num_bands: masked bands of mel filters.
        band: largest number of filters in a masked band.
        spans_per_s: masked time spans per second.
        span: largest number of stacked frames in a masked span.
    """

    speed: tuple[float, float] = (0.9, 1.12)
    gain_db: tuple[float, float] = (-8.0, 6.0)
    noise_db: tuple[float, float] = (-90.0, -40.0)
    noise_share: float = 1.0
    noise_slope: tuple[float, float] = (0.0, 0.0)
    room_share: float = 0.0
    channel_share: float = 0.0
    joined: tuple[float, ...] = (1.0,)
    pause_s: tuple[float, float] = (0.0, 0.0)
    num_bands: int = 2
    band: int = 11
    spans_per_s: float = 0.8
    span: int = 2

    def waveforms(self, speech: torch.Tensor, lens: torch.Tensor, rng: np.random.Generator):
        """Speech float32 (B, T) and its lengths (B,) -> the same at another speed, in a room, with noise and gain."""
        size = int(speech.shape[1] / rng.uniform(*self.speed))
        lens = lens * size // speech.shape[1]
        speech = F.interpolate(speech[:, None], size=size, mode="linear")[:, 0]
        padded = math.ceil((size + TAIL_S * ASR_HZ) / FFT_BLOCK) * FFT_BLOCK
        if self.room_share or self.channel_share:
            spectrum = torch.fft.rfft(speech, padded) * torch.fft.rfft(self.rooms(speech), padded)
            speech = torch.fft.irfft(spectrum * self.channels(speech, padded), padded)[:, :size]
        noise = self.noise(speech, padded)[:, :size] * decibels(speech, self.noise_db)
        return speech * decibels(speech, self.gain_db) + noise * chosen(speech, self.noise_share), lens

    def rooms(self, speech: torch.Tensor) -> torch.Tensor:
        """Impulse responses (B, T): the direct sound and, in ``room_share`` of them, exponentially decaying noise."""
        time = torch.arange(int(TAIL_S * ASR_HZ), device=speech.device) / ASR_HZ
        tail = torch.randn(len(speech), len(time), device=speech.device)
        tail = tail * 10 ** (-3 * time / uniform(speech, SECONDS_TO_60_DB)) * (time >= BEFORE_TAIL_S)
        tail = tail / tail.norm(dim=1, keepdim=True) / decibels(speech, DIRECT_TO_TAIL_DB)
        tail = tail * chosen(speech, self.room_share)
        tail[:, 0] = 1.0
        return tail

    def channels(self, speech: torch.Tensor, padded: int) -> torch.Tensor:
        """Frequency responses (B, F) of a transform of ``padded`` samples; flat but in ``channel_share`` of them."""
        hz = torch.linspace(0, ASR_HZ / 2, padded // 2 + 1, device=speech.device)
        place = torch.log1p(hz / 500) / math.log1p(ASR_HZ / 2 / 500) * (CHANNEL_POINTS - 1)
        below = place.long().clamp(max=CHANNEL_POINTS - 2)
        points = torch.empty(len(speech), CHANNEL_POINTS, device=speech.device).uniform_(-CHANNEL_DB, CHANNEL_DB)
        level = torch.lerp(points[:, below], points[:, below + 1], place - below)
        low, high = uniform(speech, LOW_CUT_HZ), uniform(speech, HIGH_CUT_HZ)
        level = level - 30 * ((low - hz) / low).clamp(min=0) * chosen(speech, CUT_SHARE)
        level = level - 60 * ((hz - high) / high).clamp(min=0) * chosen(speech, CUT_SHARE)
        return 10 ** (level * chosen(speech, self.channel_share) / 20)

    def noise(self, speech: torch.Tensor, padded: int) -> torch.Tensor:
        """Noise (B, ``padded``) with an RMS of 1."""
        noise = torch.randn(len(speech), padded, device=speech.device)
        if self.noise_slope != (0.0, 0.0):
            index = torch.arange(padded // 2 + 1, device=speech.device).clamp(min=padded * 50 // ASR_HZ)  # from 50 Hz
            noise = torch.fft.irfft(torch.fft.rfft(noise) * index ** (-uniform(speech, self.noise_slope) / 2), padded)
        return noise / noise.square().mean(1, keepdim=True).sqrt()

    def mask(self, features: torch.Tensor, mean: torch.Tensor, frames_per_s: float) -> torch.Tensor:
        """SpecAugment (Park et al. 2019): random bands and time spans of features are set to their mean.

        Args:
            features: stacked frames (B, L, M, filters).
            mean: (M, filters).
            frames_per_s: stacked frames per second.
        """
        size, length, _, filters = features.shape
        bands = random_ranges(size, self.num_bands, filters, self.band, features.device)
        spans = random_ranges(
            size, math.ceil(self.spans_per_s * length / frames_per_s), length, self.span, features.device
        )
        return torch.where(bands[:, None, None] | spans[:, :, None, None], mean, features)


def uniform(like: torch.Tensor, bounds: tuple[float, float]) -> torch.Tensor:
    """One random number between two bounds for each row of ``like``: (B, 1)."""
    return torch.empty(len(like), 1, device=like.device).uniform_(*bounds)


def decibels(like: torch.Tensor, bounds: tuple[float, float]) -> torch.Tensor:
    """Random factors (B, 1) with levels between two bounds in dB."""
    return 10 ** (uniform(like, bounds) / 20)


def chosen(like: torch.Tensor, share: float) -> torch.Tensor:
    """1.0 for a random share of the rows, otherwise 0.0: (B, 1)."""
    return (uniform(like, (0.0, 1.0)) < share).float()


def random_ranges(size: int, number: int, length: int, longest: int, device) -> torch.Tensor:
    """Boolean (``size``, ``length``): in each row, ``number`` random ranges of 0 to ``longest`` places are true."""
    first = torch.randint(0, length, (size, number, 1), device=device)
    width = torch.randint(0, longest + 1, (size, number, 1), device=device)
    place = torch.arange(length, device=device)
    return ((place >= first) & (place < first + width)).any(1)
