"""What goes wrong on one rank is an error on all of them, in time, and names it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import ranks

from hf_paged.distributed.link import SLICE_S, Link


@pytest.fixture(scope="module", params=["ranks", "stages"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of two ranks that share all layers, and of two with some each."""
    out: Path = tmp_path_factory.mktemp("faults")
    results = ranks.finish(ranks.start("faults", 2, out, request.param), out)
    assert all(result is not None for result in results), ranks.logs(out, 2)
    assert "death" in results[0], ranks.logs(out, 2)
    return results


def test_refusals(found: list[dict[str, Any]]) -> None:
    """Of options, while the engine is made; it can be made with others after that."""
    for rank in found:
        kinds, messages, _ = zip(*rank["refused"], strict=True)
        assert kinds == ("ValueError",) * 3
        assert "exact=True" in messages[0] and "speculation" in messages[1] and "9999" in messages[2]


def test_the_rank_with_the_least_memory_decides(found: list[dict[str, Any]]) -> None:
    assert [rank["pages"] for rank in found] == [(30, 64)] * 2


def test_interrupts(found: list[dict[str, Any]]) -> None:
    for rank in found:
        (kind, _, _), pages, after = rank["interrupt"]
        assert (kind, pages) == ("KeyboardInterrupt", 0)
        assert (after,) == rank["before"]


def test_an_exception_on_one_rank(found: list[dict[str, Any]]) -> None:
    """Outside of collectives: all let go of what they were doing, and can go on."""
    kinds = [rank["exception"][0][0] for rank in found]
    assert kinds == ["PeerFailed", "Broken"]
    assert "rank 1 failed: Broken" in found[0]["exception"][0][1]
    for rank in found:
        assert rank["exception"][1] == 0
        assert (rank["exception"][2],) == rank["before"]


def test_divergence(found: list[dict[str, Any]]) -> None:
    for rank in found:
        for kind, message, seconds in rank["divergence"]:
            assert kind == "Divergence" and "rank 1 differs from rank 0" in message and seconds < 5


def test_whoever_agreed_is_not_interrupted() -> None:
    """Rank 0 would begin the step, and wait in it for a rank that has let go of it, or take the next one's for it."""
    ends = Pipe()
    first, second = (Link(rank, 2, {1 - rank: end}, timeout_s=10) for rank, end in enumerate(ends))

    def interrupt() -> None:
        raise KeyboardInterrupt

    second.check = interrupt
    with ThreadPoolExecutor(max_workers=1) as thread:
        other = thread.submit(second.agree, "the next step", 7)
        time.sleep(3 * SLICE_S)
        first.agree("the next step", 7)
        other.result()
    assert second.check is interrupt
    with pytest.raises(KeyboardInterrupt):
        second.exchange("tokens", 7)


def test_a_rank_that_hangs(found: list[dict[str, Any]]) -> None:
    kind, message, seconds = found[0]["hang"][0]
    assert kind == "PeerLost" and "rank 1 has not answered for 2 s" in message and 2 <= seconds < 4.5
    assert found[1]["hang"][0][0] == "PeerLost"


def test_a_rank_that_dies(found: list[dict[str, Any]]) -> None:
    """In the middle of a forward."""
    for kind, message, seconds in found[0]["death"]:
        assert kind == "PeerLost" and "rank 1 ended" in message and seconds < 5
    assert [rank["fine"] for rank in found] == [(None,)] * 2
    assert "rank 1 ended" in found[0]["lost"][0]
