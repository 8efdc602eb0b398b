"""Matrix products and row sums whose result for a row is the same bits however many rows there are, and wherever the
row stands among them.

A library picks tiles, and splits sums, by the shape of the whole problem; then a token's numbers depend on its
neighbours in the batch (see "Defeating Nondeterminism in LLM Inference", Thinking Machines, 2025). Here tiles are fixed
per dtype and inner dimension, every sum over K or over a row is taken in one order, and no choice looks at the number
of rows. Not even Triton's own: that number is not specialised on.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the kernels compute; sums are float32 in all of them."""

# ---- matrix products ---------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["m"])
def _matmul(
    a, b, bias, out, m, n, k,
    a_batch, a_row, b_batch, b_row, b_column, out_batch, out_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, WHOLE_K: tl.constexpr,
):  # fmt: skip
    # GROUP tiles of rows go through the columns together, so that what they read of `b` is still in the L2 cache.
    program, rows, columns = tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    first = program // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    inside = program % (GROUP * columns)
    row = (first + inside % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = inside // height * BLOCK_N + tl.arange(0, BLOCK_N)
    batch = tl.program_id(1).to(tl.int64)
    lines = a + batch * a_batch + row.to(tl.int64)[:, None] * a_row
    weights = b + batch * b_batch + column.to(tl.int64)[None, :] * b_column
    row_mask, column_mask = (row < m)[:, None], (column < n)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        index = start + tl.arange(0, BLOCK_K)
        depth = index.to(tl.int64)[:, None] * b_row
        if WHOLE_K:
            x = tl.load(lines + index[None, :], mask=row_mask, other=0.0)
            w = tl.load(weights + depth, mask=column_mask, other=0.0)
        else:
            real = index < k
            x = tl.load(lines + index[None, :], mask=row_mask & real[None, :], other=0.0)
            w = tl.load(weights + depth, mask=column_mask & real[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    place = out + batch * out_batch + row.to(tl.int64)[:, None] * out_row + column[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=row_mask & column_mask)


class MatmulConfig(NamedTuple):
    """How `_matmul` is compiled."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@functools.cache
def matmul_config(dtype: torch.dtype, k: int, device: torch.device) -> MatmulConfig:
    """By what is the same for every part of a product: a row count must not choose, and neither must a column count,
    since a trainer may multiply by a vocabulary's weights in pieces.

    Args:
        k: the inner dimension. In models where it is small there are few columns too, and narrow tiles keep more of
            the device busy with a step's few rows.
    """
    if dtype == torch.float32:  # no tensor cores: products are exact, and never TF32
        return MatmulConfig(64, 64, 32, num_warps=8, num_stages=2)
    roomy = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)
    stages = 4 if roomy else 3
    if k < 4096:
        return MatmulConfig(128, 64, 64, num_warps=4, num_stages=stages)
    return MatmulConfig(128, 128, 64, num_warps=8, num_stages=stages)


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """`a @ b + bias`, rounded once, from a float32 sum.

    Args:
        a: `[..., M, K]` with at most one dimension before M; b: `[..., K, N]` of the same dtype, one of `DTYPES`, any
            strides (a copy is made where the kernel cannot read them).
        bias: `[N]`, or None.
        out: `[..., M, N]`, whose columns lie side by side; by default a new tensor.

    Returns:
        `[..., M, N]` in the dtype of a.
    """
    *batch, m, k = a.shape
    n = b.shape[-1]
    if out is None:
        out = a.new_empty(*batch, m, n)
    if out.numel() == 0:
        return out
    a = a if a.stride(-1) == 1 or k == 1 else a.contiguous()
    b = b if 1 in b.stride()[-2:] else b.contiguous()
    config = matmul_config(a.dtype, k, a.device)
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    with torch.cuda.device_of(a):
        _matmul[(tiles, *(batch or [1]))](
            a, b, bias if bias is not None else b, out, m, n, k,
            a.stride(0) if batch else 0, a.stride(-2) if m > 1 else k,
            b.stride(0) if batch else 0, b.stride(-2), b.stride(-1),
            out.stride(0) if batch else 0, out.stride(-2) if m > 1 else n,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP=8,
            HAS_BIAS=bias is not None, WHOLE_K=k % config.block_k == 0,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out


# ---- sums of rows ------------------------------------------------------------------------------------------

LANES = 1024
"""Columns that are summed side by side, at most; then the lanes are."""

TILE = 2048
"""Numbers that a program has in flight at a time."""


@triton.jit(do_not_specialize=["rows"])
def _row_sum(x, out, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    line = x + row.to(tl.int64)[:, None] * columns
    real = (row < rows)[:, None]
    acc = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        acc += tl.load(line + column, mask=real & (column < columns), other=0.0).to(tl.float32)
    tl.store(out + row, tl.sum(acc, 1), mask=row < rows)


def row_sum(x: Tensor) -> Tensor:
    """float32 `[M]`, the sums of the rows of `[M, N]`, of one of `DTYPES`."""
    rows, columns = x.shape
    out = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows == 0 or columns == 0:
        return out.zero_()
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()  # where rows begin decides which thread sums what
    block = min(LANES, triton.next_power_of_2(columns))
    height = max(1, TILE // block)
    with torch.cuda.device_of(x):
        _row_sum[(triton.cdiv(rows, height),)](x, out, rows, columns, ROWS=height, BLOCK=block, num_warps=4)
    return out
