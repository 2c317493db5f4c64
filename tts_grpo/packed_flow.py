"""The solver of CosyVoice2's flow on packed utterances, in half precision: no padding, few shapes.

The utterances of a batch stand one behind the other in one row of frames of a fixed length. Convolutions are causal
with three taps, so two frames of zeros between utterances are what an utterance's own padding would be; attention stays
within an utterance by its borders (``torch.nn.attention.varlen``); all other layers work frame by frame. So an
utterance's mel does not depend on what else is in the row, frames behind its end are not computed at all, and the fixed
length lets ten steps of the solver be one CUDA graph, whatever the utterances' lengths are.

The estimator's layers are CosyVoice's own; only the order they are called in stands here again
(``CausalConditionalDecoder.forward``, without its attention masks of all frames with all frames).
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn

GAP = 2  # frames of zeros behind each utterance
SIZES = (2048, 4096, 8192)  # frames of a row; the mean rollout has 371, three seconds of prompt included
# Frames of an utterance in these rows; a longer one (over 20 s with the prompt) has a row of its own. The attention
# kernel starts a block for each 128 frames of the longest that there may be, of each utterance that there may be: most
# of them for nothing, and that takes as long as the rest. So rows of short utterances have a graph of their own.
LONGEST = (512, 1024)
TAIL = 512  # frames of unused row that attend to each other, so that nothing is left undefined; at most LONGEST[0]
MEAN_AT_LEAST = 256  # frames an utterance; sets how many fit into a row


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, borders: torch.Tensor, longest: int) -> torch.Tensor:
    """Attention within utterances: (N, heads, size) each, with their borders int32 (S + 1,) -> (N, heads, size)."""
    if q.is_cuda:
        return varlen_attn(q, k, v, borders, borders, longest, longest)
    out = torch.zeros_like(q)
    for first, end in itertools.pairwise(borders.tolist()):
        if end > first:
            part = (x[first:end].transpose(0, 1) for x in (q, k, v))
            out[first:end] = F.scaled_dot_product_attention(*part).transpose(0, 1)
    return out


def transformer_block(block: nn.Module, x: torch.Tensor, borders: torch.Tensor, longest: int) -> torch.Tensor:
    """Matcha's ``BasicTransformerBlock`` on packed frames (N, C)."""
    attend = block.attn1
    q, k, v = attend.to_qkv(block.norm1(x)).unflatten(-1, (3, attend.heads, -1)).unbind(1)
    x = x + attend.to_out[0](attention(q, k, v, borders, longest).flatten(1))
    return x + block.ff(block.norm3(x))


