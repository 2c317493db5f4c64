"""The networks of CosyVoice3's token2wav, with the layer names of its released ``flow.pt`` and ``hift.pt``.

They were written from CosyVoice's source (ace7c47: cosyvoice/flow/flow.py ``CausalMaskedDiffWithDiT``, cosyvoice/flow/
DiT, cosyvoice/hifigan/generator.py ``CausalHiFTGenerator``), which supports one utterance at a time. All convolutions
but those with look-ahead are causal and attention is masked, so padding after an utterance does not change it.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from tts_grpo.speech.cosyvoice3.config import FlowConfig, VocoderConfig
from tts_grpo.text.tokens import NUM_SPEECH_TOKENS

MELS = 80
SPEAKER_SIZE = 192  # of the CAM++ embedding
LOOK_AHEAD = 3  # tokens
TIME_SIZE = 256  # of the sinusoidal embedding of a time step
POSITION_TAPS, POSITION_GROUPS = 31, 16


class Convolution(nn.Conv1d):
    """A convolution of stride 1 that reads only earlier inputs, or only later ones with ``ahead``."""

    def __init__(self, channels_in: int, channels_out: int, taps: int, dilation: int = 1, ahead: bool = False):
        super().__init__(channels_in, channels_out, taps, dilation=dilation)
        padding = (taps - 1) * dilation
        self.edges = (0, padding) if ahead else (padding, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.pad(x, self.edges))


class PreLookahead(nn.Module):
    """Two convolutions with a residual connection; the first reads ``LOOK_AHEAD`` tokens ahead."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.conv1 = Convolution(channels, hidden, LOOK_AHEAD + 1, ahead=True)
        self.conv2 = Convolution(hidden, channels, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C), zero after the end of each utterance, -> (B, T, C)."""
        return self.conv2(F.leaky_relu(self.conv1(x.transpose(1, 2)))).transpose(1, 2) + x


class PositionConv(nn.Module):
    """Two grouped causal convolutions with Mish, (B, T, C) -> (B, T, C)."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1, self.conv2 = (
            nn.Sequential(nn.Conv1d(dim, dim, POSITION_TAPS, groups=POSITION_GROUPS), nn.Mish()) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(1, 2)
        for layer in (self.conv1, self.conv2):
            x = layer(F.pad(x, (POSITION_TAPS - 1, 0)))
        return x.transpose(1, 2)


class InputEmbedding(nn.Module):
    """Noisy mel, prompt mel, encoded tokens and speaker -> (B, T, dim)."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj = nn.Linear(4 * MELS, dim)
        self.conv_pos_embed = PositionConv(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.proj(x)
        return self.conv_pos_embed(x) + x


class TimeEmbedding(nn.Module):
    """Time steps (S,) -> (S, dim), by a sinusoidal embedding of 1000 times the step."""

    def __init__(self, dim: int):
        super().__init__()
        self.time_mlp = nn.Sequential(nn.Linear(TIME_SIZE, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, times: torch.Tensor) -> torch.Tensor:
        half = TIME_SIZE // 2
        frequencies = torch.exp(torch.arange(half, device=times.device).float() * -(math.log(10_000) / (half - 1)))
        angles = 1000 * times[:, None] * frequencies
        return self.time_mlp(torch.cat([angles.sin(), angles.cos()], dim=1))


class Modulation(nn.Module):
    """Shifts, scales and gates for adaptive layer normalisation, (S, dim) -> (S, count, dim)."""

    def __init__(self, dim: int, count: int):
        super().__init__()
        self.linear = nn.Linear(dim, count * dim)

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        return self.linear(F.silu(time)).unflatten(1, (-1, time.shape[1]))


class Attention(nn.Module):
    """Self-attention in which rotary embeddings turn the first head only, as in the released model.

    CosyVoice applies them to the projections before it splits these into heads.
    """

    def __init__(self, dim: int, heads: int, head_size: int):
        super().__init__()
        self.heads, self.head_size = heads, head_size
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, heads * head_size) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(heads * head_size, dim)])

    def forward(self, x: torch.Tensor, used: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        """(B, T, C), bool (B, 1, 1, T), cosines and sines (2, T, head_size) -> (B, T, C)."""
        q, k, v = (self.split(layer(x)) for layer in (self.to_q, self.to_k, self.to_v))
        for value in (q, k):
            value[:, 0] = rotate(value[:, 0], rotation)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=used)
        return self.to_out[0](attended.transpose(1, 2).flatten(2))

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, heads * head_size) -> (B, heads, T, head_size)."""
        return x.unflatten(2, (self.heads, self.head_size)).transpose(1, 2)


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (arXiv 2104.09864) of (..., T, size): neighbouring channels are a pair."""
    cosines, sines = rotation
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * cosines + turned * sines


class FeedForward(nn.Module):
    def __init__(self, dim: int, mult: int):
        super().__init__()
        up = nn.Sequential(nn.Linear(dim, mult * dim), nn.GELU(approximate="tanh"))
        self.ff = nn.Sequential(up, nn.Identity(), nn.Linear(mult * dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ff(x)


def modulated_norm(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Layer normalisation without weights, then ``scale`` and ``shift``, each (C,)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Block(nn.Module):
    def __init__(self, config: FlowConfig):
        super().__init__()
        self.attn_norm = Modulation(config.dim, 6)
        self.attn = Attention(config.dim, config.heads, config.head_size)
        self.ff = FeedForward(config.dim, config.ff_mult)

    def forward(self, x, used, rotation, modulation: torch.Tensor) -> torch.Tensor:
        """See :meth:`Attention.forward`; ``modulation`` is (6, C)."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation
        x = x + gate * self.attn(modulated_norm(x, shift, scale), used, rotation)
        return x + ff_gate * self.ff(modulated_norm(x, ff_shift, ff_scale))


