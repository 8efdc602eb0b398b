"""Engine: requests in, steps, outputs. Owns the scheduler and the executor; shared by every front and every thread."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch

from hf_paged.engine.batch import Batch, Chunk
from hf_paged.engine.executor import Executor, StepResult
from hf_paged.engine.gate import Gate
from hf_paged.engine.intake import Intake, Prompt
from hf_paged.engine.output import OutputProcessor
from hf_paged.engine.request import Request, Sequence
from hf_paged.engine.scheduler import Scheduler
from hf_paged.engine.stats import EngineStats, StepRecord
from hf_paged.engine.turn import Turn
from hf_paged.outputs import RequestOutput
from hf_paged.sampling.sampler import NonFiniteLogits
from hf_paged.sampling_params import RequestOutputKind, SamplingParams

logger = logging.getLogger(__name__)

Deliver = Callable[[RequestOutput], None]


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step that was launched and whose results are not known yet."""

    batch: Batch
    land: Callable[[], StepResult]
    start_s: float
    weight_version: int


class Engine:
    """Continuous batching over one executor.

    One step is looked ahead: while the device computes a step, the next one is scheduled and launched, its sequences
    going on from tokens that only the device knows yet. Tokens are read, and ends are seen, one step late; what a
    finished sequence computed in that step is thrown away. Requests whose sampling needs the host (see
    `Executor.looks_ahead`) suspend this while they are there.

    Callers either own the loop (`add_request`, `step`, `abort`, `has_unfinished`) or leave it to `run`. Any number of
    threads may call anything at once: requests and aborts go through an inbox, and whoever waits for output computes
    the next step for everybody.
    """

    def __init__(self, executor: Executor, scheduler: Scheduler, intake: Intake) -> None:
        self.executor = executor
        self.scheduler = scheduler
        self.intake = intake
        self.output_processor = OutputProcessor(intake.tokenizer)
        self.stats = EngineStats()
        self.observers: list[Callable[[StepRecord], None]] = []
        """Called after every step, in the thread that computed it."""
        self._requests: dict[str, tuple[Request, Deliver | None]] = {}
        self._unclaimed: list[RequestOutput] = []
        self._inbox: deque[Callable[[], None]] = deque()
        self._ids: set[str] = set()
        self._adding = threading.Lock()
        self._turn = Turn()
        """Taken while a step is computed, or the inbox read."""
        self.gate = Gate()
        """Closed while the engine is paused."""
        self._saw_weights = False
        self._weight_version = 0
        self._announced = False
        """Whether a change of the weights was counted since they were last looked at."""
        self._noticed = False
        """Whether the last change that was counted was noticed, and nobody has told of it yet."""
        self._flight: _Flight | None = None
        self._landed_s = 0.0
        self._held: set[str] = set()
        """Requests whose tokens must be known before the next step is launched."""

    # ---- for callers who own the loop ----------------------------------------------------------------------

    def add_request(
        self, prompt: Prompt, sampling: SamplingParams | None = None, *, request_id: str | None = None
    ) -> str:
        """Queues one prompt; its outputs come from `step`.

        Returns:
            the request's id, made up when none is given.

        Raises:
            ValueError, TypeError: bad prompt or parameters, an id in use, or a request too large for the pool.
        """
        request = self.intake.request(prompt, sampling or SamplingParams(), request_id=request_id)
        self.submit([request])
        return request.request_id

    def step(self) -> list[RequestOutput]:
        """Computes one step and returns the outputs it changed, of requests that were added with `add_request`.

        Paused, it computes nothing and returns what there is.
        """
        outputs: list[RequestOutput] = []

        def work() -> None:
            nonlocal outputs
            self._step()
            outputs, self._unclaimed = self._unclaimed, []

        self._take_turn(work)
        return outputs

    def abort(self, request_ids: str | Iterable[str]) -> None:
        """Ends requests, keeping what they have so far; their last output says finish_reason "abort". Unknown ids are
        fine."""
        ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        self._ask(lambda: self._abort(ids))

    def has_unfinished(self) -> bool:
        """Whether any request, of whatever caller, is not done, or an output waits to be returned by `step`."""
        return bool(self._requests or self._inbox or self._unclaimed)

    @property
    def weight_version(self) -> int:
        """How many times the engine has learnt that the weights changed: by `weights_updated`, by an optimizer's step
        while requests are unfinished, by a look at the weights when it gets work again. What is noticed and told of
        afterwards counts once."""
        return self._weight_version

    def weights_updated(self, kv: str = "keep") -> None:
        """Says that the weights changed, in case a change could go unseen while requests are running.

        Cached prefixes are forgotten.

        Args:
            kv: what becomes of the keys and values of unfinished requests. "keep": they stay as the old weights made
                them. "recompute": they are computed again from the tokens so far, which stay.

        Raises:
            ValueError: another `kv`.
        """
        if kv not in ("keep", "recompute"):
            raise ValueError(f'kv must be "keep" or "recompute", got {kv!r}')
        self._ask(self._weights_told, *([self._start_over] if kv == "recompute" else []))

    @property
    def paused(self) -> bool:
        """Whether `pause` was called, and `resume` not yet."""
        return self.gate.closed

    def pause(self) -> None:
        """From here to `resume` no step is computed. The one under way is finished, and its outputs are delivered.

        Unfinished requests keep their tokens, keys and values; new ones are accepted and wait; aborts work. Threads
        that wait for outputs wait on, whereas `generate_many` and the like in the thread that paused raise a
        RuntimeError. The weights may be changed in any way. A second pause changes nothing, and one resume ends both.
        """
        # In the middle of a step, that is in a processor or an observer, it is anybody's thread.
        by = None if self._turn.mine else threading.current_thread()
        self._ask(lambda: self._pause(by))

    def resume(self) -> None:
        """Ends a pause, from whatever thread. The weights are looked at: if they have changed meanwhile,
        `weight_version` goes up. Without a pause it does nothing."""
        self._ask(self._resume)

    def warm_up(self) -> None:
        """Compiles and captures now what decode steps would otherwise compile and capture when it is first needed, so
        that no request waits for it."""

        def work() -> None:
            if not self._requests:
                self.executor.prepare()
            self.executor.warm_up()

        self._take_turn(work)

    def sleep(self, level: int = 1) -> None:
        """Gives the memory of page pool and graphs back, for training, say. Cached prefixes are forgotten; what is
        unfinished in a paused engine is computed again from its tokens later.

        Args:
            level: 1, the only one: the weights belong to the model and stay.

        Raises:
            RuntimeError: requests are unfinished, and the engine is not paused.
        """
        if level != 1:
            raise ValueError(
                f"sleep level must be 1 (the weights are the model's and stay where they are), got {level}"
            )
        self._take_turn(self._sleep)

    def wake_up(self) -> None:
        """Takes the memory again; the next request would too."""
        self._take_turn(self.executor.wake_up)

    def close(self) -> None:
        """Ends everything: requests are aborted, the memory is given back, the model is left as it was found."""
        self._take_turn(self._close)

    def reset_prefix_cache(self) -> None:
        """Forgets all cached pages before the next step."""
        self._ask(self._flush)

    # ---- for fronts ----------------------------------------------------------------------------------------

    def submit(self, requests: list[Request], deliver: Deliver | None = None) -> None:
        """Queues requests, all or none.

        Args:
            deliver: called with each output in the thread that computed the step; None leaves them to `step`.

        Raises:
            ValueError: an id is in use, or a request could not finish even alone in the pool.
        """
        if not requests:
            return
        for request in requests:
            self.scheduler.check(request)
        with self._adding:
            taken = self._ids.intersection(request.request_id for request in requests)
            if taken or len({request.request_id for request in requests}) < len(requests):
                raise ValueError(
                    f"request id {sorted(taken)[0] if taken else requests[0].request_id!r} is in use already"
                )
            self._ids.update(request.request_id for request in requests)
        self._inbox.append(lambda: self._add(requests, deliver))

    def drive(self) -> bool:
        """Computes one step and hands its outputs to their readers. Returns False when there was nothing to compute."""
        steps = self.stats.steps
        self._take_turn(self._step)
        return self.stats.steps > steps

    def run(self, requests: list[Request]) -> Iterator[RequestOutput]:
        """Submits requests and yields their outputs as they come, until all are finished.

        Leaving early (an exception, Ctrl-C, closing the iterator) aborts those that are not.

        Raises:
            RuntimeError: the calling thread has paused the engine.
        """
        self.gate.check()
        box: deque[RequestOutput] = deque()
        unfinished = {request.request_id for request in requests}
        try:
            self.submit(requests, box.append)
            while unfinished:
                # While it waited for the turn, another thread's step may have brought what it was waiting for.
                self._take_turn(lambda: None if box else self._step())
                while box:
                    output = box.popleft()
                    if output.finished:
                        unfinished.discard(output.request_id)
                    yield output
                if unfinished:
                    self.gate.wait(lambda: bool(box))
        finally:
            if unfinished:
                self.abort(unfinished)

    # ---- one step; only ever one thread at a time ----------------------------------------------------------

    def _take_turn(self, work: Callable[[], None]) -> None:
        """Does `work` while no other thread does any. If it fails, an interrupt included, the engine is put right."""
        self._turn.take(work, self._recover)

    def _recover(self) -> None:
        """Tokens already appended are whole. Everything else is made again from them."""
        self._flight = None
        requests = [request for request, _ in self._requests.values()]
        self.scheduler.recover(requests)
        for request in requests:
            for sequence in request.sequences:
                if sequence.num_generated and not sequence.finished:
                    self._end(sequence)  # its last token may not have been looked at
        self._report([request for request in requests if request.finished])

    def _step(self) -> None:
        """Lands one step, and has the next one on its way before that where it may."""
        self._read_inbox()
        if self.gate.closed:
            return
        if self._flight is None:
            self._flight = self._launch()
        if self._flight is None:
            return
        following = None if self._held else self._launch()
        flight, self._flight = self._flight, following
        if flight is not None:
            self._land(flight)
        if not self._requests:
            self._drain()  # all were finished by what has just landed: nobody wants the next one

    def _launch(self, retry: bool = False) -> _Flight | None:
        start = time.monotonic()
        batch = self.scheduler.schedule()
        if not batch:
            return None
        try:
            flight = _Flight(batch, self.executor.launch(batch), start, self._weight_version)
        except torch.OutOfMemoryError:
            if retry:
                raise
        else:
            self.scheduler.advance(batch)
            return flight
        self._shrink()
        return self._launch(retry=True)

    def _drain(self) -> None:
        """Waits for a step whose results nobody wants."""
        flight, self._flight = self._flight, None
        if flight is not None and _poisons(flight.land()):
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
        flight, self._flight = self._flight, None
        if flight is not None:
            self._land(flight)

    def _start_over(self) -> None:
        """What is under way lands, and everything unfinished is computed again from its tokens."""
        self._land_flight()
        self.scheduler.recover([request for request, _ in self._requests.values()])

    def _land(self, flight: _Flight) -> None:
        result = flight.land()
        start, self._landed_s = max(flight.start_s, self._landed_s), time.monotonic()
        touched = self._append(flight, result)
        if _poisons(result):
            self._purge()
        self._report(touched)
        self._count(flight.batch, start)

    def _purge(self) -> None:
        """The model left keys and values that are not numbers. Masked out they would still poison whoever gets their
        pages next, or has got them while this step was on its way: everything is wiped and computed again."""
        self._drain()
        self.executor.wipe(list(range(self.scheduler.pool.num_touched)))
        self.scheduler.recover([request for request, _ in self._requests.values()])

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
        for place, sequence in enumerate(batch.sampled()):
            request = sequence.request
            if sequence.finish_reason is not None:
                continue
            touched[request.request_id] = request
            if place in result.errors:
                self._fail(request, result.errors[place])
                continue
            if request.metrics.first_token_time is None:
                request.metrics.first_token_time = now
            if result.logprobs is not None:
                entry = result.logprobs[place]
                if entry is not None:
                    sequence.logprobs[sequence.num_generated :] = [entry]
            if not sequence.weight_runs or sequence.weight_runs[-1][0] != version:
                sequence.weight_runs.append((version, sequence.num_generated))
            self.scheduler.append(sequence, result.tokens[place])
            self.stats.generation_tokens += 1
            self._end(sequence)
        return list(touched.values())

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
            output = self._output(request)
            if output is not None:
                _, deliver = self._requests[request.request_id]
                (deliver or self._unclaimed.append)(output)
            if finished:
                self._ids.discard(request.request_id)
                self._held.discard(request.request_id)
                del self._requests[request.request_id]
        if self.gate.closed:
            self.gate.notify()

    def _output(self, request: Request) -> RequestOutput | None:
        try:
            return self.output_processor.output(request)
        except Exception as error:  # a tokenizer may raise anything; without text the tokens can still be told
            self._fail(request, error)
            return self.output_processor.output(request, with_text=False)

    def _count(self, batch: Batch, start: float) -> None:
        stats = self.stats
        stats.steps += 1
        stats.prompt_tokens += sum(chunk.length for chunk in batch.chunks)
        if not self.observers:
            return
        record = StepRecord(
            step=stats.steps,
            start_s=start,
            duration_s=time.monotonic() - start,
            decodes=[_name(sequence) for sequence in batch.decodes],
            chunks=[(*_name(chunk.sequence), chunk.length) for chunk in batch.chunks],
            num_waiting=self.scheduler.num_waiting,
            active_pages=self.scheduler.num_active_pages,
            cached_pages=self.scheduler.tree.num_evictable,
        )
        for observer in self.observers:
            observer(record)

    def _sleep(self) -> None:
        self._read_inbox()
        if self._requests and not self.gate.closed:
            raise RuntimeError(
                f"{len(self._requests)} requests are unfinished: finish or abort them before sleep(), or pause()"
            )
        self._drain()
        self._start_over()
        self.executor.sleep()

    def _close(self) -> None:
        self._read_inbox()
        self._abort(list(self._requests))
        self._drain()
        self.gate.open()
        self.executor.close()

    # ---- the inbox -----------------------------------------------------------------------------------------

    def _ask(self, *work: Callable[[], None]) -> None:
        """Has work done between two steps: now, or after the step in the middle of which this is called."""
        self._inbox.extend(work)
        if not self._turn.mine:
            self._take_turn(self._read_inbox)

    def _read_inbox(self) -> None:
        if self._requests and self.executor.optimizer_stepped():
            self._weights_changed()
            self._noticed = True
        while self._inbox:
            self._inbox[0]()  # may be done twice if it is interrupted, and must not mind
            self._inbox.popleft()

    def _add(self, requests: list[Request], deliver: Deliver | None) -> None:
        if not self._requests:
            self.scheduler.unshrink()
            if not self.gate.closed:
                self._look_over()
        for request in requests:
            if request.request_id in self._requests:
                continue
            if not self.executor.looks_ahead(request):
                self._held.add(request.request_id)
            self._requests[request.request_id] = request, deliver
            self.scheduler.add(request)

    def _abort(self, request_ids: list[str]) -> None:
        known = [self._requests[request_id][0] for request_id in request_ids if request_id in self._requests]
        for request in known:
            for sequence in request.sequences:
                self.scheduler.finish(sequence, "abort")
        self._report(known)
        if not self._requests:
            self._drain()

    def _look_over(self) -> None:
        """Before the first step after a time without any: the model may be another than it was."""
        if self.executor.prepare() and self._requests:
            self._start_over()
        changed = self.executor.weights_changed()
        self._noticed = changed and self._saw_weights and not self._announced
        if self._noticed:
            self._weights_changed()
        self._saw_weights, self._announced = True, False

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

    def _pause(self, by: threading.Thread | None) -> None:
        self.gate.close(by)
        self._land_flight()

    def _resume(self) -> None:
        if self.gate.closed and self._requests:
            self._look_over()
        self.gate.open()

    def _flush(self) -> None:
        self.scheduler.flush_prefix_cache()


def _poisons(result: StepResult) -> bool:
    """Whether a step may have left keys and values that are not numbers."""
    errors = any(isinstance(error, NonFiniteLogits) for error in result.errors.values())
    return errors or any(map(math.isnan, chain.from_iterable(result.scores or ())))


def _name(sequence: Sequence) -> tuple[str, int]:
    return sequence.request.request_id, sequence.index
