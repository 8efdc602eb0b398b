"""The engine's exact attention for a forward with gradients: registered with transformers as "hf_paged_exact".

A batch of padded sequences is laid out as pages and goes through the same kernel as the engine's steps, so that a token
gets the same bits here and there. The backward pass is torch's own, over the same queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from hf_paged.attention.interface import compute_dtype

EXACT = "hf_paged_exact"

PAGE = 16
"""Tokens per page: the engine's own on a GPU."""


def exact_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query `[B, H, T, D]`, key and value `[B, Hkv, T, D]` -> `[B, T, H, Dv]`.

    Args:
        attention_mask: bool `[B, T]`, False for padding on either side or between; None is no padding. Rows of padding
            get zeros.

    Raises:
        ValueError: dropout, a soft cap, sinks, keys from a cache, or another kind of mask.
    """
    for what, given in (
        ("attention dropout", dropout),
        ("a soft cap", options.get("softcap") is not None),
        ("attention sinks", options.get("s_aux") is not None),
        ("a key-value cache", key.shape[2] != query.shape[2]),
        ("a mask of four dimensions", attention_mask is not None and attention_mask.ndim != 2),
    ):
        if given:
            raise ValueError(f"exact attention cannot do {what}: leave exact mode off")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    dtype = compute_dtype(query.device, query.dtype)
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (query, key, value))
    return _ExactAttention.apply(q, k, v, _Packing.of(attention_mask, q), scaling), None


def padding_mask(
    *_: Any, mask_function: Callable[..., Any], attention_mask: Tensor | None = None, **__: Any
) -> Tensor | None:
    """transformers' mask interface: the padding, bool `[B, T]`, is all that the kernel wants to know.

    Raises:
        ValueError: a token is not to see all tokens before it.
    """
    if mask_function is not causal_mask_function:
        raise ValueError(
            "exact attention is causal attention over whole rows: it cannot do sliding windows, or several sequences "
            "packed into one row by their position_ids"
        )
    return attention_mask


@dataclass(frozen=True, slots=True)
class _Packing:
    """Where the real tokens of each row of a batch are, on the device: nobody waits to count them."""

    lengths: Tensor
    """int32 [B]."""
    order: Tensor | None
    """int64 [B, T]: the places of a row's real tokens, then those of its padding; None where there is none."""
    inverse: Tensor | None
    """int64 [B, T]: where in that order each place is."""

    @staticmethod
    def of(mask: Tensor | None, query: Tensor) -> _Packing:
        """For queries `[B, T, H, D]`. All layers of a forward have the same mask: what the first one found stays with
        it."""
        count, width = query.shape[:2]
        if mask is None:
            lengths = torch.full((count,), width, dtype=torch.int32, device=query.device)
            return _Packing(lengths, None, None)
        now = -1 if mask.is_inference() else mask._version
        version, packing = getattr(mask, "_hf_paged_packing", (now, None))
        if packing is None or version != now:
            order = (~mask.bool()).to(torch.uint8).argsort(stable=True, dim=1)
            packing = _Packing(mask.sum(1, dtype=torch.int32), order, order.argsort(1))
            mask._hf_paged_packing = now, packing  # type: ignore[attr-defined]
        return packing

    def pack(self, x: Tensor) -> Tensor:
        """`[B, T, H, D]` with real tokens first, contiguous."""
        return x.contiguous() if self.order is None else _take(x, self.order)

    def unpack(self, x: Tensor) -> Tensor:
        """The inverse."""
        return x if self.inverse is None else _take(x, self.inverse)

    def tiles(self, width: int, rows: int) -> Tensor:
        """int32 `[B * ceil(T / rows), 4]`, as `make_tiles` would cut rows of T places; some hold nothing."""
        start = torch.arange(0, width, rows, dtype=torch.int32, device=self.lengths.device)[None]
        row = torch.arange(len(self.lengths), dtype=torch.int32, device=self.lengths.device)[:, None]
        count = (self.lengths[:, None] - start).clamp(0, rows)
        return torch.stack([row * width + start, count, start.expand_as(count), row.expand_as(count)], -1).view(-1, 4)


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x[torch.arange(len(x), device=x.device)[:, None], index]


class _ExactAttention(torch.autograd.Function):
    """`[B, T, H, Dk]`, `[B, T, Hkv, Dk]`, `[B, T, Hkv, Dv]` -> `[B, T, H, Dv]`, causal."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, packing: _Packing, scaling: float) -> Tensor:
        query, key, value = (packing.pack(x) for x in (query, key, value))
        ctx.save_for_backward(query, key, value)
        ctx.packing, ctx.scaling = packing, scaling
        return packing.unpack(_attend(query, key, value, packing, scaling))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # Real tokens stand first, so that causality alone keeps padding out of them.
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            query, key, value = (x.transpose(1, 2) for x in inputs)
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=ctx.scaling).transpose(1, 2)
        grads = torch.autograd.grad(out, inputs, ctx.packing.pack(grad))
        return (*(ctx.packing.unpack(grad) for grad in grads), None, None)


def _attend(query: Tensor, key: Tensor, value: Tensor, packing: _Packing, scaling: float) -> Tensor:
    from hf_paged.attention.exact_backend import attend_exactly
    from hf_paged.kernels.triton.paged_prefill import rows_per_tile

    count, width, heads, _ = query.shape
    rows, pages = rows_per_tile(heads // key.shape[2]), -(-width // PAGE)
    key_pool, value_pool = (
        F.pad(x, (0, 0, 0, 0, 0, pages * PAGE - width)).view(-1, PAGE, *x.shape[2:]) for x in (key, value)
    )
    table = torch.arange(count * pages, dtype=torch.int32, device=query.device).view(count, pages)
    tiles = packing.tiles(width, rows)
    out = attend_exactly(query.flatten(0, 1), key_pool, value_pool, table, tiles, rows=rows, scaling=scaling)
    return out.view(count, width, *out.shape[1:])


AttentionInterface.register(EXACT, exact_attention)
AttentionMaskInterface.register(EXACT, padding_mask)
