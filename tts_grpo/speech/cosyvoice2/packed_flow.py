"""The solver of CosyVoice2's flow on packed utterances, in half precision: no padding, few shapes, few passes.

The utterances of a batch stand one behind the other in one row of frames of a fixed length. Convolutions are causal
with three taps, so two frames of zeros between utterances are what an utterance's own padding would be; attention is
told which frames each block of queries sees; all other layers work frame by frame. So an utterance's mel does not
depend on what else is in the row, and the fixed length lets ten steps of the solver be one CUDA graph, whatever the
utterances' lengths are.

The estimator's weights are CosyVoice's own; the order of its layers (``CausalConditionalDecoder.forward``) stands here
again, and the layers themselves in tts_grpo/speech/cosyvoice2/kernels.py, because a GPU needs them in this layout.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from tts_grpo.speech.cosyvoice2.kernels import QUERIES, CausalConv, CausalResnetBlock, TransformerBlocks

GAP = 2  # frames of zeros behind each utterance
SIZES = (2048, 4096, 8192)  # frames of a row; the mean rollout has 371, three seconds of prompt included
MEAN_AT_LEAST = 128  # frames an utterance; sets how many fit into a row


class Row:
    """Where the utterances of one row are.

    Args:
        lens: their frames.
        size: frames of the row; None for just as many as they need.
    """

    def __init__(self, lens: Sequence[int], size: int | None = None):
        self.size = size or sum(lens) + GAP * len(lens)
        self.starts = [0, *itertools.accumulate(n + GAP for n in lens)][:-1]
        utterance, frame, used = (torch.zeros(self.size, dtype=torch.int64) for _ in range(3))
        for i, (start, n) in enumerate(zip(self.starts, lens, strict=True)):
            utterance[start : start + n], frame[start : start + n], used[start : start + n] = i, torch.arange(n), 1
        self.utterance, self.frame, self.used = utterance, frame, used.float()
        self.tiles = self._tiles(lens)

    def _tiles(self, lens: Sequence[int]) -> torch.Tensor:
        """Attention's blocks in two copies of the row (:func:`tts_grpo.speech.cosyvoice2.kernels.attention`).

        All rows of one size have the same number of blocks. Frames between utterances attend to what the utterance
        before them attends to; frames after the last utterance attend to nothing, so that no value is undefined.
        """
        spans = [(start, start + n + GAP, start, start + n) for start, n in zip(self.starts, lens, strict=True)]
        spans.append((spans[-1][1], self.size, 0, 0))
        tiles = [
            (first, min(QUERIES, end - first), *keys)
            for begin, end, *keys in spans
            for first in range(begin, end, QUERIES)
        ]
        count = self.size // QUERIES + max(len(lens), self.size // MEAN_AT_LEAST) + 1
        tiles += [(0, 0, 0, 0)] * (count - len(tiles))
        half = torch.tensor(tiles, dtype=torch.int32)
        return torch.cat([half, half + torch.tensor([self.size, 0, self.size, self.size], dtype=torch.int32)])

    @staticmethod
    def fits(lens: Sequence[int], size: int) -> bool:
        """Whether utterances go into a row of a size."""
        return sum(lens) + GAP * len(lens) <= size and len(lens) <= size // MEAN_AT_LEAST


def fill_rows(lens: Sequence[int]) -> list[list[int]]:
    """Utterances of each row, in their order; one that is too long for all has a row of its own."""
    rows = []
    for i, n in enumerate(lens):
        if rows and Row.fits([lens[j] for j in rows[-1]] + [n], SIZES[-1]):
            rows[-1].append(i)
        else:
            rows.append([i])
    return rows


class Stage:
    """A convolutional block and its transformer blocks, on frames."""

    def __init__(self, resnet: nn.Module, blocks: nn.ModuleList, time: torch.Tensor):
        self.resnet, self.blocks = CausalResnetBlock(resnet, time), TransformerBlocks(blocks)

    def __call__(self, x, used, tiles, step: int) -> torch.Tensor:
        return self.blocks(self.resnet(x, used, step), used, tiles)


class PackedSolver:
    """Runs the flow's solver on rows.

    Args:
        decoder: CosyVoice's ``CausalConditionalCFM``; its estimator is converted.
        times: float32 (steps + 1,) of the solver.
        dtype: of the estimator's weights and activations.

    Raises:
        ValueError: the estimator is not built as CosyVoice2's is: one frame rate, GELU, widths that kernels can take.
    """

    def __init__(self, decoder: nn.Module, times: torch.Tensor, dtype: torch.dtype):
        net = decoder.estimator
        if len(net.down_blocks) != 1:
            raise ValueError("this flow's estimator changes its frame rate: use token2wav_precision=fp32")
        self.rate, self.dtype, self.channels_in = decoder.inference_cfg_rate, dtype, net.in_channels
        self.steps, self.noise = times.diff(), decoder.rand_noise[0].T.to(times.device)
        time = net.time_mlp(net.time_embeddings(times[:-1])).to(dtype)
        net.to(dtype)
        ((resnet, blocks, down),) = net.down_blocks
        self.down, self.behind_down = Stage(resnet, blocks, time), CausalConv(down)
        self.mid = [Stage(resnet, blocks, time) for resnet, blocks in net.mid_blocks]
        ((resnet, blocks, up),) = net.up_blocks
        self.up, self.behind_up = Stage(resnet, blocks, time), CausalConv(up)
        conv, _, norm, *_ = net.final_block.block
        self.final, self.projection = CausalConv(conv, norm), net.final_proj
        self.graphs, self.memory = {}, None

    def __call__(self, mu: torch.Tensor, spks: torch.Tensor, condition: torch.Tensor, lens: Sequence[int]):
        """Mel of utterances.

        Args:
            mu, condition: (B, 80, L).
            spks: (B, 80).
            lens: their B lengths, in frames.

        Returns:
            float32 (B, 80, L), undefined behind the ends.
        """
        mel = torch.empty_like(mu)
        for members in fill_rows(lens):
            row = self.row([lens[i] for i in members])
            places = (torch.tensor(row.starts)[:, None] + torch.arange(mu.shape[2])).clamp(max=row.size - 1)
            utterance = torch.tensor(members)[row.utterance]
            utterance, frame, used, tiles, places, rows = (
                x.to(mu.device, non_blocking=True)
                for x in (utterance, row.frame, row.used, row.tiles, places, torch.tensor(members))
            )
            given = (mu[utterance, :, frame], spks[utterance], condition[utterance, :, frame])
            inputs = (self.noise[frame] * used[:, None], torch.cat(given, dim=1) * used[:, None], used, tiles)
            mel[rows] = self.run(inputs, row.size)[places].transpose(1, 2)
        return mel

    def row(self, lens: Sequence[int]) -> Row:
        """The smallest row that utterances fit into."""
        size = next((size for size in SIZES if Row.fits(lens, size)), None)
        return Row(lens, size)

    def run(self, inputs, size: int) -> torch.Tensor:
        """(N, 80) of one row, through the graph of its size where there is one."""
        if size not in SIZES or not inputs[0].is_cuda:
            return self.solve(*inputs)
        if size not in self.graphs:
            self.graphs[size] = self.capture(inputs)
        graph, fixed, result = self.graphs[size]
        for place, value in zip(fixed, inputs, strict=True):
            place.copy_(value)
        graph.replay()
        return result.clone()

    def capture(self, inputs):
        """A CUDA graph of all steps, the tensors that it reads, and the one that it writes."""
        fixed = [value.clone() for value in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.solve(*fixed)  # compiles
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        self.memory = self.memory or torch.cuda.graph_pool_handle()  # one for all: results are copied out at once
        with torch.cuda.graph(graph, pool=self.memory):
            result = self.solve(*fixed)
        return graph, fixed, result

    def solve(self, x: torch.Tensor, given: torch.Tensor, used: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
        """Euler steps with classifier-free guidance (``ConditionalCFM.solve_euler``) on one row.

        Args:
            x: float32 (N, 80) to begin with.
            given: (N, 240): ``mu``, speaker and condition; the second copy of the row is given zeros.
            used: float32 (N,), 0 for frames between utterances; what was given is 0 there too.
            tiles: int32, as :attr:`Row.tiles`.
        """
        num, channels = x.shape
        state = torch.zeros(2, num, self.channels_in, device=x.device, dtype=self.dtype)
        state[0, :, channels:] = given
        used = used.repeat(2)
        for step, dt in enumerate(self.steps):
            state[:, :, :channels] = x
            change = self.estimate(state.flatten(0, 1), used, tiles, step).float()
            guided, free = (change * used[:, None]).view(2, num, channels)
            x = x + dt * ((1 + self.rate) * guided - self.rate * free)
        return x

    def estimate(self, x: torch.Tensor, used: torch.Tensor, tiles: torch.Tensor, step: int) -> torch.Tensor:
        """``CausalConditionalDecoder.forward`` on frames: (2N, 320) -> (2N, 80)."""
        skip = self.down(x, used, tiles, step)
        x = self.behind_down(skip, used)
        for stage in self.mid:
            x = stage(x, used, tiles, step)
        x = self.up(torch.cat([x, skip], dim=1), used, tiles, step)
        x = self.final(self.behind_up(x, used), used)
        return F.linear(x, self.projection.weight[:, :, 0], self.projection.bias)

    def warm_up(self) -> None:
        """Compile, and capture all graphs."""
        device = self.noise.device
        for size in SIZES if self.noise.is_cuda else ():
            row = Row([size // 8 - GAP] * 8, size)
            zeros = torch.zeros(size, 240, device=device)
            self.run((zeros[:, :80], zeros, row.used.to(device), row.tiles.to(device)), size)
