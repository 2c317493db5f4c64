"""The networks of the tiny stack's speech tokenizer (speech -> tokens) and token2wav (tokens -> speech).

Both are feed-forward stacks of ConvNeXt blocks (Liu et al. 2022, "A ConvNet for the 2020s", in the one-dimensional
form of Vocos, Siuzdak 2023). The tokenizer ends in finite scalar quantisation (Mentzer et al. 2023, "Finite Scalar
Quantization") with CosyVoice2's codebook: 8 dimensions of 3 levels, 25 tokens per second. token2wav ends, as in
Vocos, in an inverse short-time Fourier transform.

Every layer is masked to the length of each utterance, so that results do not depend on the rest of the batch.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.audio_utils import mel_filter_bank

from tts_grpo.speech.audio import ASR_HZ
from tts_grpo.text.tokens import TOKEN_HZ

SAMPLES_PER_TOKEN = ASR_HZ // TOKEN_HZ
N_FFT, HOP, NUM_MELS = 640, 160, 80
FRAMES_PER_TOKEN = SAMPLES_PER_TOKEN // HOP
LEVELS, DIMENSIONS = 3, 8


class LogMel(nn.Module):
    """Log-mel spectrogram at 16 kHz, shifted and scaled to about [-2, 2]."""

    def __init__(self, n_fft: int = N_FFT, hop: int = HOP, num_mels: int = NUM_MELS):
        super().__init__()
        self.n_fft, self.hop = n_fft, hop
        filters = mel_filter_bank(n_fft // 2 + 1, num_mels, 20.0, 7600.0, ASR_HZ, mel_scale="htk")
        self.register_buffer("filters", torch.tensor(filters.T, dtype=torch.float32), persistent=False)
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    def forward(self, speech: torch.Tensor) -> torch.Tensor:
        """(B, T) samples -> (B, T / hop, num_mels)."""
        padded = F.pad(speech.float(), ((self.n_fft - self.hop) // 2,) * 2)
        spectrum = torch.stft(padded, self.n_fft, self.hop, window=self.window, center=False, return_complex=True)
        mel = torch.log(torch.clamp(self.filters @ spectrum.abs(), min=1e-5))
        return ((mel + 5) / 4).transpose(1, 2)


class ConvNeXtBlock(nn.Module):
    """Residual block: depthwise convolution over time, then a pointwise network."""

    def __init__(self, dim: int, expansion: int = 3, kernel: int = 7, dropout: float = 0.0):
        super().__init__()
        self.depthwise = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, dim * expansion)
        self.project = nn.Linear(dim * expansion, dim)
        self.scale = nn.Parameter(torch.full((dim,), 0.2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, T, dim) with ``mask`` (B, T, 1) -> (B, T, dim), zero where the mask is zero."""
        y = self.depthwise((x * mask).transpose(1, 2)).transpose(1, 2)
        y = self.project(F.gelu(self.expand(self.norm(y))))
        return (x + self.dropout(self.scale * y)) * mask


def length_mask(lens: torch.Tensor, size: int) -> torch.Tensor:
    """(B,) lengths -> (B, size, 1) float mask."""
    return (torch.arange(size, device=lens.device)[None] < lens[:, None])[..., None].float()


class FiniteScalarQuantiser(nn.Module):
    """Rounds each of 8 normalised values to -1, 0 or 1, with a straight-through gradient."""

    def __init__(self):
        super().__init__()
        # Without this norm, the first batch collapses to one token. The factor 1.275 makes the three levels of a
        # standard normal value equally probable: P(|tanh(1.275 z)| < 0.5) = 1/3.
        self.norm = nn.BatchNorm1d(DIMENSIONS, affine=False)

    def forward(self, z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, N, 8) -> digits (B, N, 8) in {-1, 0, 1}, zero where ``mask`` (B, N, 1) is zero."""
        valid = mask[..., 0].bool()
        normed = torch.zeros_like(z, dtype=torch.float32)
        normed[valid] = self.norm(z[valid].float())
        bounded = torch.tanh(1.275 * normed)
        return bounded + (bounded.round() - bounded).detach()

    @staticmethod
    def to_tokens(digits: torch.Tensor) -> torch.Tensor:
        """(..., 8) digits -> (...) token ids."""
        powers = LEVELS ** torch.arange(DIMENSIONS, device=digits.device)
        return ((digits.round().long() + 1) * powers).sum(-1)

    @staticmethod
    def to_digits(tokens: torch.Tensor) -> torch.Tensor:
        """(...) token ids -> (..., 8) digits."""
        powers = LEVELS ** torch.arange(DIMENSIONS, device=tokens.device)
        return ((tokens[..., None] // powers) % LEVELS - 1).float()


class SpeechTokenizer(nn.Module):
    """Speech to speech tokens: log-mel frames at 100 Hz, downsampled twice to 25 Hz and quantised."""

    def __init__(self, dim: int = 160, num_blocks: int = 4):
        super().__init__()
        self.mel = LogMel()
        self.input = nn.Linear(NUM_MELS, dim)
        self.block_100hz = ConvNeXtBlock(dim)
        self.merge_50hz = nn.Linear(2 * dim, dim)
        self.block_50hz = ConvNeXtBlock(dim)
        self.merge_25hz = nn.Linear(2 * dim, dim)
        self.blocks_25hz = nn.ModuleList(ConvNeXtBlock(dim) for _ in range(num_blocks))
        self.output = nn.Linear(dim, DIMENSIONS)
        self.quantise = FiniteScalarQuantiser()

    def forward(self, mel: torch.Tensor, token_lens: torch.Tensor) -> torch.Tensor:
        """Log-mel (B, 4 N, 80) -> digits (B, N, 8)."""
        batch, frames, _ = mel.shape
        masks = {rate: length_mask(token_lens * rate, frames * rate // 4) for rate in (4, 2, 1)}
        x = self.block_100hz(self.input(mel) * masks[4], masks[4])
        x = self.block_50hz(self.merge_50hz(x.reshape(batch, frames // 2, -1)) * masks[2], masks[2])
        x = self.merge_25hz(x.reshape(batch, frames // 4, -1)) * masks[1]
        for block in self.blocks_25hz:
            x = block(x, masks[1])
        return self.quantise(self.output(x), masks[1])

    def encode(self, speech: torch.Tensor, speech_lens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Speech tokens of a batch of recordings.

        Args:
            speech: float32 (B, T), 16 kHz.
            speech_lens: int64 (B,), samples.

        Returns:
            Tokens, int64 (B, N), and their lengths, int64 (B,): one token per 640 samples, rounded up.
        """
        token_lens = (speech_lens + SAMPLES_PER_TOKEN - 1) // SAMPLES_PER_TOKEN
        size = int(token_lens.max()) * SAMPLES_PER_TOKEN
        speech = F.pad(speech, (0, max(0, size - speech.shape[1])))[:, :size]
        inside = torch.arange(size, device=speech.device)[None] < speech_lens[:, None]
        digits = self(self.mel(speech * inside), token_lens)
        return FiniteScalarQuantiser.to_tokens(digits), token_lens


