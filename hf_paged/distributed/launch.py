"""Ranks started from within: rank 0 is the calling process, the others are its children and do what it does.

    with start(functools.partial(load_part, "path/to/model"), 2) as ranks:
        outputs = ranks.model.generate_many(prompts)

Children are processes of their own kind (`python -m hf_paged.distributed.launch`), so that the caller's script needs no
`if __name__ == "__main__"`.
"""

from __future__ import annotations

import functools
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hf_paged.distributed.errors import ParallelError, PeerLost
from hf_paged.distributed.groups import TIMEOUT_S, TensorParallel, join, num_ranks
from hf_paged.distributed.lockstep import ParallelEngine, follow
from hf_paged.model.introspect import causal_lm

logger = logging.getLogger(__name__)

Build = Callable[[TensorParallel], Any]
"""Makes a rank's part of a model, wrapped; picklable, by its module and name."""

HOST = "127.0.0.1"
END_S = 10.0
"""How long a child may take to end by itself."""


def load_part(
    path_or_id: str | Path,
    parallel: TensorParallel,
    *,
    dtype: torch.dtype | str | None = None,
    quantization: str | None = "auto",
    config: Any = None,
    tokenizer: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    options: dict[str, Any] | None = None,
) -> Any:
    """This rank's part of a checkpoint, wrapped: what `start` may build, the first argument bound. Arguments are those
    of `hf_paged.load`, and `options` for transformers."""
    from hf_paged.quantization.load import load_model
    from hf_paged.wrap import wrap

    model = load_model(
        path_or_id, dtype, quantization, revision=revision, token=token, options=options, parallel=parallel
    )
    return wrap(model, config, tokenizer=tokenizer)


def load_on_ranks(
    path_or_id: str | Path,
    tensor_parallel_size: int,
    *,
    device: torch.device | str | None = None,
    timeout_s: float = TIMEOUT_S,
    pipeline_parallel_size: int = 1,
    **options: Any,
) -> tuple[Any, Ranks | None]:
    """A checkpoint's model on several ranks, however this process was started.

    Args:
        options: of `load_part`.

    Returns:
        (the wrapped model, what stops the other ranks; None under torchrun, where they are not this process's).

    Raises:
        as `start`, `join` and `hf_paged.load`.
    """
    build: Build = functools.partial(load_part, path_or_id, **options)
    if "RANK" in os.environ:
        return build(join(tensor_parallel_size, device, timeout_s, stages=pipeline_parallel_size)), None
    ranks = start(build, tensor_parallel_size, device, timeout_s, stages=pipeline_parallel_size)
    return ranks.model, ranks


class Ranks:
    """A model spread over this process and its children.

    `model` is used as any wrapped one is, from any thread; only what goes through pages works, since the children know
    of nothing else.
    """

    def __init__(self, model: Any, parallel: TensorParallel, children: list[subprocess.Popen[bytes]]) -> None:
        self.model = model
        self.parallel = parallel
        self._children = children

    def stop(self) -> None:
        """Ends the children and the group; the model is of no use after it. A second call does nothing."""
        if self._children:
            with suppress(ParallelError):
                self.model._state().drop_engine()
            with suppress(ParallelError):
                self.parallel.link.tell("end")
            self.parallel.link.close()
            _end(self._children)
            self._children = []
            dist.destroy_process_group()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __del__(self) -> None:
        _kill(self._children)


