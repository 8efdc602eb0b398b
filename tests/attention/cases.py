"""Random packed attention steps, and what must come out of them: for every backend.

A backend's test draws `cases(layout=..., ...)`, narrowed to what it supports, and calls `check(backend, case, ...)`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from hf_paged.attention.backend import AttentionBackend, AttentionBatch, LayerSpec, Layout, PrefillSpan
from hf_paged.kernels import reference


@dataclass(frozen=True)
class LayerCase:
    """One layer of a step: its inputs, and what must come out."""

    spec: LayerSpec
    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor | None
    key_pool: Tensor
    """Before the step."""
    value_pool: Tensor
    key_pool_after: Tensor
    value_pool_after: Tensor
    expected: Tensor
    """float32 `[T, H, Dv]`, from `reference.paged_attention` over the pools after the step."""


@dataclass(frozen=True)
class Case:
    """One step of several layers; `str` says what hypothesis should show of it."""

    layout: Layout
    batch: AttentionBatch
    layers: list[LayerCase]
    sequences: list[tuple[int, int, list[int]]]
    """Per sequence: rows in the batch, tokens in all, pages."""

    def __repr__(self) -> str:
        specs = [layer.spec for layer in self.layers]
        return f"Case({self.layout}, page_size={self.batch.page_size}, sequences={self.sequences}, layers={specs})"


@dataclass(frozen=True)
class Shape:
    """What the sequences of a step look like, before there are tensors."""

    page_size: int
    num_pages: int
    sequences: list[tuple[int, int, list[int]]]
    """Rows, tokens in all, pages; decodes first."""
    num_decodes: int
    strangers: list[int] = field(default_factory=list)
    """Pages that nobody in the batch owns."""


def make_shape(
    page_size: int,
    decodes: list[tuple[int, int, int]],
    spans: list[tuple[int, int, int, int]],
    order: str,
    seed: int,
) -> Shape:
    """Lays sequences out in pages.

    Args:
        decodes: per sequence (context, relative, shared): `shared` of its first pages are those of the earlier sequence
            number `relative` (modulo how many there are), as far as both have so many full ones.
        spans: (context, rows, relative, shared).
        order: how page ids lie: "dense" in order, "shuffled" but dense, "scattered", "sorted" and scattered.
    """
    virtual: list[list[int]] = []
    contexts: list[int] = []
    rows_of: list[int] = []
    count = 0
    for context, rows, relative, shared in [(c, 1, r, s) for c, r, s in decodes] + spans:
        needed = -(-(context + rows) // page_size)
        pages: list[int] = []
        if virtual:
            parent = relative % len(virtual)
            pages = virtual[parent][: min(shared, contexts[parent] // page_size, context // page_size)]
        fresh = needed - len(pages)
        virtual.append(pages + list(range(count, count + fresh)))
        count += fresh
        contexts.append(context)
        rows_of.append(rows)
    generator = np.random.default_rng(seed)
    before, after = (int(n) for n in generator.integers(0, 4, 2))
    if order in ("dense", "shuffled"):
        num_pages = before + count + after
        ids = before + (np.arange(count) if order == "dense" else generator.permutation(count))
    else:
        num_pages = 4 * count + before + after
        ids = generator.choice(num_pages, count, replace=False)
        if order == "sorted":
            ids = np.sort(ids)
    sequences = [
        (rows, context + rows, [int(ids[page]) for page in pages])
        for rows, context, pages in zip(rows_of, contexts, virtual, strict=True)
    ]
    owned = {page for _, _, pages in sequences for page in pages}
    return Shape(page_size, num_pages, sequences, len(decodes), sorted(set(range(num_pages)) - owned))


def make_batch(shape: Shape, seed: int) -> AttentionBatch:
    """The batch as the engine would describe it; the block table's unused entries are other pages' ids."""
    generator = np.random.default_rng(seed)
    size, sequences = shape.page_size, shape.sequences
    decodes = sequences[: shape.num_decodes]
    columns = max((len(pages) for _, _, pages in decodes), default=0) + int(generator.integers(0, 3))
    table = generator.integers(0, shape.num_pages, (len(decodes), columns), dtype=np.int32)
    for row, (_, _, pages) in enumerate(decodes):
        table[row, : len(pages)] = pages
    spans, row = [], len(decodes)
    for rows, length, pages in sequences[shape.num_decodes :]:
        spans.append(PrefillSpan(row=row, length=rows, context=length - rows, pages=np.array(pages, dtype=np.int32)))
        row += rows
    places = [(pages[p // size], p % size) for rows, length, pages in sequences for p in range(length - rows, length)]
    write_pages, write_offsets = (np.array(column, dtype=np.int64) for column in zip(*places, strict=True))
    return AttentionBatch(
        page_size=size,
        decode_lengths=np.array([length for _, length, _ in decodes], dtype=np.int64),
        decode_pages=table,
        spans=spans,
        write_pages=write_pages,
        write_offsets=write_offsets,
    )


def make_layer(
    shape: Shape,
    batch: AttentionBatch,
    spec: LayerSpec,
    layout: Layout,
    dtype: torch.dtype,
    seed: int,
    strangers: float,
) -> LayerCase:
    """Random tensors for one layer. Pages of strangers hold `strangers` (NaN, say), unwritten places large garbage."""
    generator = torch.Generator().manual_seed(seed)
    size, total = shape.page_size, len(batch.write_pages)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(dtype)

    def random_rows(heads: int, dim: int) -> Tensor:
        # As transformers hands them over: heads first in memory, every second time.
        return random(heads, total, dim).transpose(0, 1) if seed % 2 else random(total, heads, dim)

    pools, afters = [], []
    query = random_rows(spec.num_heads, spec.key_dim)
    new = [random_rows(spec.num_kv_heads, dim) for dim in (spec.key_dim, spec.value_dim)]
    for rows, dim in zip(new, (spec.key_dim, spec.value_dim), strict=True):
        pool = 1000 * random(shape.num_pages, size, spec.num_kv_heads, dim)  # NHD while it is being filled
        for count, length, pages in shape.sequences:
            for position in range(length - count):
                pool[pages[position // size], position % size] = random(spec.num_kv_heads, dim)
        pool[shape.strangers] = strangers
        after = pool.clone()
        for row in range(total):
            after[int(batch.write_pages[row]), int(batch.write_offsets[row])] = rows[row]
        if layout == "HND":
            pool, after = pool.transpose(1, 2).contiguous(), after.transpose(1, 2).contiguous()
        pools.append(pool)
        afters.append(after)
    sinks = 2 * random(spec.num_heads) if spec.sinks else None
    expected = reference.paged_attention(
        query.float(),
        *afters,
        shape.sequences,
        layout=layout,
        scaling=spec.scaling,
        window=spec.window,
        softcap=spec.softcap,
        sinks=sinks,
    )
    return LayerCase(spec, query, *new, sinks, *pools, *afters, expected)


def make_case(
    shape: Shape, specs: list[LayerSpec], *, layout: Layout, dtype: torch.dtype, seed: int, strangers: float
) -> Case:
    """A whole case out of a shape and layers."""
    batch = make_batch(shape, seed)
    layers = [
        make_layer(shape, batch, spec, layout, dtype, seed + 1 + index, strangers) for index, spec in enumerate(specs)
    ]
    return Case(layout, batch, layers, shape.sequences)


def as_verification(case: Case) -> Case:
    """The rows of a case's only span as decode rows of one sequence, the last one first, so that whoever attends before
    all is written misses something."""
    batch = case.batch
    (span,) = batch.spans
    assert not batch.num_decodes
    lengths = np.arange(span.context + span.length, span.context, -1)
    pages = np.tile(span.pages, (span.length, 1))
    turned = AttentionBatch(
        batch.page_size, lengths, pages, [], batch.write_pages[::-1].copy(), batch.write_offsets[::-1].copy(),
        dependent=True,
    )  # fmt: skip
    layers = [
        replace(one, **{name: getattr(one, name).flip(0) for name in ("query", "key", "value", "expected")})
        for one in case.layers
    ]
    return replace(case, batch=turned, layers=layers)


@st.composite
def shapes(
    draw: Any, page_sizes: tuple[int, ...] = (1, 2, 4, 8, 16), max_decodes: int = 8, max_spans: int = 3
) -> Shape:
    """Decodes that share prefixes as a forest, prefill spans with and without context, scattered or dense pages."""
    size = draw(st.sampled_from(page_sizes))
    context = st.integers(0, 6 * size + 5)
    relative, shared = st.integers(0, 7), st.integers(0, 6)
    decodes = draw(st.lists(st.tuples(context, relative, shared), max_size=max_decodes))
    span = st.tuples(st.one_of(st.just(0), context), st.integers(1, 3 * size + 3), relative, shared)
    spans = draw(st.lists(span, min_size=0 if decodes else 1, max_size=max_spans))
    order = draw(st.sampled_from(["dense", "shuffled", "scattered", "sorted"]))
    return make_shape(size, decodes, spans, order, draw(st.integers(0, 2**20)))


@st.composite
def layer_specs(
    draw: Any,
    head_dims: tuple[tuple[int, int], ...] = ((4, 4), (8, 8), (8, 12), (24, 16)),
    max_kv_heads: int = 3,
    max_groups: int = 4,
    windows: bool = True,
    softcaps: bool = True,
    sinks: bool = True,
    index: int = 0,
) -> LayerSpec:
    """Head counts, dimensions and options of one layer."""
    key_dim, value_dim = draw(st.sampled_from(head_dims))
    kv_heads = draw(st.integers(1, max_kv_heads))
    return LayerSpec(
        index=index,
        num_heads=kv_heads * draw(st.integers(1, max_groups)),
        num_kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        scaling=draw(st.sampled_from([key_dim**-0.5, 0.2, 1.0])),
        window=draw(st.none() | st.integers(1, 40)) if windows else None,
        softcap=draw(st.sampled_from([None, 2.0, 30.0])) if softcaps else None,
        sinks=draw(st.booleans()) if sinks else False,
    )


@st.composite
def cases(
    draw: Any,
    *,
    layout: Layout,
    dtype: torch.dtype = torch.float32,
    shape: st.SearchStrategy[Shape] | None = None,
    max_layers: int = 2,
    **layer_options: Any,
) -> Case:
    """A step with 1 to `max_layers` different layers; `layer_options` as in `layer_specs`."""
    chosen = draw(shape if shape is not None else shapes())
    specs = [draw(layer_specs(index=i, **layer_options)) for i in range(draw(st.integers(1, max_layers)))]
    strangers = draw(st.sampled_from([float("nan"), 1e4]))
    return make_case(chosen, specs, layout=layout, dtype=dtype, seed=draw(st.integers(0, 2**20)), strangers=strangers)


def check(backend: AttentionBackend, case: Case, device: torch.device, *, rtol: float, atol: float) -> None:
    """One `plan` for all layers, one `run` each: outputs as the reference's, and nothing but the new rows written."""
    plan = backend.plan(case.batch, [layer.spec for layer in case.layers])
    for layer in case.layers:
        query, key, value = (x.to(device) for x in (layer.query, layer.key, layer.value))
        key_pool, value_pool = layer.key_pool.clone().to(device), layer.value_pool.clone().to(device)
        sinks = None if layer.sinks is None else layer.sinks.to(device)
        out = backend.run(plan, layer.spec, query, key, value, key_pool, value_pool, sinks)
        assert out.dtype == layer.query.dtype
        assert torch.isfinite(out).all()
        torch.testing.assert_close(out.cpu().float(), layer.expected, rtol=rtol, atol=atol)
        for pool, after in ((key_pool, layer.key_pool_after), (value_pool, layer.value_pool_after)):
            torch.testing.assert_close(pool.cpu(), after, rtol=0, atol=0, equal_nan=True)
