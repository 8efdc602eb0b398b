"""Linear layers whose weights are 4-bit codes with a scale and a zero point per group (AWQ, GPTQ and their like).

`W[k, n] = (code - zero) * scale`. Eight codes lie in an int32, those of eight consecutive inputs k: nibble i of word r
is input 8 r + i. Nothing is ever unpacked to lie in that order. A product over k is a sum in any order, so nibbles i of
a block of words are multiplied with columns i, i + 8, i + 16, ... of the activations, eight times over.

A nibble becomes a float without a conversion, which would run at half the rate: put into the mantissa of 2^23 it is
2^23 plus itself, and nibbles 0 to 3 of either half word need not even be shifted, only be seen as multiples of 1, 16,
256 and 4096. Every step is exact until the product with the scale.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_paged.kernels.triton.device import can_overlap

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of activations, scales and results; sums are float32 in all of them."""

CROSSOVER = 64
"""The most rows that `w4_linear` multiplies with codes; for more, the weights are dequantised first. A guess: above 64
rows the codes are dequantised again for every further tile of rows, and a library's product then gets the more out of
the tensor cores the more rows there are."""

EXPONENT = 0x4B000000
"""The bits of 2^23 as a float32: its mantissa counts in ones."""

# ---- the kernels -------------------------------------------------------------------------------------------


@triton.jit
def _nibbles(words, exponent, i: tl.constexpr):
    """float32, 2^23 + nibble i of each word * 16^(i % 4). `exponent` is `EXPONENT`: as an argument at run time, it lets
    the two operations on bits become one instruction, which takes no second constant."""
    half = words >> 16 if i >= 4 else words
    return ((half & (15 << 4 * (i % 4))) | exponent).to(tl.float32, bitcast=True)


@triton.jit
def _zero(zeros, exponent, i: tl.constexpr):
    """float32, what to take from `_nibbles` to be left with (code - zero) * 16^(i % 4)."""
    return ((zeros << 4 * (i % 4)) | exponent).to(tl.float32, bitcast=True)


@triton.jit
def _unit(i: tl.constexpr):
    """What turns what is left into code - zero."""
    return 1.0 / 16 ** (i % 4)


@triton.jit
def _inputs(x, word, mask, p: tl.constexpr, dtype: tl.constexpr):
    """Columns 8 word + 2 p and the next of the activations. Those of 16 bits come as pairs, `x` is a pointer to int32:
    half the loads, of the 4 bytes that a copy to shared memory needs at least."""
    if dtype == tl.float32:
        first = tl.load(x + 8 * word + 2 * p, mask=mask, other=0.0)
        return first, tl.load(x + 8 * word + 2 * p + 1, mask=mask, other=0.0)
    else:
        pair = tl.load(x + 4 * word + p, mask=mask, other=0)
        return pair.to(tl.int16).to(dtype, bitcast=True), (pair >> 16).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def _store(acc, out, bias, row, column, m, n, HAS_BIAS: tl.constexpr, PARTIAL: tl.constexpr):
    """Stores a tile `[rows, columns]`, a part of the sum to its place in `[splits, M, N]`."""
    place = row.to(tl.int64)[:, None] * n + column[None, :]
    if PARTIAL:
        place += tl.program_id(1).to(tl.int64) * m * n
    elif HAS_BIAS:
        acc += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=(row < m)[:, None] & (column < n)[None, :])


