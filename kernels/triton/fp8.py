"""Linear layers in float8_e4m3fn: activations to 8 bits, products of few rows, and weights back.

A library's product has tiles of 64 or 128 rows, and for few rows too few tiles to keep a GPU's memory busy: there is
one of our own for these, which cuts the inputs into parts. It also takes a scale per 128 inputs of a row and per
128 x 128 of the weights, as DeepSeek has them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_paged.kernels.triton.append import FP8_MAX, unit_stride
from hf_paged.kernels.triton.device import can_overlap
from hf_paged.kernels.triton.split_k import add_parts

SMALLEST_PEAK = 1e-12
"""A row whose largest number is below it is scaled as if it were this: one of zeros must not be divided by 0."""

BLOCK = 128
"""Rows and columns of weights that share a scale."""

LEAST_TURNS = 4
"""A part of a product has at least so many turns of 128 inputs, where there are as many."""

FEW_ROWS = 64
"""Up to so many `fp8_linear` multiplies itself; of outputs up to `NARROW`, which leave a library few tiles, twice as
many."""
NARROW = 4096

MOST_AT_ONCE = 16384
"""Columns of a row that are kept in registers."""

# ---- activations -------------------------------------------------------------------------------------------


@triton.jit
def _magnitude(x):
    """float32. A NaN counts as 0: it stays one itself and must not spoil its row's scale."""
    x = x.to(tl.float32)
    return tl.where(x == x, tl.abs(x), 0.0)


