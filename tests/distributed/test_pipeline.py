"""Models cut into stages compute what they compute in one piece."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jobs
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from test_parallel import assert_same, run

import hf_paged
from hf_paged.distributed.lockstep import ParallelExecutor
from hf_paged.distributed.pipeline import Pipeline, cut_stage, share_layers
from hf_paged.distributed.plan import PlanError
from hf_paged.engine.model_executor import ModelExecutor


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run("staged_families", 2, tmp_path_factory.mktemp("stages"))


def alone(family: str) -> dict[str, Any]:
    return jobs.generate(hf_paged.wrap(jobs.make_staged(family), **jobs.OPTIONS))


@pytest.mark.parametrize("family", jobs.FAMILIES)
def test_families(found: list[dict[str, Any]], family: str) -> None:
    expected = alone(family)
    for rank in found:
        assert_same(rank[family, 1], expected)
    assert len({rank[family, 1]["weights"] for rank in found}) == 1, "by which steps are captured on all or on none"


@pytest.mark.parametrize("theirs", [True, False])
def test_stages_share_reads_all_or_none(monkeypatch: pytest.MonkeyPatch, theirs: bool) -> None:
    """Decode graphs that share reads are others: a stage of sliding windows alone would capture at other steps."""
    planner = object()
    monkeypatch.setattr(ModelExecutor, "_new_planner", lambda self: planner)
    executor = object.__new__(ParallelExecutor)
    link = SimpleNamespace(exchange=lambda what, value: [value, theirs])
    executor.parallel = SimpleNamespace(link=link)  # type: ignore[assignment]
    assert (executor._new_planner() is planner) == theirs


@pytest.mark.slow
def test_four_ranks(tmp_path: Path) -> None:
    """Four stages, and two of two ranks each."""
    found = run("staged_families", 4, tmp_path)
    for family in jobs.FAMILIES:
        expected = alone(family)
        for rank in found:
            assert_same(rank[family, 1], expected)
            assert_same(rank[family, 2], expected)


@pytest.mark.slow
def test_eight_ranks(tmp_path: Path) -> None:
    """Two stages of four, more than there are key heads."""
    found = run("staged_families", 8, tmp_path)
    for family in jobs.FAMILIES:
        expected = alone(family)
        for rank in found:
            assert_same(rank[family, 4], expected)


def test_more_than_layers_is_refused() -> None:
    """Gemma 4's layers also get an embedding of their own each, made from the first stage's."""
    config = transformers.Gemma4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, global_head_dim=16, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=64, num_kv_shared_layers=0,
    )  # fmt: skip
    model: Any = transformers.Gemma4ForCausalLM(config)
    names = list(model.state_dict())
    for stage in (0, 1):
        with pytest.raises(PlanError, match="embed_tokens_per_layer"):
            cut_stage(model, Pipeline(stage, 2, None))  # type: ignore[arg-type]
    assert list(model.state_dict()) == names


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(0, 20), st.integers(1, 5))
def test_layers_are_shared_out(costs: list[int], last: int, stages: int) -> None:
    if len(costs) < stages:
        with pytest.raises(PlanError, match="every stage needs one"):
            share_layers(costs, last, stages)
        return
    shares = share_layers(costs, last, stages)
    assert [layer for share in shares for layer in share] == list(range(len(costs))) and all(shares)

    def dearest(ends: list[int]) -> float:
        parts = [sum(costs[start:end]) for start, end in zip([0, *ends], [*ends, len(costs)], strict=True)]
        return max([*parts[:-1], parts[-1] + (last if stages > 1 else 0)])

    def every_cut(first: int, count: int) -> list[list[int]]:
        if not count:
            return [[]]
        return [[end, *rest] for end in range(first, len(costs)) for rest in every_cut(end + 1, count - 1)]

    best = min(dearest(ends) for ends in every_cut(1, stages - 1))
    assert dearest([share.stop for share in shares[:-1]]) == best
