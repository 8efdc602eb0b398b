"""The second half of a matrix product whose inputs were cut into parts: their sums, added in one order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from hf_paged.kernels.triton.device import can_overlap


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


def add_parts(parts: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Writes the sum of `parts`, and the bias, to `out`; always in the same order.

    Where `can_overlap` says so, the kernel that writes the parts must call `gdc_launch_dependents`.

    Args:
        parts: float32 `[splits, M, N]`, contiguous.
        bias: `[N]` or None.
        out: `[M, N]`, contiguous.
    """
    overlaps = can_overlap(out.device)
    launch = {"launch_pdl": True} if overlaps else {}
    with torch.cuda.device_of(out):
        _add_parts[(triton.cdiv(out.numel(), 256),)](
            parts, bias, out, out.numel(), out.shape[1], parts.shape[0], BLOCK=256, HAS_BIAS=bias is not None,
            OVERLAPS=overlaps, num_warps=2, **launch,
        )  # fmt: skip
