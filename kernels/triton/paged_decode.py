"""Attention of one query row per sequence over paged keys and values.

Flash-decoding (https://pytorch.org/blog/flash-decoding; the tiles and the running softmax are FlashAttention-2's,
arXiv 2307.08691): the keys of a sequence are cut into `num_splits` parts which separate programs work on, and a second
kernel merges the parts by their log-sum-exp. A program handles all query heads of one KV head, so that a key is read
once. The grid depends on the numbers of rows and heads alone: a CUDA graph captured over these kernels can be replayed
over other lengths. Which part is whose is computed on the device, and parts with nothing to do return at once.

The rows' own keys and values can come along: then they are written to their pages by the way, which saves a launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from hf_paged.kernels.shared_ranges import SharedRanges
from hf_paged.kernels.triton.append import FP8_MAX, to_pool, unit_stride
from hf_paged.kernels.triton.blocks import LOG2E, block_tokens, padded_dim, pages_of, score_factors, scores_of
from hf_paged.kernels.triton.device import multiprocessors
from hf_paged.kernels.triton.shared_prefix import add_shared_parts, attend_shared, overlap_options

# ---- the kernels -----------------------------------------------------------------------------------------------


@triton.jit
def _blocks_of(length, shared, window, num_splits, HAS_WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """First token to be read, first block of tokens, the block after the last, and blocks per part."""
    begin = shared
    if HAS_WINDOW:
        begin = tl.maximum(length - window, 0)
    first = begin // BLOCK_N
    end = tl.cdiv(length, BLOCK_N)
    return begin, first, end, tl.cdiv(end - first, num_splits)


@triton.jit(do_not_specialize=["table_stride", "window"])
def _decode(
    query, key_pool, value_pool, block_table, slots, lengths, sinks, new_key, new_value, write_rows,
    shared_lengths, num_shared, shared_out, shared_lse, out, part_out, part_lse,
    query_row_stride, query_head_stride, key_row_stride, key_head_stride, value_row_stride, value_head_stride,
    out_row_stride, out_head_stride, table_stride,
    window, score_scale, cap, key_scale, value_scale,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, LOG2: tl.constexpr,
    FP8: tl.constexpr, FP8_LIMIT: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    # KV heads fastest: neighbours in time read neighbours in memory.
    kv_head, row, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    num_splits = tl.num_programs(2)
    # Asked for together: what one load waits for, the others have waited for too.
    slot = tl.load(slots + row).to(tl.int64)
    length = tl.load(lengths + row)
    shared, shared_parts = 0, 0
    if shared_lengths is not None:
        shared, shared_parts = tl.load(shared_lengths + row), tl.load(num_shared + row)
    stored = length  # tokens to be read from the pages
    if new_key is not None:
        write_row = tl.load(write_rows + row)
        stored -= (write_row >= 0).to(tl.int32)
    begin, first_block, last_block, blocks = _blocks_of(length, shared, window, num_splits, HAS_WINDOW, BLOCK_N)
    first_block += split * blocks
    end_block = tl.minimum(first_block + blocks, last_block)
    if first_block >= end_block:
        return

    member = tl.arange(0, BLOCK_H)
    head = kv_head * GROUP + member
    key_dim, value_dim = tl.arange(0, BLOCK_KEY), tl.arange(0, BLOCK_VALUE)
    q = tl.load(
        query + row * query_row_stride + head[:, None] * query_head_stride + key_dim[None, :],
        mask=(member < GROUP)[:, None] & (key_dim < KEY_DIM)[None, :],
        other=0.0,
    )
    table_row = block_table + slot * table_stride
    token = first_block * BLOCK_N + tl.arange(0, BLOCK_N)
    page = pages_of(table_row, token, stored, PAGE_SIZE)

    peak = tl.full([BLOCK_H], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_VALUE], tl.float32)
    if new_key is not None:
        # The part with the last block begins with the new token, and nobody reads its place in the pages. Rounded as
        # if it had been there. All parts compute this and one keeps it: no load then waits for another.
        k_new = tl.load(
            new_key + row * key_row_stride + kv_head * key_head_stride + key_dim, mask=key_dim < KEY_DIM, other=0.0
        )
        v_new = tl.load(
            new_value + row * value_row_stride + kv_head * value_head_stride + value_dim,
            mask=value_dim < VALUE_DIM,
            other=0.0,
        )
        k_new = to_pool(k_new, key_scale, key_pool.dtype.element_ty, FP8, FP8_LIMIT)
        v_new = to_pool(v_new, value_scale, value_pool.dtype.element_ty, FP8, FP8_LIMIT)
        mine = (write_row >= 0) & (end_block == last_block)
        at_new = write_row * KV_HEADS + kv_head
        tl.store(key_pool + at_new * KEY_DIM + key_dim, k_new, mask=key_dim < tl.where(mine, KEY_DIM, 0))
        tl.store(value_pool + at_new * VALUE_DIM + value_dim, v_new, mask=value_dim < tl.where(mine, VALUE_DIM, 0))
        products = tl.sum(q.to(tl.float32) * k_new.to(q.dtype).to(tl.float32)[None, :], 1)
        peak = tl.where(mine, scores_of(products, score_scale, cap, HAS_SOFTCAP), peak)
        total = tl.where(mine, 1.0, total)
        acc = tl.where(mine, v_new.to(q.dtype).to(tl.float32)[None, :], acc)
        end_block = tl.minimum(end_block, tl.cdiv(stored, BLOCK_N))
    for _ in range(first_block, end_block):
        # What is not seen is not loaded either: it may be NaN, and 0 times NaN is NaN.
        seen = (token >= begin) & (token < stored)
        at = (page.to(tl.int64) * PAGE_SIZE + token % PAGE_SIZE) * KV_HEADS + kv_head
        k = tl.load(
            key_pool + at[:, None] * KEY_DIM + key_dim[None, :],
            mask=seen[:, None] & (key_dim < KEY_DIM)[None, :],
            other=0.0,
        )
        v = tl.load(
            value_pool + at[:, None] * VALUE_DIM + value_dim[None, :],
            mask=seen[:, None] & (value_dim < VALUE_DIM)[None, :],
            other=0.0,
        )
        token += BLOCK_N
        page = pages_of(table_row, token, stored, PAGE_SIZE)
        scores = scores_of(tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee"), score_scale, cap, HAS_SOFTCAP)
        scores = tl.where(seen[None, :], scores, -float("inf"))
        # A token was seen, in this block or before it, so the new peak is finite.
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shrink = tl.exp2(peak - new_peak)
        weights = tl.exp2(scores - new_peak[:, None])
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * shrink[:, None], input_precision="ieee")
        peak = new_peak

    if shared_lengths is not None:
        if OVERLAPS:
            gdc_wait()  # everything else that is read here was there before the kernel of the shared parts began
        acc, total, peak = add_shared_parts(
            acc, total, peak, shared_out, shared_lse, tl.where(split == 0, shared_parts, 0), row, tl.num_programs(1),
            head, member < GROUP, KV_HEADS * GROUP, VALUE_DIM, BLOCK_VALUE,
        )  # fmt: skip
    real = (member < GROUP)[:, None] & (value_dim < VALUE_DIM)[None, :]
    if part_out is None:
        if sinks is not None:
            sink = tl.load(sinks + head, mask=member < GROUP, other=0.0).to(tl.float32)
            total += tl.exp2(sink * LOG2 - peak)
        result = acc * (value_scale / total)[:, None]
        place = out + row * out_row_stride + head[:, None] * out_head_stride + value_dim[None, :]
        tl.store(place, result.to(out.dtype.element_ty), mask=real)
    else:
        part = (row * KV_HEADS * GROUP + head) * num_splits + split
        tl.store(part_out + part[:, None] * VALUE_DIM + value_dim[None, :], acc / total[:, None], mask=real)
        tl.store(part_lse + part, peak + tl.log2(total), mask=member < GROUP)


@triton.jit(do_not_specialize=["window", "num_splits"])
def _merge(
    part_out, part_lse, lengths, shared_lengths, sinks, out, out_row_stride, out_head_stride,
    window, num_splits, value_scale,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    HAS_WINDOW: tl.constexpr, LOG2: tl.constexpr,
):  # fmt: skip
    """One row and head: parts weighted by their share of the sum of exponentials."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + row)
    if length <= 0:
        return
    shared = 0
    if shared_lengths is not None:
        shared = tl.load(shared_lengths + row)
    _, first, end, blocks = _blocks_of(length, shared, window, num_splits, HAS_WINDOW, BLOCK_N)
    used = tl.cdiv(end - first, blocks)  # parts beyond were never written

    value_dim = tl.arange(0, BLOCK_VALUE)
    peak = -float("inf")
    total = 0.0
    if sinks is not None:
        peak = tl.load(sinks + head).to(tl.float32) * LOG2
        total = 1.0
    acc = tl.zeros([BLOCK_VALUE], tl.float32)
    base = (row * HEADS + head) * num_splits
    for start in range(0, used, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        lse = tl.load(part_lse + base + split, mask=split < used, other=-float("inf"))
        part = tl.load(
            part_out + (base + split)[:, None] * VALUE_DIM + value_dim[None, :],
            mask=(split < used)[:, None] & (value_dim < VALUE_DIM)[None, :],
            other=0.0,
        )
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        shrink = tl.exp2(peak - new_peak)
        weights = tl.exp2(lse - new_peak)
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink + tl.sum(part * weights[:, None], 0)
        peak = new_peak
    place = out + row * out_row_stride + head * out_head_stride + value_dim
    tl.store(place, (acc * (value_scale / total)).to(out.dtype.element_ty), mask=value_dim < VALUE_DIM)


# ---- on the host -----------------------------------------------------------------------------------------------


class DecodeConfig(NamedTuple):
    """How `_decode` is compiled."""

    block_n: int
    """Tokens per turn of the loop; a power of two, 16 at least."""
    num_warps: int
    num_stages: int


PROGRAMS_PER_MULTIPROCESSOR = 2
"""How many programs sequences are split into for each multiprocessor, where they are split."""
MAX_SPLITS = 64
"""The second kernel takes 8 parts at a time: only long sequences of very few KV heads are worth this many."""
PROGRAMS_AT_ONCE = 3
"""How many programs with blocks of 32 KiB a multiprocessor has room for."""


def decode_config(
    group: int,
    key_dim: int,
    value_dim: int,
    element_bytes: int,
    programs_per_multiprocessor: float = 1.0,
    shared: bool = False,
) -> DecodeConfig:
    """A block of keys and values of 32 KiB, and three stages: while one block is worked on, the next is on its way, and
    the one after that is asked for as soon as there is room. Three such programs fit a Hopper multiprocessor; with some
    100 KB on their way to each at any time, several times its share of the bandwidth times the latency, the memory is
    what limits them.

    A grid of a little more than that would leave most of the device idle while the rest of it runs. With blocks of
    16 KiB it fits at once: 84 us instead of 88 (64 rows of 900 tokens, else as in `choose_num_splits`). From twice as
    many on, the larger blocks are as fast or faster.

    After shared parts a row has few tokens left, and a program is over before its loads overlap. Then many small
    programs hide each other's latency: 75 us instead of 89 for 32 groups of 16 samples, 512 + 40 tokens; 400 either way
    at 512 + 512. Fewer of them than 12 for each multiprocessor are better off with two stages of the larger blocks.

    Args:
        group: query heads per KV head.
        element_bytes: of the query's elements or the pools', whichever are larger.
        shared: whether shared parts come first.
        programs_per_multiprocessor: of an unsplit grid: rows times KV heads, by multiprocessors.
    """
    if shared and group <= 16 and element_bytes <= 2 and max(key_dim, value_dim) <= 128:
        if programs_per_multiprocessor >= 12:
            return DecodeConfig(16, num_warps=1, num_stages=3)
        return DecodeConfig(block_tokens(key_dim, value_dim, element_bytes, num_warps=4), num_warps=4, num_stages=2)
    if group <= 32:
        crowded = PROGRAMS_AT_ONCE < programs_per_multiprocessor <= 2 * PROGRAMS_AT_ONCE
        block_bytes = 2**14 if crowded else 2**15
        block_n = block_tokens(key_dim, value_dim, element_bytes, num_warps=4, block_bytes=block_bytes)
        return DecodeConfig(block_n, num_warps=4, num_stages=3)
    # float32 is multiplied without tensor cores, in loops that are unrolled: such a block has to be small.
    block_n = 16 if element_bytes == 4 else block_tokens(key_dim, value_dim, element_bytes, num_warps=8)
    return DecodeConfig(block_n, num_warps=8, num_stages=3)


def choose_num_splits(programs: int, multiprocessors: int, max_blocks: int) -> int:
    """Parts per sequence.

    Where there is a program for nearly every multiprocessor already, splitting is not worth the second kernel; else one
    or two for each are enough. Microseconds on an H100 (132 multiprocessors; bfloat16, 8 KV heads of 128, rows of 900
    tokens); "aim of 4" is what a default of four programs for each came to:

    | rows | 1 part | 2 parts | 4 parts | 8 parts | aim of 4 |
    |------|--------|---------|---------|---------|----------|
    | 4    |        |         | 11.7    | 11.9    | 13.7     |
    | 16   | 25.6   | 27.7    |         |         | 29.7     |

    One row takes as long in 16 or 32 parts as in 66. Two programs rather than one, which costs next to nothing, are for
    sequences of unequal length. These gain little by more: 16 rows of 100 to 2000 tokens take 36.2 in 8 parts, 37.5 by
    the aim of 4, and a little longer in one.

    Args:
        programs: of an unsplit grid: rows times KV heads.
        max_blocks: blocks of tokens in the longest sequence there may be.
    """
    if 4 * programs > 3 * multiprocessors:
        return 1
    wanted = round(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors / programs)
    return max(1, min(wanted, max_blocks, MAX_SPLITS))


def paged_decode(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_table: Tensor,
    slots: Tensor,
    lengths: Tensor,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    num_splits: int | None = None,
    config: DecodeConfig | None = None,
    out: Tensor | None = None,
    new_key: Tensor | None = None,
    new_value: Tensor | None = None,
    write_rows: Tensor | None = None,
    shared: SharedRanges | None = None,
) -> Tensor:
    """Attention of B rows, each over the keys of its own sequence, which include the row's own.

    The rows' own keys and values are in the pages already, or they are `new_key` and `new_value`: then the pages get
    them here, as from `append_kv`, and what was in their place is not read. The same key or value must not be another
    row's to read in the same call.

    Args:
        query: `[B, H, Dk]`, any strides (a copy is made if the last is not 1).
        key_pool, value_pool: `[pages, page, Hkv, Dk]`, `[pages, page, Hkv, Dv]`, contiguous; the query's dtype or
            another, float8_e4m3fn included. Head h reads KV head `h // (H // Hkv)`.
        block_table: int32 `[S, P]`, contiguous: page ids in order of position.
        slots: int32 `[B]`: each row's row of the block table.
        lengths: int32 `[B]`: tokens of each sequence. What lies beyond is not read. 0 is no sequence: nothing is done.
        scaling: multiplies the scores.
        window: a row sees this many of the latest positions, its own included.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        sinks: `[H]`, logits of a column that takes probability and gives nothing.
        key_scale, value_scale: what stored keys and values are multiplied by to get the real ones.
        num_splits: parts per sequence; by default from the size of the grid and of the device.
        config: by default `decode_config`'s.
        out: where to write, `[B, H, Dv]` with a last stride of 1.
        new_key, new_value: `[B, Hkv, Dk]`, `[B, Hkv, Dv]`, strides as the query's: of each sequence's last token,
            in the pools' place of `write_rows`.
        write_rows: int64 `[B]`: `page * page_size + offset`, the place of position `length - 1`; a negative one is
            padding: nothing is written, and the row attends to what is in the pages alone. Given with `new_key`.
        shared: tokens that rows share, whose pages are then read once for all of them. Every row has at least one token
            that is not shared. Without a window only.

    Returns:
        `[B, H, Dv]` in the query's dtype. Products are taken in the query's dtype, sums in float32; a float32 query is
        never rounded to TF32.
    """
    rows, heads, key_dim = query.shape
    page_size, kv_heads, value_dim = value_pool.shape[1:]
    if out is None:
        out = query.new_empty(rows, heads, value_dim)
    if rows == 0:
        return out
    query, group = unit_stride(query), heads // kv_heads
    new_strides = (0, 0, 0, 0)
    if new_key is not None:
        assert new_value is not None and write_rows is not None
        new_key, new_value = unit_stride(new_key), unit_stride(new_value)
        new_strides = *new_key.stride()[:2], *new_value.stride()[:2]
    programs, num_multiprocessors = rows * kv_heads, multiprocessors(query.device)
    if config is None:
        element_bytes = max(query.element_size(), key_pool.element_size())
        busy = programs / num_multiprocessors
        config = decode_config(group, key_dim, value_dim, element_bytes, busy, shared is not None)
    if num_splits is None:
        max_blocks = -(-block_table.shape[1] * page_size // config.block_n)
        num_splits = choose_num_splits(programs, num_multiprocessors, max_blocks)
    score_scale, cap = score_factors(scaling, key_scale, softcap)
    prefix: tuple[Tensor | None, ...] = (None, None, None, None)
    if shared is not None:
        assert window is None
        found = attend_shared(
            query, key_pool, value_pool, block_table, shared, scaling=scaling, softcap=softcap, key_scale=key_scale
        )
        prefix = (shared.lengths, shared.num_parts, *found)
    overlap = {"OVERLAPS": False} if shared is None else overlap_options(query)
    part_out = part_lse = None
    if num_splits > 1:
        part_out = query.new_empty(rows, heads, num_splits, value_dim, dtype=torch.float32)
        part_lse = query.new_empty(rows, heads, num_splits, dtype=torch.float32)
    block_value = padded_dim(value_dim)
    with torch.cuda.device_of(query):
        _decode[(kv_heads, rows, num_splits)](
            query, key_pool, value_pool, block_table, slots, lengths, sinks, new_key, new_value, write_rows,
            *prefix, out, part_out, part_lse,
            query.stride(0), query.stride(1), *new_strides, out.stride(0), out.stride(1), block_table.stride(0),
            window or 0, score_scale, cap, key_scale, value_scale,
            GROUP=group, KV_HEADS=kv_heads, KEY_DIM=key_dim, VALUE_DIM=value_dim,
            PAGE_SIZE=page_size, BLOCK_H=max(16, triton.next_power_of_2(group)), BLOCK_N=config.block_n,
            BLOCK_KEY=padded_dim(key_dim), BLOCK_VALUE=block_value,
            HAS_WINDOW=window is not None, HAS_SOFTCAP=softcap is not None, LOG2=LOG2E,
            FP8=key_pool.dtype == torch.float8_e4m3fn, FP8_LIMIT=FP8_MAX,
            num_warps=config.num_warps, num_stages=config.num_stages, **overlap,
        )  # fmt: skip
        if num_splits > 1:
            _merge[(heads, rows)](
                part_out, part_lse, lengths, prefix[0], sinks, out,
                out.stride(0), out.stride(1), window or 0, num_splits, value_scale,
                HEADS=heads, VALUE_DIM=value_dim, BLOCK_N=config.block_n, BLOCK_S=8, BLOCK_VALUE=block_value,
                HAS_WINDOW=window is not None, LOG2=LOG2E, num_warps=1 if block_value <= 128 else 2,
            )  # fmt: skip
    return out
