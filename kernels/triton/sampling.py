"""Draws one token per row of logits, without sorting and without noise in memory.

The draw is the Gumbel-max trick as an exponential race: with E_i independent and exponential, argmax(x_i / T - log E_i)
is token i with probability softmax(x / T)_i (Yellott 1977; Maddison, Tarlow & Minka, "A* sampling", 2014). Tokens that
are left out need no renormalisation, and a row can be cut anywhere. E_i comes from Philox (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC 2011), keyed by the row's 64-bit key and counted by the token's index.

Three launches:

- `_find_thresholds`, one program per row: top-k, top-p and min-p keep the tokens from some logit up, so each row with a
  filter gets the one number that it filters by; other rows leave at once.
- `_race`, a grid of (block of tokens, row): the best token of each block, and its part of the row's log-sum-exp.
- `_finish`, one program per row: the best of the blocks, its log-probability, and its rank where it is wanted.

Grids depend on the shape of the logits alone and everything else is in device tensors: the three can be captured in a
CUDA graph. A row's token depends on its logits, parameters and key only: which blocks it is cut into plays no part, and
logits in bfloat16 or float16 give what the same values in float32 give.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from hf_paged.sampling.fused import SamplingRows

LOG2E = tl.constexpr(math.log2(math.e))
"""Exponentials and logarithms are to the base 2, as the hardware's are."""

LN2 = tl.constexpr(math.log(2))

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
"""The lowest threshold: logits of -inf never pass."""

ROUNDS = tl.constexpr(7)
"""Of Philox4x32: the fewest that pass BigCrush (Salmon et al.). They are a third of `_race`'s instructions."""

