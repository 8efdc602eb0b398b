"""Attention over pages in plain torch: the CPU path, and any device's fallback. No compiler, no extra package.

Decode works page by page, not sequence by sequence. Each page is one item of a batched matrix product: the query rows
of all the sequences that own the page against its keys, so a page shared by sixteen samples is read once for the
sixteen, and a page is read where it lies where the step's pages are dense enough in the pool. The parts of a sequence
are put together by the usual rescaling with the row's maximum (split-KV "flash decoding"; arXiv 2205.14135 for the
rescaling).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_paged.attention.backend import AttentionBatch, LayerSpec, Layout, PrefillSpan

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max

DENSE_ENOUGH = 0.6
"""Pages are read in place when they fill this share of the range they lie in; else gathered first. Measured on 2 cores:
gathering a page costs about 0.45 of the two products over it."""


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Pages with the same number of owners (rounded up to a power of two, the rest being padding)."""

    pages: slice | Tensor
    """The P pages: a range of the pool, or ids."""
    owners: Tensor
    """int64 [P, N]: the decode row of each owner; padding says B."""
    edges: Tensor
    """int64 [E]: the pages (by place among the P) that some owner must not see all of: last ones, windows' first
    ones."""
    hidden: Tensor
    """bool [E, 1, N, 1, page]: what it must not see."""


@dataclass(frozen=True, slots=True)
class _DecodePlan:
    buckets: list[_Bucket]
    members: Tensor
    """int64 [M]: every (page, owner) pair's row among the buckets' rows laid end to end, sequence by sequence."""
    offsets: Tensor
    """int64 [B]: where each sequence's members begin."""


@dataclass(frozen=True, slots=True)
class _SpanPlan:
    rows: slice
    pages: Tensor | None
    """Where the keys are; None when the rows themselves are all of them."""
    total: int
    mask: Tensor | None
    """bool [rows, total], True where seen; None is plain causal, or everything for a single row."""


@dataclass(frozen=True, slots=True)
class TorchPlan:
    num_decodes: int
    writes: dict[int, Tensor]
    """By number of KV heads: int64 [T * Hkv], rows of the pool seen as `[pages * Hkv * page, D]`."""
    decodes: dict[int | None, _DecodePlan]
    """By window."""
    spans: dict[int | None, list[_SpanPlan]]


