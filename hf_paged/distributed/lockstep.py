"""Engines of several ranks that compute the same steps.

Every rank has an engine of its own, with the same scheduler over the same requests, and so comes to the same decisions.
Before a step is launched the ranks compare it (`Link.agree`), so that a difference is an error on all of them rather
than a sum that waits for ever. Logits are gathered bit by bit alike, and draws depend on seeds, so tokens need not be
sent.

Either every rank runs the same program (torchrun), or rank 0 alone is called and tells the others, step by step, what
it does (`LeadingEngine`, `follow`).
"""

from __future__ import annotations

import logging
import pickle
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_paged.attention.shared import SharedPlanner
from hf_paged.config import EngineConfig
from hf_paged.distributed.errors import ParallelError, PeerFailed
from hf_paged.distributed.groups import TensorParallel
from hf_paged.distributed.pipeline import keep_rows, kept_rows, stage_of
from hf_paged.distributed.waiting import Interrupts, Watchdog
from hf_paged.engine.batch import Batch
from hf_paged.engine.engine import Engine
from hf_paged.engine.executor import StepResult
from hf_paged.engine.intake import Intake
from hf_paged.engine.loop import Deliver
from hf_paged.engine.model_executor import ModelExecutor
from hf_paged.engine.request import Request
from hf_paged.engine.scheduler import Scheduler
from hf_paged.lora.adapter import Adapter
from hf_paged.lora.travel import AdapterNews, AdapterReceiver, AdapterSender
from hf_paged.model.introspect import causal_lm
from hf_paged.speculative.config import SpeculativeConfig
from hf_paged.speculative.speculator import Speculator

logger = logging.getLogger(__name__)


class ParallelExecutor(ModelExecutor):
    """A rank's part of a model. What it launches, all ranks launch.

    Raises:
        ValueError: an option that cannot be had with several ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        config: EngineConfig,
        speculation: SpeculativeConfig | None,
        parallel: TensorParallel,
    ) -> None:
        if config.exact:
            raise ValueError("exact=True cannot be had with several ranks: sums across them round differently")
        if parallel.pipeline is not None:
            if speculation is not None:
                raise ValueError("speculation cannot be had with pipeline parallelism yet: leave it out")
            self.micro_batches = parallel.pipeline.size
            self.most_in_flight = max(self.most_in_flight, self.micro_batches)
            self.draws = parallel.pipeline.is_last
        if speculation is not None and speculation.model is not None:
            raise ValueError(
                f"speculation by {speculation.method} cannot be had with tensor parallelism yet: take ngram or suffix"
            )
        if getattr(model, "peft_config", None):
            raise ValueError("a PEFT adapter cannot be had with tensor parallelism yet: merge it into the weights")
        self.parallel = parallel
        self._watchdog = Watchdog(parallel)
        self._stage = stage_of(causal_lm(model))
        try:
            with ExitStack() as stack:
                if self._stage is not None:
                    stack.enter_context(self._stage.rehearsing())
                super().__init__(model, config, speculation)
        except ParallelError:
            raise
        except Exception as error:
            if parallel.link.gone():
                raise parallel.link.blame(error) from error
            parallel.link.fail(f"{type(error).__name__}: {error}")  # others may wait for it already
            raise

    def lost(self) -> str | None:
        link = self.parallel.link
        if link.broken is None and (gone := link.gone()):
            return f"rank {gone[0]} ended"
        return None if link.broken is None else str(link.broken)

    def _choose_num_pages(self, activations: int) -> int:
        return min(self.parallel.link.exchange("choosing the number of pages", super()._choose_num_pages(activations)))

    # Ranks must capture the same graphs at the same steps: while one captures, others compute with it.

    def _count_weights(self) -> int:
        return max(self.parallel.link.exchange("counting weights", super()._count_weights()))

    def _new_planner(self) -> SharedPlanner | None:
        planner = super()._new_planner()
        plan = self.parallel.link.exchange("whether decodes share what they read", planner is not None)
        return planner if all(plan) else None

    def looks_ahead(self, request: Request) -> bool:
        # Of a pipeline's micro-batches none goes on from tokens that are not known.
        return self.parallel.pipeline is not None or super().looks_ahead(request)

    def launch(self, batch: Batch) -> Callable[[], StepResult]:
        self.parallel.link.agree("the next step", fingerprint(batch))
        with self._together():
            land = super().launch(batch)
        return lambda: self._wait(batch, land)

    def warm_up(self) -> None:
        with self._together():
            super().warm_up()

    def _moved(self) -> bool:
        return any(self.parallel.link.exchange("looking for what moved", super()._moved()))

    def weights_changed(self) -> bool:
        return any(self.parallel.link.exchange("looking at the weights", super().weights_changed()))

    def _wait(self, batch: Batch, land: Callable[[], StepResult]) -> StepResult:
        pipeline = self.parallel.pipeline
        with self._together():
            result = land()
        if pipeline is None:
            return result
        tells = pipeline.is_last and self.parallel.rank == 0
        known = (_portable(result), kept_rows(batch)) if tells else None
        told = self.parallel.link.exchange("a step's tokens", known)
        result, kept = told[(pipeline.size - 1) * self.parallel.size]
        if not pipeline.is_last:
            keep_rows(batch, kept, self.layout.device)
        return result

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Around what goes through collectives. If one rank fails in there, no rank knows where the others stand."""
        try:
            with ExitStack() as stack:
                stack.enter_context(self._watchdog.armed())
                if self._stage is not None:
                    stack.enter_context(self._stage.living())
                yield
        except Exception as error:
            raise self.parallel.link.blame(error) from error


