"""Causal attention of spans of query rows over paged keys and values that already hold the rows' own.

FlashAttention-2 (arXiv 2307.08691) over a block table. A program handles a tile: some consecutive rows of one span,
with all the query heads that share a KV head, laid side by side as rows of the tensor cores' matrix. So a key is read
once for the whole group, and a short span of a model with few KV heads still fills a matrix. Spans are ragged; the host
cuts them into tiles once per step.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_paged.kernels.triton.append import unit_stride
from hf_paged.kernels.triton.blocks import LOG2E, attend_blocks, block_tokens, padded_dim, score_factors

# ---- the kernel ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["table_stride", "window"])
def _prefill(
    query, key_pool, value_pool, block_table, tiles, sinks, out,
    query_row_stride, query_head_stride, out_row_stride, out_head_stride, table_stride,
    window, score_scale, cap, value_scale,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, UNIFORM: tl.constexpr, LOG2: tl.constexpr,
):  # fmt: skip
    # KV heads fastest: neighbours in time read neighbours in memory.
    kv_head = tl.program_id(0) % KV_HEADS
    skipped = tl.program_id(0) // KV_HEADS % PARTS * ROWS
    tile = tiles + tl.program_id(0) // (KV_HEADS * PARTS) * 4
    first_row, count = tl.load(tile).to(tl.int64) + skipped, tl.minimum(tl.load(tile + 1) - skipped, ROWS)
    if count <= 0:
        return
    position = tl.load(tile + 2) + skipped
    table_row = block_table + tl.load(tile + 3).to(tl.int64) * table_stride

    # A line of the matrix is one row of the span and one of the KV head's query heads.
    line = tl.arange(0, BLOCK_M)
    row, head = line // GROUP, kv_head * GROUP + line % GROUP
    key_dim, value_dim = tl.arange(0, BLOCK_KEY), tl.arange(0, BLOCK_VALUE)
    q = tl.load(
        query + ((first_row + row) * query_row_stride + head * query_head_stride)[:, None] + key_dim[None, :],
        mask=(row < count)[:, None] & (key_dim < KEY_DIM)[None, :],
        other=0.0,
    )
    place = position + tl.minimum(row, count - 1)  # lines that are nobody's see what the last row sees

    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_VALUE], tl.float32)
    begin, end = 0, position + count
    if HAS_WINDOW:
        begin = tl.maximum(position - window + 1, 0)
        edge = begin // BLOCK_N  # blocks are masked from here on: all of them
    elif UNIFORM:
        edge = 0
    else:
        edge = (position + 1) // BLOCK_N  # the blocks before lie wholly below the diagonal
        acc, total, peak = attend_blocks(
            acc, total, peak, q, place, 0, edge, begin, end,
            key_pool, value_pool, table_row, kv_head, window, score_scale, cap,
            KV_HEADS, KEY_DIM, VALUE_DIM, PAGE_SIZE, BLOCK_N, BLOCK_KEY, BLOCK_VALUE,
            HAS_WINDOW, HAS_SOFTCAP, MASKED=False,
        )  # fmt: skip
    acc, total, peak = attend_blocks(
        acc, total, peak, q, place, edge, tl.cdiv(end, BLOCK_N), begin, end,
        key_pool, value_pool, table_row, kv_head, window, score_scale, cap,
        KV_HEADS, KEY_DIM, VALUE_DIM, PAGE_SIZE, BLOCK_N, BLOCK_KEY, BLOCK_VALUE,
        HAS_WINDOW, HAS_SOFTCAP, MASKED=True,
    )  # fmt: skip

    if sinks is not None:
        total += tl.exp2(tl.load(sinks + head, mask=row < count, other=0.0).to(tl.float32) * LOG2 - peak)
    result = acc * (value_scale / total)[:, None]
    tl.store(
        out + ((first_row + row) * out_row_stride + head * out_head_stride)[:, None] + value_dim[None, :],
        result.to(out.dtype.element_ty),
        mask=(row < count)[:, None] & (value_dim < VALUE_DIM)[None, :],
    )


# ---- on the host -----------------------------------------------------------------------------------------------


def rows_per_tile(group: int) -> int:
    """Query rows to a tile, so that with the `group` query heads of a KV head they make up to 128 lines: what two of
    Hopper's warp groups multiply at once. Where that is too much for the registers, the kernel does a tile in parts.
    """
    return max(1, 128 // group)


def make_tiles(spans: Sequence[tuple[int, int, int]], rows: int) -> np.ndarray:
    """Cuts spans into tiles of at most `rows` rows.

    Args:
        spans: first row, number of rows, tokens before; the i-th span's pages are row i of the block table.

    Returns:
        int32 `[tiles, 4]`: first row, number of rows, position of the first row, row of the block table. Those with
        most keys come first: a program that starts last should not run longest.
    """
    if not spans:
        return np.empty((0, 4), dtype=np.int32)
    first, length, context = np.array(spans, dtype=np.int64).T
    counts = -(-length // rows)
    span = np.repeat(np.arange(len(spans)), counts)
    offset = (np.arange(len(span)) - np.repeat(np.cumsum(counts) - counts, counts)) * rows
    tiles = np.stack([first[span] + offset, np.minimum(length[span] - offset, rows), context[span] + offset, span], 1)
    return tiles[np.argsort(-tiles[:, 2], kind="stable")].astype(np.int32)


class PrefillConfig(NamedTuple):
    """How `_prefill` is compiled."""

    lines: int
    """A program does as many of a tile's rows as make up to this many lines with their heads; one row at least."""
    block_n: int
    """Tokens per turn of the loop; a power of two, 16 at least."""
    num_warps: int
    num_stages: int


