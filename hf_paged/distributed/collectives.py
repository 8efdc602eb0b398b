"""Sums and gathers across ranks, each one operator that a compiler does not look into and a CUDA graph captures.

Operators take tensors, numbers and strings alone, so a group is named as torch itself names it, and the memory of the
one-shot kernel is found by that name too, as `attention/opaque.py` finds a layer by its pool.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

logger = logging.getLogger(__name__)

ONE_SHOT_BYTES = {2: 2 << 20, 3: 1 << 20, 4: 512 << 10}
"""By ranks, the largest sum that one kernel does by reading every rank's part at once; with more ranks than these
`ONE_SHOT_BYTES_OF_MANY`. Beyond it every rank would read too much."""
ONE_SHOT_BYTES_OF_MANY = 256 << 10
ONE_SHOT_DTYPES = (torch.bfloat16, torch.float32)
"""What torch's kernel adds."""

_gather: Callable[..., object] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""By its newer name, where torch has it: under the other it warns."""

_shared: dict[str, Tensor] = {}
"""By group: memory that every rank of it can read."""

_library = torch.library.Library("hf_paged", "FRAGMENT")
_library.define("all_reduce(Tensor input, str group) -> Tensor")
_library.define("all_gather(Tensor input, int[] widths, str group) -> Tensor")


def one_shot_bytes(ranks: int) -> int:
    """The largest sum, in bytes, that goes through the one-shot kernel."""
    return ONE_SHOT_BYTES.get(ranks, ONE_SHOT_BYTES_OF_MANY)


def share_memory(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Makes the memory through which small sums go on GPUs of one host; all ranks call it.

    Returns:
        whether this rank has it. `forget_memory` where another one has not: all of them must sum the same way.
    """
    if device.type != "cuda":
        return False
    try:
        from torch.distributed import _symmetric_memory

        buffer = _symmetric_memory.empty(one_shot_bytes(group.size()), dtype=torch.uint8, device=device)
        _symmetric_memory.rendezvous(buffer, group.group_name)
    except Exception as error:  # GPUs without a link between them, a driver or container that does not allow it
        logger.warning("sums across ranks go through NCCL alone: GPUs share no memory (%s)", error)
        return False
    _shared[group.group_name] = buffer
    return True


def forget_memory(group: dist.ProcessGroup) -> None:
    """Small sums of this group go the way of large ones."""
    _shared.pop(group.group_name, None)


def all_reduce(input: Tensor, group: str) -> Tensor:
    """The sum of all ranks' tensors of this shape, in new memory and with the same bits on every rank."""
    return torch.ops.hf_paged.all_reduce(input, group)


def all_gather(input: Tensor, widths: Sequence[int], group: str) -> Tensor:
    """`[..., widths[rank]]` -> `[..., sum(widths)]`: all ranks' columns side by side, in the order of the ranks."""
    return torch.ops.hf_paged.all_gather(input, widths, group)


def _all_reduce(input: Tensor, group: str) -> Tensor:
    buffer, size = _shared.get(group), input.numel() * input.element_size()
    fits = buffer is not None and 0 < size <= buffer.numel() and size % 16 == 0
    if buffer is not None and fits and input.dtype in ONE_SHOT_DTYPES:
        staged = buffer[:size].view(input.dtype)
        return torch.ops.symm_mem.one_shot_all_reduce_copy(staged, input.reshape(-1), "sum", group).view(input.shape)
    total = input.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=_resolve_process_group(group))  # type: ignore[arg-type]
    return total


def _all_gather(input: Tensor, widths: Sequence[int], group: str) -> Tensor:
    most = max(widths)
    own = torch.nn.functional.pad(input, (0, most - input.shape[-1])).contiguous()
    flat = own.new_empty(len(widths) * own.numel())
    _gather(flat, own.view(-1), group=_resolve_process_group(group))  # type: ignore[arg-type]
    parts = flat.view(len(widths), *own.shape)
    return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], dim=-1)


def _shape_of_sum(input: Tensor, group: str) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _shape_of_gather(input: Tensor, widths: Sequence[int], group: str) -> Tensor:
    return input.new_empty(*input.shape[:-1], sum(widths))


_library.impl("all_reduce", _all_reduce, "CompositeExplicitAutograd")
_library.impl("all_gather", _all_gather, "CompositeExplicitAutograd")
torch.library.register_fake("hf_paged::all_reduce", _shape_of_sum, lib=_library)
torch.library.register_fake("hf_paged::all_gather", _shape_of_gather, lib=_library)
