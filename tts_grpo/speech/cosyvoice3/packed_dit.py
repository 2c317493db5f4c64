"""CosyVoice3's estimator on packed utterances, in half precision.

The solver and the layout of rows are CosyVoice2's (tts_grpo/speech/cosyvoice2/packed_flow.py). Only attention and the
convolutions of the input layer read more than one frame; the kernels limit both to the frames of each utterance, so
utterances follow each other without a gap. The sum of the residual branches is float32.
"""

import torch
import torch.nn.functional as F

from tts_grpo.speech.cosyvoice2.kernels import attention, gelu
from tts_grpo.speech.cosyvoice2.packed_flow import Layout, PackedSolver
from tts_grpo.speech.cosyvoice3.kernels import PositionConv, modulate, rotate_first_head
from tts_grpo.speech.cosyvoice3.modules import MELS, Attention, DiT


class PackedDiT:
    """The estimator on frames: see :class:`tts_grpo.speech.cosyvoice2.packed_flow.Estimator`.

    Args:
        net: the estimator, whose linear layers are converted to ``dtype``.
        times: float32 (steps,), at which it is called.
        dtype: data type of its weights and activations.
    """

    gap = 0

    def __init__(self, net: DiT, times: torch.Tensor, dtype: torch.dtype):
        self.dtype, self.channels_in = dtype, net.input_embed.proj.in_features
        self.heads, self.frequencies = net.transformer_blocks[0].attn.heads, net.rotary_embed.inv_freq.clone()
        self.modulations, self.last = (value.contiguous() for value in net.modulations(times))
        self.convs = [PositionConv(layer[0], dtype) for layer in net.input_embed.conv_pos_embed.children()]
        net.to(dtype)
        x, prompt, encoded, speaker = net.input_embed.proj.weight.split(MELS, dim=1)
        self.input = (torch.cat([x, encoded, speaker, prompt], dim=1), net.input_embed.proj.bias)
        self.blocks = [
            (*joined_projections(block.attn), block.attn.to_out[0], block.ff.ff[0][0], block.ff.ff[2])
            for block in net.transformer_blocks
        ]
        self.output = net.proj_out

    def __call__(self, x: torch.Tensor, layout: Layout, step: int) -> torch.Tensor:
        frames = layout.frame
        projected = F.linear(x, *self.input)
        first, second = self.convs
        total = second(first(projected, frames), frames, projected)
        angles = frames[:, None] * self.frequencies
        rotation = angles.cos(), angles.sin()
        y = gate = None
        for (weight, bias, out, up, down), modulation in zip(self.blocks, self.modulations[step], strict=True):
            shift, scale, next_gate, ff_shift, ff_scale, ff_gate = modulation
            qkv = F.linear(modulate(total, shift, scale, self.dtype, gate, y), weight, bias)
            rotate_first_head(qkv, *rotation)
            y = out(attention(qkv, layout.tiles, self.heads))
            y = down(gelu(modulate(total, ff_shift, ff_scale, self.dtype, next_gate, y), up, "tanh"))
            gate = ff_gate
        scale, shift = self.last[step]
        return self.output(modulate(total, shift, scale, self.dtype, gate, y))


def joined_projections(layer: Attention) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of one product for queries, keys and values; frees the three layers' own."""
    layers = (layer.to_q, layer.to_k, layer.to_v)
    joined = torch.cat([one.weight for one in layers]), torch.cat([one.bias for one in layers])
    layer.to_q = layer.to_k = layer.to_v = None
    return joined


def packed_solver(net: DiT, noise, starts: torch.Tensor, times: torch.Tensor, rate: float, dtype) -> PackedSolver:
    """The solver for CosyVoice3's flow; ``noise`` is (L, 80), ``starts`` are the times at which the net is called."""
    return PackedSolver(PackedDiT(net, starts, dtype), noise, times, rate)
