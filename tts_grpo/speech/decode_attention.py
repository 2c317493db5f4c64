"""A Triton kernel for the attention of one new token per sequence, of which each sequence has another length."""

import math

import torch
import triton
import triton.language as tl

LOG2_E = math.log2(math.e)


@triton.jit
def _decode_attention(q, keys, values, out, lens, scale, max_len, GROUPS: tl.constexpr, SHARED: tl.constexpr,
                      ROWS: tl.constexpr, SIZE: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    group, sequence = tl.program_id(0), tl.program_id(1)
    end = tl.load(lens + sequence).to(tl.int32)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, SIZE)
    inside = (rows < SHARED)[:, None]
    at = (sequence * GROUPS + group) * SHARED * SIZE + rows[:, None] * SIZE + columns[None, :]
    queries = tl.load(q + at, mask=inside, other=0.0)
    start = (sequence * GROUPS + group).to(tl.int64) * max_len * SIZE
    acc = tl.zeros((ROWS, SIZE), tl.float32)
    row_sum, row_max = tl.zeros((ROWS,), tl.float32), tl.full((ROWS,), -1e30, tl.float32)
    for first in range(0, end, KEYS):
        position = first + tl.arange(0, KEYS)
        used = (position < end)[:, None]
        key_at = start + position[:, None] * SIZE + columns[None, :]
        k = tl.load(keys + key_at, mask=used, other=0.0)
        score = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        score = tl.where((position < end)[None, :], score, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(score, 1))
        weight = tl.math.exp2(score - new_max[:, None])
        rescale = tl.math.exp2(row_max - new_max)
        v = tl.load(values + key_at, mask=used, other=0.0)
        acc = acc * rescale[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        row_sum = row_sum * rescale + tl.sum(weight, 1)
        row_max = new_max
    tl.store(out + at, (acc / row_sum[:, None]).to(out.dtype.element_ty), mask=inside)


def decode_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lens: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of one token per sequence to the first keys of its sequence.

    The output of a sequence does not depend on other sequences or on L.

    Args:
        query: (B, H, D).
        keys: contiguous (B, G, L, D), where H is a multiple of G, at most 16 times G.
        values: as ``keys``.
        lens: int64 (B,), number of keys of each sequence, at least 1.
        scale: factor of the attention scores.

    Returns:
        (B, H, D).
    """
    batch, heads, size = query.shape
    groups = keys.shape[1]
    query = query.contiguous()
    out = torch.empty_like(query)
    _decode_attention[(groups, batch)](
        query, keys, values, out, lens, scale * LOG2_E, keys.shape[2], groups, heads // groups, 16, size, 64,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out