class ParallelEngine(Engine):
    """An engine on a rank whose program all ranks run."""

    executor: ParallelExecutor

    def __init__(
        self, executor: ParallelExecutor, scheduler: Scheduler, intake: Intake, speculator: Speculator
    ) -> None:
        super().__init__(executor, scheduler, intake, speculator)
        self.link = executor.parallel.link
        self._epoch = self.link.epoch
        self._interrupts = Interrupts()
        self.link.check = self._interrupts.check

    def _compute_step(self) -> None:
        with self._interrupts:  # an interrupt in the middle of a sum would leave the other ranks waiting in it
            if self.link.epoch != self._epoch:
                self._adopt(self.link.exchange("going on after a failure", self._progress())[0])
                self._epoch = self.link.epoch
            super()._compute_step()

    def _warm_up(self) -> None:
        with self._interrupts:
            super()._warm_up()

    def _recover(self) -> None:
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, ParallelError):
            self.link.fail(f"{type(error).__name__}: {error}")
        super()._recover()

    def _progress(self) -> list[tuple[str, list[tuple[list[int], str | None]]]]:
        """Unfinished requests and their tokens."""
        return [
            (request_id, [(sequence.tokens, sequence.finish_reason) for sequence in request.sequences])
            for request_id, (request, _) in self._requests.items()
        ]

    def _adopt(self, progress: list[tuple[str, list[tuple[list[int], str | None]]]]) -> None:
        """Goes back to where rank 0 is: a step may have landed here and not there."""
        missing = [request_id for request_id, _ in progress if request_id not in self._requests]
        if missing:
            raise self.link.give_up(f"it does not have rank 0's request {missing[0]!r}")
        wanted = dict(progress)
        self._abort([request_id for request_id in self._requests if request_id not in wanted])
        self._requests = {request_id: self._requests[request_id] for request_id in wanted}
        for request_id, sequences in progress:
            for sequence, (tokens, reason) in zip(self._requests[request_id][0].sequences, sequences, strict=True):
                sequence.tokens[:], sequence.finish_reason = tokens, reason
        self._flights.clear()
        self.scheduler.recover([request for request, _ in self._requests.values()])


class LeadingEngine(ParallelEngine):
    """Rank 0's engine where the other ranks have no program of their own: it tells them what it does."""

    def __init__(
        self, executor: ParallelExecutor, scheduler: Scheduler, intake: Intake, speculator: Speculator
    ) -> None:
        super().__init__(executor, scheduler, intake, speculator)
        self._told = False
        """Whether the other ranks are told of what is going on."""
        self._adapters = AdapterSender()

    def submit(self, requests: list[Request], deliver: Deliver | None = None) -> None:
        try:
            pickle.dumps(requests)
        except Exception as error:
            raise ValueError(
                "a request's processors and criteria go to every rank and must be picklable: functions and classes of "
                f"a module, no lambdas ({error})"
            ) from error
        super().submit(requests, deliver)

    def _add(self, requests: list[Request], deliver: Deliver | None) -> None:
        adapters = [request.adapter for request in requests]
        self._adapters.tell(adapters, lambda news: self.link.tell("add", (requests, news)))
        super()._add(requests, deliver)

    def _abort(self, request_ids: list[str]) -> None:
        known = [request_id for request_id in request_ids if request_id in self._requests]
        if known:
            self._tell("abort", lambda: super(LeadingEngine, self)._abort(known), known)

    def _compute_step(self) -> None:
        if self._requests or self._flights:
            self._tell("step", super()._compute_step)

    def _land_flight(self) -> None:
        self._tell("land", super()._land_flight)

    def _look_over(self) -> None:
        self._tell("look_over", super()._look_over)

    def _start_over(self) -> None:
        self._tell("start_over", super()._start_over)

    def _flush(self) -> None:
        self._tell("flush", super()._flush)

    def _weights_told(self) -> None:
        self._tell("weights_told", super()._weights_told)

    def _warm_up(self) -> None:
        self._tell("warm_up", super()._warm_up)

    def _sleep(self) -> None:
        self._read_inbox()
        self._tell("sleep", super()._sleep)

    def _close(self) -> None:
        self._read_inbox()
        if self.link.broken is None:
            self._tell("close", super()._close)
        else:
            super()._close()

    def _tell(self, call: str, work: Callable[[], None], argument: Any = None) -> None:
        """Does something, and has the others do it, unless it is part of something that they are doing."""
        if self._told:
            return work()
        if self.link.broken is None or call == "step":  # requests of a broken group can still be aborted
            self.link.tell(call, argument)
        self._told = True
        try:
            work()
        finally:
            self._told = False


