"""Triton kernels that fuse layers of CosyVoice2's token2wav in half precision.

The networks are narrow (64 to 512 channels), so that running their layers separately is limited by memory bandwidth.
Each block of these kernels holds all channels of its frames: normalisation, activation and addition are fused with the
convolution. Products are computed in half precision and accumulated in float32. Large matrix products without further
operations use cuBLAS.

Tensors are (N, C) and contiguous, one row per frame. Frames between and after utterances must be zero in the input of
a convolution; every kernel that writes such a tensor sets them to zero.

Block sizes, warps and stages were tuned on an H100 by trying some dozens of combinations, within the 99 KiB of shared
memory that other GPUs have.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import nn

QUERIES = 64  # queries per attention block
CHUNK = 32  # input channels per product in a convolution
LOG2_E = math.log2(math.e)


@triton.jit
def _attend_to_keys(queries, acc, row_sum, row_max, keys, values, first, end, stride, scale, LAST: tl.constexpr,
                    SIZE: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """Add a block of keys to the online softmax of a block of queries (FlashAttention-2, arXiv 2307.08691).

    The last block of keys may be partial.
    """
    position = first + tl.arange(0, KEYS)
    at = position[:, None].to(tl.int64) * stride + tl.arange(0, SIZE)[None, :]
    inside = position < end
    k = tl.load(keys + at, mask=inside[:, None], other=0.0) if LAST else tl.load(keys + at)
    score = tl.dot(queries, tl.trans(k)) * scale
    if LAST:
        score = tl.where(inside[None, :], score, -float("inf"))
    new_max = tl.maximum(row_max, tl.max(score, 1))
    weight = tl.math.exp2(score - new_max[:, None])
    rescale = tl.math.exp2(row_max - new_max)
    v = tl.load(values + at, mask=inside[:, None], other=0.0) if LAST else tl.load(values + at)
    acc = tl.dot(weight.to(v.dtype), v, acc * rescale[:, None])
    return acc, row_sum * rescale + tl.sum(weight, 1), new_max


@triton.jit
def _attention(qkv, out, tiles, scale, HEADS: tl.constexpr, SIZE: tl.constexpr, QUERIES: tl.constexpr,
               KEYS: tl.constexpr):  # fmt: skip
    head, tile = tl.program_id(0), tl.program_id(1)
    first_query, num_queries = tl.load(tiles + 4 * tile), tl.load(tiles + 4 * tile + 1)
    first_key, end = tl.load(tiles + 4 * tile + 2), tl.load(tiles + 4 * tile + 3)
    if num_queries > 0:
        width = HEADS * SIZE
        positions = tl.arange(0, QUERIES)
        inside = (positions < num_queries)[:, None]
        rows = (first_query + positions).to(tl.int64)[:, None]
        columns = head * SIZE + tl.arange(0, SIZE)[None, :]
        queries = tl.load(qkv + rows * (3 * width) + columns, mask=inside, other=0.0)
        keys, values = qkv + width + head * SIZE, qkv + 2 * width + head * SIZE
        acc = tl.zeros((QUERIES, SIZE), tl.float32)
        row_sum, row_max = tl.zeros((QUERIES,), tl.float32), tl.full((QUERIES,), -1e30, tl.float32)
        last = first_key + (end - first_key) // KEYS * KEYS
        for first in range(first_key, last, KEYS):
            acc, row_sum, row_max = _attend_to_keys(
                queries, acc, row_sum, row_max, keys, values, first, end, 3 * width, scale, False, SIZE, KEYS
            )
        if last < end:
            acc, row_sum, row_max = _attend_to_keys(
                queries, acc, row_sum, row_max, keys, values, last, end, 3 * width, scale, True, SIZE, KEYS
            )
        acc = acc / tl.maximum(row_sum, 1e-30)[:, None]
        tl.store(out + rows * width + columns, acc.to(out.dtype.element_ty), mask=inside)


def attention(qkv: torch.Tensor, tiles: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Attention in which each block of queries attends to a range of keys.

    Args:
        qkv: (N, 3 * heads * size).
        tiles: int32 (blocks, 4): first query, number of queries (at most ``QUERIES``; 0 skips the block), first key,
            end of the keys (exclusive). The output of a block without keys is zero.

    Returns:
        (N, heads * size), undefined for queries that are in no block.
    """
    width = qkv.shape[1] // 3
    size = width // num_heads
    out = qkv.new_empty(len(qkv), width)
    _attention[(num_heads, len(tiles))](
        qkv, out, tiles, size**-0.5 * LOG2_E, num_heads, size, QUERIES, KEYS=64, num_warps=4, num_stages=3
    )
    return out


