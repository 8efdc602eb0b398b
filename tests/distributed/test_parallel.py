"""Models spread over two processes compute what they compute in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jobs
import pytest
import ranks

import hf_paged


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks report."""
    out: Path = tmp_path_factory.mktemp("families")
    results = ranks.finish(ranks.start("families", 2, out), out)
    assert all(result is not None for result in results), ranks.logs(out, 2)
    return results


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["greedy"] == theirs["greedy"]
    assert ours["sampled"] == theirs["sampled"]
    for one, other in zip(ours["logprobs"], theirs["logprobs"], strict=True):
        for mine, alone in zip(one, other, strict=True):
            assert mine == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("family", jobs.FAMILIES)
def test_families(found: list[dict[str, Any]], family: str) -> None:
    alone = jobs.generate(hf_paged.wrap(jobs.family_model(family), **jobs.OPTIONS))
    assert len({tuple(ids) for ids in alone["greedy"]}) > 1
    for rank in found:
        assert_same(rank[family], alone)