def follow(engine: ParallelEngine) -> None:
    """Another rank than 0: does what rank 0 tells, until that is to end.

    Raises:
        ParallelError: rank 0, or another one, is lost.
    """
    adapters = AdapterReceiver(pin=engine.executor.layout.device.type == "cuda")

    def add(told: tuple[list[Request], AdapterNews]) -> None:
        requests, news = told
        adapters.take(news)
        for request in requests:
            adapters.restore(request)
        engine._add(requests, lambda _: None)

    calls: dict[str, Callable[[Any], None]] = {
        "add": add,
        "abort": engine._abort,
        "step": lambda _: engine._compute_step(),
        "land": lambda _: engine._land_flight(),
        "look_over": lambda _: engine._look_over(),
        "start_over": lambda _: engine._start_over(),
        "flush": lambda _: engine._flush(),
        "weights_told": lambda _: engine._weights_told(),
        "warm_up": lambda _: engine._warm_up(),
        "sleep": lambda _: engine._sleep(),
        "close": lambda _: engine._close(),
    }
    while True:
        call, argument = engine.link.next_call()
        if call == "end":
            return
        if engine.link.epoch != engine._epoch:
            engine._flights.clear()  # rank 0 let go of them
        try:
            engine._take_turn(lambda call=call, argument=argument: calls[call](argument))  # type: ignore[misc]
        except PeerFailed as error:
            logger.info("a step was let go of: %s", error)
        except ParallelError:
            raise
        except Exception:
            logger.exception("rank %d failed; rank 0 is told", engine.link.rank)


def fingerprint(batch: Batch) -> int:
    """A number that is the same on ranks that are about to compute the same, and hardly ever otherwise."""
    rows = [
        (zlib.crc32(row.request.request_id.encode()), row.index, row.num_computed, row.num_tokens, row.last_token)
        for row in batch.decodes
    ]
    chunks = [
        (
            zlib.crc32(chunk.sequence.request.request_id.encode()),
            chunk.sequence.request.seed,
            chunk.start,
            chunk.length,
            len(chunk.samples),
            hash(tuple(chunk.sequence.tokens)),
            zlib.crc32((chunk.sequence.request.adapter_name or "").encode()),
        )
        for chunk in batch.chunks
    ]
    return hash((tuple(rows), tuple(chunks)))


def _portable(result: StepResult) -> StepResult:
    """A step's result as it can be sent: errors that cannot are told in words."""
    return replace(result, errors={place: _as_sent(error) for place, error in result.errors.items()})


def _as_sent(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def common_seeds(parallel: TensorParallel) -> Callable[[], int]:
    """Seeds for requests that have none: the same on all ranks, as long as these ask in the same order."""
    own = int(torch.randint(2**62, ()).item())
    generator = torch.Generator().manual_seed(parallel.link.exchange("drawing a seed", own)[0])
    return lambda: int(torch.randint(2**62, (), generator=generator).item())


def read_for_all(parallel: TensorParallel) -> Callable[[Callable[[], Adapter]], Adapter]:
    """How ranks that run the same program come to have the same adapter: rank 0 reads it, and what is wrong with it is
    an error on all of them. All ranks ask in the same order."""
    link = parallel.link

    def share(read: Callable[[], Adapter]) -> Adapter:
        own: Adapter | Exception | None = None
        with Interrupts():  # one in the middle of a message would leave the others without its end
            if link.rank == 0:
                try:
                    own = read()
                except Exception as error:
                    own = _as_sent(error)
            found: Adapter | Exception = link.exchange("reading an adapter", own)[0]
        if isinstance(found, Exception):
            raise found
        return found

    return share
