"""A run as a trace for Perfetto (ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

import gzip
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_paged.engine.engine import Engine
from hf_paged.engine.request import Request
from hf_paged.engine.stats import StepRecord
from hf_paged.observe.timeline import Lane, Phase, Timeline

logger = logging.getLogger(__name__)

_ENGINE, _SEQUENCES = 1, 2
"""Processes of the trace."""


class PerfettoTrace:
    """Writes what an engine does from its making to `close`, event by event; what is held in memory is what is
    unfinished.

    A track tells of steps with the sizes of their batches, one per sequence of the times in which it was queued,
    prefilled, decoded and preempted, and counters of pages, tokens and requests. Times are microseconds since the
    trace began.

    Args:
        path: the file, gzipped where it ends in ".gz"; an older one is overwritten.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], engine: Engine) -> None:
        self.path = Path(path)
        self._engine = engine
        opened = gzip.open if self.path.suffix == ".gz" else open
        self._file: Any = opened(self.path, "wt", encoding="utf-8")
        self._separator = "[\n"
        self._lock = threading.Lock()
        self._start_s = time.monotonic()
        self._timeline = Timeline()
        self._tracks: dict[Lane, int] = {}
        """Of sequences whose last phase is not written."""
        self._over: list[Request] = []
        self._num_tracks = 0
        self._error: OSError | None = None
        self._write({"ph": "M", "name": "process_name", "pid": _ENGINE, "tid": 0, "args": {"name": "engine"}})
        self._write({"ph": "M", "name": "thread_name", "pid": _ENGINE, "tid": 1, "args": {"name": "steps"}})
        self._write({"ph": "M", "name": "process_name", "pid": _SEQUENCES, "tid": 0, "args": {"name": "sequences"}})
        for request in engine.unfinished:
            self._arrived(request)
        engine.arrival_observers.append(self._arrived)
        engine.request_observers.append(self._ended)
        engine.observers.append(self._step)

    def close(self) -> None:
        """Ends the trace; what is unfinished ends with it. A second call does nothing.

        Raises:
            OSError: something could not be written; the file ends where that was.
        """
        with self._lock:
            if self._file.closed:
                return
            self._engine.observers.remove(self._step)
            self._engine.request_observers.remove(self._ended)
            self._engine.arrival_observers.remove(self._arrived)
            now = time.monotonic()
            self._write_phases(self._timeline.settle(now) + self._timeline.going_on(now))
            try:
                self._file.write("\n]\n")
                self._file.close()
            except OSError as error:
                self._failed(error)
        if self._error is not None:
            raise self._error

    def _arrived(self, request: Request) -> None:
        with self._lock:
            self._write_phases(self._timeline.arrived(request))
            for sequence in request.sequences:
                self._num_tracks += 1
                self._tracks[request.request_id, sequence.index] = self._num_tracks
                name = f"{request.request_id} #{sequence.index}" if len(request.sequences) > 1 else request.request_id
                track = {"pid": _SEQUENCES, "tid": self._num_tracks}
                self._write({"ph": "M", "name": "thread_name", **track, "args": {"name": name}})
                order = {"sort_index": self._num_tracks}
                self._write({"ph": "M", "name": "thread_sort_index", **track, "args": order})

    def _ended(self, request: Request) -> None:
        with self._lock:
            self._timeline.ended(request)
            self._over.append(request)

    def _step(self, record: StepRecord) -> None:
        with self._lock:
            self._write_phases(self._timeline.step(record))
            prefill = sum(tokens for _, _, tokens in record.chunks)
            decode, accepted = len(record.decodes), sum(accepted for _, _, _, accepted in record.drafts)
            parts = [f"decode {decode}"] * bool(decode) + [f"prefill {prefill}"] * bool(prefill)
            args: dict[str, Any] = {"step": record.step, "decoding": decode, "prefill tokens": prefill}
            if record.drafts:
                args |= {"drafted": sum(drafted for _, _, drafted, _ in record.drafts), "accepted": accepted}
            self._slice(_ENGINE, 1, " + ".join(parts), record.start_s, record.start_s + record.duration_s, args)
            running = len(set(record.decodes) | {(name, index) for name, index, _ in record.chunks})
            free = self._engine.scheduler.num_pages - record.active_pages - record.cached_pages
            pages = {"active": record.active_pages, "cached": record.cached_pages, "free": free}
            self._counter("pages", record, pages)
            self._counter("tokens", record, {"decode": decode + accepted, "prefill": prefill})
            self._counter("sequences", record, {"running": running, "waiting": record.num_waiting})

    def _write_phases(self, phases: list[Phase]) -> None:
        for phase in phases:
            args: dict[str, Any] = {"tokens": phase.tokens} if phase.tokens else {}
            if phase.accepted:
                args["accepted drafts"] = phase.accepted
            self._slice(_SEQUENCES, self._tracks[phase.lane], phase.kind, phase.start_s, phase.end_s, args)
        for request in self._over:
            for sequence in request.sequences:
                self._tracks.pop((request.request_id, sequence.index), None)
        self._over.clear()

    def _slice(self, pid: int, tid: int, name: str, start_s: float, end_s: float, args: dict[str, Any]) -> None:
        start = self._microseconds(start_s)
        duration = max(self._microseconds(end_s) - start, 0.0)
        track = {"pid": pid, "tid": tid}
        self._write({"ph": "X", "name": name, **track, "ts": start, "dur": round(duration, 3), "args": args})

    def _counter(self, name: str, record: StepRecord, values: dict[str, int]) -> None:
        ts = self._microseconds(record.start_s)
        self._write({"ph": "C", "name": name, "pid": _ENGINE, "tid": 0, "ts": ts, "args": values})

    def _microseconds(self, at_s: float) -> float:
        return round(max(at_s - self._start_s, 0.0) * 1e6, 3)

    def _write(self, event: dict[str, Any]) -> None:
        """Writes one event. A disk that is full ends the trace, not the run."""
        if self._error is None and not self._file.closed:
            try:
                self._file.write(self._separator + json.dumps(event, separators=(",", ":")))
                self._separator = ",\n"
            except OSError as error:
                self._failed(error)

    def _failed(self, error: OSError) -> None:
        logger.error("the trace %s is cut short: %s", self.path, error)
        self._error = error


@contextmanager
def trace(path: str | os.PathLike[str], model: Any) -> Iterator[PerfettoTrace]:
    """Writes a trace of everything that a model's engine does meanwhile: `with hf_paged.trace("run.json", model):`.

    Open the file at https://ui.perfetto.dev, or in chrome://tracing.

    Args:
        path: a file; gzipped where it ends in ".gz".
        model: wrapped, or an `LLM`.

    Raises:
        OSError: the file cannot be written.
        TypeError: the model is not wrapped.
    """
    engine = getattr(model, "engine", None)
    if not isinstance(engine, Engine):
        raise TypeError(
            f"trace() follows a wrapped model or an LLM, got {type(model).__name__}: call wrap(model) first"
        )
    writer = PerfettoTrace(path, engine)
    try:
        yield writer
    finally:
        writer.close()
