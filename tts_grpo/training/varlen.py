"""Attention for packed sequences: each sequence of a pack attends to itself only, without a mask.

veRL packs the rollouts of a micro-batch one behind the other (``use_remove_padding``). With PyTorch's "sdpa",
Transformers builds a mask over the whole pack, so that time and memory are quadratic in the length of the pack. Here, a
GPU uses PyTorch's kernel for sequences of different lengths (``torch.nn.attention.varlen``, PyTorch 2.10 or later) in
half precision; otherwise attention is computed sequence by sequence.

Importing this module registers the attention in Transformers:
``actor_rollout_ref.model.override_config.attn_implementation=varlen``.
"""

import inspect
import itertools
import weakref
from functools import cache

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "varlen"


def sequence_bounds(position_ids: torch.Tensor) -> list[int]:
    """Return the indices at which the sequences of a pack start, and the length of the pack.

    Args:
        position_ids: positions in the sequences (1, T); each sequence starts at position 0.

    Raises:
        ValueError: this is no pack: it has several rows, or does not start with position 0.
    """
    if position_ids.dim() != 2 or len(position_ids) != 1:
        raise ValueError(f"attn_implementation={NAME} is for packs (use_remove_padding=True): position ids (1, T)")
    starts = (position_ids[0] == 0).nonzero()[:, 0].tolist()
    if starts[:1] != [0]:
        raise ValueError(f"attn_implementation={NAME}: a pack must start with position 0")
    return [*starts, position_ids.shape[1]]


class _Bounds:
    """Bounds of the latest pack, so that all layers share one computation (it waits for the GPU)."""

    def __init__(self):
        self.pack, self.value = lambda: None, None

    def of(self, position_ids: torch.Tensor) -> tuple[list[int], torch.Tensor]:
        """Return the bounds of a pack as a list, and as an int32 tensor on its device."""
        if self.pack() is not position_ids:
            bounds = sequence_bounds(position_ids)
            self.value = bounds, torch.tensor(bounds, dtype=torch.int32, device=position_ids.device)
            self.pack = weakref.ref(position_ids)
        return self.value


_bounds = _Bounds()


@cache
def _kernel():
    """Return PyTorch's kernel, and its flags for causal attention and for fewer heads of keys than of queries.

    PyTorch 2.10 has ``is_causal``, later versions have ``window_size``; ``enable_gqa`` came later still.
    """
    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters
    flags = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    return varlen_attn, flags, {"enable_gqa": True} if "enable_gqa" in parameters else None


def varlen_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, position_ids=None, **kwargs):
    """Compute causal attention within the sequences of a pack; an attention function of Transformers.

    Args:
        module: attention layer, not used.
        query: (1, H, T, D) with H heads; ``key`` and ``value`` are (1, G, T, D), where H is a multiple of G.
        key: see ``query``.
        value: see ``query``.
        attention_mask: must be None.
        scaling: factor of the attention scores, None for 1 / sqrt(D).
        dropout: must be 0.
        position_ids: (1, T), see :func:`sequence_bounds`.

    Returns:
        The output (1, T, H, D), and None in place of the attention weights.

    Raises:
        ValueError: there is a mask, dropout or a sliding window, or the input is no pack.
    """
    if attention_mask is not None or dropout or kwargs.get("sliding_window") or position_ids is None:
        raise ValueError(f"attn_implementation={NAME} takes position ids, and no mask, dropout or sliding window")
    bounds, on_device = _bounds.of(position_ids)
    lens = [end - start for start, end in itertools.pairwise(bounds)]
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        attention, causal, grouped = _kernel()
        if scaling is not None and scaling != query.shape[-1] ** -0.5:
            query = query * (scaling * query.shape[-1] ** 0.5)
        if grouped is None:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        packed = [x[0].transpose(0, 1) for x in (query, key, value)]  # (T, heads, D)
        output = attention(*packed, on_device, on_device, max(lens), max(lens), **causal, **(grouped or {}))
        return output[None], None
    parts = zip(*(x.split(lens, dim=2) for x in (query, key, value)), strict=True)
    outputs = [scaled_dot_product_attention(*part, is_causal=True, scale=scaling, enable_gqa=True) for part in parts]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, varlen_attention)
