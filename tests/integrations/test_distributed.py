"""Rollouts where training is spread over processes: two ranks on the CPU, each a real process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def run(strategy: str, adapter: str, out: Path, ranks: int = 2) -> list[dict[str, Any]]:
    """What each rank of `rank_main.py` reports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(ranks),
        "--master-port",
        str(port),
    ]
    out.mkdir(exist_ok=True)
    command += [str(Path(__file__).with_name("rank_main.py")), strategy, adapter, str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_ddp(tmp_path: Path, adapter: str) -> None:
    """Groups span ranks: each generates its own part of them, and all end with the same weights."""
    first, second = run("ddp", adapter, tmp_path)
    assert first["wrapper"] == "DistributedDataParallel"
    assert max(first["differences"] + second["differences"]) < 1e-4 and len(first["differences"]) == 3
    assert first["weights"] == second["weights"]
    assert first["changed"] > 0
    for mine, theirs in zip(first["completions"], second["completions"], strict=True):
        assert len({tuple(ids) for ids in mine + theirs}) == 4, "ranks draw different samples"


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_fsdp2(tmp_path: Path, adapter: str) -> None:
    """Ranks generate as long as they like on whole parameters, which are sharded again after, exceptions included."""
    for result in run("fsdp2", adapter, tmp_path):
        assert max(result["differences"]) < 1e-4 and len(result["differences"]) == 3
        assert result["broken"] == 1
        assert result["sharded"] == [True] * 4


@pytest.mark.slow
def test_rollouts_are_shared_out(tmp_path: Path) -> None:
    """Ranks draw together what one process draws, half of it each, and a failure on one is told to the other."""
    first, second = run("rollout", "full", tmp_path / "two")
    [alone] = run("rollout", "full", tmp_path / "one", 1)
    assert first["completions"] + second["completions"] == alone["completions"]
    assert len({tuple(ids) for ids in alone["completions"]}) > 8, "samples of a prompt differ"
    assert first["tokens"] + second["tokens"] == alone["tokens"]
    assert min(first["tokens"], second["tokens"]) >= alone["tokens"] / 3, "its prompts are longer"
    assert first["error"] == ["PeerFailed", "rank 1 failed: Broken: "] and second["error"][0] == "Broken"
    assert first["again"] == first["completions"] and second["again"] == second["completions"]
