"""Linear layers whose weights are 4-bit codes with a scale and a zero point per group (AWQ, GPTQ and their like).

`W[n, k] = (code - zero) * scale`. Inputs come in turns of 128, the last one filled up: the codes of turn t of output n
are 32 numbers of 16 bits, and nibble j of number h is input 128 t + 32 j + h. So the nibbles j of a turn are 32 inputs
in order, and two numbers side by side, which a register of 32 bits holds, give the two weights side by side that an
operand of the tensor cores wants. One operation for two weights puts them into the mantissas of 128 (of 1024 in
float16), two take 128 + zero away and multiply with the scale, rounding once.

The weights are the first operand, which may come out of registers: `W x^T`, whose other operand, the few activations,
is what goes through shared memory. A weight then costs about three instructions. (As the second operand each would have
to be written to shared memory and read again, which took three times as long.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from hf_paged.kernels.triton.device import can_overlap
from hf_paged.kernels.triton.split_k import add_parts

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of activations, scales and results; sums are float32 in all of them."""

TURN = 128
"""Inputs per turn."""
PLANE = 32
"""Inputs of a turn that have the same place in their numbers: a plane of nibbles."""

MOST_ROWS = 256
"""The most rows that `w4_linear` multiplies with codes; for more, the weights are dequantised first."""

LEAST_TURNS = 4
"""A part of a product has at least so many, where there are as many."""

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def _planes(base: str, kind: str, scale: str) -> tl.constexpr:
    """Machine code for each plane of two numbers: `$0 = (code - (zero - base)) * scale`, where base + code is code in
    the mantissa of base."""
    shifts = ("mov.b32 w, $1", "shr.b32 w, $1, 4", "shr.b32 w, $1, 8", "shr.b32 w, $1, 12")
    rest = f"lop3.b32 w, w, 0x000f000f, {base}, 0xEA; sub.rn.{kind} w, w, $2; mul.rn.{kind} $0, w, {scale};"
    return tl.constexpr(tuple(f"{{ .reg .b32 w; {shift}; {rest} }}" for shift in shifts))


BF16, BF16_RAW = (_planes("0x43004300", "bf16x2", scale) for scale in ("$3", "$4"))
FP16, FP16_RAW = (_planes("0x64006400", "f16x2", scale) for scale in ("$3", "$4"))

# ---- the kernels -------------------------------------------------------------------------------------------


@triton.jit
def _scales(scales, zeros, group, scale_stride, zero_stride, column, RAW: tl.constexpr):
    """Of a group of inputs, or of several, and of columns. RAW: as they lie in memory, in registers of 32 bits of their
    own, so that nothing is computed with them yet and nobody waits for them here."""
    dtype: tl.constexpr = scales.dtype.element_ty
    scale = tl.load(scales + group * scale_stride + column)
    zero = tl.load(zeros + group * zero_stride + column)
    if RAW:
        return scale.to(tl.uint16, bitcast=True).to(tl.uint32), zero.to(tl.uint32)
    elif INTERPRETED or dtype == tl.float32:
        return scale, zero.to(dtype)
    else:
        base: tl.constexpr = 0x4300 if dtype == tl.bfloat16 else 0x6400
        return scale, (zero.to(tl.uint16) | base).to(dtype, bitcast=True)


