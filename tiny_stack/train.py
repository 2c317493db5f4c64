"""What the training scripts of the tiny stack share: schedule, losses, losses' logs, greedy CTC, CUDA graphs."""

import contextlib
import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rapidfuzz.distance import Levenshtein


def autocast(device: str):
    """bfloat16 on a GPU, nothing on a CPU."""
    kind = torch.device(device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda", cache_enabled=False)


def cosine(step: int, steps: int, warmup: int, floor: float = 0.02) -> float:
    """Factor on the learning rate: linear warm-up, then half a cosine down to ``floor``."""
    progress = min(1.0, step / steps)
    return min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of all groups, in place where it is a tensor (as CUDA graphs need)."""
    for group in optimiser.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def ctc_loss(logits: torch.Tensor, lens: torch.Tensor, targets: torch.Tensor, target_lens: torch.Tensor):
    """CTC of logits (B, T, V), blank 0; a target longer than its input counts as 0."""
    log_probs = logits.float().log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(log_probs, targets.to(logits.device), lens.cpu(), target_lens.cpu(), zero_infinity=True)


def greedy_ctc(logits: torch.Tensor, lens) -> list[list[int]]:
    """Best labels of logits (B, T, V) with repeats and blanks removed."""
    best = logits.argmax(-1).cpu()
    rows = (torch.unique_consecutive(row[:n]) for row, n in zip(best, [int(n) for n in lens], strict=True))
    return [[int(label) for label in row if label] for row in rows]


def label_error_rate(hypotheses: list[list[int]], references: list[list[int]]) -> float:
    """Total edits over total reference labels."""
    errors = sum(Levenshtein.distance(h, r) for h, r in zip(hypotheses, references, strict=True))
    return errors / sum(len(r) for r in references)


def round_to_half(module: torch.nn.Module) -> None:
    """Round the weights to what a half-precision file holds, so that saving them loses nothing."""
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.half().float())


class WeightAverage:
    """Exponential moving average of parameters: steadier than the last step's, and what is shipped."""

    def __init__(self, parameters, decay: float = 0.998):
        self.parameters, self.decay, self.steps = list(parameters), decay, 0
        self.average = [p.detach().clone() for p in self.parameters]

    def update(self) -> None:
        """Take in the parameters after a step; at the start old ones are forgotten sooner."""
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 10))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    @contextlib.contextmanager
    def applied(self):
        """The average in place of the parameters, for evaluation and for saving."""
        kept = [p.detach().clone() for p in self.parameters]
        self._put(self.average)
        try:
            yield
        finally:
            self._put(kept)

    def _put(self, values: list[torch.Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, values)


class Log:
    """Losses to TensorBoard, and a line of them to the console now and then."""

    def __init__(self, writer, name: str, steps: int, every_s: float = 20.0):
        self.writer, self.name, self.steps, self.every_s = writer, name, steps, every_s
        self.begun = self.last = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether to log at this step: reading a loss waits for the GPU."""
        return step == self.steps or time.monotonic() - self.last > self.every_s

    def write(self, step: int, values: dict[str, torch.Tensor]) -> None:
        self.last = time.monotonic()
        values = {key: float(value.detach()) for key, value in values.items()}
        for key, value in values.items():
            self.writer.add_scalar(f"{self.name}/{key}", value, step)
        shown = "  ".join(f"{key} {value:.4f}" for key, value in values.items())
        print(f"{self.name} {step}/{self.steps} {self.last - self.begun:.0f}s  {shown}", flush=True)


class GraphedStep:
    """A training step as one CUDA graph, which spares thousands of kernel launches; on a CPU just the step.

    The step must use the same tensors each time: inputs are copied into them before the call.
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
