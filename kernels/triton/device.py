"""What kernels ask of the device that they run on."""

from __future__ import annotations

import functools

import torch


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs the device works on at a time, at the least."""
    if device.type != "cuda":
        return 1  # the interpreter runs one program after another
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def can_overlap(device: torch.device) -> bool:
    """Whether a kernel may begin while the one before it still runs (programmatic dependent launch): on Hopper and
    later."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
