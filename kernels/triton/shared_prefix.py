"""Attention of many rows to tokens that they share: the first half of decode for samples of one prompt.

The pages of a shared prefix are read once for up to `tile_rows` rows, whose query heads lie side by side as lines of
the tensor cores' matrix. That is the idea of Hydragen (arXiv 2402.05099) and of cascade inference
(https://flashinfer.ai/2024/02/02/cascade-inference.html); here over any number of groups and levels in one launch.
`paged_decode` goes on from what this leaves of each row's softmax, so that nothing has to be merged afterwards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from hf_paged.kernels.shared_ranges import ALIGNMENT, ITEM_FIELDS, SharedRanges
from hf_paged.kernels.triton.append import unit_stride
from hf_paged.kernels.triton.blocks import attend_blocks, block_tokens, padded_dim, score_factors
from hf_paged.kernels.triton.device import can_overlap


@triton.jit(do_not_specialize=["table_stride"])
def _attend_shared(
    query, key_pool, value_pool, block_table, items, num_items, rows, part_out, part_lse,
    query_row_stride, query_head_stride, table_stride, num_rows, score_scale, cap,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr, FIELDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    if OVERLAPS:
        gdc_launch_dependents()  # decode may begin as soon as there is room for it: it waits where it needs the parts
    kv_head, item = tl.program_id(0), tl.program_id(1)
    if item >= tl.load(num_items):
        return
    fields = items + item * FIELDS
    first, count = tl.load(fields), tl.load(fields + 1)
    begin, end, part = tl.load(fields + 2), tl.load(fields + 3), tl.load(fields + 4)
    table_row = block_table + tl.load(fields + 5).to(tl.int64) * table_stride

    line = tl.arange(0, BLOCK_M)
    member, head = line // GROUP, kv_head * GROUP + line % GROUP
    real = member < count
    row = tl.load(rows + first + member, mask=real, other=0).to(tl.int64)
    key_dim, value_dim = tl.arange(0, BLOCK_KEY), tl.arange(0, BLOCK_VALUE)
    q = tl.load(
        query + (row * query_row_stride + head * query_head_stride)[:, None] + key_dim[None, :],
        mask=real[:, None] & (key_dim < KEY_DIM)[None, :],
        other=0.0,
    )
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_VALUE], tl.float32)
    acc, total, peak = attend_blocks(
        acc, total, peak, q, line, begin // BLOCK_N, end // BLOCK_N, begin, end,
        key_pool, value_pool, table_row, kv_head, 0, score_scale, cap,
        KV_HEADS, KEY_DIM, VALUE_DIM, PAGE_SIZE, BLOCK_N, BLOCK_KEY, BLOCK_VALUE,
        HAS_WINDOW=False, HAS_SOFTCAP=HAS_SOFTCAP, MASKED=False,
    )  # fmt: skip
    place = (part * num_rows + row) * (KV_HEADS * GROUP) + head
    tl.store(
        part_out + place[:, None] * VALUE_DIM + value_dim[None, :],
        acc / total[:, None],
        mask=real[:, None] & (value_dim < VALUE_DIM)[None, :],
    )
    tl.store(part_lse + place, peak + tl.log2(total), mask=real)


@triton.jit
def add_shared_parts(
    acc, total, peak, part_out, part_lse, parts, row, num_rows, head, real,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    """A row's running softmax with its first `parts` parts taken in; `real` says which of its heads there are."""
    value_dim = tl.arange(0, BLOCK_VALUE)
    for part in range(0, parts):
        place = (part * num_rows + row) * HEADS + head
        lse = tl.load(part_lse + place, mask=real, other=0.0)
        found = tl.load(
            part_out + place[:, None] * VALUE_DIM + value_dim[None, :],
            mask=real[:, None] & (value_dim < VALUE_DIM)[None, :],
            other=0.0,
        )
        new_peak = tl.maximum(peak, lse)
        shrink, weight = tl.exp2(peak - new_peak), tl.exp2(lse - new_peak)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + found * weight[:, None]
        peak = new_peak
    return acc, total, peak


