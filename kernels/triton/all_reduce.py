"""Small sums across GPUs that see each other's memory, in one kernel and one crossing of the link.

Every rank pushes its part into the memory of all others and waits until theirs have come, as Lamport's bounded buffer
does (also TensorRT-LLM's smallest all-reduce): memory that holds a bit pattern nobody sends is memory that nothing has
come to yet, so that the data are their own signal and neither a flag nor a fence is needed.

A program deals with a fixed range of the memory, which is there three times over. In its n-th call it receives in the
range's copy `n % 3`, and empties the copy of the call before: nobody pushes to that one again before having received
what this call sends.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_BYTES = 2048
"""A program's range: 16 bytes for each of 128 threads."""
COPIES = 3
EMPTY = -0x8000
"""Twice in every four bytes: -0.0 in two-byte dtypes, and a float32 so small that it counts as 0."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class SharedMemory:
    """One rank's end of the memory through which ranks sum.

    Args:
        own: uint8 `[COPIES * ranks * capacity]`, filled with `EMPTY`: what other ranks push to.
        addresses: int64 `[ranks]`: where each rank's `own` begins, as seen from here; on the device.
        turns: int32 `[capacity / BLOCK_BYTES]`, zeros: how many calls each range has seen.
        rank: this one.
    """

    own: Tensor
    addresses: Tensor
    turns: Tensor
    rank: int

    @property
    def ranks(self) -> int:
        return len(self.addresses)

    @property
    def capacity(self) -> int:
        """The largest sum, in bytes."""
        return len(self.turns) * BLOCK_BYTES

    def takes(self, x: Tensor) -> bool:
        """Whether a tensor's sum can go this way."""
        return x.dtype in DTYPES and 0 < x.nbytes <= self.capacity


def memory_bytes(ranks: int, capacity: int) -> int:
    """What `SharedMemory.own` takes, for sums of up to `capacity` bytes, a multiple of `BLOCK_BYTES`."""
    return COPIES * ranks * capacity


@triton.jit
def _push_and_sum(
    x, addend, out, own, addresses, turns, num_elements, capacity,
    RANK: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr, EMPTY_BITS: tl.constexpr, ADDS: tl.constexpr,
    BITS: tl.constexpr, NUM_COPIES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    turn = tl.load(turns + program)
    place = program * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_elements
    mine = tl.load(x + place, mask=inside, other=0.0)
    bits = mine.to(BITS, bitcast=True)
    bits = tl.where(bits == EMPTY_BITS, 0, bits)
    mine = bits.to(x.dtype.element_ty, bitcast=True)
    to = ((turn % NUM_COPIES) * RANKS + RANK) * capacity + place
    for other in tl.static_range(RANKS):
        if other != RANK:
            theirs = tl.multiple_of(tl.load(addresses + other).to(tl.pointer_type(BITS)), 16)
            tl.store(theirs + to, bits, mask=inside)
    used = (turn + NUM_COPIES - 1) % NUM_COPIES * RANKS
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for other in tl.static_range(RANKS):  # in the same order on all ranks, for the same bits
        if other == RANK:
            total += mine.to(tl.float32)
        else:
            tl.store(own + (used + other) * capacity + place, tl.full([BLOCK], EMPTY_BITS, BITS))
            come = own + ((turn % NUM_COPIES) * RANKS + other) * capacity + place
            part = tl.load(come, mask=inside, other=0, volatile=True)
            while tl.max((part == EMPTY_BITS).to(tl.int32), axis=0) > 0:
                part = tl.load(come, mask=inside, other=0, volatile=True)
            total += part.to(x.dtype.element_ty, bitcast=True).to(tl.float32)
    if ADDS:
        total += tl.load(addend + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)
    tl.store(turns + program, (turn + 1) % NUM_COPIES)


def push_sum(x: Tensor, memory: SharedMemory, addend: Tensor | None = None) -> Tensor:
    """The sum over all ranks of `x`, in float32 and rounded once, with the same bits on every rank.

    All ranks call it with the same shapes, in the same order; the work is enqueued.

    Args:
        x: contiguous, of a dtype and size that `memory.takes`.
        addend: contiguous, like `x`; added to the sum, not summed.
    """
    out, narrow = torch.empty_like(x), x.dtype.itemsize == 2
    kind, bits = (torch.int16, tl.int16) if narrow else (torch.int32, tl.int32)
    block = BLOCK_BYTES // x.dtype.itemsize
    with torch.cuda.device_of(x):
        _push_and_sum[(triton.cdiv(x.numel(), block),)](
            x, addend, out, memory.own.view(kind), memory.addresses, memory.turns,
            x.numel(), memory.capacity // x.dtype.itemsize,
            RANK=memory.rank, RANKS=memory.ranks, BLOCK=block, ADDS=addend is not None, BITS=bits,
            EMPTY_BITS=EMPTY if narrow else EMPTY * 0x10000 + (EMPTY + 0x10000), NUM_COPIES=COPIES,
            num_warps=4,
        )  # fmt: skip
    return out
