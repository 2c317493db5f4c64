"""Parse a step's metrics in veRL's console log: ``step:3 - actor/entropy:2.5 - ...``.

Only displays and tables of times may depend on this format: lines in any other format are skipped.
"""

import re
import statistics
from pathlib import Path

_STEP = re.compile(r"step:([0-9]{1,9}) - (.*)", re.DOTALL)
_VALUE = re.compile(r"(?:np\.\w+\()?(-?[0-9]+(?:\.[0-9]*)?(?:e[-+]?[0-9]+)?)\)?", re.ASCII)
PHASES = {  # title -> veRL's metric; generation and reward_wait are added by tts_grpo/training/trainer.py
    "generation": "timing_s/generation",
    "waiting for rewards": "timing_s/reward_wait",
    "log-probabilities": "timing_s/old_log_prob",
    "update": "timing_s/update_actor",
    "weights to the rollouts": "timing_s/update_weights",
}
STEP, SAVE = "timing_s/step", "timing_s/save_checkpoint"


def parse_step(line: str) -> tuple[int, dict[str, float]] | None:
    """The step and its finite metrics by name; None if the line has no metrics."""
    match = _STEP.search(line)
    if not match:
        return None
    values = {}
    for item in match[2].split(" - "):  # not a regular expression, whose time would be quadratic in the line's length
        name, _, value = item.strip().rpartition(":")
        if name and (number := _VALUE.fullmatch(value)):
            values[name] = float(number[1])
    return int(match[1]), values


def read_steps(path: Path, skip: int) -> dict[int, dict[str, float]]:
    """Return the metrics of each step after ``skip`` in a log; the later ones if a step was repeated after a crash."""
    with path.open(encoding="utf-8", errors="replace") as file:
        parsed = [step for step in map(parse_step, file) if step]
    return {number: values for number, values in parsed if number > skip and STEP in values}


def median(steps: list[dict[str, float]], name: str) -> float | None:
    """Return the median of a metric over the steps that have it; None if none has it."""
    values = [metrics[name] for metrics in steps if name in metrics]
    return statistics.median(values) if values else None


def step_seconds(steps: list[dict[str, float]]) -> list[tuple[str, float, float | None]]:
    """Return phase, median seconds, and share of the step; the share is None if the phase is not part of the step."""
    step = statistics.median(values[STEP] - values.get(SAVE, 0.0) for values in steps)
    phases = {name: median(steps, key) or 0.0 for name, key in PHASES.items()}
    phases["sleep, poll and the rest"] = step - sum(phases.values())
    table = [(name, seconds, seconds / step) for name, seconds in phases.items()]
    table.append(("step, without saving", step, 1.0))
    save = median(steps, SAVE)
    return table if save is None else [*table, ("saving a checkpoint", save, None)]
