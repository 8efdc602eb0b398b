"""The Triton kernels of attention against the reference, over random steps.

Without a GPU they run in Triton's interpreter, which is Python: shapes are tiny. bfloat16 is for the GPU alone: the
interpreter multiplies its bits as if they were integers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from hf_paged.kernels import reference
from hf_paged.kernels.triton.append import FP8_MAX, append_kv
from hf_paged.kernels.triton.paged_decode import DecodeConfig, choose_num_splits, decode_config, paged_decode
from hf_paged.kernels.triton.paged_prefill import PrefillConfig, make_tiles, paged_prefill, rows_per_tile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FP8 = torch.float8_e4m3fn
TOLERANCES = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.float16: {"rtol": 5e-3, "atol": 5e-3},
    torch.bfloat16: {"rtol": 4e-2, "atol": 4e-2},
}
needs_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")

HEAD_DIMS = ((8, 8), (16, 16), (24, 24), (64, 64), (80, 80), (96, 96), (24, 16), (16, 40))


@dataclass(frozen=True)
class Layer:
    """What one call of an attention kernel computes, apart from the sequences."""

    kv_heads: int
    group: int
    key_dim: int
    value_dim: int
    window: int | None
    softcap: float | None
    sinks: bool
    dtype: torch.dtype
    pool_dtype: torch.dtype
    seed: int

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


@dataclass(frozen=True)
class Pages:
    """Sequences of `lengths` tokens in pages: every place that none of them owns holds NaN."""

    key_pool: Tensor
    value_pool: Tensor
    scales: tuple[float, float]
    block_table: Tensor
    """int32 [more than there are sequences, more than the longest needs]."""
    slots: list[int]
    pages: list[list[int]]


def random_layer(draw: Any) -> Layer:
    key_dim, value_dim = draw(st.sampled_from(HEAD_DIMS))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float16]))
    return Layer(
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 8)),
        key_dim=key_dim,
        value_dim=value_dim,
        window=draw(st.none() | st.integers(1, 50)),
        softcap=draw(st.sampled_from([None, 2.0, 30.0])),
        sinks=draw(st.booleans()),
        dtype=dtype,
        pool_dtype=draw(st.sampled_from([dtype, dtype, FP8])),
        seed=draw(st.integers(0, 2**20)),
    )


layers = st.composite(random_layer)()
page_sizes = st.sampled_from([1, 4, 12, 16])


def lay_out(layer: Layer, lengths: list[int], page_size: int) -> Pages:
    generator = torch.Generator().manual_seed(layer.seed)
    counts = [-(-length // page_size) for length in lengths]
    num_pages = sum(counts) + 2
    ids = torch.randperm(num_pages, generator=generator).tolist()
    pages = [[ids.pop() for _ in range(count)] for count in counts]
    slots = torch.randperm(len(lengths) + 2, generator=generator)[: len(lengths)].tolist()
    table = torch.randint(0, num_pages, (len(lengths) + 2, max(counts) + 1), generator=generator, dtype=torch.int32)
    scales = (0.5, 1.7) if layer.pool_dtype == FP8 else (1.0, 1.0)
    pools = []
    for dim in (layer.key_dim, layer.value_dim):
        pool = torch.full((num_pages, page_size, layer.kv_heads, dim), float("nan"))
        for length, own in zip(lengths, pages, strict=True):
            rows = torch.arange(length)
            owners = torch.tensor(own)[rows // page_size]
            pool[owners, rows % page_size] = torch.randn(length, layer.kv_heads, dim, generator=generator)
        pools.append(pool.to(layer.pool_dtype).to(DEVICE))
    for slot, own in zip(slots, pages, strict=True):
        table[slot, : len(own)] = torch.tensor(own, dtype=torch.int32)
    return Pages(*pools, scales, table.to(DEVICE), slots, pages)


def make_query(layer: Layer, rows: int) -> tuple[Tensor, Tensor | None]:
    """Query, heads first in memory every second time, and sinks."""
    generator = torch.Generator().manual_seed(layer.seed + 1)
    query = torch.randn(rows, layer.heads, layer.key_dim, generator=generator)
    if layer.seed % 2:
        query = query.transpose(0, 1).contiguous().transpose(0, 1)
    sinks = 2 * torch.randn(layer.heads, generator=generator)
    return query.to(layer.dtype).to(DEVICE), sinks.to(layer.dtype).to(DEVICE) if layer.sinks else None


def options_of(layer: Layer, sinks: Tensor | None) -> dict[str, Any]:
    scaling = layer.key_dim**-0.5
    return {"scaling": scaling, "window": layer.window, "softcap": layer.softcap, "sinks": sinks}


def check(
    out: Tensor, query: Tensor, layer: Layer, pages: Pages, sequences: list[tuple[int, int, list[int]]], options: Any
) -> None:
    pools = [pool.float() * s for pool, s in zip((pages.key_pool, pages.value_pool), pages.scales, strict=True)]
    expected = reference.paged_attention(query.float(), *pools, sequences, layout="NHD", **options)
    assert out.dtype == query.dtype
    torch.testing.assert_close(out.float(), expected, **TOLERANCES[layer.dtype])


# ---- append ----------------------------------------------------------------------------------------------------


STRIDES = ["plain", "heads first", "dims first", "a slice"]


def lie(x: Tensor, strides: str) -> Tensor:
    """`x` `[T, H, D]` in a memory of other strides."""
    if strides == "heads first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if strides == "dims first":
        return x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    if strides == "a slice":
        return torch.cat([x, x], dim=1)[:, x.shape[1] :]
    return x


def scatter(pool: Tensor, rows: Tensor, new: Tensor, scale: float) -> Tensor:
    """The pool after `new` `[T, Hkv, D]` was written to `rows`."""
    if pool.dtype == FP8:
        new = (new.float() / scale).clamp(-FP8_MAX, FP8_MAX)
    after = pool.clone().flatten(0, 1)
    for row, source in zip(rows.tolist(), new.to(pool.dtype), strict=True):
        if row >= 0:
            after[row] = source
    return after.view(pool.shape)


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.view(torch.uint8), expected.view(torch.uint8), rtol=0, atol=0)


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(0, 6),
    heads=st.integers(1, 5),
    dims=st.sampled_from(HEAD_DIMS),
    page_size=page_sizes,
    dtype=st.sampled_from([torch.float32, torch.float16]),
    pool_dtype=st.sampled_from([torch.float32, torch.float16, FP8]),
    strides=st.sampled_from(STRIDES),
    seed=st.integers(0, 2**20),
)
def test_append(tokens, heads, dims, page_size, dtype, pool_dtype, strides, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(3 * page_size + 4, generator=generator)[:tokens]
    rows[rows >= 3 * page_size] = -1
    # The interpreter's own rounding to float8 loses the carry from 1.96 to 2: there, nothing shall need rounding.
    rounds = DEVICE.type == "cuda"
    scales = (0.25, 3.0) if rounds else (0.25, 0.5)
    new, pools = [], []
    for dim in dims:
        x = 30 * torch.randn(tokens, heads, dim, generator=generator)
        x = x if rounds else x.to(FP8).float()
        x[:, 0, 0] = 1e4  # beyond what float8 holds
        new.append(lie(x.to(dtype).to(DEVICE), strides))
        pools.append(torch.randn(3, page_size, heads, dim, generator=generator).to(pool_dtype).to(DEVICE))
    expected = [scatter(pool, rows, x, scale) for pool, x, scale in zip(pools, new, scales, strict=True)]
    append_kv(*new, *pools, rows.to(DEVICE), key_scale=scales[0], value_scale=scales[1])
    for pool, after in zip(pools, expected, strict=True):
        assert_same_bits(pool, after)


@pytest.mark.cuda
@needs_cuda  # the interpreter's cast has no NaN
def test_append_keeps_nan_in_fp8() -> None:
    """The clamp must not turn a NaN into a number."""
    new = torch.full((1, 1, 16), float("nan"), device=DEVICE)
    pools = [torch.zeros(1, 4, 1, 16, device=DEVICE).to(FP8) for _ in range(2)]
    append_kv(new, new, *pools, torch.tensor([2], device=DEVICE))
    for pool in pools:
        assert torch.isnan(pool.float()[0, 2]).all()
        assert not torch.isnan(pool.float()[0, [0, 1, 3]]).any()


# ---- decode ----------------------------------------------------------------------------------------------------


def check_decode(
    layer: Layer, lengths: list[int], page_size: int, num_splits: int | None, config: DecodeConfig | None
) -> None:
    pages = lay_out(layer, lengths, page_size)
    query, sinks = make_query(layer, len(lengths))
    options = options_of(layer, sinks)
    slots, counts = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (pages.slots, lengths))
    out = paged_decode(
        query, pages.key_pool, pages.value_pool, pages.block_table, slots, counts,
        key_scale=pages.scales[0], value_scale=pages.scales[1], num_splits=num_splits, config=config, **options,
    )  # fmt: skip
    sequences = [(1, length, own) for length, own in zip(lengths, pages.pages, strict=True)]
    check(out, query, layer, pages, sequences, options)


@settings(max_examples=40, deadline=None)
@given(
    layer=layers,
    lengths=st.lists(st.one_of(st.just(1), st.integers(1, 70)), min_size=1, max_size=4),
    page_size=page_sizes,
    num_splits=st.sampled_from([None, 1, 2, 3, 11]),
    block_n=st.sampled_from([16, 32]),
)
def test_decode(layer, lengths, page_size, num_splits, block_n) -> None:
    check_decode(layer, lengths, page_size, num_splits, DecodeConfig(block_n, num_warps=4, num_stages=3))


BASE = Layer(2, 2, 16, 16, None, None, False, torch.float32, torch.float32, seed=3)


@pytest.mark.parametrize("window", [None, 1, 16, 17, 33])
@pytest.mark.parametrize("num_splits", [1, 4])
def test_decode_around_the_edges_of_blocks(window: int | None, num_splits: int) -> None:
    layer = Layer(**{**vars(BASE), "window": window, "sinks": True})
    lengths = [1, 15, 16, 17, 31, 32, 33, 48, 49]
    check_decode(layer, lengths, 16, num_splits, DecodeConfig(16, num_warps=4, num_stages=3))


@pytest.mark.parametrize("num_splits", [1, 3])
def test_decode_with_the_chosen_config(num_splits: int) -> None:
    check_decode(BASE, [150, 3, 64], 16, num_splits, None)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # a sink far above the scores takes everything
@pytest.mark.parametrize("num_splits", [1, 3])
def test_decode_of_scores_far_beyond_exp(num_splits: int) -> None:
    """Scores in the thousands: only differences may be exponentiated, within a part and between parts."""
    lengths = [70, 33]
    pages = lay_out(BASE, lengths, 4)
    query, _ = make_query(BASE, 2)
    slots, counts = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (pages.slots, lengths))
    options = {"scaling": 300.0, "sinks": torch.tensor([900.0, -5000.0, 5000.0, 0.0], device=DEVICE)}
    out = paged_decode(
        query, pages.key_pool, pages.value_pool, pages.block_table, slots, counts,
        num_splits=num_splits, config=DecodeConfig(16, 4, 3), **options,
    )  # fmt: skip
    pools = pages.key_pool, pages.value_pool
    sequences = [(1, length, own) for length, own in zip(lengths, pages.pages, strict=True)]
    expected = reference.paged_attention(query, *pools, sequences, layout="NHD", **options)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


def test_decode_of_no_rows() -> None:
    pages = lay_out(BASE, [5], 4)
    none = torch.empty(0, dtype=torch.int32, device=DEVICE)
    query = torch.empty(0, BASE.heads, BASE.key_dim, device=DEVICE)
    out = paged_decode(query, pages.key_pool, pages.value_pool, pages.block_table, none, none, scaling=1.0)
    assert out.shape == (0, BASE.heads, BASE.value_dim)


# ---- decode that appends ---------------------------------------------------------------------------------------


def check_appending_decode(
    layer: Layer,
    lengths: list[int],
    page_size: int,
    num_splits: int | None,
    config: DecodeConfig | None,
    *,
    padding: int = 0,
    strides: str = "plain",
) -> None:
    """As `append_kv`, then decode. Rows of padding come after the others and attend to what is there."""
    pages = lay_out(layer, lengths, page_size)
    query, sinks = make_query(layer, len(lengths))
    options = options_of(layer, sinks) | {"num_splits": num_splits, "config": config}
    scales = dict(zip(("key_scale", "value_scale"), pages.scales, strict=True))
    generator = torch.Generator().manual_seed(layer.seed + 2)
    dims = layer.key_dim, layer.value_dim
    new = [torch.randn(len(lengths), layer.kv_heads, dim, generator=generator) for dim in dims]
    new = [lie(x.to(layer.dtype).to(DEVICE), strides) for x in new]
    rows = torch.tensor(
        [own[-1] * page_size + (length - 1) % page_size for length, own in zip(lengths, pages.pages, strict=True)]
    )
    rows[len(rows) - padding :] = -1
    nan = torch.tensor(float("nan")).to(layer.pool_dtype)
    for pool in (pages.key_pool, pages.value_pool):
        for row in rows[rows >= 0].tolist():
            pool[row // page_size, row % page_size] = nan.to(DEVICE)
    after = [pool.clone() for pool in (pages.key_pool, pages.value_pool)]
    rows = rows.to(DEVICE)
    append_kv(*new, *after, rows, **scales)

    slots, counts = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (pages.slots, lengths))
    tables = pages.block_table, slots, counts
    out = paged_decode(
        query, pages.key_pool, pages.value_pool, *tables, **scales, **options,
        new_key=new[0], new_value=new[1], write_rows=rows,
    )  # fmt: skip
    for pool, expected in zip((pages.key_pool, pages.value_pool), after, strict=True):
        assert_same_bits(pool, expected)
    apart = paged_decode(query, *after, *tables, **scales, **options)
    torch.testing.assert_close(out, apart, **TOLERANCES[layer.dtype])
    sequences = [(1, length, own) for length, own in zip(lengths, pages.pages, strict=True)]
    check(
        out, query, layer, replace(pages, key_pool=after[0], value_pool=after[1]), sequences, options_of(layer, sinks)
    )


@settings(max_examples=25, deadline=None)
@given(
    layer=layers,
    lengths=st.lists(st.sampled_from([1, 16, 17, 32, 33]) | st.integers(1, 70), min_size=1, max_size=4),
    page_size=page_sizes,
    num_splits=st.sampled_from([None, 1, 2, 3, 11]),
    block_n=st.sampled_from([16, 32]),
    padding=st.integers(0, 2),
    strides=st.sampled_from(STRIDES),
)
def test_decode_appends(layer, lengths, page_size, num_splits, block_n, padding, strides) -> None:
    config, padding = DecodeConfig(block_n, num_warps=4, num_stages=3), min(padding, len(lengths))
    check_appending_decode(layer, lengths, page_size, num_splits, config, padding=padding, strides=strides)


@pytest.mark.parametrize("window", [None, 1, 2, 16, 17])
@pytest.mark.parametrize("num_splits", [1, 4])
def test_decode_appends_around_the_edges_of_blocks(window: int | None, num_splits: int) -> None:
    layer = Layer(**{**vars(BASE), "window": window, "sinks": True})
    lengths = [1, 2, 15, 16, 17, 18, 32, 33, 49]
    check_appending_decode(layer, lengths, 16, num_splits, DecodeConfig(16, num_warps=4, num_stages=3))


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("where", [0, 1], ids=["key", "value"])
def test_decode_appends_nan(num_splits: int, where: int) -> None:
    """The row that has it is all NaN, and no other is."""
    lengths = [40, 17]
    pages = lay_out(BASE, lengths, 16)
    query, _ = make_query(BASE, 2)
    new = [torch.ones(2, BASE.kv_heads, 16, device=DEVICE) for _ in range(2)]
    new[where][0] = float("nan")
    rows = torch.tensor([own[-1] * 16 + (n - 1) % 16 for n, own in zip(lengths, pages.pages, strict=True)])
    slots, counts = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (pages.slots, lengths))
    out = paged_decode(
        query, pages.key_pool, pages.value_pool, pages.block_table, slots, counts, scaling=0.25,
        new_key=new[0], new_value=new[1], write_rows=rows.to(DEVICE),
        num_splits=num_splits, config=DecodeConfig(16, 4, 3),
    )  # fmt: skip
    assert torch.isnan(out[0]).all() and not torch.isnan(out[1]).any()


# ---- how decode is launched ------------------------------------------------------------------------------------


def test_choose_num_splits() -> None:
    def chosen(rows: int, max_blocks: int = 500, kv_heads: int = 8) -> int:
        return choose_num_splits(programs=rows * kv_heads, multiprocessors=132, max_blocks=max_blocks)

    assert [chosen(rows) for rows in (1, 4, 8, 12, 13, 16, 64, 256)] == [33, 8, 4, 3, 1, 1, 1, 1]
    assert chosen(1, max_blocks=5) == 5
    assert chosen(1, kv_heads=1, max_blocks=10**6) == 64


def test_decode_config() -> None:
    def block(rows: int, dim: int = 128) -> int:
        return decode_config(4, dim, dim, 2, programs_per_multiprocessor=rows * 8 / 132).block_n

    assert [block(rows) for rows in (1, 32, 49, 50, 64, 99, 100, 256)] == [64, 64, 64, 32, 32, 32, 64, 64]
    assert block(64, dim=64) == 64  # a block is of 16 KiB anyway
    few, many = (decode_config(4, 128, 128, 2, rows * 8 / 132, shared=True) for rows in (128, 256))
    assert few == (64, 4, 2) and many == (16, 1, 3)


# ---- prefill ---------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    spans=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 100)), max_size=5),
    first=st.integers(0, 3),
    rows=st.integers(1, 17),
)
def test_tiles_cover_every_row_once(spans: list[tuple[int, int]], first: int, rows: int) -> None:
    starts = first + np.cumsum([0, *(length for length, _ in spans)])
    tiles = make_tiles([(int(start), *span) for start, span in zip(starts, spans, strict=False)], rows)
    assert tiles.dtype == np.int32 and tiles.flags.c_contiguous
    found = {
        row + i: (position + i, table_row) for row, count, position, table_row in tiles.tolist() for i in range(count)
    }
    assert found == {
        int(start) + i: (context + i, number)
        for number, (start, (length, context)) in enumerate(zip(starts, spans, strict=False))
        for i in range(length)
    }
    assert sum(tiles[:, 1]) == len(found) and (tiles[:, 1] <= rows).all()
    assert (np.diff(tiles[:, 2]) <= 0).all()


def check_prefill(
    layer: Layer, spans: list[tuple[int, int]], page_size: int, rows: int, config: PrefillConfig | None
) -> None:
    """Spans of (rows, context) after two rows that are nobody's."""
    before = 2
    pages = lay_out(layer, [context + length for length, context in spans], page_size)
    table = pages.block_table[pages.slots].contiguous()
    starts = before + np.cumsum([0, *(length for length, _ in spans)])
    tiles = make_tiles([(int(start), *span) for start, span in zip(starts, spans, strict=False)], rows)
    query, sinks = make_query(layer, int(starts[-1]))
    options = options_of(layer, sinks)
    out = torch.full((len(query), layer.heads, layer.value_dim), 7.0, dtype=layer.dtype, device=DEVICE)
    paged_prefill(
        query, pages.key_pool, pages.value_pool, table, torch.from_numpy(tiles).to(DEVICE), rows=rows, out=out,
        key_scale=pages.scales[0], value_scale=pages.scales[1], config=config, **options,
    )  # fmt: skip
    assert (out[:before] == 7.0).all()
    sequences = [(length, context + length, own) for (length, context), own in zip(spans, pages.pages, strict=True)]
    check(out[before:], query[before:], layer, pages, sequences, options)


