"""What the attention kernels share: blocks of tokens, their scores, and the running softmax over them."""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2E = math.log2(math.e)
"""Scores are kept times this, since the hardware's exponential is to the base 2."""


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


@triton.jit
def attend_blocks(
    acc, total, peak, q, place, first_block, end_block, begin, end,
    key_pool, value_pool, table_row, kv_head, window, score_scale, cap,
    KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The running softmax over some blocks of tokens. Without `MASKED`, every row sees all of them."""
    key_dim, value_dim = tl.arange(0, BLOCK_KEY), tl.arange(0, BLOCK_VALUE)
    token = first_block * BLOCK_N + tl.arange(0, BLOCK_N)
    page = pages_of(table_row, token, end, PAGE_SIZE)
    for _ in range(first_block, end_block):
        # What no row sees is not loaded: it may be NaN, and 0 times NaN is NaN.
        wanted = (token >= begin) & (token < end)
        at = (page.to(tl.int64) * PAGE_SIZE + token % PAGE_SIZE) * KV_HEADS + kv_head
        k = tl.load(
            key_pool + at[:, None] * KEY_DIM + key_dim[None, :],
            mask=wanted[:, None] & (key_dim < KEY_DIM)[None, :],
            other=0.0,
        )
        v = tl.load(
            value_pool + at[:, None] * VALUE_DIM + value_dim[None, :],
            mask=wanted[:, None] & (value_dim < VALUE_DIM)[None, :],
            other=0.0,
        )
        scores = scores_of(tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee"), score_scale, cap, HAS_SOFTCAP)
        if MASKED:
            seen = token[None, :] <= place[:, None]
            if HAS_WINDOW:
                seen &= token[None, :] > place[:, None] - window
            scores = tl.where(seen, scores, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        anchor = new_peak
        if HAS_WINDOW:
            # A row's window may begin in a later block than the tile's first row's.
            anchor = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        shrink = tl.exp2(peak - anchor)
        weights = tl.exp2(scores - anchor[:, None])
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * shrink[:, None], input_precision="ieee")
        peak = new_peak
        token += BLOCK_N
        page = pages_of(table_row, token, end, PAGE_SIZE)
    return acc, total, peak
