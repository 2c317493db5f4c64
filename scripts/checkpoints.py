"""Find the newest complete checkpoint of a training, name newer ones that are damaged, and make veRL resume from it.

    python scripts/checkpoints.py exp/NAME/checkpoints
    python scripts/checkpoints.py --check exp/NAME/checkpoints/global_step_N

A process that is killed, or a full disk, can leave a checkpoint without some of its files, or with truncated ones. veRL
reads the step to resume from in latest_checkpointed_iteration.txt. This program corrects that file if the checkpoint it
names is damaged, or if the file itself is; if no checkpoint is complete, it removes the file, and veRL starts anew. A
checkpoint whose folder "actor" is gone, as veRL and users remove old ones, is neither complete nor damaged.

Needs no packages, because run.sh starts it with base_python. With --check, it exits with status 1 and a message if a
file that a merge needs is missing or damaged.
"""

import argparse
import json
import re
import sys
import zipfile
from pathlib import Path

SHARDS = ("model", "optim", "extra_state")  # files per rank (verl 0.9, fsdp_checkpoint_manager.py)


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the checkpoints")
    parser.add_argument("--check", action="store_true", help="only check the folder, a checkpoint, for a merge")
    return parser.parse_args(argv)


def fault(checkpoint: Path, for_merge: bool = False) -> str:
    """Return which file of a checkpoint, global_step_N, is missing or damaged; "" if it is complete.

    With ``for_merge``, only the files with weights are needed; otherwise all files from which a training resumes.

    The files of torch.save are ZIP archives, whose directory is at the end, so that a truncated file is recognised
    without reading all of it.
    """
    config = checkpoint / "actor/fsdp_config.json"
    try:
        world_size = int(json.loads(config.read_text(encoding="utf-8"))["world_size"])
        json.loads((checkpoint / "actor/huggingface/config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"a configuration in {config.parent} is damaged"
    kinds, others = (SHARDS[:1], []) if for_merge else (SHARDS, ["data.pt"])
    shards = [f"actor/{kind}_world_size_{world_size}_rank_{rank}.pt" for kind in kinds for rank in range(world_size)]
    for path in (checkpoint / name for name in shards + others):
        try:
            zipfile.ZipFile(path).close()
        except FileNotFoundError:
            return f"{path} is missing"
        except (OSError, zipfile.BadZipFile):
            return f"{path} is damaged or truncated"
    return ""


def newest_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest complete checkpoint, or None, and the faults of all newer checkpoints."""
    steps = {
        int(match[1]): path for path in folder.glob("global_step_*/actor")
        if (match := re.fullmatch(r"global_step_(\d+)", path.parent.name))
    }  # fmt: skip
    faults = []
    for step in sorted(steps, reverse=True):
        what = fault(steps[step].parent)
        if not what:
            return steps[step].parent, faults
        faults.append(what)
    return None, faults


def main(argv=None):
    args = get_args(argv)
    if args.check:
        what = fault(args.folder, for_merge=True)
        return f"{what}: set llm_path to a complete checkpoint, or train again (bash run.sh 1 3)" if what else 0
    newest, faults = newest_complete(args.folder)
    for what in faults:
        print(f"damaged checkpoint: {what}: it is not used", file=sys.stderr)
    tracker = args.folder / "latest_checkpointed_iteration.txt"
    if newest:
        step = newest.name.removeprefix("global_step_")
        if not tracker.exists() or tracker.read_bytes() != step.encode():
            print(f"the newest complete checkpoint is {newest}: it is used", file=sys.stderr)
            part = tracker.with_name(f".{tracker.name}.part")
            part.write_text(step, encoding="utf-8")
            part.replace(tracker)
    elif faults and tracker.exists():
        print(f"{args.folder} has no complete checkpoint: the training starts anew", file=sys.stderr)
        tracker.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
