"""Linear layers of a few rows: reading the weights is all the work, so each is read once, in long streams.

A library's matrix product is made for many rows; of one row it gets 2.4 to 2.8 TB/s out of an H100 that can do 3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_paged.kernels.triton.device import multiprocessors

MOST_ROWS = 2
"""Above it a matrix product on tensor cores is as fast or faster: there the multiplications are the work."""

TILE = 8192
"""Weights that a program has in flight at a time."""


@triton.jit
def _linear(
    x, weight, bias, out, n, k, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, WHOLE_K: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < n
    lines = weight + tl.where(inside, column, 0).to(tl.int64)[:, None] * k
    # One sum per thread and row until the end: a reduction across threads in every turn would cost more than the loads.
    first = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    second = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        index = start + tl.arange(0, BLOCK_K)
        if WHOLE_K:
            w = tl.load(lines + index[None, :], eviction_policy="evict_first").to(tl.float32)
            first += w * tl.load(x + index).to(tl.float32)[None, :]
            if ROWS == 2:
                second += w * tl.load(x + k + index).to(tl.float32)[None, :]
        else:
            mask = index < k
            w = tl.load(lines + index[None, :], mask=mask[None, :], other=0.0).to(tl.float32)
            first += w * tl.load(x + index, mask=mask, other=0.0).to(tl.float32)[None, :]
            if ROWS == 2:
                second += w * tl.load(x + k + index, mask=mask, other=0.0).to(tl.float32)[None, :]
    shift = tl.zeros([BLOCK_N], dtype=tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + column, tl.sum(first, 1) + shift, mask=inside)
    if ROWS == 2:
        tl.store(out + n + column, tl.sum(second, 1) + shift, mask=inside)


def linear_of_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, accumulated in float32.

    Args:
        x: `[..., K]`, at most `MOST_ROWS` rows in all.
        weight: `[N, K]`, contiguous; bias: `[N]` or None.

    Returns:
        `[..., N]` in the dtype of x.
    """
    n, k = weight.shape
    rows = x.numel() // k
    if rows > MOST_ROWS:
        raise ValueError(f"at most {MOST_ROWS} rows, got {rows}")
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], n)
    # Few rows of weights per program where there are few of them, so that all of the GPU works.
    block_n = 16
    while block_n > 4 and triton.cdiv(n, block_n) < 2 * multiprocessors(x.device):
        block_n //= 2
    block_k = min(TILE // block_n, triton.next_power_of_2(k))
    with torch.cuda.device_of(x):
        _linear[(triton.cdiv(n, block_n),)](
            x, weight, bias if bias is not None else weight, out, n, k,
            ROWS=rows, BLOCK_N=block_n, BLOCK_K=block_k, HAS_BIAS=bias is not None, WHOLE_K=k % block_k == 0,
            num_warps=8,
        )  # fmt: skip
    return out