def start(
    build: Build,
    size: int,
    device: torch.device | str | None = None,
    timeout_s: float = TIMEOUT_S,
    *,
    stages: int = 1,
) -> Ranks:
    """Spreads a model over `size * stages` processes of this host, of which this one is the first.

    Args:
        build: called on every rank.
        size: ranks that share every layer.
        stages: groups of such ranks, each with some of the layers.
        device: "cuda" or "cpu"; None: GPUs, where there are any.
        timeout_s: a rank that keeps the others waiting for so long counts as lost.

    Raises:
        ValueError: too few GPUs, or a group of processes exists already.
        ParallelError: another rank failed while it started; with its error.
    """
    total = num_ranks(size, stages)
    if dist.is_initialized():
        raise ValueError(
            "torch.distributed is in use in this process: under torchrun call hf_paged.load(..., "
            f"tensor_parallel_size={size}) on every rank instead"
        )
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    if kind == "cuda" and torch.cuda.device_count() < total:
        raise ValueError(f"the model is to be spread over {total} GPUs, and there are {torch.cuda.device_count()}")
    timeout = timedelta(seconds=timeout_s)
    job = pickle.dumps((build, kind, timeout_s, size, stages))
    store = dist.TCPStore(HOST, 0, total, is_master=True, timeout=timeout, wait_for_workers=False)
    children = [_spawn(rank, total, store.port, job) for rank in range(1, total)]
    try:
        _await(children, store, timeout_s)
        dist.init_process_group(_backend(kind), store=store, rank=0, world_size=total, timeout=timeout)
        parallel = join(size, torch.device(kind, 0) if kind == "cuda" else kind, timeout_s, stages=stages, led=True)
        model = build(parallel)
        parallel.link.exchange("loading the model", None)
        model.engine  # noqa: B018 - it is made now, while all ranks make theirs
    except BaseException as error:
        told = _error_of(children, store) if isinstance(error, Exception) else None
        _kill(children)
        if dist.is_initialized():
            dist.destroy_process_group()
        if told is not None and isinstance(error, ParallelError | dist.DistError):
            raise PeerLost(told) from error
        raise
    causal_lm(model).register_forward_pre_hook(_refuse_alone, with_kwargs=True)
    return Ranks(model, parallel, children)


def _refuse_alone(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward of this rank alone would wait for the others for ever."""
    if kwargs.get("paged") is None:
        raise RuntimeError(
            "the other ranks of this model follow its engine alone: this call (a forward of its own, or a generate() "
            "that does not go through pages) needs a script that torchrun runs on every rank"
        )


def _spawn(rank: int, size: int, port: int, job: bytes) -> subprocess.Popen[bytes]:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    environment = os.environ | {"MASTER_ADDR": HOST} | {name: str(value) for name, value in own.items()}
    # The modules that the job names may lie where only the caller's path leads.
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "hf_paged.distributed.launch"]
    child = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE)
    assert child.stdin is not None
    with suppress(BrokenPipeError):  # it has died already, which is seen in a moment
        child.stdin.write(job)
        child.stdin.close()
    return child


def _await(children: list[subprocess.Popen[bytes]], store: dist.TCPStore, timeout_s: float) -> None:
    """Waits until every child has come to where the group is made."""
    deadline = time.monotonic() + timeout_s
    while store.add("ready", 0) < len(children):
        if told := _error_of(children, store):
            raise PeerLost(told)
        if time.monotonic() > deadline:
            raise PeerLost(f"a rank has not started within {timeout_s:g} s")
        time.sleep(0.05)


def _error_of(children: list[subprocess.Popen[bytes]], store: dist.TCPStore) -> str | None:
    """What a child says of its end, or its exit code; None while all are alive."""
    time.sleep(0.2)  # an end that made this rank fail may not have got here yet
    for rank, child in enumerate(children, 1):
        if store.check([f"error {rank}"]):
            return f"rank {rank} failed while it started: {store.get(f'error {rank}').decode()}"
        if child.poll() is not None:
            return f"rank {rank} ended with exit code {child.returncode} while it started"
    return None


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + END_S
    for child in children:
        with suppress(subprocess.TimeoutExpired):
            child.wait(max(deadline - time.monotonic(), 0.1))
    _kill(children)


def _kill(children: list[subprocess.Popen[bytes]]) -> None:
    for child in children:
        if child.poll() is None:
            child.kill()
            child.wait()


def _backend(kind: str) -> str:
    return "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"


def serve() -> None:
    """A child's whole life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is rank 0's to act upon
    build, kind, timeout_s, size, stages = pickle.load(sys.stdin.buffer)
    rank, total = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(HOST, int(os.environ["MASTER_PORT"]), total, is_master=False, timeout=timeout)
    started = False
    try:
        store.add("ready", 1)
        dist.init_process_group(_backend(kind), store=store, rank=rank, world_size=total, timeout=timeout)
        parallel = join(size, kind, timeout_s, stages=stages, led=True)
        model = build(parallel)
        parallel.link.exchange("loading the model", None)
        engine: ParallelEngine = model.engine
        started = True
        follow(engine)
    except Exception as error:
        if not started:
            with suppress(Exception):  # rank 0 may be gone, and the store with it
                store.set(f"error {rank}", f"{type(error).__name__}: {error}")
        if not (started and isinstance(error, ParallelError)):
            logger.exception("rank %d ends", rank)
        sys.stderr.flush()
        os._exit(1)  # without waiting for a group whose members may be gone


if __name__ == "__main__":
    serve()