@triton.jit
def _weights(codes, scale, zero, j: tl.constexpr, dtype: tl.constexpr, RAW: tl.constexpr):
    """Plane j of `codes` `[columns, PLANE]` as weights; `scale` and `zero`, from `_scales`, broadcast to that."""
    if INTERPRETED or dtype == tl.float32:
        return ((codes >> 4 * j & 15).to(dtype) - zero) * scale
    elif RAW:
        # Two of each side by side; the zero in the mantissa of the base.
        base: tl.constexpr = 0x4300 if dtype == tl.bfloat16 else 0x6400
        scale, _ = tl.broadcast(scale * 0x10001, codes)
        zero, _ = tl.broadcast((zero | base) * 0x10001, codes)
        raw: tl.constexpr = BF16_RAW if dtype == tl.bfloat16 else FP16_RAW
        if dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(raw[j], "=r,r,r,r,r,r", [codes, zero, scale], tl.bfloat16, True, 2)
        else:
            return tl.inline_asm_elementwise(raw[j], "=r,r,r,r,r,r", [codes, zero, scale], tl.float16, True, 2)
    else:
        scale, _ = tl.broadcast(scale, codes)
        zero, _ = tl.broadcast(zero, codes)
        if dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(BF16[j], "=r,r,r,r", [codes, zero, scale], tl.bfloat16, True, 2)
        else:
            return tl.inline_asm_elementwise(FP16[j], "=r,r,r,r", [codes, zero, scale], tl.float16, True, 2)


