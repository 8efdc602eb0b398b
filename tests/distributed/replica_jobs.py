"""What the replicas of `test_replicas.py` are and do; their processes import it."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "models")]

import jobs  # noqa: E402
import torch  # noqa: E402

import hf_paged  # noqa: E402

OPTIONS = {"num_pages": 64, "page_size": 8, "max_num_batched_tokens": 48, "max_num_seqs": 6, "seed": 3}


def build() -> tuple[Any, None]:
    torch.set_num_threads(1)
    return hf_paged.wrap(jobs.family_model("Llama"), **OPTIONS), None


def build_nothing() -> Any:
    raise jobs.Broken("no model today")


def build_and_die() -> Any:
    os._exit(3)


def pid(worker: Any) -> int:
    return os.getpid()


def name_of(model: Any) -> str:
    return type(model).__name__


def pages(worker: Any) -> int:
    return int(worker.engine.scheduler.num_active_pages)


def cached(worker: Any) -> int:
    return int(worker.engine.scheduler.tree.num_pages)


def fail_next_step(worker: Any) -> None:
    jobs.at_step(worker, 1, jobs.fail)  # type: ignore[arg-type]


def hang_in_next_step(worker: Any) -> None:
    jobs.at_step(worker, 1, threading.Event().wait)  # type: ignore[arg-type]


def slow_down(worker: Any, seconds: float = 0.05) -> None:
    """Of each step, so that something can be done in the middle."""
    worker.engine.observers.append(lambda record: time.sleep(seconds))


def hurry(worker: Any) -> None:
    del worker.engine.observers[1:]  # but the replica's own


def unpicklable(worker: Any) -> Any:
    return lambda: None