def prefill_config(key_dim: int, value_dim: int, element_bytes: int, hopper: bool) -> PrefillConfig:
    """As many lines as leave the accumulators in registers, and blocks of keys and values that leave room for two of
    them and the queries in shared memory.

    Args:
        element_bytes: of the query's elements.
        hopper: its tensor cores read operands from shared memory, which spares registers, and there is more of it.
    """
    dim = max(padded_dim(key_dim), padded_dim(value_dim))
    if element_bytes == 4:  # no tensor cores, but loops that are unrolled
        return PrefillConfig(32 if dim <= 64 else 16, 32 if dim <= 256 else 16, num_warps=8, num_stages=2)
    if hopper:
        lines, block_bytes = 128 if dim <= 256 else 64, 2**15
    else:
        lines, block_bytes = min(128, max(32, 2**14 // dim)), 2**14
    return PrefillConfig(lines, block_tokens(key_dim, value_dim, element_bytes, 8, block_bytes), 8, num_stages=3)


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def paged_prefill(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_table: Tensor,
    tiles: Tensor,
    *,
    rows: int,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    uniform: bool = False,
    config: PrefillConfig | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of the rows that `tiles` name, each over the keys up to its own; other rows of `out` are left alone.

    Args:
        query: `[T, H, Dk]`, any strides (a copy is made if the last is not 1).
        key_pool, value_pool: `[pages, page, Hkv, Dk]`, `[pages, page, Hkv, Dv]`, contiguous; the query's dtype or
            another, float8_e4m3fn included. Head h reads KV head `h // (H // Hkv)`.
        block_table: int32 `[S, P]`, contiguous: the spans' page ids in order of position.
        tiles: int32 `[N, 4]`, contiguous: `make_tiles`' on the device.
        rows: what `make_tiles` was called with.
        scaling, window, softcap, sinks, key_scale, value_scale: as in `paged_decode`.
        uniform: a row's result is the same bits whichever rows share its tile. All blocks are masked then: where a
            loop without masks is compiled apart, products and sums are fused otherwise, and round otherwise.
        config: by default `prefill_config`'s.
        out: where to write, `[T, H, Dv]` with a last stride of 1; by default a new tensor.

    Returns:
        `[T, H, Dv]` in the query's dtype. Products are taken in the query's dtype, sums in float32; a float32 query is
        never rounded to TF32.
    """
    heads, key_dim = query.shape[1:]
    page_size, kv_heads, value_dim = value_pool.shape[1:]
    if out is None:
        out = query.new_empty(query.shape[0], heads, value_dim)
    if len(tiles) == 0:
        return out
    query, group = unit_stride(query), heads // kv_heads
    if config is None:
        config = prefill_config(key_dim, value_dim, query.element_size(), _is_hopper(query.device))
    part_rows = max(1, config.lines // group)
    parts = -(-rows // part_rows)
    score_scale, cap = score_factors(scaling, key_scale, softcap)
    with torch.cuda.device_of(query):
        _prefill[(len(tiles) * parts * kv_heads,)](
            query, key_pool, value_pool, block_table, tiles, sinks, out,
            query.stride(0), query.stride(1), out.stride(0), out.stride(1), block_table.stride(0),
            window or 0, score_scale, cap, value_scale,
            GROUP=group, KV_HEADS=kv_heads, KEY_DIM=key_dim, VALUE_DIM=value_dim, PAGE_SIZE=page_size,
            PARTS=parts, ROWS=part_rows, BLOCK_M=max(16, triton.next_power_of_2(part_rows * group)),
            BLOCK_N=config.block_n, BLOCK_KEY=padded_dim(key_dim), BLOCK_VALUE=padded_dim(value_dim),
            HAS_WINDOW=window is not None, HAS_SOFTCAP=softcap is not None, UNIFORM=uniform,
            LOG2=LOG2E, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out
