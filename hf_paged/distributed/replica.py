"""A replica's process: an engine of its own, called through a pipe.

`replicas.py` starts it, and is at the pipe's other end.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from hf_paged.distributed.errors import ParallelError, PeerFailed, ReplicaFailed
from hf_paged.distributed.parcel import pack_output, picklable, unpack_request
from hf_paged.engine.engine import Engine
from hf_paged.engine.stats import EngineLoad, EngineStats, StepRecord
from hf_paged.llm.worker import Worker, make_worker
from hf_paged.lora.travel import AdapterNews, AdapterReceiver
from hf_paged.model.introspect import causal_lm
from hf_paged.outputs import RequestOutput

logger = logging.getLogger(__name__)

BEAT_S = 0.5
"""How often a replica says how it is, news or not."""

Build = Callable[[], tuple[Any, Any]]
"""Makes a wrapped model, and what has a `stop()` where it runs on several ranks, or None."""


@dataclass(frozen=True)
class Facts:
    """What whoever hands out requests must know of a replica."""

    config: Any
    """The model's."""
    generation_config: Any
    tokenizer: Any
    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]
    logprobs_mode: str
    speculation: Any
    adapters: Any
    """An empty `AdapterCache` of its limits; None where it has no room for adapters."""
    num_pages: int
    page_size: int
    max_num_seqs: int


@dataclass(frozen=True)
class State:
    """How a replica is."""

    stats: EngineStats
    load: EngineLoad
    weight_version: int
    record: StepRecord | None
    """Its last step."""


class Pipe:
    """To whoever it computes for: messages from any thread, and a sign of life now and then."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.sending = threading.RLock()
        self.beat: Callable[[], None] = lambda: self.send("loading")
        threading.Thread(target=self._beat, name="hf_paged-beat", daemon=True).start()

    def send(self, *message: Any) -> None:
        with self.sending:
            try:
                self._connection.send(message)
            except OSError:  # nobody is there any more
                end(1)

    def receive(self) -> tuple[Any, ...] | None:
        """The next message; None when there will be no more."""
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            return None

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT_S)
            self.beat()


class Replica:
    """An engine, and the pipe to whoever it computes for."""

    def __init__(self, number: int, pipe: Pipe, worker: Worker) -> None:
        self._number, self._pipe, self._worker = number, pipe, worker
        self._engine: Engine = worker.engine
        self._adapters = AdapterReceiver(pin=torch.device(worker.device).type == "cuda")
        self._wake = threading.Condition()
        self._news: deque[RequestOutput] = deque()
        self._unfinished: set[str] = set()
        self._failure: ReplicaFailed | None = None
        """What is told of requests that end now."""
        self._record: StepRecord | None = None
        self._engine.observers.append(self._observe)

    def facts(self) -> Facts:
        model, engine = causal_lm(self._worker.model), self._engine
        intake = engine.intake
        return Facts(
            config=model.config,
            generation_config=getattr(model, "generation_config", None),
            tokenizer=intake.tokenizer,
            vocab_size=intake.vocab_size,
            max_model_len=intake.max_model_len,
            eos_token_ids=intake.eos_token_ids(),
            logprobs_mode=intake.logprobs_mode,
            speculation=intake.speculation,
            adapters=intake.adapters,
            num_pages=engine.scheduler.num_pages,
            page_size=engine.scheduler.page_size,
            max_num_seqs=engine.load.max_num_seqs,
        )

    def serve(self) -> None:
        """Does what it is told until it is told to end, or there is nobody any more who would tell it."""
        self._pipe.send("ready", self.facts(), self._state())
        self._pipe.beat = self._tell
        threading.Thread(target=self._drive, name="hf_paged-engine", daemon=True).start()
        while (message := self._pipe.receive()) is not None:
            kind, *rest = message
            if kind == "add":
                self._add(*rest)
            elif kind == "adapters":
                self._adapters.take(rest[0])
            elif kind == "abort":
                self._engine.abort(rest[0])
                self._tell()
            elif kind == "call":
                self._call(*rest)
            else:
                return

    # ---- what it is told -------------------------------------------------------------------------------------------

    def _add(self, request_id: str, parcel: bytes, news: AdapterNews) -> None:
        self._unfinished.add(request_id)
        try:
            self._adapters.take(news)
            request = unpack_request(parcel, self._engine.intake, self._adapters)
            self._engine.submit([request], self._deliver)
        except Exception as error:  # a processor's module is not to be found here, say
            self._unfinished.discard(request_id)
            told = ReplicaFailed(f"replica {self._number} cannot take request {request_id!r}: {error}")
            self._news.append(RequestOutput(request_id, None, [], None, [], finished=True, error=told))
            self._tell()
            return
        with self._wake:
            self._wake.notify()

    def _call(self, number: int, work: bytes) -> None:
        try:
            answer = pickle.dumps((True, pickle.loads(work)(self._worker)))
        except Exception as error:
            answer = pickle.dumps((False, picklable(error)))
        self._pipe.send("answer", number, answer)

    # ---- what it tells ---------------------------------------------------------------------------------------------

    def _drive(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: bool(self._unfinished))
            try:
                idle = not self._engine.drive()
            except PeerFailed as error:
                self._fail(error)
            except ParallelError:
                traceback.print_exc()
                end(1)  # its ranks are lost: without this process others take over
            except Exception as error:
                self._fail(error)
            else:
                if self._news:
                    self._tell()
                if idle:
                    self._engine.gate.wait(lambda: bool(self._news))

    def _fail(self, error: Exception) -> None:
        """A step failed. Nobody knows whose fault it is, so that everything there is ends."""
        logger.error("a step failed", exc_info=error)
        self._failure = ReplicaFailed(f"a step failed on replica {self._number}: {type(error).__name__}: {error}")
        try:
            self._engine.abort(list(self._unfinished))
        finally:
            self._failure = None
        self._tell()

    def _deliver(self, output: RequestOutput) -> None:
        if output.finished:
            self._unfinished.discard(output.request_id)
            if self._failure is not None:
                samples = [replace(sample, finish_reason="error") for sample in output.outputs]
                output = replace(output, outputs=samples, error=self._failure)
        self._news.append(pack_output(output))

    def _observe(self, record: StepRecord) -> None:
        self._record = record

    def _tell(self) -> None:
        with self._pipe.sending:
            news = [self._news.popleft() for _ in range(len(self._news))]
            self._pipe.send("news", news, self._state())

    def _state(self) -> State:
        engine = self._engine
        return State(engine.stats, engine.load, engine.weight_version, self._record)


def end(code: int) -> None:
    """Ends this process, whatever its threads are at; ranks that it started see that and end too."""
    sys.stderr.flush()
    os._exit(code)


def main(fd: int) -> None:
    """A replica's whole life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for whoever hands out requests to act upon
    connection = Connection(fd)
    pipe, ranks = Pipe(connection), None
    try:
        number, job = connection.recv()
        build, extension = pickle.loads(job)
        model, ranks = build()
        replica = Replica(number, pipe, make_worker(model, extension))
    except Exception as error:
        pipe.send("failed", picklable(error))
        end(1)
    replica.serve()
    if ranks is not None:
        ranks.stop()
    end(0)