ONE = tl.constexpr(2.0**40)
"""Probability masses are summed as integers, in units of 1 / ONE of the likeliest token's: in whatever order, the sum
is the same. 2**23 tokens of the largest mass fit."""

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Triton runs kernels as Python, which knows no libdevice."""

SEARCH_BLOCK = 4096
"""Lanes of `_find_thresholds`: each sees every 4096th token of the row. By rounding, a draw depends on it."""

SEARCH_WARPS = 16
MANY_PROGRAMS = 512
"""`_race` cuts rows into smaller blocks until there are this many: about four per multiprocessor of a large GPU."""

KEY_SHIFTS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
"""How many low bits of a float32 are always 0 in logits of each dtype; a search need not look at them."""


# ---- filters ---------------------------------------------------------------------------------------------------


@triton.jit
def _key_of(value, SHIFT: tl.constexpr):
    """int64 scalar, the place of a float32 in their order, without the low SHIFT bits."""
    bits = value.to(tl.uint32, bitcast=True).to(tl.int64)
    return tl.where(bits >= 0x80000000, 0xFFFFFFFF - bits, bits + 0x80000000) >> SHIFT


@triton.jit
def _value_of(key, SHIFT: tl.constexpr):
    """The float32 at a place: of those that share it, the one whose low bits are 0."""
    low = (1 << SHIFT) - 1
    full = key << SHIFT
    bits = tl.where(full >= 0x80000000, full - 0x80000000, 0xFFFFFFFF - (full + low))
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def _load_logits(row, start, vocab, BLOCK: tl.constexpr):
    offsets = start + tl.arange(0, BLOCK)
    return tl.load(row + offsets, mask=offsets < vocab, other=-float("inf")).to(tl.float32)


@triton.jit
def _load_allowed(row, mask_row, start, vocab, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Logits, -inf for tokens whose bits are 0."""
    x = _load_logits(row, start, vocab, BLOCK)
    if MASKED:
        offsets = start + tl.arange(0, BLOCK)
        words = tl.load(mask_row + offsets // 32, mask=offsets < vocab, other=0)
        x = tl.where(((words >> (offsets % 32)) & 1) != 0, x, -float("inf"))
    return x


@triton.jit
def _total_of(mass):
    """Exact sum of float32 masses, in units of 1 / ONE."""
    return tl.sum((mass * ONE).to(tl.int64))


@triton.jit
def _search_lanes(first, second, first_weight, second_weight, low, high, target, SHIFT: tl.constexpr):
    """The greatest key in [low, high) from which up the lanes weigh `target`; `low` if there is none."""
    while high - low > 1:
        middle = (low + high) // 2
        value = _value_of(middle, SHIFT)
        weight = tl.where(first >= value, first_weight, 0) + tl.where(second >= value, second_weight, 0)
        reached = tl.sum(weight) >= target
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    return low


@triton.jit
def _search_row(
    row, mask_row, vocab, peak, scale, low, high, target,
    MASKED: tl.constexpr, MASS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `_search_lanes` over the whole row, of which each reading quarters the range. Weights are the masses
    exp2((x - peak) * scale), or 1."""
    while high - low > 1:
        width = high - low
        one, two, three = low + tl.maximum(width // 4, 1), low + width // 2, low + tl.maximum(width * 3 // 4, 1)
        from_one, from_two, from_three = _value_of(one, SHIFT), _value_of(two, SHIFT), _value_of(three, SHIFT)
        if MASS:
            dtype: tl.constexpr = tl.float32
        else:
            dtype: tl.constexpr = tl.int32
        of_one = tl.zeros([BLOCK], dtype)
        of_two = tl.zeros([BLOCK], dtype)
        of_three = tl.zeros([BLOCK], dtype)
        for start in tl.range(0, vocab, BLOCK, loop_unroll_factor=2):
            x = _load_allowed(row, mask_row, start, vocab, MASKED, BLOCK)
            if MASS:
                weight = tl.exp2((x - peak) * scale)
            else:
                weight = tl.full([BLOCK], 1, tl.int32)
            of_one += tl.where(x >= from_one, weight, 0)
            of_two += tl.where(x >= from_two, weight, 0)
            of_three += tl.where(x >= from_three, weight, 0)
        if MASS:
            one_reached = _total_of(of_one) >= target
            two_reached = _total_of(of_two) >= target
            three_reached = _total_of(of_three) >= target
        else:
            one_reached = tl.sum(of_one) >= target
            two_reached = tl.sum(of_two) >= target
            three_reached = tl.sum(of_three) >= target
        low = tl.where(three_reached, three, tl.where(two_reached, two, tl.where(one_reached, one, low)))
        high = tl.where(three_reached, high, tl.where(two_reached, three, tl.where(one_reached, two, one)))
    return low


@triton.jit
def _find_thresholds(
    logits, row_stride, mask, mask_stride, vocab, temperature, top_k, top_p, min_p, thresholds,
    MASKED: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The least logit that each row may draw.

    A threshold is the greatest float from which up the row holds enough: k tokens, or p of the mass. It is found by
    bisection over float32's order. The lanes keep the two largest logits of every BLOCK-th token in registers, so that
    a search mostly needs no memory: what is at least `dropped`, the largest that found no place there, is all in the
    lanes. Only a threshold below that needs the row read again, and the lanes still bound it from below.
    """
    program = tl.program_id(0)
    heat = tl.load(temperature + program)
    k = tl.load(top_k + program)
    p = tl.load(top_p + program)
    relative = tl.load(min_p + program)
    limited = (k > 0) & (k < vocab)
    threshold = tl.full([], LOWEST, tl.float32)
    if (heat > 0) & (limited | (p < 1) | (relative > 0)):
        row = logits + program.to(tl.int64) * row_stride
        mask_row = mask + program.to(tl.int64) * mask_stride
        first = tl.full([BLOCK], -float("inf"), tl.float32)
        second = first
        third = first
        for start in tl.range(0, vocab, BLOCK, loop_unroll_factor=4):
            x = _load_allowed(row, mask_row, start, vocab, MASKED, BLOCK)
            beaten = tl.minimum(first, x)
            first = tl.maximum(first, x)
            third = tl.maximum(third, tl.minimum(second, beaten))
            second = tl.maximum(second, beaten)
        peak = tl.max(first)
        dropped = tl.max(third)
        scale = LOG2E / heat
        low = _key_of(threshold, SHIFT)
        dropped_key = _key_of(dropped, SHIFT)
        beyond = _key_of(peak, SHIFT) + 1
        if limited:
            ones = tl.full([BLOCK], 1, tl.int32)
            low = _search_lanes(first, second, ones, ones, low, beyond, k, SHIFT)
            if low < dropped_key:
                low = _search_row(
                    row, mask_row, vocab, peak, scale, low, dropped_key + 1, k, MASKED, False, SHIFT, BLOCK
                )  # fmt: skip
            threshold = _value_of(low, SHIFT)
        if p < 1:
            first_mass = tl.where(first >= threshold, tl.exp2((first - peak) * scale), 0.0)
            second_mass = tl.where(second >= threshold, tl.exp2((second - peak) * scale), 0.0)
            first_weight = (first_mass * ONE).to(tl.int64)
            second_weight = (second_mass * ONE).to(tl.int64)
            if threshold > dropped:
                whole = tl.sum(first_weight + second_weight)
            else:
                mass = tl.zeros([BLOCK], tl.float32)
                for start in tl.range(0, vocab, BLOCK, loop_unroll_factor=4):
                    x = _load_allowed(row, mask_row, start, vocab, MASKED, BLOCK)
                    mass += tl.where(x >= threshold, tl.exp2((x - peak) * scale), 0.0)
                whole = _total_of(mass)
            target = (p.to(tl.float64) * whole.to(tl.float64)).to(tl.int64)
            # All tokens lighter than (1 - p) / vocab of the likeliest weigh less than 1 - p together. Half of it leaves
            # room for rounding.
            least = peak - heat * tl.log(2.0 * vocab / (1 - p))
            low = tl.maximum(low, _key_of(least, SHIFT))
            low = _search_lanes(first, second, first_weight, second_weight, low, beyond, target, SHIFT)
            if low < dropped_key:
                low = _search_row(
                    row, mask_row, vocab, peak, scale, low, dropped_key + 1, target, MASKED, True, SHIFT, BLOCK
                )  # fmt: skip
            threshold = _value_of(low, SHIFT)
        if relative > 0:
            threshold = tl.maximum(threshold, tl.fma(heat, tl.log(relative), peak))
    tl.store(thresholds + program, threshold)


# ---- the draw --------------------------------------------------------------------------------------------------


@triton.jit
def _log2(x):
    """One instruction, to 2**-22; Triton's own is exact to the last bits and takes twenty-four."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return libdevice.fast_log2f(x)


@triton.jit
def _exp(x):
    """Three instructions instead of six: what is less than 2**-126 is 0."""
    if INTERPRETED:
        return tl.exp(x)
    else:
        return libdevice.fast_expf(x)


@triton.jit
def _exponential(bits):
    """Of the exponential distribution times log2(e), from 32 random bits: -log2(1 - v), v in the middle of one of 2**32
    cells of (0, 1).

    The winner's is small more often than not, and 1 - v would round there: below 1/32 it is the logarithm's series.
    """
    v = bits.to(tl.float32) * 2.0**-32 + 2.0**-33
    series = v * (LOG2E + v * (LOG2E / 2 + v * (LOG2E / 3 + v * (LOG2E / 4))))
    # v can round to 1, and the only token that a row may draw must not be infinitely late.
    return tl.where(v < 1 / 32, series, -_log2(tl.maximum(1 - v, 2.0**-33)))


@triton.jit
def _race(
    logits, row_stride, mask, mask_stride, vocab, temperature, keys, logprob_scale, thresholds,
    best_scores, best_tokens, peaks, sums, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one block of one row: the winner and its score, the maximum, and the sum of exponentials relative to it, of
    scaled logits. The mask is for the winner alone."""
    block = tl.program_id(0)
    program = tl.program_id(1)
    x = _load_logits(logits + program.to(tl.int64) * row_stride, block * BLOCK, vocab, BLOCK)
    peak = tl.max(x)
    relative = (x - tl.where(peak == -float("inf"), 0.0, peak)) * tl.load(logprob_scale + program)
    total = tl.sum(_exp(relative))  # NaN if x has one, or +inf
    heat = tl.load(temperature + program)
    score = x
    if heat > 0:
        # One call of Philox serves four tokens in a row.
        calls = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        one, two, three, four = tl.randint4x(tl.load(keys + program), calls, ROUNDS)
        bits = tl.reshape(tl.join(tl.join(one, three), tl.join(two, four)), [BLOCK])
        score = tl.fma(x, LOG2E / heat, -_log2(_exponential(bits)))
        # A tiny temperature can make it -inf, which is for tokens that are not drawn.
        score = tl.maximum(score, LOWEST)
    score = tl.where(x >= tl.load(thresholds + program), score, -float("inf"))
    if MASKED:
        mask_row = mask + program.to(tl.int64) * mask_stride
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        words = tl.load(mask_row + offsets // 32, mask=offsets < vocab, other=0)
        score = tl.where(((words >> (offsets % 32)) & 1) != 0, score, -float("inf"))
    best, place = tl.max(score, 0, return_indices=True)  # the lowest index among equals
    out = program * tl.num_programs(0) + block
    tl.store(best_scores + out, best)
    tl.store(best_tokens + out, block * BLOCK + place)
    tl.store(peaks + out, peak)
    tl.store(sums + out, total)


@triton.jit
def _finish(
    logits, row_stride, vocab, wants_rank, logprob_scale, best_scores, best_tokens, peaks, sums, num_blocks,
    tokens, logprobs, ranks, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    blocks = tl.arange(0, BLOCKS)
    there = blocks < num_blocks
    parts = program * num_blocks + blocks
    maxima = tl.load(peaks + parts, mask=there, other=-float("inf"))
    peak = tl.max(maxima)
    scale = tl.load(logprob_scale + program)
    factors = tl.exp2((maxima - tl.where(peak == -float("inf"), 0.0, peak)) * scale * LOG2E)
    total = tl.sum(tl.load(sums + parts, mask=there, other=0.0) * factors)
    finite = (peak > -float("inf")) & (peak < float("inf")) & (total == total)

    scores = tl.load(best_scores + parts, mask=there, other=-float("inf"))
    best, block = tl.max(scores, 0, return_indices=True)
    drawn = finite & (best > -float("inf"))  # else all that the mask allows is -inf
    token = tl.load(best_tokens + program * num_blocks + block)
    row = logits + program.to(tl.int64) * row_stride
    logit = tl.load(row + token, mask=finite, other=0.0).to(tl.float32)
    tl.store(tokens + program, tl.where(drawn, token, tl.where(finite, -2, -1)).to(tl.int64))
    tl.store(logprobs + program, tl.where(drawn, (logit - peak) * scale - tl.log2(total) * LN2, float("nan")))

    rank = tl.full([], 0, tl.int32)
    if drawn & (tl.load(wants_rank + program) != 0):
        larger = tl.zeros([BLOCK], tl.int32)
        for start in tl.range(0, vocab, BLOCK, loop_unroll_factor=4):
            larger += (_load_logits(row, start, vocab, BLOCK) > logit).to(tl.int32)
        rank = tl.sum(larger) + 1
    tl.store(ranks + program, rank)


def race_block(rows: int, vocab: int) -> int:
    """How many tokens a program of `_race` handles: few where there are few rows, so that all of the GPU works."""
    block = 4096
    while block > 1024 and rows * triton.cdiv(vocab, block) < MANY_PROGRAMS:
        block //= 2
    return block


def find_thresholds(
    logits: Tensor, rows: SamplingRows, *, mask: Tensor | None = None, block: int = SEARCH_BLOCK
) -> Tensor:
    """float32 `[B]`: the least logit that each row may draw; see `sample_tokens`."""
    thresholds = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _find_thresholds[(len(logits),)](
        logits, logits.stride(0), *_pointer(mask, logits), logits.shape[1],
        rows.temperature, rows.top_k, rows.top_p, rows.min_p, thresholds,
        MASKED=mask is not None, SHIFT=KEY_SHIFTS[logits.dtype], BLOCK=block, num_warps=SEARCH_WARPS,
    )  # fmt: skip
    return thresholds


def _pointer(mask: Tensor | None, logits: Tensor) -> tuple[Tensor, int]:
    """What kernels take for a mask, and its stride: without one, anything that they do not look at."""
    return (logits, 0) if mask is None else (mask, mask.stride(0))


def sample_tokens(
    logits: Tensor,
    rows: SamplingRows,
    *,
    tokens: Tensor,
    logprobs: Tensor,
    ranks: Tensor,
    mask: Tensor | None = None,
    block: int | None = None,
) -> None:
    """Draws a token per row after temperature, top-k (ties with the k-th stay), top-p of what that left (ties with the
    last stay) and min-p, or takes the lowest index among the maxima.

    Args:
        logits: `[B, V]`, bfloat16, float16 or float32; rows may be farther apart than V.
        rows: the parameters, on the same device.
        tokens: int64 `[B]`, written; -1 where a row has a NaN, +inf, or nothing finite, -2 where all that is allowed
            is -inf.
        logprobs: float32 `[B]`, written: the token's under the softmax of the logits times `rows.logprob_scale`,
            without filters; NaN beside a negative token.
        ranks: int32 `[B]`, written: 1 + how many logits are larger, in rows that want it, else 0.
        mask: int32 `[B, ceil(V / 32)]`, a bit per token, the lowest first: only tokens whose bit is 1 are drawn, at
            least one per row. Log-probabilities and ranks are as without it.
        block: tokens per program of the draw; the result does not depend on it.
    """
    count, vocab = logits.shape
    if count == 0:
        return
    if logits.stride(1) != 1:
        raise ValueError(f"the logits of a row must lie side by side, got strides {logits.stride()}")
    if mask is not None and (mask.dtype != torch.int32 or mask.shape != (count, triton.cdiv(vocab, 32))):
        raise ValueError(
            f"a mask of {count} rows of {vocab} logits is int32 [{count}, {triton.cdiv(vocab, 32)}], got "
            f"{mask.dtype} {list(mask.shape)}"
        )
    block = block or race_block(count, vocab)
    num_blocks = triton.cdiv(vocab, block)
    with torch.cuda.device_of(logits):
        thresholds = find_thresholds(logits, rows, mask=mask)
        best_scores, peaks, sums = torch.empty(3, count, num_blocks, dtype=torch.float32, device=logits.device)
        best_tokens = torch.empty(count, num_blocks, dtype=torch.int32, device=logits.device)
        _race[(num_blocks, count)](
            logits, logits.stride(0), *_pointer(mask, logits), vocab, rows.temperature, rows.keys, rows.logprob_scale,
            thresholds, best_scores, best_tokens, peaks, sums,
            MASKED=mask is not None, BLOCK=block, num_warps=max(4, block // 512),
        )  # fmt: skip
        _finish[(count,)](
            logits, logits.stride(0), vocab, rows.wants_logprob, rows.logprob_scale, best_scores, best_tokens, peaks,
            sums, num_blocks, tokens, logprobs, ranks,
            BLOCKS=triton.next_power_of_2(num_blocks), BLOCK=4096, num_warps=8,
        )  # fmt: skip
