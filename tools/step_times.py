"""Print how the time of a training step is divided, from a run's log.

    python tools/step_times.py --log-file exp/NAME/log/train.log [--skip 2]

Values are medians over the steps, without the first steps (compilation, warm-up). The time to save a checkpoint is not
part of a step's time. "sleep, poll and the rest" is the time of a step minus the named phases.
"""

import argparse
from pathlib import Path

from tts_grpo.training.verl_log import median, read_steps, step_seconds

MEMORY = ("perf/max_memory_allocated_gb", "perf/max_memory_reserved_gb")


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log-file", type=Path, required=True, help="training log of stage 2")
    parser.add_argument("--skip", type=int, default=2, help="number of first steps to skip")
    return parser.parse_args(argv)


def main(argv=None):
    args = get_args(argv)
    steps = read_steps(args.log_file, args.skip)
    if not steps:
        raise SystemExit(f"step_times.py: {args.log_file} has no step after step {args.skip}")
    values = [steps[number] for number in sorted(steps)]
    print(f"{len(steps)} steps ({min(steps)} to {max(steps)}), medians")
    print("| phase | seconds | share |\n| --- | --- | --- |")
    for name, seconds, share in step_seconds(values):
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
