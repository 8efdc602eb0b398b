"""Models spread over two processes compute what they compute in one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jobs
import pytest
import ranks

import hf_paged
from hf_paged.distributed.link import _own_address


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


@pytest.mark.slow
def test_two_hosts(tmp_path: Path) -> None:
    """As far as one machine can be two: torchrun is started once on each, with one rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    hosts = []
    for host in range(2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        command += ["--node-rank", str(host), "--master-addr", "127.0.0.1", "--master-port", str(port)]
        command += [str(Path(jobs.__file__)), "one_family", str(tmp_path)]
        with Path(tmp_path, f"{host}.log").open("wb") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            hosts.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    for rank in ranks.finish(hosts, tmp_path):
        assert rank is not None, ranks.logs(tmp_path, 2)
        assert_same(rank, alone("Llama"))


def test_the_address_that_others_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert _own_address() == "127.0.0.1"
