"""Under torchrun: one list of prompts over replicas, outputs on all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jobs
import pytest
import ranks
from families import make_model

import hf_paged


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    make_model("Llama").save_pretrained(folder)
    return folder


def run(size: int, out: Path, folder: str) -> list[dict[str, Any]]:
    found = ranks.finish(ranks.start("spread", size, out, folder), out)
    assert all(result is not None for result in found), ranks.logs(out, size)
    return found


def check(found: list[dict[str, Any]], folder: str, sizes: set[int]) -> None:
    model = hf_paged.load(folder, device="cpu", **jobs.OPTIONS | {"seed": 3})
    expected = {}
    for name in ("greedy", "sampled", "unseeded"):
        outputs = model.generate_many(jobs.PROMPTS, getattr(jobs, name.upper()))
        expected[name] = [[one.token_ids for one in output.outputs] for output in outputs]
    total = model.engine.stats.generation_tokens
    for rank in found:
        for size in sizes:
            for name, tokens in expected.items():
                assert rank[f"{name} {size}"] == tokens, (name, size)
            assert rank[f"own {size}"] < total
        kind, message, _ = rank["divergence"]
        assert kind == "Divergence" and "rank 1 has other prompts" in message
        assert rank["after"] == rank["llm"] == [ids for (ids,) in expected["greedy"]]
        kind, message, _ = rank["sizes"]
        assert kind == "ValueError" and f"need {len(found) + 1}, and {len(found)} were started" in message
    for size in sizes:
        assert sum(rank[f"own {size}"] for rank in found) == size * total


def test_two_replicas(folder: str, tmp_path: Path) -> None:
    found = run(2, tmp_path, folder)
    check(found, folder, {1})
    assert [rank["exception"][0] for rank in found] == ["PeerFailed", "Broken"]
    kind, message, seconds = found[0]["death"]
    assert kind == "PeerLost" and "another process ended" in message and seconds < 30


@pytest.mark.slow
def test_two_replicas_of_two_ranks(folder: str, tmp_path: Path) -> None:
    check(run(4, tmp_path, folder), folder, {1, 2})
