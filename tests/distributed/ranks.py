"""Several ranks on the CPU, each a real process, that run functions of `jobs.py`."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def start(job: str, size: int, out: Path, *args: str) -> list[subprocess.Popen[bytes]]:
    """Processes that run `jobs.<job>(out, *args)`, as torchrun would start them. Their results go to `{rank}.pickle`,
    what they print to `{rank}.log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(size):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in own.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(HERE / "jobs.py"), job, str(out), *args]
        with Path(out, f"{rank}.log").open("wb") as log:
            ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    return ranks


def finish(ranks: list[subprocess.Popen[bytes]], out: Path, timeout_s: float = 240) -> list[Any]:
    """What each rank reports, None where it reports nothing. Processes left over are ended."""
    deadline = time.monotonic() + timeout_s
    try:
        for process in ranks:
            process.wait(max(deadline - time.monotonic(), 0.1))
    finally:
        for process in ranks:
            process.kill()
    return [read(out, rank) for rank in range(len(ranks))]


def read(out: Path, rank: int) -> Any:
    file = out / f"{rank}.pickle"
    return pickle.loads(file.read_bytes()) if file.exists() else None


def logs(out: Path, size: int) -> str:
    """The end of what each rank printed, for a failed assertion."""
    return "\n".join(f"--- rank {rank}\n{Path(out, f'{rank}.log').read_text()[-3000:]}" for rank in range(size))
