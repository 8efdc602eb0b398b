"""Timeline: what every sequence was doing when, put together from an engine's steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_paged.engine.request import Request
from hf_paged.engine.stats import StepRecord

Lane = tuple[str, int]
"""(request id, sample index)."""
Kind = Literal["queued", "prefill", "decode", "preempted"]


@dataclass(slots=True)
class Phase:
    """A time in which a sequence did one thing."""

    lane: Lane
    kind: Kind
    start_s: float
    """As of `time.monotonic()`."""
    end_s: float = 0.0
    tokens: int = 0
    """Computed of a prompt, or generated."""
    accepted: int = 0
    """Of those generated, the ones that had been drafted."""


class Timeline:
    """Takes what an engine's observers are told, in that order, and returns phases that are over.

    A step costs what changed in it: sequences that only go on decoding are handled as one set.
    """

    def __init__(self) -> None:
        self._open: dict[Lane, Phase] = {}
        """What each unfinished sequence does now; nothing between two pieces of prefill."""
        self._decoding: dict[Lane, int] = {}
        """Those that did in the last step, and how many decode steps had been seen before their phase began."""
        self._samples: dict[str, int] = {}
        """How many each unfinished request has."""
        self._over: list[str] = []
        self._steps = 0
        self._end_s = 0.0

    @property
    def settling(self) -> bool:
        """Whether a request is finished whose last phases were not returned yet."""
        return bool(self._over)

    def arrived(self, request: Request) -> list[Phase]:
        """A request was queued, or was there when the looking began. Returns phases of requests that are finished."""
        closed = self.settle(request.metrics.arrival_time)
        self._samples[request.request_id] = len(request.sequences)
        for sequence in request.sequences:
            lane = (request.request_id, sequence.index)
            if not sequence.finished and lane not in self._open:
                self._open[lane] = Phase(lane, "queued", request.metrics.arrival_time)
        return closed

    def ended(self, request: Request) -> None:
        """A request is finished. The step that ended it may be told of after this."""
        if request.request_id in self._samples:
            self._over.append(request.request_id)

    def step(self, record: StepRecord) -> list[Phase]:
        """Takes a step in. Returns phases that ended before it, and its pieces of prefill."""
        closed: list[Phase] = []
        start, end = record.start_s, record.start_s + record.duration_s
        decodes = {lane for lane in record.decodes if lane[0] in self._samples}
        for lane in self._decoding.keys() - decodes:
            self._stop_decoding(lane, closed)
        for request_id, index, tokens in record.chunks:
            if request_id in self._samples:
                self._leave((request_id, index), start, closed)
                closed.append(Phase((request_id, index), "prefill", start, end, tokens))
        for lane in decodes - self._decoding.keys():
            self._leave(lane, start, closed)
            self._open[lane] = Phase(lane, "decode", start)
            self._decoding[lane] = self._steps
        for request_id, index, _, accepted in record.drafts:
            phase = self._open.get((request_id, index))
            if phase is not None:
                phase.accepted += accepted
        for lane in record.preempted:
            if lane[0] in self._samples:
                self._stop_decoding(lane, closed)
                self._leave(lane, start, closed)
                self._open[lane] = Phase(lane, "preempted", start)
        self._steps += 1
        self._end_s = end
        return closed + self.settle(end)

    def settle(self, now_s: float) -> list[Phase]:
        """Phases of requests that are finished."""
        closed: list[Phase] = []
        for request_id in self._over:
            for index in range(self._samples.pop(request_id, 0)):
                lane = (request_id, index)
                self._stop_decoding(lane, closed)
                self._leave(lane, now_s, closed)
        self._over.clear()
        return closed

    def going_on(self, now_s: float) -> list[Phase]:
        """What unfinished sequences are doing, as phases that end now."""
        return [self._decoded(lane) if lane in self._decoding else self._as_of(lane, now_s) for lane in self._open]

    def _as_of(self, lane: Lane, now_s: float) -> Phase:
        phase = self._open[lane]
        return Phase(lane, phase.kind, phase.start_s, now_s)

    def _decoded(self, lane: Lane) -> Phase:
        phase = self._open[lane]
        tokens = self._steps - self._decoding[lane] + phase.accepted
        return Phase(lane, "decode", phase.start_s, self._end_s, tokens, phase.accepted)

    def _stop_decoding(self, lane: Lane, closed: list[Phase]) -> None:
        if lane in self._decoding:
            closed.append(self._decoded(lane))
            del self._decoding[lane], self._open[lane]

    def _leave(self, lane: Lane, now_s: float, closed: list[Phase]) -> None:
        if lane in self._open:
            closed.append(self._as_of(lane, max(now_s, self._open[lane].start_s)))
            del self._open[lane]
