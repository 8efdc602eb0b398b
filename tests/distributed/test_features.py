"""Everything that an engine does, on two ranks that torchrun started, and on two that were started from within."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jobs
import pytest
import ranks
import torch
import torch.distributed as dist

import hf_paged
from hf_paged.distributed.errors import PeerLost
from hf_paged.distributed.launch import Ranks, start


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return jobs.features(hf_paged.wrap(jobs.family_model("Llama"), **jobs.FEW_PAGES))


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    near = {"scores", "kept"}
    for name in theirs.keys() - near - {"logprobs"}:
        assert ours[name] == theirs[name], name
    for name in near:
        for mine, other in zip(ours[name], theirs[name], strict=True):
            assert mine == pytest.approx(other, abs=1e-4)


@pytest.mark.slow
def test_under_torchrun(tmp_path: Path, alone: dict[str, Any]) -> None:
    found = ranks.finish(ranks.start("every_feature", 2, tmp_path), tmp_path)
    assert all(found), ranks.logs(tmp_path, 2)
    for rank in found:
        assert_same(rank["plain"], alone)
        assert_same(rank["drafting"], alone)


@pytest.mark.parametrize(("size", "stages"), [(2, 1), (1, 2)])
def test_started_from_within(alone: dict[str, Any], size: int, stages: int) -> None:
    """Rank 0 is called like any model, and survives its own interrupts; a forward that the others do not know of is
    refused, and their death is an error."""
    with start(jobs.build_part, size, "cpu", timeout_s=60, stages=stages) as group:
        model = group.model
        assert_same(jobs.features(model), alone)
        with pytest.raises(RuntimeError, match="torchrun" if stages == 1 else "pipeline parallelism"):
            model(torch.tensor([[1, 2]]))
        with pytest.raises(ValueError, match="picklable"):
            model.generate_many([[1, 2]], hf_paged.SamplingParams(logits_processors=[lambda ids, scores: scores]))
        with pytest.raises(RuntimeError, match="torchrun" if stages == 1 else "pipeline parallelism"):
            model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, assistant_model=jobs.family_model("Llama"))
        jobs.hear_interrupts()
        jobs.at_step(model, 2, jobs.interrupt)
        with pytest.raises(KeyboardInterrupt):
            jobs.generate(model)
        jobs.at_step(model, 2, jobs.fail)
        with pytest.raises(jobs.Broken):
            jobs.generate(model)
        assert model.engine.scheduler.num_active_pages == 0
        again = jobs.generate(model)
        assert again["greedy"] == alone["greedy"] and again["sampled"] == alone["sampled"]
        check_death(group)
    assert not dist.is_initialized()


def check_death(group: Ranks) -> None:
    [child] = group._children
    jobs.at_step(group.model, 2, child.kill)
    with pytest.raises(PeerLost, match="rank 1 ended"):
        jobs.generate(group.model)
    with pytest.raises(PeerLost, match="rank 1 ended"):
        jobs.generate(group.model)


def test_a_rank_that_does_not_start() -> None:
    with pytest.raises(PeerLost, match="rank 1 failed while it started: Broken: no model today"):
        start(jobs.build_nothing, 2, "cpu", timeout_s=60)
    with pytest.raises(PeerLost, match="exit code 3"):
        start(jobs.die_at_once, 2, "cpu", timeout_s=60)
    assert not dist.is_initialized()