class Rotary(nn.Module):
    """Angles of rotary embeddings; the released file has their frequencies."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / (10_000 ** (torch.arange(0, size, 2).float() / size)))

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """Positions (T,) -> cosines and sines (2, T, size)."""
        angles = (positions.float()[:, None] * self.inv_freq).repeat_interleave(2, dim=1)
        return torch.stack([angles.cos(), angles.sin()])


class DiT(nn.Module):
    """The flow's estimator: a diffusion transformer (arXiv 2212.09748), here on padded batches.

    All utterances of a batch are at the same time step, so its modulations are computed once, by :meth:`modulations`.
    """

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.time_embed = TimeEmbedding(config.dim)
        self.input_embed = InputEmbedding(config.dim)
        self.rotary_embed = Rotary(config.head_size)
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm_out = Modulation(config.dim, 2)
        self.proj_out = nn.Linear(config.dim, MELS)

    def modulations(self, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Time steps (S,) -> modulations of the blocks (S, depth, 6, dim) and of the last layer (S, 2, dim)."""
        time = self.time_embed(times)
        blocks = torch.stack([block.attn_norm(time) for block in self.transformer_blocks], dim=1)
        return blocks, self.norm_out(time)

    def forward(self, x, used, blocks: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """Velocity of the mel spectrogram.

        Args:
            x: (B, T, 320): noisy mel, prompt mel, encoded tokens and speaker.
            used: bool (B, T), False after the end of each utterance.
            blocks, last: modulations (depth, 6, dim) and (2, dim) of the time step.

        Returns:
            (B, T, 80), undefined after the end of each utterance.
        """
        rotation = self.rotary_embed(torch.arange(x.shape[1], device=x.device))
        x = self.input_embed(x)
        for block, modulation in zip(self.transformer_blocks, blocks, strict=True):
            x = block(x, used[:, None, None], rotation, modulation)
        scale, shift = last
        return self.proj_out(modulated_norm(x, shift, scale))


class FlowNetwork(nn.Module):
    """The networks in ``flow.pt``."""

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.input_embedding = nn.Embedding(NUM_SPEECH_TOKENS, MELS)
        self.spk_embed_affine_layer = nn.Linear(SPEAKER_SIZE, MELS)
        self.pre_lookahead_layer = PreLookahead(MELS, config.lookahead_channels)
        self.decoder = nn.ModuleDict({"estimator": DiT(config)})


class Downsample(nn.Conv1d):
    """A convolution that keeps every ``rate``-th frame and reads only earlier inputs and the next ``rate``."""

    def __init__(self, channels_in: int, channels_out: int, rate: int):
        super().__init__(channels_in, channels_out, 2 * rate, rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.pad(x, (self.stride[0] - 1, 0)))


class Upsample(Convolution):
    """Repeats each frame ``rate`` times before a causal convolution."""

    def __init__(self, channels_in: int, channels_out: int, taps: int, rate: int):
        super().__init__(channels_in, channels_out, taps)
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x[..., None].expand(*x.shape, self.rate).flatten(2))


