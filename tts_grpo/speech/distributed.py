"""Helpers for processes started by torchrun: rank, world size, barrier."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist


def setup(device: str) -> tuple[int, int, str]:
    """Initialise the process group, if torchrun started this process.

    Args:
        device: "cpu" (gloo) or "cuda" (NCCL; each process uses the GPU of its local rank).

    Returns:
        Rank, world size and torch device of this process.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    if world_size > 1:
        gpu = torch.device(device) if device.startswith("cuda") else None
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(hours=12), device_id=gpu)
    return rank, world_size, device


def cores_per_process() -> int:
    """Number of this machine's cores for each of torchrun's processes, at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def barrier() -> None:
    """Wait until all processes have called this function."""
    if dist.is_initialized():
        dist.barrier()


def shutdown() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