@triton.jit
def _layer_norm(x, gain, bias, columns, eps, CHANNELS: tl.constexpr):
    """Layer normalisation of float32 (frames, CHANNELS)."""
    mean = tl.sum(x, 1) / CHANNELS
    centred = x - mean[:, None]
    scale = tl.math.rsqrt(tl.sum(centred * centred, 1) / CHANNELS + eps)
    return centred * scale[:, None] * tl.load(gain + columns)[None, :] + tl.load(bias + columns)[None, :]


@triton.jit
def _add_and_norm(x, out, used, num, added, gain, bias, eps, NORM: tl.constexpr, CHANNELS: tl.constexpr,
                  FRAMES: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * FRAMES + tl.arange(0, FRAMES)
    columns = tl.arange(0, CHANNELS)
    inside = rows < num
    at = rows.to(tl.int64)[:, None] * CHANNELS + columns[None, :]
    value = tl.load(x + at, mask=inside[:, None], other=0.0).to(tl.float32) + tl.load(added + columns)[None, :]
    if NORM:
        value = _layer_norm(value, gain, bias, columns, eps, CHANNELS)
    else:
        keep = tl.load(used + rows, mask=inside, other=0.0) > 0
        value = tl.where(keep[:, None], value, 0.0)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside[:, None])


