"""Adapters' parts of linear layers' outputs, rows grouped by adapter (after SGMV of Punica, arXiv 2310.18547, and
S-LoRA, arXiv 2311.03285).

Two kernels: one takes rows down to an adapter's rank, the other up to the layer's outputs, where it also adds the
layer's own. A program works on a tile of rows of one adapter, and of one layer where the output is that of several
side by side: a tile of columns never straddles two. How many rows an adapter has is read on the device, so that the
grid depends on shapes alone and a graph can hold it; programs beyond an adapter's last row end at once.

What bounds them: in a decode step neither memory nor arithmetic. All matrices of an adapter of rank 16 on an 8B model
are 84 MB, 25 us of an H100's memory, or as long as half a dozen launches. With up to 16 rows an adapter, one tile holds
all of them, and each matrix is read once, whole: down in a loop over the inputs, which is cut into parts of
`SPLIT_INPUTS` for its latency; up in one load of `[columns, rank]`, without a loop. So what an addition costs is two
launches, and in each the latency of a few loads one after another (where the rows begin, which they are, what is in
them), whatever the size of tiles. Fewer launches are what helps, hence one pair for all layers with the same input; on
Hopper the second of them begins while the first still runs, with all that does not depend on it. Of several tiles of
rows each reads A and B again, out of the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_paged.kernels.triton.device import can_overlap

FEW_ROWS = 128
"""Up to so many rows, the way down is cut along the inputs: there are too few tiles to fill a GPU."""
SPLIT_INPUTS = 512
"""Inputs of a part, at the least."""
MOST_SPLITS = 16


@triton.jit(do_not_specialize=["num_rows"])
def _shrink(
    x, a, order, starts, parts, num_rows, inputs, x_stride, a_stride, per_split,
    LAYERS: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    if OVERLAPS:
        gdc_launch_dependents()  # the way up waits where it needs the parts
    slot = tl.program_id(2)
    begin = tl.load(starts + slot) + tl.program_id(0) * BLOCK_M
    end = tl.load(starts + slot + 1)
    if begin >= end:
        return
    layer, split = tl.program_id(1) % LAYERS, tl.program_id(1) // LAYERS
    place = begin + tl.arange(0, BLOCK_M)
    row = tl.load(order + place, mask=place < end, other=num_rows)
    inside = row < num_rows
    x_rows = x + tl.where(inside, row, 0).to(tl.int64)[:, None] * x_stride
    rank = layer * RANK + tl.arange(0, RANK)
    a_rows = a + slot.to(tl.int64) * a_stride + rank.to(tl.int64)[None, :] * inputs
    acc = tl.zeros([BLOCK_M, RANK], dtype=tl.float32)
    first = split * per_split
    last = tl.minimum(first + per_split, inputs)
    for start in range(first, last, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        known = k < last
        x_tile = tl.load(x_rows + k[None, :], mask=inside[:, None] & known[None, :], other=0.0)
        a_tile = tl.load(a_rows + k[:, None], mask=known[:, None], other=0.0)
        acc = tl.dot(x_tile, a_tile, acc, input_precision="ieee")
    out = parts + (split.to(tl.int64) * num_rows + place)[:, None] * (LAYERS * RANK) + rank[None, :]
    tl.store(out, acc.to(parts.dtype.element_ty), mask=(place < end)[:, None] & (place < num_rows)[:, None])


@triton.jit
def _columns(tile, SIZES: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which layer a tile of columns belongs to, its first column among those of all layers, and that layer's end."""
    layer, end = 0, SIZES[0]
    begin = tile * BLOCK_N
    for i in tl.static_range(1, len(SIZES)):
        beyond = begin >= end  # the tiles of this layer and of all before it
        begin = tl.where(beyond, end + (begin - end) // BLOCK_N * BLOCK_N, begin)
        layer = tl.where(beyond, i, layer)
        end = tl.where(beyond, end + SIZES[i], end)
    return layer, begin, end


@triton.jit(do_not_specialize=["num_rows"])
def _expand(
    parts, b, base, order, starts, out, num_rows, outputs, base_stride, b_stride, num_splits,
    SIZES: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_SLOTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(2)
    begin = tl.load(starts + slot) + tl.program_id(0) * BLOCK_M
    end = tl.where(slot < NUM_SLOTS, tl.load(starts + tl.minimum(slot + 1, NUM_SLOTS)), num_rows)
    if begin >= end:
        return
    place = begin + tl.arange(0, BLOCK_M)
    row = tl.load(order + place, mask=place < end, other=num_rows)
    layer, first, last = _columns(tl.program_id(1), SIZES, BLOCK_N)
    column = first + tl.arange(0, BLOCK_N)
    inside = (row < num_rows)[:, None] & (column < last)[None, :]
    line = tl.where(row < num_rows, row, 0).to(tl.int64)[:, None]
    value = tl.load(base + line * base_stride + column[None, :], mask=inside, other=0.0)
    rank = tl.arange(0, RANK)
    b_rows = b + slot.to(tl.int64) * b_stride + column.to(tl.int64)[None, :] * RANK
    adapted = tl.where(slot < NUM_SLOTS, last, 0)  # no column is, where there is no slot
    b_tile = tl.load(b_rows + rank[:, None], mask=(column < adapted)[None, :], other=0.0)
    if OVERLAPS:
        gdc_wait()  # without an adapter too: when this kernel has ended, the one before it must have
    if slot < NUM_SLOTS:
        low = tl.zeros([BLOCK_M, RANK], dtype=tl.float32)
        known = (place < end) & (place < num_rows)
        for split in range(num_splits):  # in one order: the same bits every time
            lines = parts + ((split * num_rows + place).to(tl.int64) * len(SIZES) + layer)[:, None] * RANK
            low += tl.load(lines + rank[None, :], mask=known[:, None], other=0.0)
        added = tl.dot(low.to(b_tile.dtype), b_tile, input_precision="ieee")
        value = (value.to(tl.float32) + added).to(value.dtype)
    tl.store(out + line * outputs + column[None, :], value, mask=inside)


def add_lora(base: Tensor, x: Tensor, a: Tensor, b: Tensor, order: Tensor, starts: Tensor, sizes: list[int]) -> Tensor:
    """`base + (x A^T) B^T`, with the A and B of each row's slot; rows of no slot are the base's.

    Args:
        base: `[T, N]`, the outputs of L layers side by side; its columns are contiguous.
        x: `[T, K]` in the dtype of a and b.
        a: `[slots, L * R, K]`, the layers' one below the other; b: `[slots, N, R]`. Of both, what belongs to a slot is
            contiguous; R is a power of two from 16 on.
        order: int32 `[>= T]`, rows by slot, those of no slot last.
        starts: int32 `[slots + 1]`, where each slot's begin.
        sizes: columns of each layer, N together.

    Returns:
        `[T, N]` in the dtype of base, contiguous.
    """
    rows, inputs = x.shape
    slots, outputs, rank = b.shape
    layers = len(sizes)
    if base.stride(-1) != 1:
        base = base.contiguous()
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = base.new_empty(rows, outputs)
    if not rows:
        return out
    few = rows <= FEW_ROWS
    block_m = 16 if few else 32 if rank > 128 else 64
    block_k = 128 if rank <= 64 else 64 if rank <= 128 else 32
    splits = min(MOST_SPLITS, triton.cdiv(inputs, SPLIT_INPUTS)) if few else 1
    per_split = triton.cdiv(triton.cdiv(inputs, splits), block_k) * block_k
    # What is not a part of a sum is rounded as the way up needs it, once.
    parts = torch.empty(splits, rows, layers, rank, dtype=torch.float32 if splits > 1 else b.dtype, device=x.device)
    tiles = triton.cdiv(rows, block_m)
    block_n = 128 if rank <= 128 else 64
    columns = sum(triton.cdiv(size, block_n) for size in sizes)
    overlaps = can_overlap(x.device)
    launch = {"launch_pdl": True} if overlaps else {}
    with torch.cuda.device_of(x):
        _shrink[(tiles, splits * layers, slots)](
            x, a, order, starts, parts, rows, inputs, x.stride(0), a.stride(0), per_split,
            LAYERS=layers, RANK=rank, BLOCK_M=block_m, BLOCK_K=block_k, OVERLAPS=overlaps,
        )  # fmt: skip
        _expand[(tiles, columns, slots + 1)](
            parts, b, base, order, starts, out, rows, outputs, base.stride(0), b.stride(0), splits,
            SIZES=tuple(sizes), RANK=rank, BLOCK_M=block_m, BLOCK_N=block_n, NUM_SLOTS=slots,
            OVERLAPS=overlaps, **launch,
        )  # fmt: skip
    return out
