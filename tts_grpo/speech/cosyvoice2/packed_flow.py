"""The solver of a flow on packed utterances, in half precision, and CosyVoice2's estimator for it.

The utterances of a batch are concatenated to rows of frames. Attention is limited to the frames of each utterance. The
convolutions of CosyVoice2's estimator are causal with three taps, so two zero frames between utterances replace the
padding of single utterances. All other layers work frame by frame. Therefore the mel spectrogram of an utterance does
not depend on the rest of the row. Rows have few fixed lengths, so that the ten steps of the solver can be captured as
one CUDA graph per length.

The estimator's weights are CosyVoice's own. The order of its layers (``CausalConditionalDecoder.forward``) is
reimplemented here, and the layers in tts_grpo/speech/cosyvoice2/kernels.py, because packing needs another layout.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from tts_grpo.speech.cosyvoice2.kernels import QUERIES, CausalConv, CausalResnetBlock, TransformerBlocks

GAP = 2  # zero frames after each utterance for CosyVoice2's convolutions
SIZES = tuple(range(2048, 8193, 1024))  # frames per row; the mean rollout has 371, including three seconds of prompt
MIN_MEAN_FRAMES = 128  # frames per utterance on average, at least; limits the number of utterances per row


class PackedRow:
    """The layout of one row of utterances.

    Args:
        lens: number of frames of each utterance.
        size: number of frames of the row; None for the minimum.
        gap: number of zero frames after each utterance.
    """

    def __init__(self, lens: Sequence[int], size: int | None = None, gap: int = GAP):
        self.size, self.gap = size or sum(lens) + gap * len(lens), gap
        self.starts = [0, *itertools.accumulate(n + gap for n in lens)][:-1]
        utterance, frame, used = (torch.zeros(self.size, dtype=torch.int64) for _ in range(3))
        for i, (start, n) in enumerate(zip(self.starts, lens, strict=True)):
            utterance[start : start + n], frame[start : start + n], used[start : start + n] = i, torch.arange(n), 1
        self.utterance, self.frame, self.used = utterance, frame, used.float()
        self.tiles = self._tiles(lens)

    def _tiles(self, lens: Sequence[int]) -> torch.Tensor:
        """Blocks for :func:`tts_grpo.speech.cosyvoice2.kernels.attention`, for two copies of the row.

        All rows of one size have the same number of blocks. Frames between utterances attend to the utterance before
        them; frames after the last utterance are in a block without keys, so that their output is defined.
        """
        spans = [(start, start + n + self.gap, start, start + n) for start, n in zip(self.starts, lens, strict=True)]
        spans.append((spans[-1][1], self.size, 0, 0))
        tiles = [
            (first, min(QUERIES, end - first), *keys)
            for begin, end, *keys in spans
            for first in range(begin, end, QUERIES)
        ]
        count = self.size // QUERIES + max(len(lens), self.size // MIN_MEAN_FRAMES) + 1
        tiles += [(0, 0, 0, 0)] * (count - len(tiles))
        half = torch.tensor(tiles, dtype=torch.int32)
        return torch.cat([half, half + torch.tensor([self.size, 0, self.size, self.size], dtype=torch.int32)])

    @staticmethod
    def fits(lens: Sequence[int], size: int, gap: int = GAP) -> bool:
        """Whether utterances fit into a row of ``size`` frames."""
        return sum(lens) + gap * len(lens) <= size and len(lens) <= size // MIN_MEAN_FRAMES


def assign_rows(lens: Sequence[int], gap: int = GAP) -> list[list[int]]:
    """Indices of the utterances in each row, in order; an utterance that is too long for SIZES gets its own row."""
    rows = []
    for i, n in enumerate(lens):
        if rows and PackedRow.fits([lens[j] for j in rows[-1]] + [n], SIZES[-1], gap):
            rows[-1].append(i)
        else:
            rows.append([i])
    return rows


class Layout(NamedTuple):
    """What an estimator must know about two copies of a row of N frames; all tensors are on its device."""

    used: torch.Tensor  # float32 (2N,), 0 for frames between and after utterances, which are zero in its input
    frame: torch.Tensor  # int32 (2N,), position of each frame in its utterance
    tiles: torch.Tensor  # int32, see PackedRow._tiles


class Estimator(Protocol):
    """The estimator of a flow, on frames."""

    channels_in: int  # noisy mel, encoded tokens, speaker and prompt mel
    dtype: torch.dtype
    gap: int  # number of zero frames that it needs after each utterance

    def __call__(self, x: torch.Tensor, layout: Layout, step: int) -> torch.Tensor:
        """Frames (2N, channels_in) -> velocities (2N, 80) in one step of the solver."""


class PackedSolver:
    """Runs a flow's solver on packed rows.

    Args:
        estimator: the flow's estimator in half precision.
        noise: float32 (L, 80), from which the solver starts.
        times: float32 (steps + 1,), time points of the solver.
        rate: strength of classifier-free guidance.
    """

    def __init__(self, estimator: Estimator, noise: torch.Tensor, times: torch.Tensor, rate: float):
        self.estimator, self.noise, self.steps, self.rate = estimator, noise.to(times.device), times.diff(), rate
        self.graphs, self.memory = {}, None

    def __call__(self, mu: torch.Tensor, spks: torch.Tensor, condition: torch.Tensor, lens: Sequence[int]):
        """Mel spectrograms of utterances.

        Args:
            mu, condition: (B, 80, L).
            spks: (B, 80).
            lens: B lengths in frames.

        Returns:
            float32 (B, 80, L), undefined after the end of each utterance.
        """
        mel = torch.empty_like(mu)
        for members in assign_rows(lens, self.estimator.gap):
            row = self.row([lens[i] for i in members])
            positions = (torch.tensor(row.starts)[:, None] + torch.arange(mu.shape[2])).clamp(max=row.size - 1)
            utterance = torch.tensor(members)[row.utterance]
            utterance, frame, used, tiles, positions, indices = (
                x.to(mu.device, non_blocking=True)
                for x in (utterance, row.frame, row.used, row.tiles, positions, torch.tensor(members))
            )
            conditioning = (mu[utterance, :, frame], spks[utterance], condition[utterance, :, frame])
            inputs = (
                self.noise[frame] * used[:, None], torch.cat(conditioning, dim=1) * used[:, None], used.repeat(2),
                frame.int().repeat(2), tiles,
            )  # fmt: skip
            mel[indices] = self.run(inputs, row.size)[positions].transpose(1, 2)
        return mel

    def row(self, lens: Sequence[int]) -> PackedRow:
        """The smallest row that utterances fit into."""
        gap = self.estimator.gap
        return PackedRow(lens, next((size for size in SIZES if PackedRow.fits(lens, size, gap)), None), gap)

    def run(self, inputs, size: int) -> torch.Tensor:
        """Mel frames (N, 80) of one row; uses a CUDA graph if the row has one of SIZES and is on a GPU."""
        if size not in SIZES or not inputs[0].is_cuda:
            return self.solve(*inputs)
        if size not in self.graphs:
            self.graphs[size] = self.capture(inputs)
        graph, graph_inputs, result = self.graphs[size]
        for target, value in zip(graph_inputs, inputs, strict=True):
            target.copy_(value)
        graph.replay()
        return result.clone()

    def capture(self, inputs):
        """Capture a CUDA graph of all steps. Returns it with its input tensors and its output tensor."""
        graph_inputs = [value.clone() for value in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.solve(*graph_inputs)  # compiles the kernels
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        self.memory = (
            self.memory or torch.cuda.graph_pool_handle()
        )  # shared by all graphs: each result is copied before the next replay
        with torch.cuda.graph(graph, pool=self.memory):
            result = self.solve(*graph_inputs)
        return graph, graph_inputs, result

    def solve(self, x: torch.Tensor, conditioning: torch.Tensor, *layout: torch.Tensor) -> torch.Tensor:
        """Euler steps with classifier-free guidance (``ConditionalCFM.solve_euler``) on one row.

        Args:
            x: float32 (N, 80), initial noise.
            conditioning: (N, 240): ``mu``, speaker and condition; for the second, unconditional copy of the row, zeros
                are used.
            layout: the tensors of a :class:`Layout`.
        """
        num, channels = x.shape
        layout = Layout(*layout)
        state = torch.zeros(2, num, self.estimator.channels_in, device=x.device, dtype=self.estimator.dtype)
        state[0, :, channels:] = conditioning
        for step, dt in enumerate(self.steps):
            state[:, :, :channels] = x
            velocity = self.estimator(state.flatten(0, 1), layout, step).float()
            conditional, unconditional = (velocity * layout.used[:, None]).view(2, num, channels)
            x = x + dt * ((1 + self.rate) * conditional - self.rate * unconditional)
        return x

    def warm_up(self) -> None:
        """Compile the kernels and capture the CUDA graphs of all SIZES."""
        device = self.noise.device
        for size in SIZES if self.noise.is_cuda else ():
            row = PackedRow([size // 8 - self.estimator.gap] * 8, size, self.estimator.gap)
            zeros = torch.zeros(size, 240, device=device)
            layout = (row.used.repeat(2), row.frame.int().repeat(2), row.tiles)
            self.run((zeros[:, :80], zeros, *(tensor.to(device) for tensor in layout)), size)


class EstimatorBlock:
    """A ResNet block of the estimator and the transformer blocks after it, on frames."""

    def __init__(self, resnet: nn.Module, blocks: nn.ModuleList, time: torch.Tensor):
        self.resnet, self.blocks = CausalResnetBlock(resnet, time), TransformerBlocks(blocks)

    def __call__(self, x, used, tiles, step: int) -> torch.Tensor:
        return self.blocks(self.resnet(x, used, step), used, tiles)


class ConvolutionalEstimator:
    """CosyVoice2's estimator on frames.

    Args:
        net: CosyVoice's ``CausalConditionalDecoder``, which is converted to ``dtype``.
        times: float32 (steps,), at which it is called.
        dtype: data type of its weights and activations.

    Raises:
        ValueError: the architecture is not supported: it must have one frame rate, GELU and numbers of channels that
            the kernels support.
    """

    gap = GAP

    def __init__(self, net: nn.Module, times: torch.Tensor, dtype: torch.dtype):
        if len(net.down_blocks) != 1:
            raise ValueError("this flow's estimator changes its frame rate: set token2wav_precision=fp32")
        self.dtype, self.channels_in = dtype, net.in_channels
        time = net.time_mlp(net.time_embeddings(times)).to(dtype)
        net.to(dtype)
        ((resnet, blocks, down),) = net.down_blocks
        self.down, self.conv_after_down = EstimatorBlock(resnet, blocks, time), CausalConv(down)
        self.mid = [EstimatorBlock(resnet, blocks, time) for resnet, blocks in net.mid_blocks]
        ((resnet, blocks, up),) = net.up_blocks
        self.up, self.conv_after_up = EstimatorBlock(resnet, blocks, time), CausalConv(up)
        conv, _, norm, *_ = net.final_block.block
        self.final, self.projection = CausalConv(conv, norm), net.final_proj

    def __call__(self, x: torch.Tensor, layout: Layout, step: int) -> torch.Tensor:
        """``CausalConditionalDecoder.forward``: see :class:`Estimator`."""
        used, _, tiles = layout
        skip = self.down(x, used, tiles, step)
        x = self.conv_after_down(skip, used)
        for block in self.mid:
            x = block(x, used, tiles, step)
        x = self.up(torch.cat([x, skip], dim=1), used, tiles, step)
        x = self.final(self.conv_after_up(x, used), used)
        return F.linear(x, self.projection.weight[:, :, 0], self.projection.bias)


def packed_solver(decoder: nn.Module, times: torch.Tensor, dtype: torch.dtype) -> PackedSolver:
    """The solver for CosyVoice's ``CausalConditionalCFM``; see :class:`ConvolutionalEstimator`."""
    estimator = ConvolutionalEstimator(decoder.estimator, times[:-1], dtype)
    return PackedSolver(estimator, decoder.rand_noise[0].T, times, decoder.inference_cfg_rate)