class TorchBackend:
    """See the module's docstring. Tensors of the plan live on `device`."""

    layout: Layout = "HND"
    shares = False  # it reads any page once for all rows that own it, without being told

    def __init__(self, device: torch.device) -> None:
        self.device = device

    # ---- plan: once per step, on the host ------------------------------------------------------------------

    def plan(self, batch: AttentionBatch, layers: list[LayerSpec]) -> TorchPlan:
        windows = {layer.window for layer in layers}
        return TorchPlan(
            num_decodes=batch.num_decodes,
            writes={heads: self._plan_writes(batch, heads) for heads in {layer.num_kv_heads for layer in layers}},
            decodes={w: self._plan_decodes(batch, w) for w in windows} if batch.num_decodes else {},
            spans={w: [self._plan_span(span, w) for span in batch.spans] for w in windows},
        )

    def _plan_writes(self, batch: AttentionBatch, heads: int) -> Tensor:
        rows = (batch.write_pages[:, None] * heads + np.arange(heads)) * batch.page_size + batch.write_offsets[:, None]
        return self._upload(rows.ravel())

    def _plan_decodes(self, batch: AttentionBatch, window: int | None) -> _DecodePlan:
        size, count = batch.page_size, batch.num_decodes
        lengths = batch.decode_lengths
        begins = np.zeros_like(lengths) if window is None else np.maximum(lengths - window, 0)
        columns = np.arange(batch.decode_pages.shape[1])
        wanted = (columns >= (begins // size)[:, None]) & (columns < -(-lengths // size)[:, None])
        owner, column = np.nonzero(wanted)  # sequence by sequence
        page = batch.decode_pages[owner, column].astype(np.int64)
        first = column * size  # position of the page's first token
        low, high = begins[owner] - first, lengths[owner] - first  # what the owner sees of the page

        unique, inverse, shares = np.unique(page, return_inverse=True, return_counts=True)
        widths = 1 << np.ceil(np.log2(shares)).astype(np.int64)  # owners per page, rounded up to a power of two
        by_page = np.argsort(inverse, kind="stable")
        rank = np.empty_like(inverse)  # of an owner among its page's owners
        rank[by_page] = np.arange(len(page)) - np.repeat(np.cumsum(shares) - shares, shares)

        buckets, member, base = [], np.empty(len(page), dtype=np.int64), 0
        for width in np.unique(widths):
            ids = np.flatnonzero(widths == width)
            pages = unique[ids]
            span = int(pages[-1] - pages[0]) + 1
            dense = len(pages) >= DENSE_ENOUGH * span
            place = np.full(len(unique), -1)
            place[ids] = pages - pages[0] if dense else np.arange(len(ids))
            items = span if dense else len(ids)
            mine = np.flatnonzero(widths[inverse] == width)
            at = (place[inverse[mine]], rank[mine])
            owners = np.full((items, width), count)
            owners[at] = owner[mine]
            lows = np.zeros((items, width), dtype=np.int64)
            highs = np.full((items, width), size)  # padding sees everything: nobody asks what
            lows[at], highs[at] = low[mine], high[mine]
            position = np.arange(size)
            edges = np.flatnonzero(((lows > 0) | (highs < size)).any(1))
            hidden = (position < lows[edges, :, None]) | (position >= highs[edges, :, None])
            buckets.append(
                _Bucket(
                    pages=slice(int(pages[0]), int(pages[0]) + span) if dense else self._upload(pages),
                    owners=self._upload(owners),
                    edges=self._upload(edges),
                    hidden=self._upload(hidden[:, None, :, None, :]),
                )
            )
            member[mine] = base + at[0] * width + at[1]
            base += items * int(width)
        offsets = np.zeros(count, dtype=np.int64)
        np.cumsum(wanted.sum(1)[:-1], out=offsets[1:])
        return _DecodePlan(buckets, self._upload(member), self._upload(offsets))

    def _plan_span(self, span: PrefillSpan, window: int | None) -> _SpanPlan:
        total = span.context + span.length
        rows = slice(span.row, span.row + span.length)
        pages = None if span.context == 0 else self._upload(span.pages.astype(np.int64))
        mask = None
        causal_is_enough = window is None or total <= window
        if not causal_is_enough or (span.context > 0 and span.length > 1):
            row = np.arange(span.context, total)[:, None]
            column = np.arange(total)[None, :]
            seen = column <= row
            if window is not None:
                seen &= column > row - window
            mask = self._upload(seen)
        return _SpanPlan(rows, pages, total, mask)

    def _upload(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)

    # ---- run: once per layer, on the device ----------------------------------------------------------------

    def run(
        self,
        plan: TorchPlan,
        layer: LayerSpec,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_pool: Tensor,
        value_pool: Tensor,
        sinks: Tensor | None,
    ) -> Tensor:
        rows = plan.writes[layer.num_kv_heads]
        scales, pools = (layer.key_scale, layer.value_scale), (key_pool, value_pool)
        stored = [_as_stored(x, pool.dtype, s) for x, pool, s in zip((key, value), pools, scales, strict=True)]
        for x, pool in zip(stored, pools, strict=True):
            _as_bytes(pool).view(-1, x.shape[-1]).index_copy_(0, rows, _as_bytes(x).reshape(-1, x.shape[-1]))
        out = query.new_empty(query.shape[0], layer.num_heads, layer.value_dim)
        if plan.num_decodes:
            decodes = plan.decodes[layer.window]
            out[: plan.num_decodes] = _decode(decodes, layer, query[: plan.num_decodes], key_pool, value_pool, sinks)
        for span in plan.spans[layer.window]:
            parts = [x[span.rows] for x in stored]
            if span.pages is not None:
                parts = [_rows_of(pool, span) for pool in pools]
            keys, values = (_as_computed(x, query.dtype, s) for x, s in zip(parts, scales, strict=True))
            out[span.rows] = _prefill(span, layer, query[span.rows], keys, values, sinks)
        return out


def _as_stored(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """Keys or values as a pool of `dtype` keeps them, which is what prefill attends to as well."""
    if dtype.itemsize > 1:
        return x.to(dtype)
    return (x.float() / scale).clamp_(-FP8_MAX, FP8_MAX).to(dtype)  # the cast does not saturate


def _as_computed(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """Stored keys or values, scaled back where they were scaled."""
    return x.to(dtype) if x.dtype.itemsize > 1 else x.to(dtype) * scale


def _as_bytes(x: Tensor) -> Tensor:
    """FP8, for which torch has hardly an operation, as bytes."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def _decode(
    plan: _DecodePlan, layer: LayerSpec, query: Tensor, key_pool: Tensor, value_pool: Tensor, sinks: Tensor | None
) -> Tensor:
    """`[B, H, Dk]` against pages -> `[B, H, Dv]`."""
    count, heads, kv_heads = query.shape[0], layer.num_heads, layer.num_kv_heads
    groups, page = heads // kv_heads, key_pool.shape[2]
    # One row more, for the padding's owner.
    dtype = key_pool.dtype if key_pool.dtype.itemsize > 1 else query.dtype
    query = F.pad(query * (layer.scaling * layer.key_scale), (0, 0, 0, 0, 0, 1)).to(dtype)
    highest = query.new_zeros(count + 1, heads, dtype=torch.float32)
    highest[:count] = -math.inf if sinks is None else sinks.float()

    parts = []
    for bucket in plan.buckets:
        items, width = bucket.owners.shape
        rows = query.index_select(0, bucket.owners.view(-1))
        rows = rows.view(items, width, kv_heads, groups, layer.key_dim).transpose(1, 2)
        keys = _pages_of(key_pool, bucket.pages).to(dtype).reshape(items * kv_heads, page, layer.key_dim)
        scores = torch.bmm(rows.reshape(items * kv_heads, width * groups, layer.key_dim), keys.transpose(1, 2))
        scores = scores.view(items, kv_heads, width, groups, page).float()
        if layer.softcap is not None:
            scores = scores.div_(layer.softcap).tanh_().mul_(layer.softcap)
        edges = scores.index_select(0, bucket.edges).masked_fill_(bucket.hidden, -math.inf)
        scores.index_copy_(0, bucket.edges, edges)
        tops = scores.amax(-1).transpose(1, 2).reshape(items * width, heads)
        highest.scatter_reduce_(0, bucket.owners.view(-1, 1).expand(-1, heads), tops, "amax")
        parts.append(scores)

    sums, totals = [], []
    for bucket, scores in zip(plan.buckets, parts, strict=True):
        items, width = bucket.owners.shape
        peak = highest.index_select(0, bucket.owners.view(-1)).view(items, width, kv_heads, groups, 1).transpose(1, 2)
        weights = scores.sub_(peak).exp_()
        totals.append(weights.sum(-1).transpose(1, 2).reshape(items * width, heads))
        values = _pages_of(value_pool, bucket.pages).to(dtype).reshape(items * kv_heads, page, layer.value_dim)
        part = torch.bmm(weights.to(values.dtype).view(items * kv_heads, width * groups, page), values)
        part = part.view(items, kv_heads, width, groups * layer.value_dim).transpose(1, 2)
        sums.append(part.reshape(items * width, heads * layer.value_dim).float())

    total = _sum_members(plan, totals)
    if sinks is not None:
        total = total + (sinks.float() - highest[:count]).exp()
    out = _sum_members(plan, sums).view(count, heads, layer.value_dim)
    return out / (total / layer.value_scale)[..., None]


def _pages_of(pool: Tensor, pages: slice | Tensor) -> Tensor:
    """A view of a range of pages, or a copy of pages by id (`index_select` takes a quarter of `pool[ids]`'s time)."""
    return pool[pages] if isinstance(pages, slice) else _as_bytes(pool).index_select(0, pages).view(pool.dtype)


def _sum_members(plan: _DecodePlan, parts: list[Tensor]) -> Tensor:
    """Adds up what belongs to each sequence: rows `[..., C]` of all buckets -> `[B, C]`."""
    rows = parts[0] if len(parts) == 1 else torch.cat(parts)
    return F.embedding_bag(plan.members, rows, plan.offsets, mode="sum")


def _rows_of(pool: Tensor, span: _SpanPlan) -> Tensor:
    """`[total, Hkv, D]`: the keys or values of one sequence."""
    assert span.pages is not None
    taken = _as_bytes(_pages_of(pool, span.pages)).permute(0, 2, 1, 3)
    return taken.reshape(-1, taken.shape[2], taken.shape[3])[: span.total].view(pool.dtype)


def _prefill(
    span: _SpanPlan, layer: LayerSpec, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
) -> Tensor:
    """`[Tq, H, Dk]` against `[Tk, Hkv, D]` -> `[Tq, H, Dv]`."""
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    if layer.softcap is None and sinks is None:
        causal = span.mask is None and query.shape[0] > 1
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=span.mask, is_causal=causal, scale=layer.scaling, enable_gqa=True
        )
        return out[0].transpose(0, 1)
    groups = layer.num_heads // layer.num_kv_heads
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * layer.scaling
    if layer.softcap is not None:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    mask = span.mask
    if mask is None and query.shape[0] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], -1)
    weights = torch.softmax(scores, -1)[..., : k.shape[2]]
    return torch.matmul(weights.to(v.dtype), v)[0].transpose(0, 1)
