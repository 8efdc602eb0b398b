"""TensorParallel: this process's place among those that compute one model together."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from hf_paged.distributed.collectives import forget_memory, share_memory
from hf_paged.distributed.link import Link, connect

TIMEOUT_S = 300.0
"""How long a rank may keep the others waiting: loading and compiling are part of it."""


@dataclass(frozen=True, eq=False)
class TensorParallel:
    """One rank of a group. It is handed on to whoever needs it; a sharded model has it with it."""

    rank: int
    size: int
    group: dist.ProcessGroup
    """Of the device's own backend: what collectives of the model go through."""
    device: torch.device
    link: Link
    """Messages between the hosts."""
    led: bool = False
    """Whether only rank 0 is called, and the others follow it; else every rank runs the same program."""

    @property
    def name(self) -> str:
        """The group's name, as operators know it."""
        return self.group.group_name

    def __deepcopy__(self, memo: object) -> TensorParallel:
        return self


def under_torchrun() -> bool:
    """Whether this process is one of several that torchrun, or a launcher like it, started."""
    return dist.is_available() and (dist.is_initialized() or "RANK" in os.environ)


def join(
    size: int,
    device: torch.device | str | int | None = None,
    timeout_s: float = TIMEOUT_S,
    *,
    led: bool = False,
) -> TensorParallel:
    """This process's place in a group of `size` ranks; all processes call it at the same time.

    The processes that torchrun started are taken in order, `size` by `size`: with twice as many, two groups compute a
    replica each.

    Args:
        size: ranks that share a model.
        device: None: the GPU of this process's place on its host, or the CPU where there is none.
        timeout_s: a rank that keeps the others waiting for so long counts as lost.
        led: whether only rank 0 will be called.

    Raises:
        ValueError: there is no such number of processes, or of GPUs.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"tensor_parallel_size must be a positive integer, got {size!r}")
    if not under_torchrun():
        raise ValueError(
            f"tensor_parallel_size={size} needs {size} processes, and this is one: run the script with "
            f"`torchrun --nproc-per-node {size} script.py`, or let hf_paged.distributed.launch.start begin the others"
        )
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    if world % size:
        raise ValueError(
            f"tensor_parallel_size={size} does not divide the {world} processes that were started: run torchrun with "
            f"--nproc-per-node {size}"
        )
    device = _own_device(device)
    timeout = timedelta(seconds=timeout_s)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    own = dist.get_rank() // size
    for first in range(0, world, size):  # every process makes every group
        ranks = list(range(first, first + size))
        backend = "nccl" if device.type == "cuda" else "gloo"
        made = dist.new_group(ranks, timeout=timeout, backend=backend)
        host = dist.new_group(ranks, timeout=timeout, backend="gloo")
        if first == own * size:
            group, control = made, host
    rank = dist.get_rank() % size
    link = connect(rank, size, control, timeout_s)
    if not all(link.exchange("setting up shared memory", share_memory(group, device))):
        forget_memory(group)
    return TensorParallel(rank, size, group, device, link, led)


def _own_device(device: torch.device | str | int | None) -> torch.device:
    place = int(os.environ.get("LOCAL_RANK", dist.get_rank() if dist.is_initialized() else 0))
    found = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if found.type != "cuda":
        return found
    if found.index is None:
        if place >= torch.cuda.device_count():
            raise ValueError(f"local rank {place} has no GPU of its own: there are {torch.cuda.device_count()}")
        found = torch.device("cuda", place)
    torch.cuda.set_device(found)
    return found
