"""What linear layers in float8_e4m3fn need besides a library's product: activations to 8 bits, and weights back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_paged.kernels.triton.append import FP8_MAX, unit_stride

SMALLEST_PEAK = 1e-12
"""A row whose largest number is below it is scaled as if it were this: one of zeros must not be divided by 0."""

BLOCK = 128
"""Rows and columns of weights that share a scale."""

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
    x, out, scales, row_stride, columns, SMALLEST: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
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
            num_warps=min(16, max(1, block // 256)),
        )  # fmt: skip
    return out, scales


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
