"""The operator that adds adapters' parts to a linear layer's output, each row its own adapter's.

Rows are grouped by slot: `order` int32 `[>= T]` lists the rows of a step so that those of slot 0 come first, then those
of slot 1, and so on, and those of the plain model last; `starts` int32 `[slots + 1]` says where each group begins. Both
stay where they are from step to step, and are as long as the largest step, so that a graph may read them.

What adapters are added to may be the outputs of several layers with one input, side by side. Then their A lie one below
the other, and so do their B, and each column of the output has to do with its own layer's part of `x A^T` alone.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("hf_paged", "FRAGMENT")
_library.define(
    "add_adapters(Tensor base, Tensor x, Tensor a, Tensor b, Tensor order, Tensor starts, int[] sizes) -> Tensor"
)


def add_adapters(
    base: Tensor, x: Tensor, a: Tensor, b: Tensor, order: Tensor, starts: Tensor, sizes: list[int]
) -> Tensor:
    """`base + (x A^T) B^T`, with the A and B of each row's slot; rows of no slot are the base's.

    Args:
        base: `[..., sum(sizes)]`, the layers' own output for T rows; columns may be part of a wider tensor.
        x: `[..., inputs]`, what the layers were given.
        a: `[slots, len(sizes) * rank, inputs]`; b: `[slots, sum(sizes), rank]`, of one dtype. A slot's part of each is
            contiguous.
        order, starts: as the module says.
        sizes: outputs of each layer.

    Returns:
        a new tensor like `base`, contiguous.
    """
    return torch.ops.hf_paged.add_adapters(base, x, a, b, order, starts, sizes)


def _add_adapters(
    base: Tensor, x: Tensor, a: Tensor, b: Tensor, order: Tensor, starts: Tensor, sizes: list[int]
) -> Tensor:
    rows, own = x.reshape(-1, x.shape[-1]).to(a.dtype), base.reshape(-1, base.shape[-1])
    if x.is_cuda:
        from hf_paged.kernels.triton.lora import add_lora

        return add_lora(own, rows, a, b, order, starts, sizes).view(base.shape)
    return add_lora_plainly(own, rows, a, b, order, starts, sizes).view(base.shape)


def add_lora_plainly(
    base: Tensor, x: Tensor, a: Tensor, b: Tensor, order: Tensor, starts: Tensor, sizes: list[int]
) -> Tensor:
    """`add_adapters` of `[T, sum(sizes)]` and `[T, inputs]`, slot by slot."""
    out = base.clone(memory_format=torch.contiguous_format)
    for slot, (first, end) in enumerate(pairwise(starts.tolist())):
        if first < end:
            rows = order[first:end]
            low = (x[rows] @ a[slot].T).split(b.shape[2], 1)
            parts = [down @ up.T for down, up in zip(low, b[slot].split(sizes), strict=True)]
            out[rows] += torch.cat(parts, 1).to(out.dtype)
    return out


def _shape(base: Tensor, *_: Any) -> Tensor:
    return base.new_empty(base.shape)


_library.impl("add_adapters", _add_adapters, "CompositeExplicitAutograd")
torch.library.register_fake("hf_paged::add_adapters", _shape, lib=_library)
