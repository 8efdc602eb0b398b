"""Watch: an engine's steps on their way to messages."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from hf_paged.engine.engine import Engine
from hf_paged.engine.request import Request
from hf_paged.engine.stats import StepRecord
from hf_paged.integrations.openai_server.live.pages import page_map
from hf_paged.observe.timeline import Lane, Phase, Timeline

MOST_EVENTS = 20_000
"""That may wait to be collected."""
MAP_SHARE = 0.01
"""Of the time, that reading the page map may take."""
BUCKETS_PER_DECADE, FIRST_BUCKET_S, NUM_BUCKETS = 10, 1e-4, 70
KINDS = ("queued", "prefill", "decode", "preempted")


def bucket(seconds: float) -> int:
    """The place of a time in a histogram of ten buckets a decade, from 0.1 ms on."""
    place = math.floor(BUCKETS_PER_DECADE * math.log10(max(seconds, FIRST_BUCKET_S) / FIRST_BUCKET_S))
    return min(place, NUM_BUCKETS - 1)


@dataclass
class _News:
    """What happened since the last message."""

    lanes: list[list[Any]] = field(default_factory=list)
    """[lane, request id, sample index, adapter's name or None]."""
    phases: list[list[int]] = field(default_factory=list)
    """[lane, place in KINDS, start in ms, end in ms, tokens, accepted]. One with lane, kind and start of an earlier one
    takes its place."""
    ends: list[list[Any]] = field(default_factory=list)
    """[lane, finish reason]."""
    ttft: Counter[int] = field(default_factory=Counter)
    itl: Counter[int] = field(default_factory=Counter)
    """By bucket."""
    steps: int = 0
    prefilled: int = 0
    generated: int = 0
    drafted: int = 0
    accepted: int = 0


class Watch:
    """Watches an engine from its making to `close`. The engine's thread only puts what it is told into a queue; the
    rest is done by whoever calls `collect`.

    Times in messages are milliseconds since the watch began.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._zero_s = time.monotonic()
        self._events: deque[tuple[Callable[[Any], None], Any]] = deque(maxlen=MOST_EVENTS)
        self._timeline = Timeline()
        self._lanes: dict[Lane, list[Any]] = {}
        """What was told of sequences whose last phase is not: see `_News.lanes`."""
        self._num_lanes = 0
        self._over: list[Request] = []
        self._awaited: dict[str, Request] = {}
        """Requests whose first token is not counted yet."""
        self._last: tuple[set[Lane], float] = set(), 0.0
        """Who ran in the last step, and when it ended."""
        self._map: tuple[int, list[int]] | None = None
        self._map_due_s = 0.0
        self._prefix = (0, 0)
        self._news = _News()
        for request in engine.unfinished:
            self._take_arrival(request)
            if request.metrics.first_token_time is not None:
                self._awaited.pop(request.request_id, None)
        engine.arrival_observers.append(self._arrived)
        engine.request_observers.append(self._ended)
        engine.observers.append(self._stepped)

    def close(self) -> None:
        """Stops watching."""
        self.engine.observers.remove(self._stepped)
        self.engine.request_observers.remove(self._ended)
        self.engine.arrival_observers.remove(self._arrived)

    def _arrived(self, request: Request) -> None:
        self._events.append((self._take_arrival, request))

    def _ended(self, request: Request) -> None:
        self._events.append((self._take_end, request))

    def _stepped(self, record: StepRecord) -> None:
        self._events.append((self._take_step, record))

    @property
    def overrun(self) -> bool:
        """Whether more has happened than was collected in time, so that some of it is lost."""
        return len(self._events) == MOST_EVENTS

    def picture(self) -> dict[str, Any]:
        """All that is now, for somebody who has seen nothing; `collect` comes before."""
        scheduler, now = self.engine.scheduler, time.monotonic()
        per_cell, cells = page_map(scheduler)
        return self._gauges(now) | {
            "num_pages": scheduler.num_pages,
            "page_size": scheduler.page_size,
            "max_num_seqs": scheduler.max_num_seqs,
            "lanes": list(self._lanes.values()),
            "phases": [self._told(phase) for phase in self._timeline.going_on(now)],
            "per_cell": per_cell,
            "pages": cells,
        }

    def collect(self) -> dict[str, Any]:
        """What happened since the last call."""
        while self._events:
            take, what = self._events.popleft()
            take(what)
        now = time.monotonic()
        self._look_for_first_tokens()
        self._tell(self._timeline.settle(now))
        self._tell(phase for phase in self._timeline.going_on(now) if phase.kind in ("decode", "preempted"))
        news, self._news = self._news, _News()
        stats = self.engine.scheduler.stats
        before, self._prefix = self._prefix, (stats.prefix_queries, stats.prefix_hits)
        message = self._gauges(now) | {
            "lanes": news.lanes,
            "phases": news.phases,
            "ends": news.ends,
            "ttft": news.ttft,
            "itl": news.itl,
            "steps": news.steps,
            "tokens": [news.prefilled, news.generated, news.drafted, news.accepted],
            "prefix": [now - old for now, old in zip(self._prefix, before, strict=True)],
        }
        if now >= self._map_due_s and (found := self._read_map(now)) != self._map:
            self._map = found
            message["per_cell"], message["pages"] = found
        return message

    def _gauges(self, now_s: float) -> dict[str, Any]:
        scheduler = self.engine.scheduler
        running = len({sequence.request.request_id for sequence in list(scheduler.running)})
        return {
            "t": self._ms(now_s),
            "running": running,
            "waiting": max(self.engine.num_unfinished - running, 0),
            "active": scheduler.num_active_pages,
            "cached": scheduler.tree.num_evictable,
            "paused": self.engine.paused,
        }

    def _read_map(self, now_s: float) -> tuple[int, list[int]]:
        start = time.perf_counter()
        found = page_map(self.engine.scheduler)
        self._map_due_s = now_s + (time.perf_counter() - start) / MAP_SHARE
        return found

    def _take_end(self, request: Request) -> None:
        self._timeline.ended(request)
        self._over.append(request)

    def _take_arrival(self, request: Request) -> None:
        self._tell(self._timeline.arrived(request))
        if request.scored is None:
            self._awaited[request.request_id] = request
        arrival = self._ms(request.metrics.arrival_time)
        for sequence in request.sequences:
            self._num_lanes += 1
            told = [self._num_lanes, request.request_id, sequence.index, request.adapter_name]
            self._lanes[request.request_id, sequence.index] = told
            self._news.lanes.append(told)
            self._news.phases.append([self._num_lanes, 0, arrival, arrival, 0, 0])

    def _take_step(self, record: StepRecord) -> None:
        self._tell(self._timeline.step(record))
        news, (before, before_s) = self._news, self._last
        end, lanes = record.start_s + record.duration_s, set(record.decodes)
        if going_on := len(lanes & before):
            news.itl[bucket(end - before_s)] += going_on
        lanes.update((request_id, index) for request_id, index, _ in record.chunks)
        self._last = lanes, end
        accepted = sum(accepted for _, _, _, accepted in record.drafts)
        news.steps += 1
        news.prefilled += sum(tokens for _, _, tokens in record.chunks)
        news.generated += len(record.decodes) + accepted
        news.drafted += sum(drafted for _, _, drafted, _ in record.drafts)
        news.accepted += accepted

    def _look_for_first_tokens(self) -> None:
        for request in list(self._awaited.values()):
            first = request.metrics.first_token_time
            if first is not None:
                self._news.ttft[bucket(first - request.metrics.arrival_time)] += 1
            if first is not None or request.finished:
                del self._awaited[request.request_id]

    def _tell(self, phases: Iterable[Phase]) -> None:
        """Takes phases into the next message, and the ends of lanes that have no other."""
        self._news.phases += [self._told(phase) for phase in phases if phase.lane in self._lanes]
        if not self._over or self._timeline.settling:
            return
        for request in self._over:
            for sequence in request.sequences:
                lane = self._lanes.pop((request.request_id, sequence.index), None)
                if lane is not None:
                    self._news.ends.append([lane[0], sequence.finish_reason])
        self._over.clear()

    def _told(self, phase: Phase) -> list[int]:
        start, end = self._ms(phase.start_s), self._ms(phase.end_s)
        return [self._lanes[phase.lane][0], KINDS.index(phase.kind), start, end, phase.tokens, phase.accepted]

    def _ms(self, at_s: float) -> int:
        return round((at_s - self._zero_s) * 1000)
