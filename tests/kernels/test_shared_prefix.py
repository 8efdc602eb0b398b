"""Decode that reads shared prefixes once, against the reference, over random groups.

Without a GPU the kernels run in Triton's interpreter; see test_attention_kernels.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from test_attention_kernels import BASE, BIG, DEVICE, TOLERANCES, Layer, check, lay_out, layers, make_query, needs_cuda

from hf_paged.attention.shared import SharedLimits, SharedPlan, make_plan, shared_ranges
from hf_paged.kernels.shared_ranges import ALIGNMENT, SharedRanges
from hf_paged.kernels.triton.append import append_kv
from hf_paged.kernels.triton.paged_decode import DecodeConfig, paged_decode

PAGE = 16

Group = tuple[int, int]
"""(tokens shared, rows)."""


def on_device(plan: SharedPlan, slots: list[int], max_parts: int) -> SharedRanges:
    """The plan, with room that nobody uses."""
    items = np.full((len(plan.items) + 3, 6), 10**6, dtype=np.int32)
    items[: len(plan.items)] = plan.items
    items[: len(plan.items), -1] = np.array(slots)[plan.items[:, -1]]
    arrays = (items, np.array([len(plan.items)], dtype=np.int32), plan.rows, plan.lengths, plan.num_parts)
    return SharedRanges(*(torch.from_numpy(a).to(DEVICE) for a in arrays), max_parts, plan.tile_rows)


def check_shared(
    layer: Layer,
    groups: list[Group],
    own: list[int],
    *,
    system: int = 0,
    num_splits: int | None = None,
    config: DecodeConfig | None = None,
    limits: SharedLimits | None = None,
    wanted: int = 4,
    appends: bool = False,
) -> SharedPlan | None:
    """Groups whose rows share their pages, after `system` tokens that all of them share; row i has `own[i]` more.
    Without a plan (too little in common, or too little room), nothing is checked."""
    shared = [system + length for length, count in groups for _ in range(count)]
    lengths = [length + more for length, more in zip(shared, own, strict=True)]
    pages = lay_out(layer, lengths, PAGE)
    first, tables = 0, [list(p) for p in pages.pages]
    for length, count in groups:
        for row in range(first, first + count):
            common, everybodys = (system + length) // PAGE, system // PAGE
            tables[row][:common] = tables[first][:common]
            tables[row][:everybodys] = tables[0][:everybodys]
            pages.block_table[pages.slots[row], : len(tables[row])] = torch.tensor(tables[row], dtype=torch.int32)
        first += count
    table = pages.block_table[pages.slots].cpu().numpy()
    limits = limits or SharedLimits.of(len(lengths), layer.group)
    ranges = shared_ranges(table, np.array(lengths) - 1, PAGE)
    plan = make_plan(ranges, len(lengths), limits, wanted)
    if plan is None:
        return None
    query, sinks = make_query(layer, len(lengths))
    options: dict[str, Any] = {"scaling": layer.key_dim**-0.5, "softcap": layer.softcap, "sinks": sinks}
    scales = dict(zip(("key_scale", "value_scale"), pages.scales, strict=True))
    slots, counts = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (pages.slots, lengths))
    new: dict[str, Any] = {}
    after = pages
    if appends:
        generator = torch.Generator().manual_seed(layer.seed + 2)
        key, value = (
            torch.randn(len(lengths), layer.kv_heads, dim, generator=generator).to(layer.dtype).to(DEVICE)
            for dim in (layer.key_dim, layer.value_dim)
        )
        places = [t[(n - 1) // PAGE] * PAGE + (n - 1) % PAGE for n, t in zip(lengths, tables, strict=True)]
        rows = torch.tensor(places, device=DEVICE)
        new = {"new_key": key, "new_value": value, "write_rows": rows}
        after = replace(pages, key_pool=pages.key_pool.clone(), value_pool=pages.value_pool.clone())
        append_kv(key, value, after.key_pool, after.value_pool, rows, **scales)
    out = paged_decode(
        query, pages.key_pool, pages.value_pool, pages.block_table, slots, counts, **scales, **options, **new,
        num_splits=num_splits, config=config, shared=on_device(plan, pages.slots, limits.max_parts),
    )  # fmt: skip
    sequences = [(1, length, own_pages) for length, own_pages in zip(lengths, tables, strict=True)]
    check(out, query, layer, after, sequences, options)
    return plan


@st.composite
def steps(draw: Any) -> tuple[list[Group], list[int]]:
    groups = draw(
        st.lists(st.tuples(st.sampled_from([64, 80, 128, 192]), st.integers(1, 4)), min_size=1, max_size=3).filter(
            lambda groups: any(count > 1 for _, count in groups)
        )
    )
    rows = sum(count for _, count in groups)
    return groups, draw(st.lists(st.integers(1, 40), min_size=rows, max_size=rows))


@settings(max_examples=12, deadline=None)
@given(
    layer=layers,
    step=steps(),
    num_splits=st.sampled_from([None, 1, 3]),
    block_n=st.sampled_from([16, 32]),
    limits=st.none()
    | st.builds(SharedLimits, st.sampled_from([1, 2, 8]), st.integers(6, 20), st.integers(12, 40), st.integers(1, 3)),
    wanted=st.integers(1, 9),
    appends=st.booleans(),
)
def test_shared_decode(layer, step, num_splits, block_n, limits, wanted, appends) -> None:
    groups, own = step
    config = DecodeConfig(block_n, num_warps=4, num_stages=3)
    layer = replace(layer, window=None)
    options = {"num_splits": num_splits, "config": config, "limits": limits, "wanted": wanted, "appends": appends}
    assume(check_shared(layer, groups, own, **options) is not None)


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("appends", [False, True])
def test_a_system_prompt_is_a_level_of_its_own(num_splits: int, appends: bool) -> None:
    groups, own = [(192, 3), (128, 2), (256, 1)], [1, 2, 40, 1, 17, 5]
    plan = check_shared(BASE, groups, own, system=128, num_splits=num_splits, appends=appends)
    assert plan is not None and plan.lengths.tolist() == [320, 320, 320, 256, 256, 128]
    assert len({tuple(item[2:4]) for item in plan.items.tolist()}) > 2


def test_a_long_prefix_in_parts() -> None:
    plan = check_shared(BASE, [(1024, 2)], [3, 20], wanted=50)
    assert plan is not None and plan.num_parts.tolist() == [4, 4]


def test_more_rows_than_an_item_holds() -> None:
    plan = check_shared(BASE, [(64, 19)], list(range(1, 20)))
    assert plan is not None and sorted(plan.items[:, 1].tolist()) == [3, 16]


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("layer", [layer for layer in BIG if layer.window is None], ids=str)
@pytest.mark.parametrize("num_splits", [None, 8])
def test_shared_decode_of_real_shapes(layer: Layer, num_splits: int | None) -> None:
    groups = [(1024, 16), (512, 8), (2048, 5), (640, 1)]
    own = [1 + 37 * i for i in range(30)]
    plan = check_shared(layer, groups, own, system=256, num_splits=num_splits, appends=True, wanted=33)
    assert plan is not None and (plan.lengths[:29] >= 512 // ALIGNMENT * ALIGNMENT).all()


@pytest.mark.cuda
@needs_cuda
def test_a_graph_goes_on_with_another_plan() -> None:
    """Captured once, replayed over groups that it was not captured with."""
    layer, rows = BIG[0], 24
    pages = lay_out(layer, [600] * rows, PAGE)
    query, _ = make_query(layer, rows)
    slots, lengths = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (pages.slots, [600] * rows))
    limits = SharedLimits.of(rows, layer.group)
    buffers = SharedRanges(
        torch.zeros(limits.max_items, 6, dtype=torch.int32, device=DEVICE),
        torch.zeros(1, dtype=torch.int32, device=DEVICE),
        *(torch.zeros(n, dtype=torch.int32, device=DEVICE) for n in (limits.max_rows, rows, rows)),
        max_parts=limits.max_parts, tile_rows=limits.tile_rows,
    )  # fmt: skip

    def run() -> torch.Tensor:
        return paged_decode(
            query, pages.key_pool, pages.value_pool, pages.block_table, slots, lengths, scaling=0.1, shared=buffers
        )

    expected = run().clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for counts in ([8, 8, 8], [24], [2, 20, 2]):
        first = 0
        for count in counts:
            members = slice(first, first + count)
            shared = pages.block_table[pages.slots[first], : 512 // PAGE].clone()
            pages.block_table[pages.slots[members], : 512 // PAGE] = shared
            first += count
        table = pages.block_table[pages.slots].cpu().numpy()
        plan = make_plan(shared_ranges(table, np.full(rows, 599), PAGE), rows, limits, 16)
        assert plan is not None
        given_plan = on_device(plan, pages.slots, limits.max_parts)
        for buffer, array in zip(buffers[:5], given_plan[:5], strict=True):
            buffer.view(-1)[: array.numel()] = array.reshape(-1)[: buffer.numel()]
        graph.replay()
        plain = paged_decode(query, pages.key_pool, pages.value_pool, pages.block_table, slots, lengths, scaling=0.1)
        torch.testing.assert_close(out, plain, **TOLERANCES[torch.bfloat16])
    assert not torch.equal(out, expected)
