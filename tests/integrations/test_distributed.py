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


def run(strategy: str, adapter: str, out: Path) -> list[dict[str, Any]]:
    """What each of two ranks of `rank_main.py` reports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    command += [str(Path(__file__).with_name("rank_main.py")), strategy, adapter, str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


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