@triton.jit(do_not_specialize=["split_words", "exponent"])
def _gemv(
    x, codes, scales, zeros, bias, out, m, n, words, split_words, exponent,
    ROWS: tl.constexpr, GROUP_WORDS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
    STAGES: tl.constexpr, HAS_BIAS: tl.constexpr, PARTIAL: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One or two rows, without tensor cores: a sum per thread, and across threads at the end."""
    dtype: tl.constexpr = scales.dtype.element_ty
    stride: tl.constexpr = 8 if dtype == tl.float32 else 4
    if OVERLAPS:
        gdc_launch_dependents()  # the kernel that adds the parts waits where it needs them
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (column < n)[None, :]
    begin = tl.program_id(1) * split_words
    end = tl.minimum(begin + split_words, words)
    first = tl.zeros([BLOCK_W, BLOCK_N], dtype=tl.float32)
    second = tl.zeros([BLOCK_W, BLOCK_N], dtype=tl.float32)
    for start in tl.range(begin, end, BLOCK_W, num_stages=STAGES):
        word = start + tl.arange(0, BLOCK_W)
        real = word < end
        mask = real[:, None] & inside
        code = tl.load(codes + word.to(tl.int64)[:, None] * n + column[None, :], mask=mask, other=0)
        place = (word // GROUP_WORDS)[:, None] * n + column[None, :]
        scale = tl.load(scales + place, mask=mask, other=0.0).to(tl.float32)
        zero = tl.load(zeros + place, mask=mask, other=0).to(tl.float32)
        # The sum of x * (code - zero) over a word is the sum of x * code, less the zero times the sum of x.
        product = tl.zeros([BLOCK_W, BLOCK_N], dtype=tl.float32)
        total = tl.zeros([BLOCK_W], dtype=tl.float32)
        product_2 = tl.zeros([BLOCK_W, BLOCK_N], dtype=tl.float32)
        total_2 = tl.zeros([BLOCK_W], dtype=tl.float32)
        for p in tl.static_range(4):
            even = _nibbles(code, exponent, 2 * p) - 8388608.0
            odd = _nibbles(code, exponent, 2 * p + 1) - 8388608.0
            a, b = _inputs(x, word, real, p, dtype)
            a, b = a.to(tl.float32), b.to(tl.float32)
            total += a + b
            product += even * (a * _unit(2 * p))[:, None]
            product += odd * (b * _unit(2 * p + 1))[:, None]
            if ROWS == 2:
                a, b = _inputs(x + words * stride, word, real, p, dtype)
                a, b = a.to(tl.float32), b.to(tl.float32)
                total_2 += a + b
                product_2 += even * (a * _unit(2 * p))[:, None]
                product_2 += odd * (b * _unit(2 * p + 1))[:, None]
        first += scale * (product - zero * total[:, None])
        if ROWS == 2:
            second += scale * (product_2 - zero * total_2[:, None])
    row = tl.arange(0, 1)
    _store(tl.sum(first, 0)[None, :], out, bias, row, column, m, n, HAS_BIAS, PARTIAL)
    if ROWS == 2:
        _store(tl.sum(second, 0)[None, :], out, bias, row + 1, column, m, n, HAS_BIAS, PARTIAL)


@triton.jit(do_not_specialize=["split_words", "m"])
def _matmul(
    x, codes, scales, zeros, bias, out, m, n, words, split_words,
    EXPONENT: tl.constexpr, GROUP_WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, PARTIAL: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """A tile of rows and columns, over one part of the inputs."""
    dtype: tl.constexpr = scales.dtype.element_ty
    stride: tl.constexpr = 8 if dtype == tl.float32 else 4
    if OVERLAPS:
        gdc_launch_dependents()  # the kernel that adds the parts waits where it needs them
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside, rows = (column < n)[None, :], (row < m)[:, None]
    lines = x + row.to(tl.int64)[:, None] * (words * stride)
    begin = tl.program_id(1) * split_words
    end = tl.minimum(begin + split_words, words)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(begin, end, BLOCK_W):
        word = start + tl.arange(0, BLOCK_W)
        real = word < end
        mask = real[:, None] & inside
        code = tl.load(codes + word.to(tl.int64)[:, None] * n + column[None, :], mask=mask, other=0)
        if GROUP_WORDS % BLOCK_W == 0:  # parts are whole blocks, so a block lies in one group
            place, known = start // GROUP_WORDS * n + column[None, :], inside
        else:
            place, known = (word // GROUP_WORDS)[:, None] * n + column[None, :], mask
        scale = tl.load(scales + place, mask=known, other=0.0).to(tl.float32)
        zero = tl.load(zeros + place, mask=known, other=0).to(tl.int32)
        for p in tl.static_range(4):
            even = (_nibbles(code, EXPONENT, 2 * p) - _zero(zero, EXPONENT, 2 * p)) * (scale * _unit(2 * p))
            odd = (_nibbles(code, EXPONENT, 2 * p + 1) - _zero(zero, EXPONENT, 2 * p + 1)) * (scale * _unit(2 * p + 1))
            a, b = _inputs(lines, word[None, :], rows & real[None, :], p, dtype)
            acc = tl.dot(a, even.to(dtype), acc, input_precision="ieee")
            acc = tl.dot(b, odd.to(dtype), acc, input_precision="ieee")
    _store(acc, out, bias, row, column, m, n, HAS_BIAS, PARTIAL)


@triton.jit(do_not_specialize=["splits"])
def _add_parts(parts, bias, out, count, n, splits, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, OVERLAPS: tl.constexpr):
    """The parts `[splits, M, N]` of every sum, first to last."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias + place % n, mask=mask, other=0.0).to(tl.float32)
    if OVERLAPS:
        gdc_wait()
    for split in range(splits):
        acc += tl.load(parts + split * count + place, mask=mask, other=0.0)
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["exponent"])
def _dequantize(
    codes, scales, zeros, out, n, words, exponent,
    GROUP_WORDS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    word = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    mask = (word < words)[:, None] & (column < n)[None, :]
    code = tl.load(codes + word.to(tl.int64)[:, None] * n + column[None, :], mask=mask, other=0)
    place = (word // GROUP_WORDS)[:, None] * n + column[None, :]
    scale = tl.load(scales + place, mask=mask, other=0.0).to(tl.float32)
    zero = tl.load(zeros + place, mask=mask, other=0).to(tl.int32)
    for i in tl.static_range(8):
        weight = (_nibbles(code, exponent, i) - _zero(zero, exponent, i)) * (scale * _unit(i))
        line = out + (8 * word + i).to(tl.int64)[:, None] * n
        tl.store(line + column[None, :], weight.to(out.dtype.element_ty), mask=mask)


# ---- on the host -------------------------------------------------------------------------------------------

LEAST_WORDS = 32
"""Zeros are loaded as 8 bits, and for an operand that comes from 8 bits Triton takes a layout of 32 inputs at a time.
It compiles for 16 too, and that was never seen to give the right sums."""


class W4Config(NamedTuple):
    """How a product is cut up, and how its kernel is compiled."""

    block_m: int
    """Rows per program; 1 or 2 mean the kernel without tensor cores, which takes just as many rows."""
    block_n: int
    block_words: int
    """Words of eight inputs per turn of the loop; with tensor cores at least `LEAST_WORDS`."""
    splits: int
    """Parts that the inputs are cut into, each of whole turns; more than one cost a second kernel."""
    num_warps: int
    num_stages: int


def w4_config(m: int, n: int, k: int, group: int, dtype: torch.dtype = torch.bfloat16) -> W4Config:
    """For an H100: 132 multiprocessors, 228 KiB of shared memory each. Reasoned from the machine code, not measured.

    What has to be read is half a byte per weight and a twentieth of that again in scales and zeros (groups of 128); at
    3 TB/s a multiprocessor gets 13 bytes a cycle, and has 128 lanes for what are then 26 weights: five instructions for
    each. To keep the memory busy, 16 to 32 KiB must be on their way to each multiprocessor.

    One or two rows take 5.0 and 6.7 instructions per weight, and no sum needs a second kernel if there are columns for
    as many programs as there are multiprocessors. 32 of them are lines of 128 bytes; a turn is 16 KiB, two more are on
    their way. Layers too narrow for that are split.

    More rows: an mma takes 16, and each weight is dequantised once for all rows of its tile: 8.5 instructions per
    weight for 16 rows, 9.7 for 32, 10.5 for 64, so it is these that limit, at about half of the memory's rate. Every
    program reads its activations again, as many bytes as weights with 16 and 32 rows, twice as many with 64; wider
    tiles would read fewer, and leave fewer programs. For instructions to hide each other's latency there should be
    three or four programs of four warps, or one or two of eight, on a multiprocessor: that many are made by splitting,
    whose parts stay in the L2 cache.

    Args:
        group: inputs per scale. Short groups cost the same instructions; not used so far.
        dtype: of the activations. float32 is multiplied without tensor cores, in loops that are unrolled: there tiles
            have 16 rows, and larger ones do not fit.
    """
    if m <= 2:
        config = W4Config(m, block_n=32, block_words=128, splits=1, num_warps=8, num_stages=3)
        wanted = 132
    elif m <= 16 or dtype == torch.float32:
        config = W4Config(16, block_n=64, block_words=32, splits=1, num_warps=4, num_stages=3)
        wanted = 512
    else:
        config = W4Config(32 if m <= 32 else 64, block_n=128, block_words=32, splits=1, num_warps=8, num_stages=3)
        wanted = 264 if m <= 32 else 132
    programs = triton.cdiv(n, config.block_n) * triton.cdiv(m, config.block_m)
    turns = triton.cdiv(k // 8, config.block_words)
    splits = min(max(1, wanted // programs), 16, turns)
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
    """`x @ W + bias` with `W[k, n] = (code - zero) * scale`, for few rows; the same bits every time.

    With one or two rows the weights are exact, with more they are rounded to the dtype of x, to what `w4_dequantize`
    gives; sums are float32. Kernels and grids follow from shapes alone, so that a CUDA graph can hold them.

    Args:
        x: `[M, K]`, of one of `DTYPES`.
        codes: int32 `[K / 8, N]`, contiguous; nibble i of word r is input 8 r + i.
        scales: `[K / group_size, N]` in the dtype of x, contiguous.
        zeros: uint8 `[K / group_size, N]`, contiguous; 0 to 16.
        group_size: inputs per scale: a multiple of 8 that divides K.
        bias: `[N]`, or None.
        config: by default `w4_config`'s.

    Returns:
        `[M, N]` in the dtype of x.
    """
    _check(codes, scales, zeros, group_size)
    (m, k), n, words = x.shape, codes.shape[1], codes.shape[0]
    if k != 8 * words:
        raise ValueError(f"x has {k} columns, the codes {words} rows of 8 inputs each: they must be as many")
    if x.dtype != scales.dtype:
        raise ValueError(f"x is {x.dtype} and the scales are {scales.dtype}: cast one of them")
    out = x.new_empty(m, n)
    if out.numel() == 0:
        return out
    x = x.contiguous()
    if x.data_ptr() % 4:
        x = x.clone()  # pairs of columns are read at a time
    config = config or w4_config(m, n, k, group_size, x.dtype)
    if config.block_m > 2 and config.block_words < LEAST_WORDS:
        raise ValueError(f"block_words must be at least {LEAST_WORDS} with tensor cores, got {config.block_words}")
    split = config.splits > 1
    target = x.new_empty(config.splits, m, n, dtype=torch.float32) if split else out
    pointers = (x if x.dtype == torch.float32 else x.view(-1).view(torch.int32), codes, scales, zeros, bias, target)
    turns = triton.cdiv(triton.cdiv(words, config.block_words), config.splits)
    sizes = (m, n, words, turns * config.block_words, EXPONENT)
    common = {
        "GROUP_WORDS": group_size // 8, "BLOCK_N": config.block_n, "BLOCK_W": config.block_words,
        "HAS_BIAS": bias is not None, "PARTIAL": split, "OVERLAPS": split and can_overlap(x.device),
        "num_warps": config.num_warps,
    }  # fmt: skip
    columns = triton.cdiv(n, config.block_n)
    with torch.cuda.device_of(x):
        if config.block_m <= 2:
            _gemv[(columns, config.splits)](*pointers, *sizes, ROWS=m, STAGES=config.num_stages, **common)
        else:
            _matmul[(columns, config.splits, triton.cdiv(m, config.block_m))](
                *pointers, *sizes, BLOCK_M=config.block_m, num_stages=config.num_stages, **common
            )
        if split:
            overlap = {"OVERLAPS": True, "launch_pdl": True} if common["OVERLAPS"] else {"OVERLAPS": False}
            _add_parts[(triton.cdiv(m * n, 256),)](
                target, bias, out, m * n, n, config.splits, BLOCK=256, HAS_BIAS=bias is not None,
                num_warps=2, **overlap,
            )  # fmt: skip
    return out


def w4_dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """The weights `[K, N]`, computed in float32 and rounded once to `dtype`, one of `DTYPES`; arguments as
    `w4_matmul`'s."""
    _check(codes, scales, zeros, group_size)
    words, n = codes.shape
    out = scales.new_empty(8 * words, n, dtype=dtype)
    if out.numel() == 0:
        return out
    block_n, block_words = 128, 8
    with torch.cuda.device_of(codes):
        _dequantize[(triton.cdiv(n, block_n), triton.cdiv(words, block_words))](
            codes, scales, zeros, out, n, words, EXPONENT,
            GROUP_WORDS=group_size // 8, BLOCK_N=block_n, BLOCK_W=block_words, num_warps=4,
        )  # fmt: skip
    return out


def w4_linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int, bias: Tensor | None = None
) -> Tensor:
    """`[..., N]` out of `[..., K]`: `w4_matmul` of up to `CROSSOVER` rows, a library's product of more."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] <= CROSSOVER:
        out = w4_matmul(rows, codes, scales, zeros, group_size, bias)
    else:
        weight = w4_dequantize(codes, scales, zeros, group_size, x.dtype)
        out = rows @ weight if bias is None else torch.addmm(bias, rows, weight)
    return out.view(*x.shape[:-1], out.shape[-1])


def _check(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> None:
    """Raises a ValueError over tensors that do not describe one matrix."""
    if codes.dtype != torch.int32 or zeros.dtype != torch.uint8 or scales.dtype not in DTYPES:
        found = f"{codes.dtype}, {scales.dtype} and {zeros.dtype}"
        raise ValueError(f"codes, scales and zeros must be int32, floating point and uint8, not {found}")
    words, n = codes.shape
    if group_size < 8 or group_size % 8 or 8 * words % group_size:
        raise ValueError(f"groups of {group_size} inputs: must be a multiple of 8 that divides the {8 * words} inputs")
    expected = (8 * words // group_size, n)
    for name, tensor in (("scales", scales), ("zeros", zeros)):
        if tensor.shape != expected:
            needed = f"the codes {tuple(codes.shape)} in groups of {group_size} need {expected}"
            raise ValueError(f"{name} have shape {tuple(tensor.shape)}, and {needed}")
    if not (codes.is_contiguous() and scales.is_contiguous() and zeros.is_contiguous()):
        raise ValueError("codes, scales and zeros must be contiguous")