class Snake(nn.Module):
    """``x + sin(alpha x)^2 / alpha`` with one alpha per channel (arXiv 2006.08195)."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        alpha = self.alpha[:, None]
        return x + (1.0 / (alpha + 1e-9)) * torch.sin(x * alpha) ** 2


class ResBlock(nn.Module):
    """Residual pairs of causal convolutions, the first of each pair dilated."""

    def __init__(self, channels: int, taps: int, dilations: tuple[int, ...]):
        super().__init__()
        self.convs1 = nn.ModuleList(weight_norm(Convolution(channels, channels, taps, rate)) for rate in dilations)
        self.convs2 = nn.ModuleList(weight_norm(Convolution(channels, channels, taps)) for _ in dilations)
        self.activations1 = nn.ModuleList(Snake(channels) for _ in dilations)
        self.activations2 = nn.ModuleList(Snake(channels) for _ in dilations)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layers = zip(self.activations1, self.convs1, self.activations2, self.convs2, strict=True)
        for snake1, conv1, snake2, conv2 in layers:
            x = conv2(snake2(conv1(snake1(x)))) + x
        return x


class F0Predictor(nn.Module):
    """Mel (B, 80, T) -> fundamental frequency in Hz (B, T); the first convolution reads three frames ahead."""

    def __init__(self, channels: int):
        super().__init__()
        layers = []
        for number in range(5):
            conv = Convolution(MELS, channels, 4, ahead=True) if number == 0 else Convolution(channels, channels, 3)
            layers += [weight_norm(conv), nn.ELU()]
        self.condnet = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, 1)

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.condnet(mel).transpose(1, 2))[..., 0].abs()


class VocoderNetwork(nn.Module):
    """The networks in ``hift.pt``: HiFTNet (arXiv 2309.09493), causal."""

    def __init__(self, config: VocoderConfig):
        super().__init__()
        self.config, channels = config, config.base_channels
        sizes = [channels // 2 ** (i + 1) for i in range(len(config.upsample_rates))]
        bins = config.n_fft + 2
        self.m_source = nn.ModuleDict({"l_linear": nn.Linear(config.harmonics + 1, 1)})
        self.conv_pre = weight_norm(Convolution(MELS, channels, config.look_right + 1, ahead=True))
        self.ups = nn.ModuleList(
            weight_norm(Upsample(*layer))
            for layer in zip([channels, *sizes], sizes, config.upsample_kernels, config.upsample_rates, strict=False)
        )
        rates = [math.prod(config.upsample_rates[i + 1 :]) for i in range(len(sizes))]
        self.source_downs = nn.ModuleList(
            Convolution(bins, size, 1) if rate == 1 else Downsample(bins, size, rate)
            for size, rate in zip(sizes, rates, strict=True)
        )
        self.source_resblocks = nn.ModuleList(
            ResBlock(*layer) for layer in zip(sizes, config.source_kernels, config.source_dilations, strict=True)
        )
        self.resblocks = nn.ModuleList(
            ResBlock(size, *layer) for size in sizes for layer in zip(config.kernels, config.dilations, strict=True)
        )
        self.conv_post = weight_norm(Convolution(sizes[-1], bins, 7))
        self.f0_predictor = F0Predictor(config.f0_channels)

    def forward(self, mel: torch.Tensor, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Magnitude and phase (B, n_fft / 2 + 1, F) of mel (B, 80, T) and the source's spectrum (B, n_fft + 2, F)."""
        x = self.conv_pre(mel)
        for i, (up, down, source_block) in enumerate(
            zip(self.ups, self.source_downs, self.source_resblocks, strict=True)
        ):
            x = up(F.leaky_relu(x, self.config.slope))
            if i == len(self.ups) - 1:
                x = F.pad(x, (1, 0), mode="reflect")
            x = x + source_block(down(source))
            count = len(self.config.kernels)
            x = sum(block(x) for block in self.resblocks[i * count : (i + 1) * count]) / count
        x = self.conv_post(F.leaky_relu(x))
        magnitude, phase = x.split(self.config.n_fft // 2 + 1, dim=1)
        return torch.exp(magnitude), torch.sin(phase)