@triton.jit(do_not_specialize=["split_turns", "m"])
def _matmul(
    x, codes, scales, zeros, bias, out, m, n, k,
    code_stride, scale_stride, zero_stride, turns, split_turns,
    GROUP: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr, PARTIAL: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """A tile of rows and columns, over one part of the turns."""
    dtype: tl.constexpr = scales.dtype.element_ty
    # Wide tiles wait for nothing else, and take 32 bits for that; narrow ones are faster with 16.
    RAW: tl.constexpr = BLOCK_M >= 64 and dtype != tl.float32 and not INTERPRETED
    if OVERLAPS:
        gdc_launch_dependents()  # the kernel that adds the parts waits where it needs them
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    # What juts out computes the last row or column again: masks would cost instructions in every turn.
    near = tl.minimum(column, n - 1)
    index = tl.arange(0, 32)
    line = x + tl.minimum(row, m - 1).to(tl.int64)[None, :] * k + index[:, None]
    begin = tl.program_id(1) * split_turns
    code = codes + near[:, None] * 32 + index[None, :]
    end = tl.minimum(begin + split_turns, turns)
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    # One group per turn is the rule. Its scales are loaded a turn ahead, since nobody else would.
    scale, zero = _scales(scales, zeros, begin * 128 // GROUP, scale_stride, zero_stride, near, RAW)
    for turn in tl.range(begin, end, num_stages=STAGES):
        words = tl.load(code + turn * code_stride)  # fewer than 2^31 numbers
        if GROUP % 128 == 0:
            next_scale, next_zero = _scales(
                scales, zeros, tl.minimum(turn + 1, turns - 1) * 128 // GROUP, scale_stride, zero_stride, near, RAW
            )
        for j in tl.static_range(4):
            first = turn * 128 + 32 * j
            if EVEN:
                a = tl.load(line + first)
            else:
                a = tl.load(line + first, mask=(first + index < k)[:, None], other=0.0)
            if GROUP % 128 == 0:
                weights = _weights(words, scale[:, None], zero[:, None], j, dtype, RAW)
            elif GROUP % 32 == 0:
                one_scale, one_zero = _scales(
                    scales, zeros, tl.minimum(first, k - 1) // GROUP, scale_stride, zero_stride, near, RAW
                )
                weights = _weights(words, one_scale[:, None], one_zero[:, None], j, dtype, RAW)
            else:
                group = tl.minimum(first + index, k - 1) // GROUP
                each_scale, each_zero = _scales(
                    scales, zeros, group[None, :], scale_stride, zero_stride, near[:, None], RAW
                )
                weights = _weights(words, each_scale, each_zero, j, dtype, RAW)
            acc = tl.dot(weights, a, acc, input_precision="ieee")
        if GROUP % 128 == 0:
            scale, zero = next_scale, next_zero
    place = row.to(tl.int64)[None, :] * n + column[:, None]
    if PARTIAL:  # to its place in [splits, M, N]
        place += tl.program_id(1).to(tl.int64) * m * n
    elif HAS_BIAS:
        acc += tl.load(bias + near).to(tl.float32)[:, None]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=(column < n)[:, None] & (row < m)[None, :])


@triton.jit
def _dequantize(
    codes, scales, zeros, out, n, k, code_stride, scale_stride, zero_stride, GROUP: tl.constexpr, BLOCK_N: tl.constexpr
):
    dtype: tl.constexpr = scales.dtype.element_ty
    RAW: tl.constexpr = False
    turn, index = tl.program_id(0), tl.arange(0, 32)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    near = tl.minimum(column, n - 1)[:, None]
    words = tl.load(codes + turn * code_stride + near * 32 + index[None, :])
    line = out + column.to(tl.int64)[:, None] * k
    for j in tl.static_range(4):
        inputs = turn * 128 + 32 * j + index
        group = tl.minimum(inputs, k - 1) // GROUP
        if GROUP % 32 == 0:
            group = tl.min(group, 0)
            scale, zero = _scales(scales, zeros, group, scale_stride, zero_stride, near, RAW)
        else:
            scale, zero = _scales(scales, zeros, group[None, :], scale_stride, zero_stride, near, RAW)
        weights = _weights(words, scale, zero, j, dtype, RAW)
        tl.store(line + inputs[None, :], weights, mask=(column < n)[:, None] & (inputs < k)[None, :])


# ---- on the host -------------------------------------------------------------------------------------------


class W4Config(NamedTuple):
    """How a product is cut up, and how its kernel is compiled."""

    block_m: int
    """Rows per program: 8, 16, 32, ..."""
    block_n: int
    """Columns per program: 16, 32, ..."""
    splits: int
    """Parts that the turns are cut into; more than one cost a second kernel."""
    num_warps: int
    num_stages: int


def w4_config(m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> W4Config:
    """The best of some forty ways measured on an H100 (132 multiprocessors), or near it: for layers of 4096 x 4096 to
    28672 x 4096 and 1 to 256 rows.

    Few rows are as fast as the codes come in, and want many small programs; more rows want wide tiles, so that
    activations are read less often, and two programs, or one of 128 rows, for each multiprocessor.

    Args:
        dtype: of the activations. float32 is multiplied without tensor cores, in loops that are unrolled: there tiles
            are small.
    """
    block_m = max(8, triton.next_power_of_2(m))
    if dtype == torch.float32:
        config, wanted = W4Config(16, block_n=32, splits=1, num_warps=4, num_stages=2), 264
    elif block_m <= 16:
        config, wanted = W4Config(block_m, block_n=128, splits=1, num_warps=4, num_stages=3), 448
    elif block_m <= 64:
        config, wanted = W4Config(block_m, block_n=256, splits=1, num_warps=8, num_stages=3), 264
    else:
        config, wanted = W4Config(128, block_n=256, splits=1, num_warps=8, num_stages=3), 132
    programs = triton.cdiv(n, config.block_n) * triton.cdiv(m, config.block_m)
    turns = triton.cdiv(k, TURN)
    splits = min(max(1, round(wanted / programs)), 16, max(1, turns // LEAST_TURNS))
    return config._replace(splits=triton.cdiv(turns, triton.cdiv(turns, splits)))


def w4_matmul(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_size: int,
    bias: Tensor | None = None,
    *,
    config: W4Config | None = None,
) -> Tensor:
    """`x @ W^T + bias` with `W[n, k] = (code - zero) * scale`, for few rows; the same bits every time.

    The weights are rounded to the dtype of x, to what `w4_dequantize` gives; sums are float32. Kernels and grids follow
    from shapes alone, so that a CUDA graph can hold them.

    Args:
        x: `[M, K]`, of one of `DTYPES`.
        codes: int16 `[ceil(K / 128), N, 32]`: nibble j of number h of turn t is input 128 t + 32 j + h.
        scales: `[K / group_size, N]` in the dtype of x.
        zeros: uint8 `[K / group_size, N]`; 0 to 16. All three may be some of the columns of a larger layer.
        group_size: inputs per scale. Multiples of 128 are fastest, then those of 32.
        bias: `[N]`, or None.
        config: by default `w4_config`'s.

    Returns:
        `[M, N]` in the dtype of x.
    """
    n, k = _check(codes, scales, zeros, group_size)
    m = x.shape[0]
    if x.shape[1] != k:
        raise ValueError(f"x has {x.shape[1]} columns, and the weights have {k} inputs: they must be as many")
    if x.dtype != scales.dtype:
        raise ValueError(f"x is {x.dtype} and the scales are {scales.dtype}: cast one of them")
    out = x.new_empty(m, n)
    if out.numel() == 0:
        return out
    config = config or w4_config(m, n, k, x.dtype)
    turns = codes.shape[0]
    split = config.splits > 1
    target = x.new_empty(config.splits, m, n, dtype=torch.float32) if split else out
    overlaps = split and can_overlap(x.device)
    with torch.cuda.device_of(x):
        _matmul[(triton.cdiv(n, config.block_n), config.splits, triton.cdiv(m, config.block_m))](
            x.contiguous(), codes, scales, zeros, bias, target, m, n, k,
            codes.stride(0), scales.stride(0), zeros.stride(0), turns, triton.cdiv(turns, config.splits),
            GROUP=group_size, EVEN=k % TURN == 0, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            STAGES=config.num_stages, HAS_BIAS=bias is not None, PARTIAL=split, OVERLAPS=overlaps,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    if split:
        add_parts(target, bias, out)
    return out


def w4_dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> Tensor:
    """The weights `[N, K]` in the dtype of `scales`, rounded to it once; arguments as `w4_matmul`'s."""
    n, k = _check(codes, scales, zeros, group_size)
    out = scales.new_empty(n, k)
    if out.numel() == 0:
        return out
    block_n = 64
    with torch.cuda.device_of(codes):
        _dequantize[(codes.shape[0], triton.cdiv(n, block_n))](
            codes,
            scales,
            zeros,
            out,
            n,
            k,
            codes.stride(0),
            scales.stride(0),
            zeros.stride(0),
            GROUP=group_size,
            BLOCK_N=block_n,
            num_warps=4,
        )
    return out


def w4_linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int, bias: Tensor | None = None
) -> Tensor:
    """`[..., N]` out of `[..., K]`: `w4_matmul` of up to `MOST_ROWS` rows, a library's product of more."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] <= MOST_ROWS:
        out = w4_matmul(rows, codes, scales, zeros, group_size, bias)
    else:
        out = torch.nn.functional.linear(rows, w4_dequantize(codes, scales, zeros, group_size), bias)
    return out.view(*x.shape[:-1], out.shape[-1])


def _check(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> tuple[int, int]:
    """Outputs and inputs. Raises a ValueError over tensors that do not describe one matrix."""
    if codes.dtype != torch.int16 or zeros.dtype != torch.uint8 or scales.dtype not in DTYPES:
        found = f"{codes.dtype}, {scales.dtype} and {zeros.dtype}"
        raise ValueError(f"codes, scales and zeros must be int16, floating point and uint8, not {found}")
    groups, n = scales.shape
    k = groups * group_size
    if group_size < 1 or tuple(codes.shape) != (triton.cdiv(k, TURN), n, PLANE):
        expected = (triton.cdiv(k, TURN), n, PLANE)
        needed = f"scales {tuple(scales.shape)} of groups of {group_size} inputs need {expected}"
        raise ValueError(f"codes have shape {tuple(codes.shape)}, and {needed}")
    if zeros.shape != scales.shape:
        raise ValueError(f"zeros have shape {tuple(zeros.shape)}, and the scales {tuple(scales.shape)}: must be alike")
    if codes.numel() >= 2**31:
        raise ValueError(f"a weight of {n} x {k} is too large: its codes are to be fewer than 2^31 numbers of 16 bits")
    if n and k and not all(tensor[0].is_contiguous() for tensor in (codes, scales, zeros)):
        raise ValueError("codes, scales and zeros must be contiguous but for their first dimension")
    return n, k
