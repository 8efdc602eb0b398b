"""Attention of one query row per sequence over paged keys and values.

Flash-decoding (https://pytorch.org/blog/flash-decoding; the tiles and the running softmax are FlashAttention-2's,
arXiv 2307.08691): the keys of a sequence are cut into `num_splits` parts which separate programs work on, and a second
kernel merges the parts by their log-sum-exp. A program handles all query heads of one KV head, so that a key is read
once. The grid depends on the numbers of rows and heads alone: a CUDA graph captured over these kernels can be replayed
over other lengths. Which part is whose is computed on the device, and parts with nothing to do return at once.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_paged.kernels.triton.append import unit_stride

LOG2E = math.log2(math.e)
"""Scores are kept times this, since the hardware's exponential is to the base 2."""


# ---- shared with paged_prefill ---------------------------------------------------------------------------------


@triton.jit
def pages_of(table_row, token, end, PAGE_SIZE: tl.constexpr):
    """int32, the tokens' pages; those at `end` and beyond may lie beyond the table, and get some page."""
    return tl.load(table_row + token // PAGE_SIZE, mask=token < end, other=0)


@triton.jit
def scores_of(products, score_scale, cap, HAS_SOFTCAP: tl.constexpr):
    """Scores times log2(e) out of query-key products; `score_scale` and `cap` are `score_factors`'."""
    if HAS_SOFTCAP:
        # cap * tanh(x), with tanh(x) = 1 - 2 / (1 + exp(2 x)): right at both ends, where exp is inf or 0.
        return cap - 2 * cap / (1 + tl.exp2(products * score_scale))
    else:
        return products * score_scale


def score_factors(scaling: float, key_scale: float, softcap: float | None) -> tuple[float, float]:
    """The two factors of `scores_of`."""
    if softcap is None:
        return scaling * key_scale * LOG2E, 0.0
    return 2 * LOG2E * scaling * key_scale / softcap, softcap * LOG2E


def padded_dim(dim: int) -> int:
    """A head dimension as the tensor cores take it: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(dim))


def block_tokens(key_dim: int, value_dim: int, element_bytes: int, num_warps: int, block_bytes: int = 2**15) -> int:
    """Tokens whose keys and values of one head, padded, fill `block_bytes`; a power of two, 16 at least.

    At most half as many as there are threads: then Triton lets each thread load the page ids it needs itself, and does
    not pass them round through shared memory.
    """
    tokens = block_bytes // ((padded_dim(key_dim) + padded_dim(value_dim)) * element_bytes)
    return min(16 * num_warps, max(16, 1 << (tokens.bit_length() - 1)))


# ---- the kernels -----------------------------------------------------------------------------------------------


@triton.jit
def _blocks_of(length, window, num_splits, HAS_WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """First token seen, first block of tokens, the block after the last, and blocks per part."""
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(length - window, 0)
    first = begin // BLOCK_N
    end = tl.cdiv(length, BLOCK_N)
    return begin, first, end, tl.cdiv(end - first, num_splits)


@triton.jit(do_not_specialize=["table_stride", "window"])
def _decode(
    query, key_pool, value_pool, block_table, slots, lengths, sinks, out, part_out, part_lse,
    query_row_stride, query_head_stride, out_row_stride, out_head_stride, table_stride,
    window, score_scale, cap, value_scale,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, LOG2: tl.constexpr,
):  # fmt: skip
    # KV heads fastest: neighbours in time read neighbours in memory.
    kv_head, row, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    num_splits = tl.num_programs(2)
    length = tl.load(lengths + row)
    begin, first_block, end_block, blocks = _blocks_of(length, window, num_splits, HAS_WINDOW, BLOCK_N)
    first_block += split * blocks
    end_block = tl.minimum(first_block + blocks, end_block)
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
    table_row = block_table + tl.load(slots + row).to(tl.int64) * table_stride

    peak = tl.full([BLOCK_H], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_VALUE], tl.float32)
    token = first_block * BLOCK_N + tl.arange(0, BLOCK_N)
    page = pages_of(table_row, token, length, PAGE_SIZE)
    for _ in range(first_block, end_block):
        # What is not seen is not loaded either: it may be NaN, and 0 times NaN is NaN.
        seen = (token >= begin) & (token < length)
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
        page = pages_of(table_row, token, length, PAGE_SIZE)
        scores = scores_of(tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee"), score_scale, cap, HAS_SOFTCAP)
        scores = tl.where(seen[None, :], scores, -float("inf"))
        # A block has a token that is seen, so the new peak is finite.
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shrink = tl.exp2(peak - new_peak)
        weights = tl.exp2(scores - new_peak[:, None])
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * shrink[:, None], input_precision="ieee")
        peak = new_peak

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
    part_out, part_lse, lengths, sinks, out, out_row_stride, out_head_stride, window, num_splits, value_scale,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    HAS_WINDOW: tl.constexpr, LOG2: tl.constexpr,
):  # fmt: skip
    """One row and head: parts weighted by their share of the sum of exponentials."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    _, first, end, blocks = _blocks_of(tl.load(lengths + row), window, num_splits, HAS_WINDOW, BLOCK_N)
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


def decode_config(group: int, key_dim: int, value_dim: int, element_bytes: int) -> DecodeConfig:
    """A block of keys and values of 32 KiB, and three stages: while one block is worked on, the next is on its way, and
    the one after that is asked for as soon as there is room. Three such programs fit a Hopper multiprocessor; with some
    100 KB on their way to each at any time, several times its share of the bandwidth times the latency, the memory is
    what limits them.

    Args:
        group: query heads per KV head.
        element_bytes: of the query's elements or the pools', whichever are larger.
    """
    if group <= 32:
        return DecodeConfig(block_tokens(key_dim, value_dim, element_bytes, num_warps=4), num_warps=4, num_stages=3)
    # float32 is multiplied without tensor cores, in loops that are unrolled: such a block has to be small.
    block_n = 16 if element_bytes == 4 else block_tokens(key_dim, value_dim, element_bytes, num_warps=8)
    return DecodeConfig(block_n, num_warps=8, num_stages=3)


PROGRAMS_PER_MULTIPROCESSOR = 4
"""How many programs there should be for each multiprocessor, at least, before sequences are not split any more."""
MAX_SPLITS = 128


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter runs one program after another
    return torch.cuda.get_device_properties(device).multi_processor_count


def choose_num_splits(programs: int, multiprocessors: int, max_blocks: int) -> int:
    """Parts per sequence.

    Args:
        programs: of an unsplit grid: rows times KV heads.
        max_blocks: blocks of tokens in the longest sequence there may be.
    """
    # Rounded to the nearest: a device that is nearly full is not worth the second kernel.
    wanted = (2 * PROGRAMS_PER_MULTIPROCESSOR * multiprocessors + programs) // (2 * programs)
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
) -> Tensor:
    """Attention of B rows, each over the keys of its own sequence, which include the row's own.

    Args:
        query: `[B, H, Dk]`, any strides (a copy is made if the last is not 1).
        key_pool, value_pool: `[pages, page, Hkv, Dk]`, `[pages, page, Hkv, Dv]`, contiguous; the query's dtype or
            another, float8_e4m3fn included. Head h reads KV head `h // (H // Hkv)`.
        block_table: int32 `[S, P]`, contiguous: page ids in order of position.
        slots: int32 `[B]`: each row's row of the block table.
        lengths: int32 `[B]`: tokens of each sequence, 1 at least. What lies beyond is not read.
        scaling: multiplies the scores.
        window: a row sees this many of the latest positions, its own included.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        sinks: `[H]`, logits of a column that takes probability and gives nothing.
        key_scale, value_scale: what stored keys and values are multiplied by to get the real ones.
        num_splits: parts per sequence; by default from the size of the grid and of the device.
        config: by default `decode_config`'s.
        out: where to write, `[B, H, Dv]` with a last stride of 1.

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
    if config is None:
        config = decode_config(group, key_dim, value_dim, max(query.element_size(), key_pool.element_size()))
    if num_splits is None:
        max_blocks = -(-block_table.shape[1] * page_size // config.block_n)
        num_splits = choose_num_splits(rows * kv_heads, _multiprocessors(query.device), max_blocks)
    score_scale, cap = score_factors(scaling, key_scale, softcap)
    part_out = part_lse = None
    if num_splits > 1:
        part_out = query.new_empty(rows, heads, num_splits, value_dim, dtype=torch.float32)
        part_lse = query.new_empty(rows, heads, num_splits, dtype=torch.float32)
    block_value = padded_dim(value_dim)
    with torch.cuda.device_of(query):
        _decode[(kv_heads, rows, num_splits)](
            query, key_pool, value_pool, block_table, slots, lengths, sinks, out, part_out, part_lse,
            query.stride(0), query.stride(1), out.stride(0), out.stride(1), block_table.stride(0),
            window or 0, score_scale, cap, value_scale,
            GROUP=group, KV_HEADS=kv_heads, KEY_DIM=key_dim, VALUE_DIM=value_dim,
            PAGE_SIZE=page_size, BLOCK_H=max(16, triton.next_power_of_2(group)), BLOCK_N=config.block_n,
            BLOCK_KEY=padded_dim(key_dim), BLOCK_VALUE=block_value,
            HAS_WINDOW=window is not None, HAS_SOFTCAP=softcap is not None, LOG2=LOG2E,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        if num_splits > 1:
            _merge[(heads, rows)](
                part_out, part_lse, lengths, sinks, out,
                out.stride(0), out.stride(1), window or 0, num_splits, value_scale,
                HEADS=heads, VALUE_DIM=value_dim, BLOCK_N=config.block_n, BLOCK_S=8, BLOCK_VALUE=block_value,
                HAS_WINDOW=window is not None, LOG2=LOG2E, num_warps=1 if block_value <= 128 else 2,
            )  # fmt: skip
    return out