def resnet_block(resnet: nn.Module, x: torch.Tensor, mask: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """(1, C, N) -> packed frames (N, C')."""
    return resnet(x, mask, time)[0].T.contiguous()


class Row:
    """Where the utterances of one row are.

    Args:
        lens: their frames.
        size: frames of the row; None for just as many as they need.
    """

    def __init__(self, lens: Sequence[int], size: int | None = None):
        self.size = size or sum(lens) + GAP * len(lens)
        self.starts = [0, *itertools.accumulate(n + GAP for n in lens)][:-1]
        self.longest = next((n for n in LONGEST if n >= max(lens)), max(lens))
        utterance, frame, used = (torch.zeros(self.size, dtype=torch.int64) for _ in range(3))
        for i, (start, n) in enumerate(zip(self.starts, lens, strict=True)):
            utterance[start : start + n], frame[start : start + n], used[start : start + n] = i, torch.arange(n), 1
        self.utterance, self.frame, self.used = utterance, frame, used.float()
        self.borders = self._borders(lens)

    def _borders(self, lens: Sequence[int]) -> torch.Tensor:
        """Borders of attention in two copies of the row, int32, as many for each row of a size."""
        half = [0]
        for start, n in zip(self.starts, lens, strict=True):
            half += [start + n, start + n + GAP]
        half += [*range(half[-1] + TAIL, self.size, TAIL), self.size]
        count = 2 * (self.size // MEAN_AT_LEAST) + self.size // TAIL + 2
        half += [self.size] * (count - len(half))
        return torch.tensor(half + [self.size + border for border in half[1:]], dtype=torch.int32)

    @staticmethod
    def fits(lens: Sequence[int], size: int) -> bool:
        """Whether utterances go into a row of a size."""
        return sum(lens) + GAP * len(lens) <= size and len(lens) <= size // MEAN_AT_LEAST and max(lens) <= LONGEST[-1]


def fill_rows(lens: Sequence[int]) -> list[list[int]]:
    """Utterances of each row, in their order; one that is too long for all has a row of its own."""
    rows = []
    for i, n in enumerate(lens):
        if rows and Row.fits([lens[j] for j in rows[-1]] + [n], SIZES[-1]):
            rows[-1].append(i)
        else:
            rows.append([i])
    return rows


class PackedSolver:
    """Runs the flow's solver on rows.

    Args:
        decoder: CosyVoice's ``CausalConditionalCFM``; its estimator is converted.
        times: float32 (steps + 1,) of the solver.
        dtype: of the estimator's weights and activations.

    Raises:
        ValueError: the estimator is not built as CosyVoice2's is.
    """

    def __init__(self, decoder: nn.Module, times: torch.Tensor, dtype: torch.dtype):
        self.estimator, self.rate, self.dtype = decoder.estimator, decoder.inference_cfg_rate, dtype
        if len(self.estimator.down_blocks) != 1:
            raise ValueError("this flow's estimator changes its frame rate: use token2wav_precision=fp32")
        self.steps = times.diff()
        self.time = self.estimator.time_mlp(self.estimator.time_embeddings(times[:-1])).to(dtype)
        self.noise = decoder.rand_noise[0].to(times.device)
        self.estimator.to(dtype)
        for part in self.estimator.modules():
            if hasattr(part, "fuse_projections"):
                part.fuse_projections()
        self.graphs, self.memory = {}, None
        self.block, self.resnet = transformer_block, resnet_block
        if times.is_cuda:
            self.block, self.resnet = (torch.compile(f, dynamic=True) for f in (transformer_block, resnet_block))

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
            utterance, frame, used, borders, places, rows = (
                x.to(mu.device, non_blocking=True)
                for x in (utterance, row.frame, row.used, row.borders, places, torch.tensor(members))
            )
            packed = [(x[utterance, :, frame] * used[:, None]).T for x in (mu, condition)]
            speakers = (spks[utterance] * used[:, None]).T
            solved = self.run((self.noise[:, frame], packed[0], speakers, packed[1], used, borders), row)
            mel[rows] = solved[:, places].transpose(0, 1)
        return mel

    def row(self, lens: Sequence[int]) -> Row:
        """The smallest row that utterances fit into."""
        size = next((size for size in SIZES if Row.fits(lens, size)), None)
        return Row(lens, size)

    def run(self, inputs, row: Row) -> torch.Tensor:
        """(80, N) of one row, through the graph of its size where there is one."""
        if row.size not in SIZES or not inputs[0].is_cuda:
            return self.solve(*inputs, row.longest)
        key = row.size, row.longest
        if key not in self.graphs:
            self.graphs[key] = self.capture(inputs, row.longest)
        graph, fixed, result = self.graphs[key]
        for place, value in zip(fixed, inputs, strict=True):
            place.copy_(value)
        graph.replay()
        return result.clone()

    def capture(self, inputs, longest: int):
        """A CUDA graph of all steps, the tensors that it reads, and the one that it writes."""
        fixed = [value.clone() for value in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.solve(*fixed, longest)  # compiles
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        self.memory = self.memory or torch.cuda.graph_pool_handle()  # one for all: results are copied out at once
        with torch.cuda.graph(graph, pool=self.memory):
            result = self.solve(*fixed, longest)
        return graph, fixed, result

    def solve(self, x, mu, spks, condition, used, borders, longest: int) -> torch.Tensor:
        """Euler steps with classifier-free guidance (``ConditionalCFM.solve_euler``) on one row, (80, N) each."""
        both = lambda value: torch.cat([value, torch.zeros_like(value)], dim=1).to(self.dtype)  # noqa: E731
        given = torch.cat([both(mu), both(spks), both(condition)])
        mask = used.repeat(2)[None, None].to(self.dtype)
        for time, dt in zip(self.time, self.steps, strict=True):
            state = torch.cat([torch.cat([x, x], dim=1).to(self.dtype), given])
            guided, free = self.estimate(state[None], mask, time[None], borders, longest).float().chunk(2, dim=2)
            x = x + dt * ((1 + self.rate) * guided - self.rate * free)[0]
        return x

    def estimate(self, x, mask, time, borders, longest: int) -> torch.Tensor:
        """``CausalConditionalDecoder.forward`` on packed frames: (1, 320, N) -> (1, 80, N)."""
        net = self.estimator
        ((resnet, blocks, down),) = net.down_blocks
        skip = self.stage(resnet, blocks, x, mask, time, borders, longest)
        x = down(skip * mask)
        for resnet, blocks in net.mid_blocks:
            x = self.stage(resnet, blocks, x, mask, time, borders, longest)
        ((resnet, blocks, up),) = net.up_blocks
        x = up(self.stage(resnet, blocks, torch.cat([x, skip], dim=1), mask, time, borders, longest) * mask)
        return net.final_proj(net.final_block(x, mask) * mask) * mask

    def stage(self, resnet, blocks, x, mask, time, borders, longest: int) -> torch.Tensor:
        """A convolutional block and its transformer blocks."""
        frames = self.resnet(resnet, x, mask, time)
        for block in blocks:
            frames = self.block(block, frames, borders, longest)
        return frames.T[None].contiguous()

    def warm_up(self) -> None:
        """Compile, and capture all graphs."""
        device = self.noise.device
        for size, longest in itertools.product(SIZES, LONGEST) if self.noise.is_cuda else ():
            row = Row([longest] * (size // (longest + GAP)), size)
            channels = torch.zeros(80, size, device=device)
            inputs = (channels, channels, channels, channels, row.used.to(device), row.borders.to(device))
            self.run(inputs, row)
