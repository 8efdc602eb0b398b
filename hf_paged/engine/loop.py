"""StepLoop: requests, and one step after another over all of them. It knows no threads: one at a time may call it."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch

from hf_paged.engine.batch import Batch, Chunk
from hf_paged.engine.executor import Executor, StepResult
from hf_paged.engine.gate import Gate
from hf_paged.engine.intake import Intake
from hf_paged.engine.output import OutputProcessor
from hf_paged.engine.request import Request, Sequence
from hf_paged.engine.scheduler import Scheduler
from hf_paged.engine.stats import EngineStats, StepRecord
from hf_paged.outputs import RequestOutput
from hf_paged.sampling.errors import NonFiniteLogits
from hf_paged.sampling_params import RequestOutputKind
from hf_paged.speculative.speculator import Speculator

logger = logging.getLogger(__name__)

Deliver = Callable[[RequestOutput], None]


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step that was launched and whose results are not known yet."""

    batch: Batch
    land: Callable[[], StepResult]
    start_s: float
    weight_version: int
    speculates: bool
    """Whether drafters were asked; what forms force is drafted either way."""


class StepLoop:
    """Launches steps, lands them, and tells about the requests that they changed; see `Engine`."""

    def __init__(self, executor: Executor, scheduler: Scheduler, intake: Intake, speculator: Speculator) -> None:
        self.executor = executor
        self.scheduler = scheduler
        self.intake = intake
        self.speculator = speculator
        self.output_processor = OutputProcessor(intake.tokenizer)
        self.stats = EngineStats()
        self.observers: list[Callable[[StepRecord], None]] = []
        """Called after every step, in the thread that computed it."""
        self.arrival_observers: list[Callable[[Request], None]] = []
        """Called with every request that joins the queue, in the thread that queued it."""
        self.request_observers: list[Callable[[Request], None]] = []
        """Called with every request that has ended, in the thread that saw its end."""
        self._requests: dict[str, tuple[Request, Deliver | None]] = {}
        self._unclaimed: list[RequestOutput] = []
        self._ids: set[str] = set()
        self.gate = Gate()
        """Closed while the engine is paused."""
        self._saw_weights = False
        self._unseen = False
        """Whether the model must be looked over before the next step."""
        self._weight_version = 0
        self._announced = False
        """Whether a change of the weights was counted since they were last looked at."""
        self._noticed = False
        """Whether the last change that was counted was noticed, and nobody has told of it yet."""
        self._flights: deque[_Flight] = deque()
        """Steps in the order of their launch."""
        self._landed_s = 0.0
        self._held: set[str] = set()
        """Requests whose tokens must be known before the next step is launched."""

    # ---- launch and landing --------------------------------------------------------------------------------------

    def _launch(self, retry: bool = False) -> _Flight | None:
        start, running = time.monotonic(), self.scheduler.running
        # A batch that is about to grow may be too large for drafts in a moment.
        may_draft = not self._flights and not self.scheduler.growing
        speculates = may_draft and self.speculator.wants(len(running))
        batch = self.scheduler.schedule(self.speculator.propose(running) if may_draft else None)
        if not batch:
            return None
        try:
            flight = _Flight(batch, self.executor.launch(batch), start, self._weight_version, speculates)
        except torch.OutOfMemoryError:
            if retry:
                raise
        else:
            self.scheduler.advance(batch)
            return flight
        self._shrink()
        return self._launch(retry=True)

    def _launch_all(self) -> None:
        """Has as many steps on their way as may be."""
        while len(self._flights) < self.executor.most_in_flight and not (self._flights and self._waits_for_tokens()):
            flight = self._launch()
            if flight is None:
                return
            self._flights.append(flight)

    def _waits_for_tokens(self) -> bool:
        """Whether nothing may be launched before what is in the air has landed."""
        if self._held or (self._flights and self._flights[-1].batch.drafts):
            return True
        running = self.scheduler.running
        wants = self.speculator.wants(len(running)) or self.speculator.must_jump(running)
        return wants and not self.scheduler.growing

    def _drain(self) -> None:
        """Waits for steps whose results nobody wants."""
        poisoned = False
        while self._flights:
            poisoned |= _poisons(self._flights.popleft().land())
        if poisoned:
            self._purge()

    def _shrink(self) -> None:
        """After running out of memory: everything starts over in smaller batches."""
        scheduler = self.scheduler
        scheduler.shrink()
        logger.warning(
            "out of memory: going on with batches of %d tokens and %d sequences at most",
            scheduler.max_num_batched_tokens,
            scheduler.max_num_seqs,
        )
        self._start_over()

    def _land_flight(self) -> None:
        """Leaves nothing in the air."""
        while self._flights:
            self._land(self._flights.popleft())

    def _start_over(self) -> None:
        """What is under way lands, and everything unfinished is computed again from its tokens."""
        self._land_flight()
        self.scheduler.recover([request for request, _ in self._requests.values()])

    def _land(self, flight: _Flight, then: Callable[[], None] | None = None) -> None:
        """Waits for a step, and tells about the requests that it changed.

        Args:
            then: what to do before anybody is told.
        """
        result = flight.land()
        before, self._landed_s = self._landed_s, time.monotonic()
        start = max(flight.start_s, before)
        known = self.stats.generation_tokens
        verified = self._verify(flight.batch, result) if flight.batch.drafts else []
        touched = self._append(flight, result)
        if _poisons(result):
            self._purge()
        self._settle()
        if not flight.batch.chunks and flight.batch.decodes:
            num_seqs = len(flight.batch.decodes) - sum(map(len, flight.batch.drafts.values()))
            tokens = self.stats.generation_tokens - known
            self.speculator.pace.landed(num_seqs, flight.speculates, tokens, self._landed_s - before)
        if then is not None:
            then()  # if memory ran out in there, steps have landed that told about some requests' ends
        self._report([request for request in touched if request.request_id in self._requests])
        self._count(flight.batch, start, verified)

    def _settle(self) -> None:
        try:
            self.executor.settle()
        except torch.OutOfMemoryError:
            if self.scheduler.max_num_batched_tokens == 1:
                raise
            self._flights.clear()  # what the last one draws will never be known
            self._shrink()

    def _purge(self) -> None:
        """The model left keys and values that are not numbers. Masked out they would still poison whoever gets their
        pages next, or has got them while this step was on its way: everything is wiped and computed again."""
        self._drain()
        self.executor.wipe(list(range(self.scheduler.pool.num_touched)))
        self.scheduler.recover([request for request, _ in self._requests.values()])

    def _recover(self) -> None:
        """Tokens already appended are whole. Everything else is made again from them."""
        self._flights.clear()
        requests = [request for request, _ in self._requests.values()]
        self.scheduler.recover(requests)
        for request in requests:
            for sequence in request.sequences:
                if sequence.num_generated and not sequence.finished:
                    self._end(sequence)  # its last token may not have been looked at
        self._report([request for request in requests if request.finished])

    # ---- what a step brought -------------------------------------------------------------------------------------

    def _append(self, flight: _Flight, result: StepResult) -> list[Request]:
        """Gives sequences their tokens and ends those that are done. Returns the requests with news, once each."""
        batch, version, now = flight.batch, flight.weight_version, time.monotonic()
        touched: dict[str, Request] = {}
        if result.prompt_logprobs is not None:
            for chunk, found in zip(batch.chunks, result.prompt_logprobs, strict=True):
                request = chunk.sequence.request
                if request.sampling.prompt_logprobs is not None and not chunk.sequence.num_generated:
                    known = request.prompt_logprobs if chunk.start and request.prompt_logprobs else [None]
                    request.prompt_logprobs = known[: chunk.start + 1] + list(found)
        if result.scores is not None:
            for chunk, scores in zip(batch.chunks, result.scores, strict=True):
                if chunk.sequence.request.scored is not None and self._score(chunk, scores):
                    touched[chunk.sequence.request.request_id] = chunk.sequence.request
        for place, row in enumerate(batch.sampled()):
            sequence, request = row.origin, row.request
            if sequence.finish_reason is not None:
                continue
            if row is not sequence and not _goes_on(sequence, row):
                continue  # a token drafted before it was rejected
            touched[request.request_id] = request
            if place in result.errors:
                self._fail(request, result.errors[place])
                continue
            if request.metrics.first_token_time is None:
                request.metrics.first_token_time = now
            if request.sampling.logprobs is not None:
                self._keep_logprobs(sequence, result, place)
            if not sequence.weight_runs or sequence.weight_runs[-1][0] != version:
                sequence.weight_runs.append((version, sequence.num_generated))
            self.scheduler.append(sequence, result.tokens[place])
            self.stats.generation_tokens += 1
            self._end(sequence)
        return list(touched.values())

    def _verify(self, batch: Batch, result: StepResult) -> list[tuple[Sequence, int, int]]:
        """Rejects drafted tokens from the first one on that is not what was sampled in its place. What is sampled is
        thus what would have been without drafts, whatever these are: draws depend on a sequence's seed and on the
        position, and the first token that differs ends it. Returns (sequence, tokens drafted, tokens accepted)."""
        if result.drafted is not None:
            unknown = [draft for draft in batch.drafts.values() if draft[0] < 0]
            for place, drawn in enumerate(result.drafted):
                unknown[place][:] = drawn
        verified, tokens = [], result.tokens
        for place, row in enumerate(batch.decodes):
            draft = batch.drafts.get(row)
            if draft:
                accepted = 0
                while accepted < len(draft) and tokens[place + accepted] == draft[accepted]:
                    accepted += 1
                self.scheduler.reject(row, len(draft) - accepted)
                self.speculator.verified(row, len(draft), accepted)
                verified.append((row, len(draft), accepted))
        return verified

    def _keep_logprobs(self, sequence: Sequence, result: StepResult, place: int) -> None:
        history = sequence.logprobs
        if len(history.values) > sequence.num_generated:
            history.truncate(sequence.num_generated)
        if result.drawn is not None:
            history.add(result.tokens[place], result.drawn[0][place], result.drawn[1][place])
        elif result.logprobs is not None and (entry := result.logprobs[place]) is not None:
            history.append(entry)

    def _score(self, chunk: Chunk, scores: list[float]) -> bool:
        """Keeps what a chunk tells about a request that is only scored. Returns whether this ended it."""
        sequence, request = chunk.sequence, chunk.sequence.request
        if sequence.finish_reason is not None:
            return False
        request.scores[max(chunk.start - (request.logits_from or 0), 0) :] = scores
        if any(map(math.isnan, scores)):
            error = f"request {request.request_id!r}: cannot be scored, the model's logits are not finite"
            self._fail(request, NonFiniteLogits(error))
        elif chunk.start + chunk.length == request.num_prompt:
            self.scheduler.finish(sequence, "stop")
        return sequence.finished

    def _end(self, sequence: Sequence) -> None:
        """Finishes a sequence if its last token ends it."""
        try:
            end = self.output_processor.end_of(sequence)
        except Exception as error:  # a caller's stopping criterion may raise anything
            self._fail(sequence.request, error)
            return
        if end is not None:
            sequence.stop_reason = end[1]
            self.scheduler.finish(sequence, end[0])

    def _fail(self, request: Request, error: Exception) -> None:
        """Ends one request for a reason of its own; its neighbours do not notice."""
        request.error = error
        for sequence in request.sequences:
            self.scheduler.finish(sequence, "error")

    def _report(self, requests: list[Request]) -> None:
        for request in requests:
            finished = request.finished
            if not finished and request.sampling.output_kind is RequestOutputKind.FINAL_ONLY:
                continue
            if finished:
                request.metrics.finished_time = time.monotonic()
                self.speculator.end(request)  # before anybody is told: an interrupt of it must not tell them twice
            output = self._output(request)
            if output is not None:
                _, deliver = self._requests[request.request_id]
                (deliver or self._unclaimed.append)(output)
            if finished:
                self._ids.discard(request.request_id)
                self._held.discard(request.request_id)
                del self._requests[request.request_id]
                for observer in tuple(self.request_observers):
                    observer(request)
        if self.gate.closed:
            self.gate.notify()

    def _output(self, request: Request) -> RequestOutput | None:
        try:
            return self.output_processor.output(request)
        except Exception as error:  # a tokenizer may raise anything; without text the tokens can still be told
            self._fail(request, error)
            return self.output_processor.output(request, with_text=False)

    def _count(self, batch: Batch, start: float, verified: list[tuple[Sequence, int, int]]) -> None:
        stats = self.stats
        stats.steps += 1
        stats.prompt_tokens += sum(chunk.length for chunk in batch.chunks)
        if not self.observers:
            return
        record = StepRecord(
            step=stats.steps,
            start_s=start,
            duration_s=time.monotonic() - start,
            decodes=[_name(row) for row in batch.decodes if row is row.origin],
            chunks=[(*_name(chunk.sequence), chunk.length) for chunk in batch.chunks],
            num_waiting=self.scheduler.num_waiting,
            active_pages=self.scheduler.num_active_pages,
            cached_pages=self.scheduler.tree.num_evictable,
            drafts=[(*_name(sequence), drafted, accepted) for sequence, drafted, accepted in verified],
            preempted=[_name(sequence) for sequence in batch.preempted],
        )
        for observer in tuple(self.observers):  # another thread may be taking one away
            observer(record)

    # ---- requests and weights ------------------------------------------------------------------------------------

    def _add(self, requests: list[Request], deliver: Deliver | None) -> None:
        if not self._requests:
            self.scheduler.unshrink()
            self._unseen = True
            self._landed_s = time.monotonic()
        for request in requests:
            if request.request_id in self._requests:
                continue
            if not self.executor.looks_ahead(request):
                self._held.add(request.request_id)
            self.speculator.begin(request)
            self._requests[request.request_id] = request, deliver
            self.scheduler.add(request)
            for observer in tuple(self.arrival_observers):
                observer(request)

    def _abort(self, request_ids: list[str]) -> None:
        known = [self._requests[request_id][0] for request_id in request_ids if request_id in self._requests]
        for request in known:
            for sequence in request.sequences:
                self.scheduler.finish(sequence, "abort")
        self._report(known)
        if not self._requests:
            self._drain()

    def _look_over(self) -> None:
        """Before the first step after a time without any: the model may be another than it was. Should this fail (there
        is no memory to wake up with, say), whoever asked for the step is told, and the next one tries again."""
        if self.executor.prepare() and self._requests:
            self._start_over()
        changed = self.executor.weights_changed()
        self._noticed = changed and self._saw_weights and not self._announced
        if self._noticed:
            self._weights_changed()
        self._saw_weights, self._announced, self._unseen = True, False, False

    def _weights_told(self) -> None:
        if not self._noticed or self.executor.weights_changed():
            self._weights_changed()
        self._noticed = False

    def _weights_changed(self) -> None:
        """What is launched from here on is computed with other weights."""
        self._weight_version += 1
        self._flush()
        if self._requests:
            self.executor.weights_changed()  # the next look compares with these
        else:
            self._announced = True

    def _flush(self) -> None:
        self.scheduler.flush_prefix_cache()


def _goes_on(sequence: Sequence, row: Sequence) -> bool:
    """Whether a row that verifies a draft is what the sequence has become."""
    return len(sequence.tokens) == row.num_tokens and sequence.tokens[-1] == row.last_token


def _poisons(result: StepResult) -> bool:
    """Whether a step may have left keys and values that are not numbers."""
    errors = any(isinstance(error, NonFiniteLogits) for error in result.errors.values())
    return errors or any(map(math.isnan, chain.from_iterable(result.scores or ())))


def _name(sequence: Sequence) -> tuple[str, int]:
    return sequence.request.request_id, sequence.index