def add_and_norm(x: torch.Tensor, added: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    """``norm(x + added)`` for frames (N, C) and ``added`` float32 (C,)."""
    out = torch.empty_like(x)
    _add_and_norm[(triton.cdiv(len(x), 16),)](
        x, out, x, len(x), added, norm.weight, norm.bias, norm.eps, True, x.shape[1], 16, num_warps=4
    )
    return out


def add_where(x: torch.Tensor, added: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """``x + added`` for frames (N, C) where ``used`` (N,) is 1, zeros where it is 0."""
    out = torch.empty_like(x)
    _add_and_norm[(triton.cdiv(len(x), 16),)](
        x, out, used, len(x), added, added, added, 0.0, False, x.shape[1], 16, num_warps=4
    )
    return out


class TransformerBlocks:
    """A sequence of Matcha's ``BasicTransformerBlock``s on frames.

    Matrix products accumulate directly into the frames. For this, the biases of output layers are not added to the
    frames until the end; until then, the norms add them to their input. cuBLAS fuses GELU only in its tanh
    approximation, whose largest error is 5e-4.

    Args:
        blocks: the modules, in half precision; their attention projections are fused.

    Raises:
        ValueError: the activation is not GELU.
    """

    def __init__(self, blocks: nn.ModuleList):
        self.layers = []
        added = torch.zeros_like(blocks[0].norm1.bias, dtype=torch.float32)
        for block in blocks:
            block.attn1.fuse_projections()
            activation = type(block.ff.net[0]).__name__
            if activation != "GELU":
                raise ValueError(f"no kernel for the activation {activation}: set token2wav_precision=fp32")
            out, up, down = block.attn1.to_out[0], block.ff.net[0].proj, block.ff.net[2]
            between = added + out.bias.float()
            self.layers.append((block.attn1, block.norm1, added, out.weight.T, block.norm3, between, up, down.weight.T))
            added = between + down.bias.float()
        self.added = added

    def __call__(self, x: torch.Tensor, used: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
        """Frames (N, C) -> (N, C); overwrites ``x``.

        Args:
            used: float32 (N,), 0 for frames between utterances.
            tiles: see :func:`attention`.
        """
        for attend, norm1, before, out, norm3, between, up, down in self.layers:
            x.addmm_(attention(attend.to_qkv(add_and_norm(x, before, norm1)), tiles, attend.heads), out)
            x.addmm_(gelu(add_and_norm(x, between, norm3), up), down)
        return add_where(x, self.added, used)


def gelu(x: torch.Tensor, layer: nn.Linear, approximate: str = "none") -> torch.Tensor:
    """GELU of a linear layer's output for (N, C); a GPU always uses the tanh approximation."""
    if x.is_cuda:
        return torch._addmm_activation(layer.bias, x, layer.weight.T, use_gelu=True)
    return F.gelu(layer(x), approximate=approximate)


@triton.jit
def _convolve(acc, x, w, base, position, length, dilation, offset, columns, IN: tl.constexpr,
              OUT: tl.constexpr, TAPS: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Add a convolution to ``acc`` (frames, OUT); its taps are ``dilation`` apart and start at ``offset``."""
    channels = tl.arange(0, CHUNK)
    for i in range(TAPS * (IN // CHUNK)):
        at = position + offset + i // (IN // CHUNK) * dilation
        inside = (at >= 0) & (at < length)
        value = tl.load(
            x + (base + at)[:, None] * IN + (i % (IN // CHUNK) * CHUNK + channels)[None, :], mask=inside[:, None],
            other=0.0,
        )  # fmt: skip
        acc = tl.dot(value, tl.load(w + (i * CHUNK + channels)[:, None] * OUT + columns[None, :]), acc)
    return acc


@triton.jit
def _mish(x):
    """``x * tanh(softplus(x))`` without logarithm; above 20, it equals x in any precision."""
    e = tl.exp(tl.minimum(x, 20.0))
    n = e * (e + 2)
    return x * n / (n + 2)


@triton.jit
def _causal_conv(x, source, out, used, num, w, bias, gain, norm_bias, added, w_source, eps, NORM: tl.constexpr,
                 SOURCE: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, TAPS: tl.constexpr, FRAMES: tl.constexpr,
                 CHUNK: tl.constexpr):  # fmt: skip
    rows = (tl.program_id(0) * FRAMES + tl.arange(0, FRAMES)).to(tl.int64)
    columns = tl.arange(0, OUT)
    acc = tl.zeros((FRAMES, OUT), tl.float32)
    acc = _convolve(acc, x, w, 0, rows, num, 1, 1 - TAPS, columns, IN, OUT, TAPS, CHUNK)
    acc += tl.load(bias + columns)[None, :]
    if NORM:
        acc = _mish(_layer_norm(acc, gain, norm_bias, columns, eps, OUT)) + tl.load(added + columns)[None, :]
    if SOURCE > 0:
        acc = _convolve(acc, source, w_source, 0, rows, num, 1, 0, columns, SOURCE, OUT, 1, CHUNK)
    keep = tl.load(used + rows, mask=rows < num, other=0.0) > 0
    value = tl.where(keep[:, None], acc, 0.0).to(out.dtype.element_ty)
    tl.store(out + rows[:, None] * OUT + columns[None, :], value, mask=(rows < num)[:, None])


def frames_first(conv: nn.Conv1d, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Weight of a convolution as (taps * input channels, output channels)."""
    return conv.weight.permute(2, 1, 0).flatten(0, 1).to(dtype or conv.weight.dtype).contiguous()


class CausalConv:
    """CosyVoice's ``CausalConv1d`` on frames, fused with an optional layer norm, Mish and residual.

    Args:
        conv: the module.
        norm: layer norm after the convolution, which is followed by Mish; None for neither.
        residual: convolution with one tap whose output is added at the end.

    Raises:
        ValueError: the number of channels is not a multiple of 32.
    """

    def __init__(self, conv: nn.Conv1d, norm: nn.LayerNorm | None = None, residual: nn.Conv1d | None = None):
        if conv.in_channels % CHUNK or (residual and residual.in_channels % CHUNK):
            raise ValueError(f"no kernel for {conv.in_channels} channels: set token2wav_precision=fp32")
        self.weight, self.bias, self.norm, self.taps = frames_first(conv), conv.bias, norm, conv.kernel_size[0]
        self.residual = self.weight if residual is None else frames_first(residual)
        self.added = torch.zeros_like(conv.bias) if residual is None else residual.bias

    def __call__(self, x, used, added: torch.Tensor | None = None, source: torch.Tensor | None = None):
        """Frames (N, C) -> (N, C').

        Args:
            used: float32 (N,), 0 for frames between utterances.
            added: (C',), added after Mish.
            source: frames (N, C''), the input of ``residual``.
        """
        out = x.new_empty(len(x), len(self.bias))
        norm = (self.norm.weight, self.norm.bias) if self.norm else (self.bias, self.bias)
        _causal_conv[(triton.cdiv(len(x), 64),)](
            x, x if source is None else source, out, used, len(x), self.weight, self.bias, *norm,
            self.added if added is None else added, self.residual, self.norm.eps if self.norm else 0.0,
            self.norm is not None,
            0 if source is None else source.shape[1], x.shape[1], out.shape[1], self.taps, 64, CHUNK, num_warps=8,
            num_stages=4,
        )  # fmt: skip
        return out


class CausalResnetBlock:
    """CosyVoice's ``CausalResnetBlock1D`` on frames.

    Args:
        block: the module.
        time: (steps, E), embeddings of the solver's time steps.
    """

    def __init__(self, block: nn.Module, time: torch.Tensor):
        conv1, _, norm1, *_ = block.block1.block
        conv2, _, norm2, *_ = block.block2.block
        self.first, self.second = CausalConv(conv1, norm1), CausalConv(conv2, norm2, block.res_conv)
        self.time = block.mlp(time)

    def __call__(self, x: torch.Tensor, used: torch.Tensor, step: int) -> torch.Tensor:
        """Frames (N, C) -> (N, C') in step ``step`` of the solver."""
        return self.second(self.first(x, used, self.time[step]), used, source=x)


@triton.jit
def _snake(x, alpha):
    """CosyVoice's ``Snake``, ``x + sin(alpha x)^2 / alpha``.

    The square of the sine has the period pi. A polynomial for the sine in [-pi/2, pi/2], fitted by least squares at
    Chebyshev nodes, has an error of 4e-9. The GPU's own sine, which accepts arguments of any size, is several times
    slower.
    """
    turns = x * alpha * 0.3183098861837907
    r = turns - tl.floor(turns + 0.5)
    q = r * r
    s = r * (3.14159258 + q * (-5.16770687 + q * (2.55003119 + q * (-0.598044194 + q * 0.0772183862))))
    return x + s * s / (alpha + 1e-9)


@triton.jit
def _apply_snake(x, out, used, alpha, num, CHANNELS: tl.constexpr, FRAMES: tl.constexpr):
    rows = (tl.program_id(0) * FRAMES + tl.arange(0, FRAMES)).to(tl.int64)
    columns = tl.arange(0, CHANNELS)
    at = rows[:, None] * CHANNELS + columns[None, :]
    inside = (rows < num)[:, None]
    value = _snake(tl.load(x + at, mask=inside, other=0.0), tl.load(alpha + columns)[None, :])
    keep = tl.load(used + rows, mask=rows < num, other=0.0) > 0
    tl.store(out + at, tl.where(keep[:, None], value, 0.0).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _dilated_conv(x, total, out, used, length, w, bias, alpha, dilation, offset, ADD: tl.constexpr,
                  ACTIVATE: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr, FRAMES: tl.constexpr,
                  CHUNK: tl.constexpr):  # fmt: skip
    position = (tl.program_id(0) * FRAMES + tl.arange(0, FRAMES)).to(tl.int64)
    base = tl.program_id(1).to(tl.int64) * length
    columns = tl.arange(0, CHANNELS)
    acc = tl.zeros((FRAMES, CHANNELS), tl.float32)
    acc = _convolve(acc, x, w, base, position, length, dilation, offset, columns, CHANNELS, CHANNELS, TAPS, CHUNK)
    acc += tl.load(bias + columns)[None, :]
    at = (base + position)[:, None] * CHANNELS + columns[None, :]
    inside = (position < length)[:, None]
    if ADD:
        acc += tl.load(total + at, mask=inside, other=0.0)
        tl.store(total + at, acc, mask=inside)
    if ACTIVATE:
        acc = _snake(acc, tl.load(alpha + columns)[None, :])
        keep = tl.load(used + base + position, mask=position < length, other=0.0) > 0
        tl.store(out + at, tl.where(keep[:, None], acc, 0.0).to(out.dtype.element_ty), mask=inside)


class SnakeResBlock(nn.Module):
    """HiFT's ``ResBlock`` with products in half precision and the residual sum in float32.

    Args:
        block: the module.
        masks: for each length T, float32 (B, 1, T), 0 after the end of each utterance; convolutions read zeros there.
        dtype: data type of the products.
        causal: whether convolutions read earlier frames only, instead of as many earlier as later ones.
    """

    def __init__(self, block: nn.Module, masks: dict[int, torch.Tensor], dtype: torch.dtype, causal: bool = False):
        super().__init__()
        self.masks, self.dtype, self.causal = masks, dtype, causal
        alphas = [snake.alpha for pair in zip(block.activations1, block.activations2, strict=True) for snake in pair]
        convs = [conv for pair in zip(block.convs1, block.convs2, strict=True) for conv in pair]
        self.first_alpha, self.taps = alphas[0], convs[0].kernel_size[0]
        self.layers = [
            (frames_first(conv, dtype), conv.bias, alpha, conv.dilation[0])
            for conv, alpha in zip(convs, [*alphas[1:], None], strict=True)
        ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 (B, C, T) -> (B, C, T)."""
        used = self.masks[x.shape[2]]
        total = x.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        rows, length, channels = total.shape
        active = torch.empty_like(total, dtype=self.dtype)
        _apply_snake[(triton.cdiv(rows * length, 32),)](
            total, active, used, self.first_alpha, rows * length, channels, 32, num_warps=4
        )
        earlier = self.taps - 1 if self.causal else self.taps // 2
        for i, (weight, bias, alpha, dilation) in enumerate(self.layers):
            out = torch.empty_like(active)
            _dilated_conv[(triton.cdiv(length, 64), rows)](
                active, total, out, used, length, weight, bias, bias if alpha is None else alpha, dilation,
                -earlier * dilation, i % 2 == 1, alpha is not None, channels, self.taps, 64, min(CHUNK, channels),
                num_warps=8 if channels > 128 else 4, num_stages=3,
            )  # fmt: skip
            active = out
        return total.transpose(1, 2)