def overlap_options(query: Tensor) -> dict[str, bool]:
    """How decode is launched after `attend_shared`: on Hopper and later it may begin while that still runs
    (programmatic dependent launch), on multiprocessors that are done with their items: 0.152 ms instead of 0.158 for 16
    groups of 16 samples, 2,048 + 256 tokens."""
    if can_overlap(query.device):
        return {"OVERLAPS": True, "launch_pdl": True}
    return {"OVERLAPS": False}


class SharedConfig(NamedTuple):
    """How the kernel is compiled."""

    block_n: int
    """Tokens per turn of the loop; a power of two, 16 at least, ALIGNMENT at most."""
    num_warps: int
    num_stages: int


def shared_config(lines: int, key_dim: int, value_dim: int, element_bytes: int) -> SharedConfig:
    """Blocks of at most 32 KiB and three stages, as in decode: it is the same memory that limits. With heads of 256
    there is shared memory for two on the smaller GPUs (99 KiB), queries included, and in float32 for one.

    Args:
        lines: rows of the matrix.
        element_bytes: of the query's elements or the pools', whichever are larger.
    """
    if element_bytes == 4:  # float32 is multiplied without tensor cores, in loops that are unrolled
        return SharedConfig(16, num_warps=8, num_stages=2 if max(key_dim, value_dim) <= 128 else 1)
    num_warps = 4 if lines <= 64 else 8
    block_n = block_tokens(key_dim, value_dim, element_bytes, num_warps)
    return SharedConfig(min(block_n, ALIGNMENT), num_warps, num_stages=3 if max(key_dim, value_dim) <= 128 else 2)


def attend_shared(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_table: Tensor,
    shared: SharedRanges,
    *,
    scaling: float,
    softcap: float | None = None,
    key_scale: float = 1.0,
    config: SharedConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Every item's attention of its rows to its tokens. The grid depends on the room for items alone: a CUDA graph
    captured over this can be replayed over other items.

    Args:
        query: `[B, H, Dk]`, any strides (a copy is made if the last is not 1).
        key_pool, value_pool, block_table, scaling, softcap, key_scale: as in `paged_decode`.
        config: by default `shared_config`'s.

    Returns:
        float32 `[parts, B, H, Dv]`, the values' weighted means, not yet times a value scale, and float32
        `[parts, B, H]`, the base-2 logarithms of the sums of exponentials; what no item covers is not written.
    """
    num_rows, heads, key_dim = query.shape
    page_size, kv_heads, value_dim = value_pool.shape[1:]
    query, group = unit_stride(query), heads // kv_heads
    part_out = query.new_empty(shared.max_parts, num_rows, heads, value_dim, dtype=torch.float32)
    part_lse = query.new_empty(shared.max_parts, num_rows, heads, dtype=torch.float32)
    lines = max(16, triton.next_power_of_2(shared.tile_rows * group))
    if config is None:
        element_bytes = max(query.element_size(), key_pool.element_size())
        config = shared_config(lines, key_dim, value_dim, element_bytes)
    score_scale, cap = score_factors(scaling, key_scale, softcap)
    with torch.cuda.device_of(query):
        _attend_shared[(kv_heads, len(shared.items))](
            query, key_pool, value_pool, block_table, shared.items, shared.num_items, shared.rows, part_out, part_lse,
            query.stride(0), query.stride(1), block_table.stride(0), num_rows, score_scale, cap,
            GROUP=group, KV_HEADS=kv_heads, KEY_DIM=key_dim, VALUE_DIM=value_dim, PAGE_SIZE=page_size,
            FIELDS=ITEM_FIELDS, BLOCK_M=lines, BLOCK_N=config.block_n,
            BLOCK_KEY=padded_dim(key_dim), BLOCK_VALUE=padded_dim(value_dim), HAS_SOFTCAP=softcap is not None,
            OVERLAPS=overlap_options(query)["OVERLAPS"],
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return part_out, part_lse
