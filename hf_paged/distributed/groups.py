"""TensorParallel: this process's place among those that compute one model together."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from hf_paged.distributed.collectives import forget_memory, share_memory
from hf_paged.distributed.link import Link, connect
from hf_paged.distributed.pipeline import Pipeline

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
    """Messages between the hosts, of all stages."""
    led: bool = False
    """Whether only the link's rank 0 is called, and the others follow it; else every rank runs the same program."""
    pipeline: Pipeline | None = None
    """Where `rank` and `size` are a stage's: which one this is. None: there is one."""

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
    stages: int = 1,
    led: bool = False,
) -> TensorParallel:
    """This process's place in a group of `size` ranks, or `size * stages`; all processes call it at the same time.

    The processes that torchrun started are taken in order, `size` by `size` for a stage, and stage by stage: with twice
    as many, two groups compute a replica each.

    Args:
        size: ranks that share every layer.
        stages: groups of such ranks, each with some of the layers.
        device: None: the GPU of this process's place on its host, or the CPU where there is none.
        timeout_s: a rank that keeps the others waiting for so long counts as lost.
        led: whether only rank 0 will be called.

    Raises:
        ValueError: there is no such number of processes, or of GPUs.
    """
    total = num_ranks(size, stages)
    sizes = f"tensor_parallel_size={size}" + (f" and pipeline_parallel_size={stages}" if stages > 1 else "")
    if not under_torchrun():
        raise ValueError(
            f"{sizes} needs {total} processes, and this is one: run the script with "
            f"`torchrun --nproc-per-node {total} script.py`, or let hf_paged.distributed.launch.start begin the others"
        )
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    if world % total:
        raise ValueError(
            f"{sizes}, that is {total} ranks, does not divide the {world} processes that were started: run torchrun "
            f"with --nproc-per-node {total}"
        )
    device = _own_device(device)
    timeout = timedelta(seconds=timeout_s)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    backend = "nccl" if device.type == "cuda" else "gloo"
    own = dist.get_rank()

    def make_group(every: list[list[int]], backend: str = backend) -> dist.ProcessGroup:
        """The group of this process's; every process makes every group."""
        made = [(ranks, dist.new_group(ranks, timeout=timeout, backend=backend)) for ranks in every]
        return next(group for ranks, group in made if own in ranks)

    replicas = [range(first, first + total) for first in range(0, world, total)]
    group = make_group([list(ranks[first : first + size]) for ranks in replicas for first in range(0, total, size)])
    control = make_group([list(ranks) for ranks in replicas], "gloo")
    pipeline = None
    if stages > 1:
        passed = make_group([list(ranks[place::size]) for ranks in replicas for place in range(size)])
        pipeline = Pipeline(own % total // size, stages, passed)
    link = connect(own % total, total, control, timeout_s)
    if not all(link.exchange("setting up shared memory", share_memory(group, device))):
        forget_memory(group)
    return TensorParallel(own % size, size, group, device, link, led, pipeline)


def num_ranks(size: int, stages: int) -> int:
    """Processes that a model takes.

    Raises:
        ValueError: no such sizes.
    """
    for name, value in (("tensor_parallel_size", size), ("pipeline_parallel_size", stages)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return size * stages


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