@settings(max_examples=40, deadline=None)
@given(
    layer=layers,
    spans=st.lists(st.tuples(st.integers(1, 20), st.one_of(st.just(0), st.integers(0, 60))), min_size=1, max_size=3),
    page_size=page_sizes,
    rows=st.integers(1, 17),
    lines=st.sampled_from([16, 32, 128]),
    block_n=st.sampled_from([16, 32]),
)
def test_prefill(layer, spans, page_size, rows, lines, block_n) -> None:
    check_prefill(layer, spans, page_size, rows, PrefillConfig(lines, block_n, num_warps=4, num_stages=2))


@pytest.mark.parametrize("window", [None, 1, 16, 40])
def test_prefill_around_the_edges_of_blocks(window: int | None) -> None:
    layer = Layer(**{**vars(BASE), "window": window})
    spans = [(rows, context) for context in (0, 1, 15, 16, 17) for rows in (1, 15, 16, 17)]
    check_prefill(layer, spans, 16, 16, PrefillConfig(32, 16, num_warps=4, num_stages=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_prefill_with_the_chosen_config(dtype: torch.dtype) -> None:
    layer = Layer(**{**vars(BASE), "dtype": dtype, "pool_dtype": dtype})
    check_prefill(layer, [(90, 70), (3, 0)], 16, rows_per_tile(layer.group), None)


def test_prefill_of_no_tiles() -> None:
    pages = lay_out(BASE, [5], 4)
    tiles = torch.from_numpy(make_tiles([], 4)).to(DEVICE)
    query, _ = make_query(BASE, 3)
    out = paged_prefill(query, pages.key_pool, pages.value_pool, pages.block_table, tiles, rows=4, scaling=1.0)
    assert out.shape == (3, BASE.heads, BASE.value_dim)


# ---- real shapes -----------------------------------------------------------------------------------------------

BIG = [
    Layer(8, 4, 128, 128, None, None, False, torch.bfloat16, torch.bfloat16, seed=1),
    Layer(8, 4, 128, 128, None, None, False, torch.bfloat16, FP8, seed=2),
    Layer(32, 1, 80, 80, None, None, False, torch.bfloat16, torch.bfloat16, seed=3),
    Layer(8, 8, 64, 64, 128, None, True, torch.bfloat16, torch.bfloat16, seed=4),
    Layer(4, 2, 256, 256, 512, 50.0, False, torch.bfloat16, torch.bfloat16, seed=5),
    Layer(2, 7, 128, 128, None, None, False, torch.float16, torch.float16, seed=6),
    Layer(16, 1, 192, 128, None, None, False, torch.bfloat16, torch.bfloat16, seed=7),
    Layer(1, 71, 64, 64, None, None, False, torch.bfloat16, torch.bfloat16, seed=8),
    Layer(4, 2, 512, 512, None, None, False, torch.bfloat16, torch.bfloat16, seed=9),
    Layer(8, 4, 128, 128, None, None, False, torch.float32, torch.float32, seed=10),
    Layer(2, 4, 256, 256, None, None, False, torch.float32, torch.float32, seed=11),
]


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("layer", BIG, ids=str)
@pytest.mark.parametrize("num_splits", [None, 1])
def test_decode_of_real_shapes(layer: Layer, num_splits: int | None) -> None:
    check_decode(layer, [1, 16, 17, 999, 1000, 1024, 2500, 777], 16, num_splits, None)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("layer", BIG, ids=str)
@pytest.mark.parametrize("num_splits", [None, 1, 16])
def test_decode_appends_to_real_shapes(layer: Layer, num_splits: int | None) -> None:
    lengths = [1, 16, 17, 999, 1000, 1024, 2500, 777]
    check_appending_decode(layer, lengths, 16, num_splits, None, padding=1, strides="a slice")


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("layer", BIG, ids=str)
def test_prefill_of_real_shapes(layer: Layer) -> None:
    check_prefill(layer, [(700, 0), (1, 30), (64, 1000), (129, 3)], 16, rows_per_tile(layer.group), None)


@pytest.mark.cuda
@needs_cuda
def test_pool_of_more_than_two_to_the_31_elements() -> None:
    """Offsets are counted in 64 bits: the one sequence lies at the end of 4.3 GB of float8."""
    num_pages, page_size = 2**31 // (16 * 8 * 128) + 64, 16
    if torch.cuda.mem_get_info()[0] < 3 * num_pages * page_size * 8 * 128:
        pytest.skip("needs 6.6 GB of free memory")
    pools = [torch.empty(num_pages, page_size, 8, 128, device=DEVICE, dtype=torch.uint8).view(FP8) for _ in range(2)]
    length, layer = 100, BIG[1]
    own = list(range(num_pages - 7, num_pages))
    rows = torch.tensor([own[p // page_size] * page_size + p % page_size for p in range(length)], device=DEVICE)
    new = [torch.randn(length, 8, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
    append_kv(*new, *pools, rows)
    query, _ = make_query(layer, length)
    table = torch.tensor([own], dtype=torch.int32, device=DEVICE)
    kept = [pool[own].float() for pool in pools]
    expected = reference.paged_attention(
        query.float(), *kept, [(length, length, list(range(len(own))))], layout="NHD", scaling=0.1
    )
    slots, lengths = (torch.tensor([x], dtype=torch.int32, device=DEVICE) for x in (0, length))
    last = paged_decode(query[-1:], *pools, table, slots, lengths, scaling=0.1)
    tiles = torch.from_numpy(make_tiles([(0, length, 0)], 32)).to(DEVICE)
    out = paged_prefill(query, *pools, table, tiles, rows=32, scaling=0.1)
    torch.testing.assert_close(last.float(), expected[-1:], **TOLERANCES[torch.bfloat16])
    torch.testing.assert_close(out.float(), expected, **TOLERANCES[torch.bfloat16])