@triton.jit
def _fit(x, factor, LIMIT: tl.constexpr):
    """float32. A NaN stays one: that a row went wrong must not be hidden."""
    return tl.clamp(x.to(tl.float32) * factor, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _quantize(
    x, out, scales, row_stride, columns,
    SMALLEST: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    if OVERLAPS:
        gdc_launch_dependents()  # the product that follows waits where it needs these rows
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    # The first block stays in registers, which is all of nearly every row; the rest is read twice.
    first = tl.load(x + row * row_stride + index, mask=index < columns, other=0.0)
    peak = _magnitude(first)
    for start in range(BLOCK, columns, BLOCK):
        more = tl.load(x + row * row_stride + start + index, mask=start + index < columns, other=0.0)
        peak = tl.maximum(peak, _magnitude(more))
    peak = tl.maximum(tl.max(peak, 0), SMALLEST)
    tl.store(scales + row, tl.div_rn(peak, LIMIT))
    factor = tl.div_rn(LIMIT, peak)  # a division per element would take longer than all the rest
    line = out + row * columns + index
    tl.store(line, _fit(first, factor, LIMIT).to(out.dtype.element_ty), mask=index < columns)
    for start in range(BLOCK, columns, BLOCK):
        more = tl.load(x + row * row_stride + start + index, mask=start + index < columns, other=0.0)
        tl.store(line + start, _fit(more, factor, LIMIT).to(out.dtype.element_ty), mask=start + index < columns)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as float8_e4m3fn, each with a scale of its own: `x` is about `quantized * scales`.

    Args:
        x: `[M, K]`, floating point, any strides (a copy is made if the last is not 1).

    Returns:
        float8_e4m3fn `[M, K]`, clamped to what the type holds, NaN where x is (an infinite number leaves zeros and
        NaN in its row); and float32 `[M, 1]`: the row's largest magnitude, NaN left out, over 448.
    """
    rows, columns = x.shape
    out = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    if rows == 0:
        return out, scales
    x = unit_stride(x)
    block = min(MOST_AT_ONCE, triton.next_power_of_2(columns))
    with torch.cuda.device_of(x):
        _quantize[(rows,)](
            x, out, scales, x.stride(0), columns, SMALLEST=SMALLEST_PEAK, LIMIT=FP8_MAX, BLOCK=block,
            OVERLAPS=can_overlap(x.device),             num_warps=min(16, max(1, block // 256)),
        )  # fmt: skip
    return out, scales


def quantize_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `quantize_rows`, with a scale for every 128 columns of a row.

    Args:
        x: `[M, K]`, floating point, contiguous; K a multiple of 128.

    Returns:
        float8_e4m3fn `[M, K]`, and float32 `[M, K / 128]`.
    """
    rows, columns = x.shape
    quantized, scales = quantize_rows(x.reshape(-1, BLOCK))
    return quantized.view(rows, columns), scales.view(rows, columns // BLOCK)


# ---- products ----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["split_turns", "m"])
def _matmul(
    x, x_scales, weight, scales, bias, out, m, n, k, turns, split_turns,
    IN_BLOCKS: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr, PARTIAL: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """A tile of rows and columns, over one part of the turns of 128 inputs: `W x^T`, since of `W` there is more."""
    if OVERLAPS:
        if PARTIAL:
            gdc_launch_dependents()  # the kernel that adds the parts waits where it needs them
        gdc_wait()  # for the rows
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    # What juts out computes the last row or column again: masks would cost instructions in every turn.
    near, close = tl.minimum(column, n - 1), tl.minimum(row, m - 1)
    index = tl.arange(0, 128)
    line = x + close.to(tl.int64)[None, :] * k + index[:, None]
    lane = weight + near.to(tl.int64)[:, None] * k + index[None, :]
    begin = tl.program_id(1) * split_turns
    end = tl.minimum(begin + split_turns, turns)
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for turn in tl.range(begin, end, num_stages=STAGES):
        if EVEN:
            w = tl.load(lane + turn * 128)
            a = tl.load(line + turn * 128)
        else:
            real = turn * 128 + index < k
            w = tl.load(lane + turn * 128, mask=real[None, :], other=0.0)
            a = tl.load(line + turn * 128, mask=real[:, None], other=0.0)
        if IN_BLOCKS:
            part = tl.dot(w, a)
            scale = tl.load(scales + near // 128 * turns + turn)
            acc += part * (scale[:, None] * tl.load(x_scales + close * turns + turn)[None, :])
        else:
            # The tensor cores' own sums have fewer bits than float32: they are to be short.
            acc = tl.dot(w, a, acc, max_num_imprecise_acc=128)
    if not IN_BLOCKS:
        acc = acc * tl.load(scales + near)[:, None] * tl.load(x_scales + close)[None, :]
    place = row.to(tl.int64)[None, :] * n + column[:, None]
    if PARTIAL:  # to its place in [splits, M, N]
        place += tl.program_id(1).to(tl.int64) * m * n
    elif HAS_BIAS:
        acc += tl.load(bias + near).to(tl.float32)[:, None]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=(column < n)[:, None] & (row < m)[None, :])


class FP8Config(NamedTuple):
    """How a product is cut up, and how its kernel is compiled."""

    block_m: int
    """Rows per program: 16, 32, ..."""
    block_n: int
    """Columns per program: 16, 32, ..."""
    splits: int
    """Parts that the turns of 128 inputs are cut into; more than one cost a second kernel."""
    num_warps: int
    num_stages: int


def fp8_config(m: int, n: int, k: int) -> FP8Config:
    """The best of some twenty ways measured on an H100 (132 multiprocessors), or near it: for layers of 4096 x 4096 to
    28672 x 4096 and 1 to 256 rows."""
    block_m = min(max(16, triton.next_power_of_2(m)), 128)
    config = FP8Config(block_m, block_n=64, splits=1, num_warps=4, num_stages=5 if block_m <= 64 else 4)
    programs = triton.cdiv(n, config.block_n) * triton.cdiv(m, config.block_m)
    turns = triton.cdiv(k, BLOCK)
    splits = min(max(1, round(264 / programs)), 16, max(1, turns // LEAST_TURNS))
    return config._replace(splits=triton.cdiv(turns, triton.cdiv(turns, splits)))


def fp8_linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """`[M, N]` in bfloat16 out of `[M, K]`, which is quantised with a scale per row: `fp8_matmul` of few rows, a
    library's product of more.

    Args:
        x: bfloat16 `[M, K]`; K a multiple of 16, and N too.
        weight: float8_e4m3fn `[N, K]`, contiguous.
        scales: float32 `[N, 1]`.
        bias: bfloat16 `[N]`, or None.
    """
    (m, _), n = x.shape, weight.shape[0]
    quantized, x_scales = quantize_rows(x)
    if m <= FEW_ROWS or (m <= 2 * FEW_ROWS and n <= NARROW):
        return fp8_matmul(quantized, x_scales, weight, scales, bias)
    return torch._scaled_mm(
        quantized, weight.t(), x_scales, scales.t(), bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def fp8_matmul(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    config: FP8Config | None = None,
) -> Tensor:
    """`(x * x_scales) @ (weight * scales)^T + bias`, for few rows; sums are float32, and the same bits every time.

    Args:
        x: float8_e4m3fn `[M, K]`, contiguous, of `quantize_rows` or `quantize_groups` right before it.
        x_scales: float32 `[M, 1]`, or `[M, K / 128]` where the weight's are per block.
        weight: float8_e4m3fn `[N, K]`, contiguous.
        scales: float32 `[N, 1]`, or per block of 128 x 128 `[ceil(N / 128), K / 128]`, contiguous.
        bias: `[N]`, or None.
        dtype: of the result.
        config: by default `fp8_config`'s.

    Returns:
        `[M, N]`.
    """
    (m, k), n = x.shape, weight.shape[0]
    turns = triton.cdiv(k, BLOCK)
    in_blocks = tuple(x_scales.shape) == (m, turns) and tuple(scales.shape) == (triton.cdiv(n, BLOCK), turns)
    in_blocks = in_blocks and tuple(scales.shape) != (n, 1)
    if weight.shape[1] != k or not (in_blocks or (tuple(x_scales.shape), tuple(scales.shape)) == ((m, 1), (n, 1))):
        found = f"{tuple(x_scales.shape)} and {tuple(scales.shape)}"
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not go with scales {found}")
    out = torch.empty(m, n, dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    config = config or fp8_config(m, n, k)
    split = config.splits > 1
    target = torch.empty(config.splits, m, n, dtype=torch.float32, device=x.device) if split else out
    overlaps = can_overlap(x.device)
    launch = {"launch_pdl": True} if overlaps else {}
    with torch.cuda.device_of(x):
        _matmul[(triton.cdiv(n, config.block_n), config.splits, triton.cdiv(m, config.block_m))](
            x, x_scales, weight, scales, bias, target, m, n, k, turns, triton.cdiv(turns, config.splits),
            IN_BLOCKS=in_blocks, EVEN=k % BLOCK == 0, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            STAGES=config.num_stages, HAS_BIAS=bias is not None, PARTIAL=split, OVERLAPS=overlaps,
            num_warps=config.num_warps, num_stages=config.num_stages, **launch,
        )  # fmt: skip
    if split:
        add_parts(target, bias, out)
    return out


# ---- weights -----------------------------------------------------------------------------------------------


@triton.jit
def _dequantize(weight, scale_inv, out, n, k, HEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(1) * HEIGHT + tl.arange(0, HEIGHT)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # All rows and columns of a program share a scale.
    scale = tl.load(scale_inv + tl.program_id(1) * HEIGHT // BLOCK * tl.num_programs(0) + tl.program_id(0))
    place = row.to(tl.int64)[:, None] * k + column[None, :]
    mask = (row < n)[:, None] & (column < k)[None, :]
    w = tl.load(weight + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, (w * scale).to(out.dtype.element_ty), mask=mask)


def dequantize_blocks(weight: Tensor, scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights out of blocks of 128 x 128, each multiplied with its scale (DeepSeek's `weight_scale_inv`).

    Args:
        weight: float8_e4m3fn `[N, K]`, contiguous.
        scale_inv: float32 `[ceil(N / 128), ceil(K / 128)]`: blocks at the lower and right edges may be smaller.

    Returns:
        `[N, K]` in `dtype`, rounded once.
    """
    n, k = weight.shape
    expected = (-(-n // BLOCK), -(-k // BLOCK))
    if weight.dtype != torch.float8_e4m3fn or scale_inv.dtype != torch.float32:
        raise ValueError(f"weight and scale_inv must be float8_e4m3fn and float32, not {weight.dtype} and "
                         f"{scale_inv.dtype}")  # fmt: skip
    if tuple(scale_inv.shape) != expected:
        found = f"{expected}, not {tuple(scale_inv.shape)}"
        raise ValueError(
            f"weights {tuple(weight.shape)} in blocks of {BLOCK} x {BLOCK} need scale_inv of shape {found}"
        )
    out = torch.empty(n, k, dtype=dtype, device=weight.device)
    if out.numel() == 0:
        return out
    height = 32
    with torch.cuda.device_of(weight):
        _dequantize[(expected[1], triton.cdiv(n, height))](
            weight.contiguous(), scale_inv.contiguous(), out, n, k, HEIGHT=height, BLOCK=BLOCK, num_warps=4
        )
    return out
