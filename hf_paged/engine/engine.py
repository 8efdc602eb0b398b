"""Engine: requests in, steps, outputs. Owns the scheduler and the executor; shared by every front and every thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from hf_paged.engine.executor import Executor
from hf_paged.engine.intake import Intake, Prompt
from hf_paged.engine.loop import Deliver, StepLoop
from hf_paged.engine.request import Request
from hf_paged.engine.scheduler import Scheduler
from hf_paged.engine.stats import EngineLoad
from hf_paged.engine.turn import Turn
from hf_paged.lora.request import LoRARequest
from hf_paged.outputs import RequestOutput
from hf_paged.sampling_params import SamplingParams
from hf_paged.speculative.speculator import Speculator


class Engine(StepLoop):
    """Continuous batching over one executor.

    One step is looked ahead: while the device computes a step, the next one is scheduled and launched, its sequences
    going on from tokens that only the device knows yet. Tokens are read, and ends are seen, one step late; what a
    finished sequence computed in that step is thrown away. Requests whose sampling needs the host (see
    `Executor.looks_ahead`) suspend this while they are there.

    Callers either own the loop (`add_request`, `step`, `abort`, `has_unfinished`) or leave it to `run`. Any number of
    threads may call anything at once: requests and aborts go through an inbox, and whoever waits for output computes
    the next step for everybody.
    """

    def __init__(
        self, executor: Executor, scheduler: Scheduler, intake: Intake, speculator: Speculator | None = None
    ) -> None:
        super().__init__(executor, scheduler, intake, speculator or Speculator())
        self._inbox: deque[Callable[[], None]] = deque()
        self._adding = threading.Lock()
        self._turn = Turn()
        """Taken while a step is computed, or the inbox read."""

    # ---- for callers who own the loop ----------------------------------------------------------------------

    def add_request(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        lora_request: LoRARequest | None = None,
    ) -> str:
        """Queues one prompt; its outputs come from `step`.

        Returns:
            the request's id, made up when none is given.

        Raises:
            ValueError, TypeError, FileNotFoundError: bad prompt, parameters or adapter, an id in use, or a request too
                large for the pool.
        """
        request = self.intake.request(
            prompt, sampling or SamplingParams(), request_id=request_id, lora_request=lora_request
        )
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
    def num_unfinished(self) -> int:
        """Requests, of whatever caller, that are not done."""
        return len(self._ids)

    def lost(self) -> str | None:
        """Why nothing can be computed ever again, processes that it needs being lost for one; None while it can."""
        return self.executor.lost()

    @property
    def load(self) -> EngineLoad:
        """What there is to do at this moment."""
        scheduler = self.scheduler
        return EngineLoad(
            running=len(scheduler.running),
            waiting=scheduler.num_waiting,
            active_pages=scheduler.num_active_pages,
            num_pages=scheduler.num_pages,
            max_num_seqs=scheduler.max_num_seqs,
        )

    @property
    def unfinished(self) -> list[Request]:
        """Requests that are queued or run, in order of arrival; read them only."""
        return [request for request, _ in list(self._requests.values())]

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
        that no request waits for it, but for those with masks, penalties or processors."""

        self._take_turn(self._warm_up)

    def sleep(self, level: int = 1) -> None:
        """Gives the page pool's memory back, for training, say. On a GPU the pool keeps its addresses, so that CUDA
        graphs, which are small, stay and need not be captured again. Cached prefixes are forgotten; what is unfinished
        in a paused engine is computed again from its tokens later.

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

    def set_tokenizer(self, tokenizer: Any) -> None:
        """Another tokenizer, for the requests from here on; those that are unfinished keep the text they have."""

        def change() -> None:
            self.intake.tokenizer = self.output_processor.tokenizer = tokenizer

        self._ask(change)

    # ---- adapters ------------------------------------------------------------------------------------------

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Reads an adapter now, so that no request waits for it. Returns whether it was not there yet, or read anew.

        Raises:
            ValueError, FileNotFoundError: it does not fit, or there is none; or the engine has no room for adapters.
        """
        known = lora_request.lora_int_id in self.list_loras()
        self.intake.adapter(lora_request)
        return not known or lora_request.load_inplace

    def remove_lora(self, lora_int_id: int) -> bool:
        """Forgets an adapter; requests that began with it go on with it. Returns whether it was there."""
        return self.intake.need_adapters().remove(lora_int_id)

    def list_loras(self) -> set[int]:
        """The ids of the adapters in the host's memory."""
        return self.intake.need_adapters().ids()

    # ---- for fronts ----------------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raises ValueError for a request that could not finish even alone in the pool."""
        self.scheduler.check(request)

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
            self.check(request)
        self._claim_ids(requests)
        self._inbox.append(lambda: self._add(requests, deliver))

    def _claim_ids(self, requests: list[Request]) -> None:
        with self._adding:
            taken = self._ids.intersection(request.request_id for request in requests)
            if taken or len({request.request_id for request in requests}) < len(requests):
                raise ValueError(
                    f"request id {sorted(taken)[0] if taken else requests[0].request_id!r} is in use already"
                )
            self._ids.update(request.request_id for request in requests)

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

    # ---- only ever one thread at a time --------------------------------------------------------------------------

    def _take_turn(self, work: Callable[[], None]) -> None:
        """Does `work` while no other thread does any. If it fails, an interrupt included, the engine is put right."""
        self._turn.take(work, self._recover)

    def _step(self) -> None:
        self._read_inbox()
        if not self.gate.closed:
            self._compute_step()

    def _compute_step(self) -> None:
        """Lands one step, and has those after it on their way before that where they may be."""
        if self._unseen and self._requests:
            self._look_over()
        self._launch_all()
        if not self._flights:
            return
        # Of micro-batches the next one needs this one's tokens, and nobody else is to wait for what they are told.
        self._land(self._flights.popleft(), then=self._launch_all if self.executor.micro_batches > 1 else None)
        if not self._requests:
            self._drain()  # all were finished by what has just landed: nobody wants the next one

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

    def _pause(self, by: threading.Thread | None) -> None:
        self.gate.close(by)
        self._land_flight()

    def _resume(self) -> None:
        if self.gate.closed and self._requests:
            self._look_over()
        self.gate.open()

    def _warm_up(self) -> None:
        if not self._requests:
            self.executor.prepare()
        self.executor.warm_up()

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