class TokenDecoder(nn.Module):
    """Speech tokens to waveform: blocks at 25 Hz, blocks at 50 Hz, then two spectral frames per 50 Hz step."""

    def __init__(self, dim: int = 256, num_blocks: int = 4, wave_dim: int = 256, num_wave_blocks: int = 5):
        super().__init__()
        self.wave_dim = wave_dim
        self.input = nn.Linear(DIMENSIONS, dim)
        self.blocks = nn.ModuleList(ConvNeXtBlock(dim) for _ in range(num_blocks))
        self.upsample = nn.Linear(dim, 2 * wave_dim)
        self.wave_blocks = nn.ModuleList(ConvNeXtBlock(wave_dim) for _ in range(num_wave_blocks))
        self.norm = nn.LayerNorm(wave_dim)
        self.head = nn.Linear(wave_dim, 2 * (N_FFT + 2))
        with torch.no_grad():  # initial output is quiet: the first half of each frame's outputs are log-magnitudes
            self.head.bias.zero_().view(2, 2, -1)[:, 0] = -3.0
        self.register_buffer("window", torch.hann_window(N_FFT), persistent=False)

    def features(self, digits: torch.Tensor, token_lens: torch.Tensor) -> torch.Tensor:
        """Digits (B, N, 8) -> features (B, N, dim) at 25 Hz."""
        mask = length_mask(token_lens, digits.shape[1])
        x = self.input(digits) * mask
        for block in self.blocks:
            x = block(x, mask)
        return x

    def forward(self, digits: torch.Tensor, token_lens: torch.Tensor) -> torch.Tensor:
        """Digits (B, N, 8) -> waveform (B, 640 N), zero after each end."""
        batch, size, _ = digits.shape
        mask = length_mask(2 * token_lens, 2 * size)
        x = self.upsample(self.features(digits, token_lens)).reshape(batch, 2 * size, self.wave_dim) * mask
        for block in self.wave_blocks:
            x = block(x, mask)
        spectrum = (self.head(self.norm(x)).float() * mask).reshape(batch, FRAMES_PER_TOKEN * size, N_FFT + 2)
        waveform = self.overlap_add(spectrum, mask.repeat_interleave(2, dim=1))
        inside = length_mask(token_lens * SAMPLES_PER_TOKEN, waveform.shape[1])[..., 0]
        return waveform * inside  # remove the tail of the last frame, which decoding an utterance alone would cut off

    def overlap_add(self, spectrum: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, F, 642) log-magnitudes and phases with ``mask`` (B, F, 1) -> (B, 160 F)."""
        log_magnitude, phase = spectrum.chunk(2, dim=-1)
        frames = torch.fft.irfft(torch.polar(torch.exp(log_magnitude.clamp(max=5.0)), phase), N_FFT)
        # 1.5 is the sum of the squared Hann windows that overlap at each sample.
        frames = (frames * self.window * mask / 1.5).reshape(*spectrum.shape[:2], N_FFT // HOP, HOP)
        overlap = N_FFT // HOP - 1
        shifted = (F.pad(frames[:, :, j], (0, 0, j, overlap - j)) for j in range(overlap + 1))
        trim = (N_FFT - HOP) // 2
        return sum(shifted).flatten(1)[:, trim:-trim]
