"""Finding what rows share, against a naive comparison of pages; and plans that fit their limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_paged.attention.backend import LayerSpec
from hf_paged.attention.shared import SharedLimits, SharedPlanner, can_share, make_plan, shared_ranges
from hf_paged.engine.request import Request, Sequence
from hf_paged.kernels.shared_ranges import ALIGNMENT
from hf_paged.sampling_params import SamplingParams

PAGE = 16
PER_ALIGNMENT = ALIGNMENT // PAGE


@st.composite
def forests(draw: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose pages form a forest: (table [B, P], tokens stored [B])."""
    chains: list[list[int]] = [[]]
    ids = iter(range(1, 10**6))
    for _ in range(draw(st.integers(0, 5))):
        parent = draw(st.sampled_from(chains))
        chains.append(parent + [next(ids) for _ in range(draw(st.integers(1, 3 * PER_ALIGNMENT)))])
    rows, stored = [], []
    for _ in range(draw(st.integers(1, 12))):
        chain = draw(st.sampled_from(chains))
        own = [next(ids) for _ in range(draw(st.integers(1, 6)))]
        rows.append(chain + own)
        stored.append(draw(st.integers(0, len(rows[-1]) * PAGE - 1)))
    width = max(map(len, rows))
    table = np.zeros((len(rows), width), dtype=np.int32)
    for place, pages in enumerate(rows):
        table[place, : len(pages)] = pages
        table[place, len(pages) :] = draw(st.integers(0, 50))  # what lies beyond a sequence's pages is arbitrary
    return table, np.array(stored)


def naive_cover(table: np.ndarray, stored: np.ndarray, row: int) -> int:
    """Tokens that the row has in common with any other, in whole alignments."""
    most = 0
    for other in range(len(table)):
        if other != row:
            limit = min(stored[row], stored[other]) // PAGE
            same = table[row, :limit] == table[other, :limit]
            most = max(most, limit if same.all() else int(same.argmin()))
    return most * PAGE // ALIGNMENT * ALIGNMENT


@settings(max_examples=200, deadline=None)
@given(forests())
def test_ranges_are_what_rows_share(forest: tuple[np.ndarray, np.ndarray]) -> None:
    table, stored = forest
    covered = np.zeros(len(table), dtype=int)
    for shared in shared_ranges(table, stored, PAGE):
        assert len(shared.rows) > 1 and shared.begin < shared.end
        assert shared.begin % ALIGNMENT == shared.end % ALIGNMENT == 0
        assert (covered[shared.rows] == shared.begin).all(), "a gap"
        pages = table[shared.rows, : shared.end // PAGE]
        assert (pages == pages[0]).all() and (stored[shared.rows] >= shared.end).all()
        covered[shared.rows] = shared.end
    assert covered.tolist() == [naive_cover(table, stored, row) for row in range(len(table))]


@settings(max_examples=200, deadline=None)
@given(
    forests(),
    st.builds(
        SharedLimits,
        tile_rows=st.sampled_from([1, 2, 4, 16]),
        max_items=st.integers(1, 12),
        max_rows=st.integers(1, 30),
        max_parts=st.integers(1, 4),
    ),
    st.integers(1, 20),
)
def test_plans_cover_each_token_once_and_fit(forest: Any, limits: SharedLimits, wanted: int) -> None:
    table, stored = forest
    plan = make_plan(shared_ranges(table, stored, PAGE), len(table), limits, wanted)
    if plan is None:
        return
    assert len(plan.items) <= limits.max_items and len(plan.rows) <= limits.max_rows
    assert plan.num_parts.max() <= limits.max_parts and (plan.lengths < stored + 1).all()
    parts: dict[int, dict[int, tuple[int, int]]] = {row: {} for row in range(len(table))}
    for first, count, begin, end, part, pages_of in plan.items.tolist():
        assert 1 <= count <= limits.tile_rows and begin < end and begin % ALIGNMENT == end % ALIGNMENT == 0
        for row in plan.rows[first : first + count].tolist():
            assert part not in parts[row]
            parts[row][part] = begin, end
            assert (table[row, : end // PAGE] == table[pages_of, : end // PAGE]).all()
    for row, own in parts.items():
        assert sorted(own) == list(range(plan.num_parts[row]))
        edges = [own[part] for part in sorted(own)]
        assert [b for b, _ in edges] == [0, *(e for _, e in edges)][: len(edges)], "parts follow one another"
        assert plan.lengths[row] == (edges[-1][1] if edges else 0)
    lengths = plan.items[:, 3] - plan.items[:, 2]
    assert (np.diff(lengths) <= 0).all(), "longest first"


def group(prompt: int, samples: int, own: int, first_slot: int = 0) -> list[Sequence]:
    request = Request("r", [1] * prompt, SamplingParams(n=samples))
    for slot, sequence in enumerate(request.sequences, first_slot):
        sequence.slot, sequence.num_computed = slot, prompt + own
    return request.sequences


def planner() -> SharedPlanner:
    return SharedPlanner(page_size=PAGE, token_bytes=4096, kv_heads=8, group=4, multiprocessors=132)


def block_table(groups: list[list[Sequence]], shared: int) -> np.ndarray:
    """Samples share the pages of the first `shared` tokens."""
    sequences = [sequence for own in groups for sequence in own]
    table = np.arange(1, 1 + len(sequences) * 600, dtype=np.int32).reshape(len(sequences), 600)
    for own in groups:
        table[[s.slot for s in own], : shared // PAGE] = table[own[0].slot, : shared // PAGE]
    return table


def test_rollouts_share_and_strangers_do_not() -> None:
    groups = [group(2048, 16, 256, 16 * i) for i in range(16)]
    sequences = [sequence for own in groups for sequence in own]
    plan = planner().plan(sequences, block_table(groups, 2048))
    assert plan is not None and (plan.lengths == 2048).all()
    assert planner().plan(sequences, block_table(groups, 0)) is None
    assert planner().plan(sequences[:1], block_table(groups, 2048)) is None
    assert planner().plan([], block_table(groups, 0)) is None


def test_a_little_in_common_is_not_worth_a_kernel() -> None:
    groups = [group(128, 2, 1500, 2 * i) for i in range(16)]
    assert planner().plan([s for own in groups for s in own], block_table(groups, 128)) is None


def test_which_layers_can_share() -> None:
    layer = LayerSpec(0, num_heads=8, num_kv_heads=2, key_dim=128, value_dim=128, scaling=1.0)
    assert can_share(layer) and can_share(replace(layer, key_dim=256, value_dim=256, softcap=30.0, sinks=True))
    assert not can_share(replace(layer, window=512)), "it looks back to few tokens only"
    assert not can_share(replace(layer, key_dim=576, value_dim=512)), "no room beside the queries on every GPU"


def test_a_few_rows_are_spread_over_the_device() -> None:
    own = group(8192, 16, 128)
    plan = planner().plan(own, block_table([own], 8192))
    assert plan is not None and len(plan.items) >= 16


def test_a_plan_is_kept_while_the_same_sequences_decode() -> None:
    groups = [group(2048, 16, 256, 16 * i) for i in range(4)]
    sequences = [sequence for own in groups for sequence in own]
    table, own = block_table(groups, 2048), planner()
    plan = own.plan(sequences, table)
    assert plan is not None and own.plan(list(sequences), table) is plan
    fewer = own.plan(sequences[1:], table)
    assert fewer is not None and len(fewer.lengths) == len(sequences) - 1
    own.plan(sequences[:1], table)
    assert own.plan(sequences[1:], table) is not fewer, "what was forgotten is planned anew"
