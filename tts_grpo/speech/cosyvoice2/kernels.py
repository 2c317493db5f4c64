"""Triton kernels of CosyVoice2's token2wav in half precision: frames first, several layers in one pass over memory.

Its networks are narrow (64 to 512 channels), so that their layers, run one by one, spend most of a GPU's time on moving
activations. Here a kernel's block has all channels of its frames at hand: what a convolution gives is normalised,
activated and added before it is written. Products are of half precision, sums of float32. Large matrix products
without more to them are left to cuBLAS.

Frames are rows: (N, C), contiguous. Those between and behind utterances are zeros in whatever a convolution reads; each
kernel that writes such a tensor sees to it.

Sizes of blocks, warps and stages are about the fastest on an H100 among some dozens of each, and need no more than the
99 KiB of shared memory that other GPUs have.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import nn

QUERIES = 64  # of a block of attention
CHUNK = 32  # channels that a convolution multiplies at once
LOG2_E = math.log2(math.e)


@triton.jit
def _more_keys(queries, acc, total, most, keys, values, first, end, stride, scale, LAST: tl.constexpr,
               SIZE: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """A block of queries with one more block of keys, by online softmax (FlashAttention-2, arXiv 2307.08691).

    The last block may end within.
    """
    place = first + tl.arange(0, KEYS)
    at = place[:, None].to(tl.int64) * stride + tl.arange(0, SIZE)[None, :]
    inside = place < end
    k = tl.load(keys + at, mask=inside[:, None], other=0.0) if LAST else tl.load(keys + at)
    score = tl.dot(queries, tl.trans(k)) * scale
    if LAST:
        score = tl.where(inside[None, :], score, -float("inf"))
    new = tl.maximum(most, tl.max(score, 1))
    weight = tl.math.exp2(score - new[:, None])
    shrink = tl.math.exp2(most - new)
    v = tl.load(values + at, mask=inside[:, None], other=0.0) if LAST else tl.load(values + at)
    acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None])
    return acc, total * shrink + tl.sum(weight, 1), new


@triton.jit
def _attention(qkv, out, tiles, scale, HEADS: tl.constexpr, SIZE: tl.constexpr, QUERIES: tl.constexpr,
               KEYS: tl.constexpr):  # fmt: skip
    head, tile = tl.program_id(0), tl.program_id(1)
    first_query, num_queries = tl.load(tiles + 4 * tile), tl.load(tiles + 4 * tile + 1)
    first_key, end = tl.load(tiles + 4 * tile + 2), tl.load(tiles + 4 * tile + 3)
    if num_queries > 0:
        width = HEADS * SIZE
        places = tl.arange(0, QUERIES)
        inside = (places < num_queries)[:, None]
        rows = (first_query + places).to(tl.int64)[:, None]
        columns = head * SIZE + tl.arange(0, SIZE)[None, :]
        queries = tl.load(qkv + rows * (3 * width) + columns, mask=inside, other=0.0)
        keys, values = qkv + width + head * SIZE, qkv + 2 * width + head * SIZE
        acc = tl.zeros((QUERIES, SIZE), tl.float32)
        total, most = tl.zeros((QUERIES,), tl.float32), tl.full((QUERIES,), -1e30, tl.float32)
        last = first_key + (end - first_key) // KEYS * KEYS
        for first in range(first_key, last, KEYS):
            acc, total, most = _more_keys(
                queries, acc, total, most, keys, values, first, end, 3 * width, scale, False, SIZE, KEYS
            )
        if last < end:
            acc, total, most = _more_keys(
                queries, acc, total, most, keys, values, last, end, 3 * width, scale, True, SIZE, KEYS
            )
        acc = acc / tl.maximum(total, 1e-30)[:, None]
        tl.store(out + rows * width + columns, acc.to(out.dtype.element_ty), mask=inside)


def attention(qkv: torch.Tensor, tiles: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Attention of blocks of queries, each to a range of keys.

    Args:
        qkv: (N, 3 * heads * size).
        tiles: int32 (blocks, 4): first query, number of queries (at most ``QUERIES``; 0: no block), first key and the
            end of the keys. A block without keys gives zeros.

    Returns:
        (N, heads * size), undefined for a query of no block.
    """
    width = qkv.shape[1] // 3
    size = width // num_heads
    out = qkv.new_empty(len(qkv), width)
    _attention[(num_heads, len(tiles))](
        qkv, out, tiles, size**-0.5 * LOG2_E, num_heads, size, QUERIES, KEYS=64, num_warps=4, num_stages=3
    )
    return out


