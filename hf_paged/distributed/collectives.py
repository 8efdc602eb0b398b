"""Sums and gathers across ranks, each one operator that a compiler does not look into and a CUDA graph captures.

Operators take tensors, numbers and strings alone, so a group is named as torch itself names it, and the memory of the
one-shot kernel is found by that name too, as `attention/opaque.py` finds a layer by its pool.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

logger = logging.getLogger(__name__)

PUSHED_BYTES = {2: 4 << 20, 3: 1 << 20, 4: 512 << 10}
"""By ranks, the largest sum that one kernel does by pushing every rank's part to all others; with more ranks than these
`PUSHED_BYTES_OF_MANY`. Beyond it every rank would push too much."""
PUSHED_BYTES_OF_MANY = 256 << 10

_gather: Callable[..., object] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""By its newer name, where torch has it: under the other it warns."""

_shared: dict[str, Any] = {}
"""By group: the `SharedMemory` through which it sums, where there is one."""

_library = torch.library.Library("hf_paged", "FRAGMENT")
_library.define("all_reduce(Tensor input, str group) -> Tensor")
_library.define("all_reduce_add(Tensor input, Tensor addend, str group) -> Tensor")
_library.define("all_gather(Tensor input, int[] widths, str group) -> Tensor")


def pushed_bytes(ranks: int) -> int:
    """The largest sum, in bytes, that ranks push to each other."""
    return PUSHED_BYTES.get(ranks, PUSHED_BYTES_OF_MANY)


def share_memory(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Makes the memory through which small sums go on GPUs of one host; all ranks call it, and none of them sums before
    all have come back from it.

    Returns:
        whether this rank has it. `forget_memory` where another one has not: all of them must sum the same way.
    """
    if device.type != "cuda":
        return False
    try:
        _shared[group.group_name] = _make_memory(group, device)
    except Exception as error:  # GPUs without a link between them, a driver or container that does not allow it
        logger.warning("sums across ranks go through NCCL alone: GPUs share no memory (%s)", error)
        return False
    return True


def _make_memory(group: dist.ProcessGroup, device: torch.device) -> Any:
    from torch.distributed import _symmetric_memory

    from hf_paged.kernels.triton.all_reduce import BLOCK_BYTES, EMPTY, SharedMemory, memory_bytes

    capacity = pushed_bytes(group.size())
    own = _symmetric_memory.empty(memory_bytes(group.size(), capacity), dtype=torch.uint8, device=device)
    addresses = _symmetric_memory.rendezvous(own, group.group_name).buffer_ptrs
    own.view(torch.int16).fill_(EMPTY)
    turns = torch.zeros(capacity // BLOCK_BYTES, dtype=torch.int32, device=device)
    made = SharedMemory(own, torch.tensor(addresses, dtype=torch.int64, device=device), turns, group.rank())
    torch.cuda.synchronize(device)
    return made


def forget_memory(group: dist.ProcessGroup) -> None:
    """Small sums of this group go the way of large ones."""
    _shared.pop(group.group_name, None)


def all_reduce(input: Tensor, group: str) -> Tensor:
    """The sum of all ranks' tensors of this shape, in new memory and with the same bits on every rank."""
    return torch.ops.hf_paged.all_reduce(input, group)


def fuse_additions(graph: torch.fx.Graph) -> None:
    """Has sums take in what is added to them right away, the residual stream: one kernel less per sum. A pass over what
    a compiler has made of a layer."""
    add = torch.ops.aten.add.Tensor
    for node in list(graph.find_nodes(op="call_function", target=torch.ops.hf_paged.all_reduce.default)):
        users = list(node.users)
        if len(users) != 1 or users[0].target is not add or users[0].kwargs:
            continue
        (user,) = users
        addend = user.args[1] if user.args[0] is node else user.args[0]
        if addend is node or not isinstance(addend, torch.fx.Node) or not _alike(node, addend):
            continue
        with graph.inserting_before(user):
            fused = graph.call_function(torch.ops.hf_paged.all_reduce_add.default, (node.args[0], addend, node.args[1]))
        fused.meta.update(user.meta)
        user.replace_all_uses_with(fused)
        graph.erase_node(user)
        graph.erase_node(node)


def _alike(one: torch.fx.Node, other: torch.fx.Node) -> bool:
    first, second = one.meta.get("val"), other.meta.get("val")
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return False
    return first.dtype == second.dtype and first.shape == second.shape


def all_gather(input: Tensor, widths: Sequence[int], group: str) -> Tensor:
    """`[..., widths[rank]]` -> `[..., sum(widths)]`: all ranks' columns side by side, in the order of the ranks."""
    return torch.ops.hf_paged.all_gather(input, widths, group)


def _all_reduce(input: Tensor, group: str) -> Tensor:
    memory = _shared.get(group)
    if memory is not None and memory.takes(input):
        return _push_sum(input, memory, None)
    total = input.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=_resolve_process_group(group))  # type: ignore[arg-type]
    return total


def _all_reduce_add(input: Tensor, addend: Tensor, group: str) -> Tensor:
    memory = _shared.get(group)
    if memory is not None and memory.takes(input):
        return _push_sum(input, memory, addend)
    return _all_reduce(input, group) + addend


def _push_sum(input: Tensor, memory: Any, addend: Tensor | None) -> Tensor:
    from hf_paged.kernels.triton.all_reduce import push_sum

    return push_sum(input.contiguous(), memory, None if addend is None else addend.contiguous())


def _all_gather(input: Tensor, widths: Sequence[int], group: str) -> Tensor:
    most = max(widths)
    own = torch.nn.functional.pad(input, (0, most - input.shape[-1])).contiguous()
    flat = own.new_empty(len(widths) * own.numel())
    _gather(flat, own.view(-1), group=_resolve_process_group(group))  # type: ignore[arg-type]
    parts = flat.view(len(widths), *own.shape)
    return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], dim=-1)


def _shape_of_sum(input: Tensor, group: str) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _shape_of_sum_and_add(input: Tensor, addend: Tensor, group: str) -> Tensor:
    return _shape_of_sum(input, group)


def _shape_of_gather(input: Tensor, widths: Sequence[int], group: str) -> Tensor:
    return input.new_empty(*input.shape[:-1], sum(widths))


_library.impl("all_reduce", _all_reduce, "CompositeExplicitAutograd")
_library.impl("all_reduce_add", _all_reduce_add, "CompositeExplicitAutograd")
_library.impl("all_gather", _all_gather, "CompositeExplicitAutograd")
torch.library.register_fake("hf_paged::all_reduce", _shape_of_sum, lib=_library)
torch.library.register_fake("hf_paged::all_reduce_add", _shape_of_sum_and_add, lib=_library)
torch.library.register_fake("hf_paged::all_gather", _shape_of_gather, lib=_library)
