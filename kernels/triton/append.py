"""Writes new keys and values to their places in the pages, both in one launch.

For prefill's rows: those of one token per sequence are written by paged_decode, which attends at the same time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FP8_MAX = 448.0
"""The largest float8_e4m3fn. Its cast does not saturate in every library, so values are clamped first."""


def unit_stride(x: Tensor) -> Tensor:
    """`x`, or a contiguous copy where its last dimension is strided: the kernels load 16 bytes at a time."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def to_pool(x, scale, dtype: tl.constexpr, FP8: tl.constexpr, FP8_LIMIT: tl.constexpr):
    """`x` as a pool of `dtype` keeps it; paged_decode's new keys and values go through this too."""
    if FP8:
        x = tl.div_rn(x.to(tl.float32), scale)
        # A NaN stays one: that a sequence went wrong must not be hidden.
        x = tl.clamp(x, -FP8_LIMIT, FP8_LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return x.to(dtype)


@triton.jit
def _write_row(
    source, row_stride, head_stride, pool, row, scale,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr, FP8: tl.constexpr,
    FP8_LIMIT: tl.constexpr,
):  # fmt: skip
    """One token's `[HEADS, DIM]` to row `row` of a pool seen as `[pages * page, HEADS, DIM]`."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    dim = tl.arange(0, BLOCK_DIM)[None, :]
    real = (head < HEADS) & (dim < DIM)
    x = tl.load(source + token * row_stride + head * head_stride + dim, mask=real, other=0.0)
    x = to_pool(x, scale, pool.dtype.element_ty, FP8, FP8_LIMIT)
    tl.store(pool + (row * HEADS + head) * DIM + dim, x, mask=real)


@triton.jit
def _append(
    key, value, key_pool, value_pool, rows,
    key_row_stride, key_head_stride, value_row_stride, value_head_stride, key_scale, value_scale,
    HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr, FP8: tl.constexpr,
    FP8_LIMIT: tl.constexpr,
):  # fmt: skip
    row = tl.load(rows + tl.program_id(0))
    if row < 0:
        return
    _write_row(key, key_row_stride, key_head_stride, key_pool, row, key_scale,
               HEADS, KEY_DIM, BLOCK_HEADS, BLOCK_KEY, FP8, FP8_LIMIT)  # fmt: skip
    _write_row(value, value_row_stride, value_head_stride, value_pool, row, value_scale,
               HEADS, VALUE_DIM, BLOCK_HEADS, BLOCK_VALUE, FP8, FP8_LIMIT)  # fmt: skip


def append_kv(
    key: Tensor,
    value: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    rows: Tensor,
    *,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """Casts keys and values to the pools' dtype and writes each token's to its row.

    Args:
        key, value: `[T, Hkv, Dk]`, `[T, Hkv, Dv]`, any strides (a copy is made if the last is not 1).
        key_pool, value_pool: `[pages, page, Hkv, D]`, contiguous.
        rows: int64 `[T]`: `page * page_size + offset`; a negative one is padding, which is not written.
        key_scale, value_scale: float8_e4m3fn pools store `x / scale`, clamped to what they can hold. Else unused.
    """
    tokens, heads, key_dim = key.shape
    if tokens == 0:
        return
    key, value, value_dim = unit_stride(key), unit_stride(value), value.shape[2]
    blocks = [triton.next_power_of_2(n) for n in (heads, key_dim, value_dim)]
    # 16 bytes of 2-byte elements per thread and load; a token of a big model takes a few loads per thread.
    num_warps = min(4, max(1, blocks[0] * max(blocks[1:]) // (32 * 8)))
    with torch.cuda.device_of(key):
        _append[(tokens,)](
            key, value, key_pool, value_pool, rows,
            key.stride(0), key.stride(1), value.stride(0), value.stride(1), key_scale, value_scale,
            HEADS=heads, KEY_DIM=key_dim, VALUE_DIM=value_dim,
            BLOCK_HEADS=blocks[0], BLOCK_KEY=blocks[1], BLOCK_VALUE=blocks[2],
            FP8=key_pool.dtype == torch.float8_e4m3fn, FP8_LIMIT=FP8_MAX, num_warps=num_warps,
        )  # fmt: skip
