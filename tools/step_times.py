"""Where the time of a training step goes, from a run's log.

    python tools/step_times.py --log-file exp/NAME/log/train.log [--skip 2]

Medians over the steps, the first ones (compilation, warm-up) left out. A step that saved a checkpoint counts without
the saving. "sleep, poll and the rest" is what the named parts leave of the step.
"""

import argparse
import statistics
from pathlib import Path

from tts_grpo.training.verl_log import parse_step

PARTS = {  # name -> veRL's; generation and reward_wait are ours (tts_grpo/training/trainer.py)
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
    parser.add_argument("--log-file", type=Path, required=True, help="log of stage 2")
    parser.add_argument("--skip", type=int, default=2, help="first steps to leave out")
    return parser.parse_args(argv)


def read_steps(path: Path, skip: int) -> dict[int, dict[str, float]]:
    """Metrics by step; of a step that was done twice, after a crash, the later ones.

    Raises:
        SystemExit: the log has no step beyond ``skip``.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        parsed = [step for step in map(parse_step, file) if step]
    steps = {number: values for number, values in parsed if number > skip and STEP in values}
    if not steps:
        raise SystemExit(f"step_times.py: {path} has no step after step {skip}")
    return steps


def median(steps, name: str) -> float | None:
    found = [values[name] for values in steps if name in values]
    return statistics.median(found) if found else None


def rows(steps: list[dict[str, float]]) -> list[tuple[str, float, float | None]]:
    """Part, seconds, share of the step."""
    whole = statistics.median(values[STEP] - values.get(SAVE, 0.0) for values in steps)
    parts = {name: median(steps, key) or 0.0 for name, key in PARTS.items()}
    parts["sleep, poll and the rest"] = whole - sum(parts.values())
    table = [(name, seconds, seconds / whole) for name, seconds in parts.items()]
    table.append(("step, without saving", whole, 1.0))
    save = median(steps, SAVE)
    return table if save is None else [*table, ("saving a checkpoint", save, None)]


def main(argv=None):
    args = get_args(argv)
    steps = read_steps(args.log_file, args.skip)
    values = [steps[number] for number in sorted(steps)]
    print(f"{len(steps)} steps ({min(steps)} to {max(steps)}), medians")
    print("| part | seconds | share |\n| --- | --- | --- |")
    for name, seconds, share in rows(values):
        print(f"| {name} | {seconds:.2f} | {'' if share is None else f'{share:.1%}'} |")
    for name, form in (
        ("response_length/mean", "{:.1f} tokens a rollout"),
        ("critic/score/mean", "mean reward {:.3f}"),
    ):
        if (value := median(values, name)) is not None:
            print(form.format(value))
    for name in MEMORY:
        if found := [step[name] for step in values if name in step]:
            print(f"{name} {max(found):.1f} (of the trainer's process on a GPU)")


if __name__ == "__main__":
    main()
