"""Models spread over two processes compute what they compute in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jobs
import pytest
import ranks

import hf_paged


def run(job: str, size: int, out: Path) -> list[dict[str, Any]]:
    """What each rank reports."""
    results = ranks.finish(ranks.start(job, size, out), out)
    assert all(result is not None for result in results), ranks.logs(out, size)
    return results


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run("families", 2, tmp_path_factory.mktemp("families"))


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["greedy"] == theirs["greedy"]
    assert ours["sampled"] == theirs["sampled"]
    for one, other in zip(ours["logprobs"], theirs["logprobs"], strict=True):
        for mine, alone in zip(one, other, strict=True):
            assert mine == pytest.approx(alone, abs=1e-4)


def alone(family: str) -> dict[str, Any]:
    return jobs.generate(hf_paged.wrap(jobs.family_model(family), **jobs.OPTIONS))


@pytest.mark.parametrize("family", jobs.FAMILIES)
def test_families(found: list[dict[str, Any]], family: str) -> None:
    expected = alone(family)
    assert len({tuple(ids) for ids in expected["greedy"]}) > 1
    for rank in found:
        assert_same(rank[family], expected)


@pytest.mark.slow
def test_four_ranks(tmp_path: Path) -> None:
    """More of them than key heads."""
    found = run("families", 4, tmp_path)
    for family in jobs.FAMILIES:
        expected = alone(family)
        for rank in found:
            assert_same(rank[family], expected)


@pytest.mark.slow
def test_compiled_and_fused(tmp_path: Path) -> None:
    for rank in run("compiled", 2, tmp_path):
        assert_same(rank, alone("Llama"))
