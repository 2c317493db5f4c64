"""Print how the time of a training step is divided, from a run's log.

    python tools/step_times.py --log-file exp/NAME/log/train.log [--skip 2]

Values are medians over the steps, without the first steps (compilation, warm-up). The time to save a checkpoint is not
part of a step's time. "sleep, poll and the rest" is the time of a step minus the named phases.
"""

import argparse
import statistics
from pathlib import Path

from tts_grpo.training.verl_log import parse_step

PHASES = {  # title -> veRL's metric; generation and reward_wait are added by tts_grpo/training/trainer.py
    "generation": "timing_s/generation",
    "waiting for rewards": "timing_s/reward_wait",
    "log-probabilities": "timing_s/old_log_prob",
    "update": "timing_s/update_actor",
    "weights to the rollouts": "timing_s/update_weights",
}
STEP, SAVE = "timing_s/step", "timing_s/save_checkpoint"
MEMORY = ("perf/max_memory_allocated_gb", "perf/max_memory_reserved_gb")


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log-file", type=Path, required=True, help="training log of stage 2")
    parser.add_argument("--skip", type=int, default=2, help="number of first steps to skip")
    return parser.parse_args(argv)


def read_steps(path: Path, skip: int) -> dict[int, dict[str, float]]:
    """Metrics by step; the later ones if a step was repeated after a crash.

    Raises:
        SystemExit: the log has no step after ``skip``.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        parsed = [step for step in map(parse_step, file) if step]
    steps = {number: values for number, values in parsed if number > skip and STEP in values}
    if not steps:
        raise SystemExit(f"step_times.py: {path} has no step after step {skip}")
    return steps


def median(steps, name: str) -> float | None:
    values = [metrics[name] for metrics in steps if name in metrics]
    return statistics.median(values) if values else None


def rows(steps: list[dict[str, float]]) -> list[tuple[str, float, float | None]]:
    """Phase, seconds, and share of the step; the share is None if the phase is not part of the step."""
    step = statistics.median(values[STEP] - values.get(SAVE, 0.0) for values in steps)
    phases = {name: median(steps, key) or 0.0 for name, key in PHASES.items()}
    phases["sleep, poll and the rest"] = step - sum(phases.values())
    table = [(name, seconds, seconds / step) for name, seconds in phases.items()]
    table.append(("step, without saving", step, 1.0))
    save = median(steps, SAVE)
    return table if save is None else [*table, ("saving a checkpoint", save, None)]


def main(argv=None):
    args = get_args(argv)
    steps = read_steps(args.log_file, args.skip)
    values = [steps[number] for number in sorted(steps)]
    print(f"{len(steps)} steps ({min(steps)} to {max(steps)}), medians")
    print("| phase | seconds | share |\n| --- | --- | --- |")
    for name, seconds, share in rows(values):
        print(f"| {name} | {seconds:.2f} | {'' if share is None else f'{share:.1%}'} |")
    for name, form in (
        ("response_length/mean", "{:.1f} tokens per rollout"),
        ("critic/score/mean", "mean reward {:.3f}"),
    ):
        if (value := median(values, name)) is not None:
            print(form.format(value))
    for name in MEMORY:
        if measured := [step[name] for step in values if name in step]:
            print(f"{name} {max(measured):.1f} (of the trainer's process on a GPU)")


if __name__ == "__main__":
    main()
