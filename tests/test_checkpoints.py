"""Tests that a checkpoint is used only if it is complete."""

import json

import pytest
import torch

from scripts import checkpoints

TRACKER = "latest_checkpointed_iteration.txt"


def make_checkpoint(folder, step: int, world_size: int = 2):
    """Write a small checkpoint in veRL's format and name it in veRL's tracker file."""
    checkpoint = folder / f"global_step_{step}"
    (checkpoint / "actor/huggingface").mkdir(parents=True)
    (checkpoint / "actor/huggingface/config.json").write_text("{}")
    for rank in range(world_size):
        for kind in checkpoints.SHARDS:
            torch.save({"x": torch.zeros(1000)}, checkpoint / f"actor/{kind}_world_size_{world_size}_rank_{rank}.pt")
    torch.save({}, checkpoint / "data.pt")
    (checkpoint / "actor/fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": world_size}))
    (folder / TRACKER).write_text(str(step))
    return checkpoint


def test_the_newest_of_complete_checkpoints_is_used(tmp_path, capsys):
    for step in (4, 12, 8):
        make_checkpoint(tmp_path, step)
    assert checkpoints.main([str(tmp_path)]) == 0
    assert (tmp_path / TRACKER).read_text() == "12", "a kill after the last file, before the tracker was written"
    capsys.readouterr()
    assert checkpoints.main([str(tmp_path)]) == 0 and capsys.readouterr().err == ""


def truncate(path, to: float) -> None:
    path.write_bytes(path.read_bytes()[: int(to * path.stat().st_size)])


FILES = [f"actor/{kind}_world_size_2_rank_{rank}.pt" for kind in checkpoints.SHARDS for rank in (0, 1)]
FILES += ["data.pt", "actor/fsdp_config.json", "actor/huggingface/config.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", 0, 0.5, 0.99])
def test_a_damaged_checkpoint_is_named_and_skipped(tmp_path, capsys, name, damage):
    make_checkpoint(tmp_path, 4)
    path = make_checkpoint(tmp_path, 8) / name
    if damage == "missing":
        path.unlink()
    elif name.endswith("huggingface/config.json"):
        path.write_text("{"[: int(2 * damage)])
    else:
        truncate(path, damage)
    assert checkpoints.main([str(tmp_path)]) == 0
    assert (tmp_path / TRACKER).read_text() == "4"
    said = capsys.readouterr().err
    assert "global_step_8" in said.splitlines()[0] and f"newest complete checkpoint is {tmp_path}/global_step_4" in said
    for_merge = bool(checkpoints.main(["--check", str(tmp_path / "global_step_8")]))
    assert for_merge == ("model" in name or name.endswith(".json"))


@pytest.mark.parametrize("tracker", ["", "8x", "9"])
def test_a_damaged_tracker_is_written_again(tmp_path, tracker):
    make_checkpoint(tmp_path, 8)
    (tmp_path / TRACKER).write_text(tracker)
    assert checkpoints.main([str(tmp_path)]) == 0
    assert (tmp_path / TRACKER).read_text() == "8" and not list(tmp_path.glob(".*"))


def test_without_a_complete_checkpoint_the_training_starts_anew(tmp_path, capsys):
    truncate(make_checkpoint(tmp_path, 8) / "data.pt", 0.5)
    assert checkpoints.main([str(tmp_path)]) == 0
    assert not (tmp_path / TRACKER).exists() and "the training starts anew" in capsys.readouterr().err
