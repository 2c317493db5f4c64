"""Helpers shared by the training scripts: learning-rate schedule, CTC, weight averaging, logging, CUDA graphs."""

import contextlib
import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rapidfuzz.distance import Levenshtein


def autocast(device: str):
    """bfloat16 autocast on a GPU, disabled on a CPU."""
    kind = torch.device(device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda", cache_enabled=False)


def cosine(step: int, steps: int, warmup: int, floor: float = 0.02) -> float:
    """Learning-rate factor: linear warm-up times a half-cosine decay to ``floor``."""
    progress = min(1.0, step / steps)
    return min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all groups; in place where it is a tensor, which CUDA graphs require."""
    for group in optimiser.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def ctc_loss(logits: torch.Tensor, lens: torch.Tensor, targets: torch.Tensor, target_lens: torch.Tensor):
    """CTC loss of logits (B, T, V) with blank 0; the loss of a target that is longer than its input is 0."""
    log_probs = logits.float().log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(log_probs, targets.to(logits.device), lens.cpu(), target_lens.cpu(), zero_infinity=True)


def greedy_ctc(logits: torch.Tensor, lens) -> list[list[int]]:
    """Greedy CTC decoding of logits (B, T, V): best labels without repeats and blanks."""
    best = logits.argmax(-1).cpu()
    rows = (torch.unique_consecutive(row[:n]) for row, n in zip(best, [int(n) for n in lens], strict=True))
    return [[int(label) for label in row if label] for row in rows]


def label_error_rate(hypotheses: list[list[int]], references: list[list[int]]) -> float:
    """Total edit distance over total reference labels."""
    errors = sum(Levenshtein.distance(h, r) for h, r in zip(hypotheses, references, strict=True))
    return errors / sum(len(r) for r in references)


def round_to_half(module: torch.nn.Module) -> None:
    """Round weights to half precision, so that saving them in half precision is lossless."""
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.half().float())


class WeightAverage:
    """Exponential moving average of the parameters, which is what is saved: it varies less than the last step."""

    def __init__(self, parameters, decay: float = 0.998):
        self.parameters, self.decay, self.steps = list(parameters), decay, 0
        self.average = [p.detach().clone() for p in self.parameters]

    def update(self) -> None:
        """Add the parameters after a step; the decay is faster during the first steps."""
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 10))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    @contextlib.contextmanager
    def applied(self):
        """Context in which the parameters are replaced by their average, for evaluation and saving."""
        original = [p.detach().clone() for p in self.parameters]
        self._assign(self.average)
        try:
            yield
        finally:
            self._assign(original)

    def _assign(self, values: list[torch.Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, values)


class TrainingLog:
    """Writes losses to TensorBoard and to the console, at most once in ``every_s`` seconds."""

    def __init__(self, writer, name: str, steps: int, every_s: float = 20.0):
        self.writer, self.name, self.steps, self.every_s = writer, name, steps, every_s
        self.start = self.last = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether to log at this step. Not every step: reading a loss waits for the GPU."""
        return step == self.steps or time.monotonic() - self.last > self.every_s

    def write(self, step: int, values: dict[str, torch.Tensor]) -> None:
        self.last = time.monotonic()
        values = {key: float(value.detach()) for key, value in values.items()}
        for key, value in values.items():
            self.writer.add_scalar(f"{self.name}/{key}", value, step)
        formatted = "  ".join(f"{key} {value:.4f}" for key, value in values.items())
        print(f"{self.name} {step}/{self.steps} {self.last - self.start:.0f}s  {formatted}", flush=True)


class GraphedStep:
    """A training step captured as a CUDA graph, which saves thousands of kernel launches; on a CPU, the step itself.

    The step must use the same tensors each time: copy new inputs into them before the call.
    """

    warmups = 4

    def __init__(self, step: Callable[[], None], device: str):
        self.step, self.graph, self.calls = step, None, 0
        self.cuda = torch.device(device).type == "cuda"

    def __call__(self) -> None:
        self.calls += 1
        if not self.cuda:
            self.step()
        elif self.graph is not None:
            self.graph.replay()
        elif self.calls <= self.warmups:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.step()
            torch.cuda.current_stream().wait_stream(stream)
        else:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.step()
            self.graph.replay()
