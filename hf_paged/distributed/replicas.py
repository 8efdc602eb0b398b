"""Replicas of a model, each with an engine in a process of its own: how they are started, called and ended.

`replicated.py` makes them look like one engine.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from hf_paged.distributed.errors import ReplicaLost
from hf_paged.distributed.groups import TIMEOUT_S
from hf_paged.distributed.replica import Build, Facts, State
from hf_paged.outputs import RequestOutput

logger = logging.getLogger(__name__)

END_S = 10.0
"""How long a replica may take to end by itself."""


class Handle:
    """A replica as the calling process sees it. What goes to it and what comes from it has a thread each, so that
    neither side ever waits for the other to read.

    Args:
        number, size: which it is, of how many; they share the host's cores.
        devices: what CUDA_VISIBLE_DEVICES is there; None leaves it as it is.
        job: the pickled `Build`, and the extension of its worker.
    """

    def __init__(self, number: int, size: int, job: bytes, devices: str | None) -> None:
        self.number = number
        self.facts: Future[Facts] = Future()
        """Known when it is ready."""
        self.state: State | None = None
        self.lost: ReplicaLost | None = None
        self.heard_s = self.moved_s = time.monotonic()
        """When it was last heard of, and when it had last finished a step or had nothing to do."""
        self.on_news: Callable[[Handle, list[RequestOutput]], None] = lambda handle, outputs: None
        self.on_lost: Callable[[Handle], None] = lambda handle: None
        self._calls: dict[int, tuple[Future[Any], bool]] = {}
        self._lock = threading.Lock()
        self._outgoing: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._connection, child = Pipe()
        self._process = _spawn(child, devices, size)
        child.close()
        self.send(number, job)
        for work in (self._write, self._read):
            threading.Thread(target=work, name=f"hf_paged-replica-{number}", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def called(self) -> bool:
        """Whether it is at work for a `call` that may take as long as it likes."""
        return any(long for _, long in list(self._calls.values()))

    def send(self, *message: Any) -> None:
        """Has a message sent, without waiting for it."""
        self._outgoing.put(message)

    def call(self, work: Callable[[Any], Any], long: bool) -> Future[Any]:
        """Has `work(worker)` done there, picklable as are its arguments and its result. The future raises what that
        raises, or ReplicaLost."""
        parcel, answer = pickle.dumps(work), Future[Any]()
        with self._lock:
            number = max(self._calls, default=0) + 1
            self._calls[number] = answer, long
        if self.lost is not None:
            self._answer(number, (False, self.lost))
        self.send("call", number, parcel)
        return answer

    def kill(self, error: ReplicaLost) -> None:
        """Ends it at once."""
        self.lost = self.lost or error
        self._process.kill()

    def close(self, deadline: float) -> None:
        """Ends it, by force when it has not ended at this time (of `time.monotonic()`)."""
        self.lost = self.lost or ReplicaLost(f"replica {self.number} was closed")
        self.send("end")
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(deadline - time.monotonic(), 0.1))
        self._process.kill()
        self._process.wait()

    def _write(self) -> None:
        with suppress(OSError):  # it is gone, which `_read` sees
            while (message := self._outgoing.get()) is not None:
                self._connection.send(message)

    def _read(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                kind, *rest = self._connection.recv()
                self.heard_s = time.monotonic()
                if kind == "news":
                    outputs, state = rest
                    self._look(state)
                    self.on_news(self, outputs)
                elif kind == "answer":
                    self._answer(rest[0], pickle.loads(rest[1]))
                elif kind == "ready":
                    facts, self.state = rest
                    self.facts.set_result(facts)
                elif kind == "failed":
                    self.facts.set_exception(rest[0])
        self._outgoing.put(None)
        code = self._process.wait()
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        self.lost = self.lost or ReplicaLost(f"replica {self.number} ended {how}: look for its own error in the log")
        if not self.facts.done():
            self.facts.set_exception(self.lost)
        for number in list(self._calls):
            self._answer(number, (False, self.lost))
        self.on_lost(self)

    def _look(self, state: State) -> None:
        if self.state is None or state.stats.steps > self.state.stats.steps:
            self.moved_s = time.monotonic()
        self.state = state

    def _answer(self, number: int, answer: tuple[bool, Any]) -> None:
        with self._lock:
            future, _ = self._calls.pop(number, (None, False))
        if future is not None:
            good, value = answer
            (future.set_result if good else future.set_exception)(value)


def start(
    build: Build,
    size: int,
    *,
    devices: Sequence[str] | None = None,
    extension: type | str | None = None,
    timeout_s: float = TIMEOUT_S,
) -> list[Handle]:
    """Starts replicas and waits until all are ready.

    Args:
        build: called in each; picklable.
        size: their number.
        devices: what CUDA_VISIBLE_DEVICES is in each; None leaves it as it is.
        extension: of their workers; see `hf_paged.llm.worker.make_worker`.
        timeout_s: one that is not heard of for so long counts as lost.

    Raises:
        whatever `build` raises there, ReplicaLost; then none is left.
    """
    job = pickle.dumps((build, extension))
    handles = [Handle(number, size, job, None if devices is None else devices[number]) for number in range(size)]
    try:
        for handle in handles:
            while not handle.facts.done():
                futures.wait([handle.facts], timeout=0.5)
                watch(handles, timeout_s)
            handle.facts.result()
    except BaseException:
        close(handles, 0.0)
        raise
    return handles


def watch(handles: Sequence[Handle], timeout_s: float, busy: Callable[[Handle], bool] = lambda handle: False) -> None:
    """Ends replicas that hang.

    Args:
        busy: whether one should be computing steps.
    """
    now = time.monotonic()
    for handle in handles:
        if handle.lost is not None:
            continue
        if not busy(handle) or handle.called:
            handle.moved_s = now
        if now - handle.heard_s > timeout_s:
            handle.kill(ReplicaLost(f"replica {handle.number} was not heard of for {timeout_s:g} s: it hangs"))
        elif now - handle.moved_s > timeout_s:
            handle.kill(ReplicaLost(f"replica {handle.number} has finished no step for {timeout_s:g} s: it hangs"))


def close(handles: Sequence[Handle], patience_s: float = END_S) -> None:
    """Ends replicas, by force after `patience_s`."""
    deadline = time.monotonic() + patience_s
    for handle in handles:
        handle.send("end")
    for handle in handles:
        handle.close(deadline)


def _spawn(child: Connection, devices: str | None, size: int) -> subprocess.Popen[bytes]:
    # The modules that a job names may lie where only the caller's path leads.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = devices
    environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // size, 1)))
    # Not with -m: what is defined in a program's main module could not be read at the other end.
    command = [sys.executable, "-c", f"from hf_paged.distributed.replica import main; main({child.fileno()})"]
    return subprocess.Popen(command, env=environment, pass_fds=[child.fileno()], stdin=subprocess.DEVNULL)