@triton.jit
def _normalised(x, gain, bias, columns, eps, CHANNELS: tl.constexpr):
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
        value = _normalised(value, gain, bias, columns, eps, CHANNELS)
    else:
        keep = tl.load(used + rows, mask=inside, other=0.0) > 0
        value = tl.where(keep[:, None], value, 0.0)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside[:, None])


def add_and_norm(x: torch.Tensor, added: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    """``norm(x + added)`` of frames (N, C), with ``added`` float32 (C,)."""
    out = torch.empty_like(x)
    _add_and_norm[(triton.cdiv(len(x), 16),)](
        x, out, x, len(x), added, norm.weight, norm.bias, norm.eps, True, x.shape[1], 16, num_warps=4
    )
    return out


def add_where(x: torch.Tensor, added: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """``x + added`` of frames (N, C) where ``used`` (N,) is 1, zeros where it is 0."""
    out = torch.empty_like(x)
    _add_and_norm[(triton.cdiv(len(x), 16),)](
        x, out, used, len(x), added, added, added, 0.0, False, x.shape[1], 16, num_warps=4
    )
    return out


class TransformerBlocks:
    """Matcha's ``BasicTransformerBlock``s one behind the other, on frames.

    The biases of what is added to the frames are left out until the end, and given to the norms instead: so the
    products add to the frames themselves. cuBLAS's GELU in the first product of a feed-forward layer is the one by
    tanh, which differs from the exact one by 5e-4 at most.

    Args:
        blocks: the modules, in half precision; their projections are fused.

    Raises:
        ValueError: their activation is not GELU.
    """

    def __init__(self, blocks: nn.ModuleList):
        self.layers = []
        added = torch.zeros_like(blocks[0].norm1.bias, dtype=torch.float32)
        for block in blocks:
            block.attn1.fuse_projections()
            activation = type(block.ff.net[0]).__name__
            if activation != "GELU":
                raise ValueError(f"no kernel for the activation {activation}: use token2wav_precision=fp32")
            out, up, down = block.attn1.to_out[0], block.ff.net[0].proj, block.ff.net[2]
            between = added + out.bias.float()
            self.layers.append((block.attn1, block.norm1, added, out.weight.T, block.norm3, between, up, down.weight.T))
            added = between + down.bias.float()
        self.added = added

    def __call__(self, x: torch.Tensor, used: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
        """(N, C) to (N, C); ``x`` is overwritten.

        Args:
            used: float32 (N,), 0 for frames between utterances.
            tiles: of :func:`attention`.
        """
        for attend, norm1, before, out, norm3, between, up, down in self.layers:
            x.addmm_(attention(attend.to_qkv(add_and_norm(x, before, norm1)), tiles, attend.heads), out)
            x.addmm_(gelu(add_and_norm(x, between, norm3), up), down)
        return add_where(x, self.added, used)


def gelu(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """GELU of a linear layer of (N, C)."""
    if x.is_cuda:
        return torch._addmm_activation(layer.bias, x, layer.weight.T, use_gelu=True)
    return F.gelu(layer(x))


@triton.jit
def _taps(acc, x, w, base, place, length, dilation, offset, columns, IN: tl.constexpr, OUT: tl.constexpr,
          TAPS: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Add a convolution's products to (frames, OUT): its taps are ``dilation`` apart, the first at ``offset``."""
    channels = tl.arange(0, CHUNK)
    for i in range(TAPS * (IN // CHUNK)):
        at = place + offset + i // (IN // CHUNK) * dilation
        inside = (at >= 0) & (at < length)
        value = tl.load(
            x + (base + at)[:, None] * IN + (i % (IN // CHUNK) * CHUNK + channels)[None, :], mask=inside[:, None],
            other=0.0,
        )  # fmt: skip
        acc = tl.dot(value, tl.load(w + (i * CHUNK + channels)[:, None] * OUT + columns[None, :]), acc)
    return acc


@triton.jit
def _mish(x):
    """``x * tanh(softplus(x))``, tanh of a logarithm written out; above 20 it is x in any precision."""
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
    acc = _taps(acc, x, w, 0, rows, num, 1, 1 - TAPS, columns, IN, OUT, TAPS, CHUNK)
    acc += tl.load(bias + columns)[None, :]
    if NORM:
        acc = _mish(_normalised(acc, gain, norm_bias, columns, eps, OUT)) + tl.load(added + columns)[None, :]
    if SOURCE > 0:
        acc = _taps(acc, source, w_source, 0, rows, num, 1, 0, columns, SOURCE, OUT, 1, CHUNK)
    keep = tl.load(used + rows, mask=rows < num, other=0.0) > 0
    value = tl.where(keep[:, None], acc, 0.0).to(out.dtype.element_ty)
    tl.store(out + rows[:, None] * OUT + columns[None, :], value, mask=(rows < num)[:, None])


def frames_first(conv: nn.Conv1d, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A convolution's weight as (taps * channels in, channels out)."""
    return conv.weight.permute(2, 1, 0).flatten(0, 1).to(dtype or conv.weight.dtype).contiguous()


class CausalConv:
    """CosyVoice's ``CausalConv1d`` on frames, with the norm and Mish that may follow and what is added to them.

    Args:
        conv: the module.
        norm: the layer norm behind it, with Mish behind that; None for neither.
        residual: a convolution of one tap whose result is added in the end.

    Raises:
        ValueError: the channels are no multiple of 32.
    """

    def __init__(self, conv: nn.Conv1d, norm: nn.LayerNorm | None = None, residual: nn.Conv1d | None = None):
        if conv.in_channels % CHUNK or (residual and residual.in_channels % CHUNK):
            raise ValueError(f"no kernel for {conv.in_channels} channels: use token2wav_precision=fp32")
        self.weight, self.bias, self.norm, self.taps = frames_first(conv), conv.bias, norm, conv.kernel_size[0]
        self.residual = self.weight if residual is None else frames_first(residual)
        self.added = torch.zeros_like(conv.bias) if residual is None else residual.bias

    def __call__(self, x, used, added: torch.Tensor | None = None, source: torch.Tensor | None = None):
        """Frames (N, C) to (N, C').

        Args:
            used: float32 (N,), 0 for frames between utterances.
            added: (C',), to be added behind Mish.
            source: frames (N, C'') that ``residual`` takes.
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
        time: embeddings of the solver's steps, (steps, E).
    """

    def __init__(self, block: nn.Module, time: torch.Tensor):
        conv1, _, norm1, *_ = block.block1.block
        conv2, _, norm2, *_ = block.block2.block
        self.first, self.second = CausalConv(conv1, norm1), CausalConv(conv2, norm2, block.res_conv)
        self.time = block.mlp(time)

    def __call__(self, x: torch.Tensor, used: torch.Tensor, step: int) -> torch.Tensor:
        """(N, C) to (N, C') in one of the solver's steps."""
        return self.second(self.first(x, used, self.time[step]), used, source=x)


@triton.jit
def _snake(x, alpha):
    """CosyVoice's ``Snake``, ``x + sin(alpha x)^2 / alpha``.

    The square's period is pi: a polynomial of the sine in half of it, fitted by least squares at Chebyshev nodes, is
    right to 4e-9. A GPU's own sine takes several times as long, for arguments of any size.
    """
    turns = x * alpha * 0.3183098861837907
    r = turns - tl.floor(turns + 0.5)
    q = r * r
    s = r * (3.14159258 + q * (-5.16770687 + q * (2.55003119 + q * (-0.598044194 + q * 0.0772183862))))
    return x + s * s / (alpha + 1e-9)


@triton.jit
def _activate(x, out, used, alpha, num, CHANNELS: tl.constexpr, FRAMES: tl.constexpr):
    rows = (tl.program_id(0) * FRAMES + tl.arange(0, FRAMES)).to(tl.int64)
    columns = tl.arange(0, CHANNELS)
    at = rows[:, None] * CHANNELS + columns[None, :]
    inside = (rows < num)[:, None]
    value = _snake(tl.load(x + at, mask=inside, other=0.0), tl.load(alpha + columns)[None, :])
    keep = tl.load(used + rows, mask=rows < num, other=0.0) > 0
    tl.store(out + at, tl.where(keep[:, None], value, 0.0).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _dilated_conv(x, total, out, used, length, w, bias, alpha, dilation, ADD: tl.constexpr, ACTIVATE: tl.constexpr,
                  CHANNELS: tl.constexpr, TAPS: tl.constexpr, FRAMES: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    place = (tl.program_id(0) * FRAMES + tl.arange(0, FRAMES)).to(tl.int64)
    base = tl.program_id(1).to(tl.int64) * length
    columns = tl.arange(0, CHANNELS)
    acc = tl.zeros((FRAMES, CHANNELS), tl.float32)
    acc = _taps(acc, x, w, base, place, length, dilation, -(TAPS // 2) * dilation, columns, CHANNELS, CHANNELS, TAPS,
                CHUNK)  # fmt: skip
    acc += tl.load(bias + columns)[None, :]
    at = (base + place)[:, None] * CHANNELS + columns[None, :]
    inside = (place < length)[:, None]
    if ADD:
        acc += tl.load(total + at, mask=inside, other=0.0)
        tl.store(total + at, acc, mask=inside)
    if ACTIVATE:
        acc = _snake(acc, tl.load(alpha + columns)[None, :])
        keep = tl.load(used + base + place, mask=place < length, other=0.0) > 0
        tl.store(out + at, tl.where(keep[:, None], acc, 0.0).to(out.dtype.element_ty), mask=inside)


class SnakeResBlock(nn.Module):
    """HiFT's ``ResBlock``, its products in half precision and its sum in float32.

    Args:
        block: the module.
        masks: by length T, float32 (B, 1, T): 0 behind the end of each utterance. The convolutions read zeros there.
        dtype: of the products.
    """

    def __init__(self, block: nn.Module, masks: dict[int, torch.Tensor], dtype: torch.dtype):
        super().__init__()
        self.masks, self.dtype = masks, dtype
        alphas = [snake.alpha for pair in zip(block.activations1, block.activations2, strict=True) for snake in pair]
        convs = [conv for pair in zip(block.convs1, block.convs2, strict=True) for conv in pair]
        self.first_alpha, self.taps = alphas[0], convs[0].kernel_size[0]
        self.layers = [
            (frames_first(conv, dtype), conv.bias, alpha, conv.dilation[0])
            for conv, alpha in zip(convs, [*alphas[1:], None], strict=True)
        ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 (B, C, T) to (B, C, T)."""
        used = self.masks[x.shape[2]]
        total = x.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        rows, length, channels = total.shape
        active = torch.empty_like(total, dtype=self.dtype)
        _activate[(triton.cdiv(rows * length, 32),)](
            total, active, used, self.first_alpha, rows * length, channels, 32, num_warps=4
        )
        for i, (weight, bias, alpha, dilation) in enumerate(self.layers):
            out = torch.empty_like(active)
            _dilated_conv[(triton.cdiv(length, 64), rows)](
                active, total, out, used, length, weight, bias, bias if alpha is None else alpha, dilation,
                i % 2 == 1, alpha is not None, channels, self.taps, 64, min(CHUNK, channels),
                num_warps=8 if channels > 128 else 4, num_stages=3,
            )  # fmt: skip
            active = out
        return total.transpose(1, 2)
