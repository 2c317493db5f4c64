"""Triton kernels for CosyVoice3's flow in half precision: what lies between its matrix products and its attention.

Tensors are (N, C) and contiguous, one row per frame; N frames are those of several utterances.
"""

import torch
import triton
import triton.language as tl
from torch import nn

from tts_grpo.speech.cosyvoice2.kernels import _mish


@triton.jit
def _add_and_modulate(x, y, gate, shift, scale, out, num, ADD: tl.constexpr, CHANNELS: tl.constexpr,
                      FRAMES: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * FRAMES + tl.arange(0, FRAMES)
    columns = tl.arange(0, CHANNELS)
    at = rows.to(tl.int64)[:, None] * CHANNELS + columns[None, :]
    inside = (rows < num)[:, None]
    value = tl.load(x + at, mask=inside, other=0.0)
    if ADD:
        added = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        value += tl.load(gate + columns)[None, :] * added
        tl.store(x + at, value, mask=inside)
    mean = tl.sum(value, 1) / CHANNELS
    centred = value - mean[:, None]
    normal = centred * tl.math.rsqrt(tl.sum(centred * centred, 1) / CHANNELS + 1e-6)[:, None]
    result = normal * (1 + tl.load(scale + columns)[None, :]) + tl.load(shift + columns)[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


def modulate(x, shift, scale, dtype: torch.dtype, gate=None, y=None) -> torch.Tensor:
    """Layer normalisation of ``x``, then scale and shift; before that, ``x += gate * y`` in place.

    Args:
        x: float32 (N, C); C is a power of two.
        shift, scale, gate: float32 (C,).
        dtype: of the result, (N, C).
        y: (N, C) in half precision; None to add nothing.
    """
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _add_and_modulate[(triton.cdiv(len(x), 4),)](
        x, x if y is None else y, shift if gate is None else gate, shift, scale, out, len(x), y is not None,
        x.shape[1], 4, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _rotate(qkv, cosines, sines, num, stride, width, PAIRS: tl.constexpr, FRAMES: tl.constexpr):
    rows = tl.program_id(0) * FRAMES + tl.arange(0, FRAMES)
    inside = (rows < num)[:, None]
    pairs = tl.arange(0, PAIRS)
    at = rows.to(tl.int64)[:, None] * PAIRS + pairs[None, :]
    cosine, sine = tl.load(cosines + at, mask=inside, other=0.0), tl.load(sines + at, mask=inside, other=0.0)
    start = qkv + rows.to(tl.int64)[:, None] * stride + tl.program_id(1) * width + 2 * pairs[None, :]
    even = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    odd = tl.load(start + 1, mask=inside, other=0.0).to(tl.float32)
    tl.store(start, (even * cosine - odd * sine).to(qkv.dtype.element_ty), mask=inside)
    tl.store(start + 1, (odd * cosine + even * sine).to(qkv.dtype.element_ty), mask=inside)


def rotate_first_head(qkv: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> None:
    """Rotary embedding of the first head of queries and keys, in place (see ``modules.Attention``).

    Args:
        qkv: (N, 3 * heads * size).
        cosines, sines: float32 (N, size / 2), of the angles of each frame.
    """
    num, stride = qkv.shape
    _rotate[(triton.cdiv(num, 32), 2)](qkv, cosines, sines, num, stride, stride // 3, cosines.shape[1], 32, num_warps=4)


@triton.jit
def _position_conv(x, added, out, frames, num, w, bias, ADD: tl.constexpr, CHANNELS: tl.constexpr, SIZE: tl.constexpr,
                   TAPS: tl.constexpr, FRAMES: tl.constexpr):  # fmt: skip
    rows = (tl.program_id(0) * FRAMES + tl.arange(0, FRAMES)).to(tl.int64)
    group = tl.program_id(1)
    columns = tl.arange(0, SIZE)
    frame = tl.load(frames + rows, mask=rows < num, other=-1)
    at = rows[:, None] * CHANNELS + group * SIZE + columns[None, :]
    weights = w + group * TAPS * SIZE * SIZE + columns[:, None] * SIZE + columns[None, :]
    acc = tl.zeros((FRAMES, SIZE), tl.float32)
    for tap in range(TAPS):
        earlier = TAPS - 1 - tap
        value = tl.load(x + at - earlier * CHANNELS, mask=(frame >= earlier)[:, None], other=0.0)
        acc = tl.dot(value, tl.load(weights + tap * SIZE * SIZE), acc)
    acc = _mish(acc + tl.load(bias + group * SIZE + columns)[None, :])
    inside = (rows < num)[:, None]
    if ADD:
        acc += tl.load(added + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


class PositionConv:
    """A grouped causal convolution followed by Mish, within utterances.

    Args:
        conv: the layer; its number of channels per group is a power of two and at least 16.
        dtype: data type of its products.
    """

    def __init__(self, conv: nn.Conv1d, dtype: torch.dtype):
        self.groups, self.taps, self.size = conv.groups, conv.kernel_size[0], conv.weight.shape[1]
        weight = conv.weight.unflatten(0, (self.groups, self.size))  # (groups, out, in, taps)
        self.weight, self.bias = weight.permute(0, 3, 2, 1).to(dtype).contiguous(), conv.bias.float()

    def __call__(self, x, frames: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """Frames (N, C) -> (N, C).

        Args:
            frames: int32 (N,), position of each frame in its utterance.
            added: (N, C), added to the result, which then is float32.
        """
        out = torch.empty_like(x, dtype=x.dtype if added is None else torch.float32)
        _position_conv[(triton.cdiv(len(x), 128), self.groups)](
            x, x if added is None else added, out, frames, len(x), self.weight, self.bias, added is not None,
            x.shape[1], self.size, self.taps, 128, num_warps=4, num_stages=3,
        )  # fmt: skip
        return out
