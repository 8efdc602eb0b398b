"""ReplicatedEngine: data parallelism from within. Several replicas of a model that look like one engine.

The calling process has no model. It makes the requests, and draws their seeds in order, so that they draw the same
tokens on any number of replicas. A `Router` says who gets which; what no replica has room for waits here.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_paged.distributed import replicas
from hf_paged.distributed.errors import ReplicaLost
from hf_paged.distributed.groups import TIMEOUT_S
from hf_paged.distributed.parcel import ended, pack_request, unpack_output
from hf_paged.distributed.replica_group import ReplicaGroup
from hf_paged.distributed.replicas import Handle
from hf_paged.distributed.routing import Order, Router
from hf_paged.engine.gate import Gate
from hf_paged.engine.intake import Intake, Prompt
from hf_paged.engine.loop import Deliver
from hf_paged.engine.request import Request
from hf_paged.engine.scheduler import Scheduler
from hf_paged.engine.stats import EngineLoad, EngineStats, StepRecord
from hf_paged.lora.request import LoRARequest
from hf_paged.outputs import RequestOutput
from hf_paged.sampling_params import RequestOutputKind, SamplingParams

logger = logging.getLogger(__name__)

TRIES = 2
"""Replicas that may be lost with a request: one that ends them all should not be given to all."""


@dataclass
class _Entry:
    """An unfinished request."""

    request: Request
    parcel: bytes
    deliver: Deliver | None
    order: Order
    handle: Handle | None = None
    """Who computes it; None while it waits."""
    told: bool = False
    """Whether its reader has seen some of it."""
    generated: int = 0
    """Tokens that its reader has seen."""
    aborted: bool = False
    tries: int = 0


class ReplicatedEngine:
    """Does what fronts ask of an `Engine`, by handing it on.

    A step that fails ends its replica's requests, with the error in their outputs. A replica whose process ends or
    hangs is left out from then on: what it had not finished is computed again by others, but for requests of which
    something was told already, and those that two replicas were lost with. They end with an error that names the
    replica.

    Args:
        handles: replicas that are ready.
        seed: where requests without a seed get theirs from; None is torch's global generator.
        timeout_s: a replica that finishes no step for so long counts as lost.
    """

    def __init__(self, handles: Sequence[Handle], seed: int | None = None, timeout_s: float = TIMEOUT_S) -> None:
        self._group = ReplicaGroup(handles)
        facts = [handle.facts.result() for handle in handles]
        first, num_pages = facts[0], min(each.num_pages for each in facts)
        self.intake = Intake(
            first.tokenizer,
            vocab_size=first.vocab_size,
            max_model_len=first.max_model_len,
            pool_tokens=num_pages * first.page_size,
            eos_token_ids=lambda: first.eos_token_ids,
            logprobs_mode=first.logprobs_mode,
            speculation=first.speculation,
            seed=seed,
            adapters=first.adapters,
        )
        self.observers: list[Callable[[StepRecord], None]] = []
        """Called with a replica's last step, a few times per second."""
        self.gate = Gate()
        self._fits = Scheduler(num_pages=num_pages, page_size=first.page_size, max_num_seqs=1, max_num_batched_tokens=1)
        """Says what is too large."""
        self._router = Router(
            len(self.handles), page_size=first.page_size, num_pages=num_pages, max_num_seqs=first.max_num_seqs
        )
        self._timeout_s = timeout_s
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        """Something was delivered, or has ended."""
        self._entries: dict[str, _Entry] = {}
        self._arrivals = itertools.count()
        self._unclaimed: list[RequestOutput] = []
        self._closed = False
        for handle in self.handles:
            handle.on_news, handle.on_lost = self._take, self._lose
            if handle.lost is not None:
                self._lose(handle)
        threading.Thread(target=self._watch, name="hf_paged-watch", daemon=True).start()

    @property
    def handles(self) -> list[Handle]:
        return self._group.handles

    # ---- for callers who own the loop ------------------------------------------------------------------------------

    def add_request(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        lora_request: LoRARequest | None = None,
    ) -> str:
        """As `Engine.add_request`."""
        request = self.intake.request(
            prompt, sampling or SamplingParams(), request_id=request_id, lora_request=lora_request
        )
        self.submit([request])
        return request.request_id

    def step(self) -> list[RequestOutput]:
        """Waits a moment for outputs of requests that were added with `add_request`, and returns them."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._unclaimed) or not self._entries, timeout=0.1)
            outputs, self._unclaimed = self._unclaimed, []
        return outputs

    def abort(self, request_ids: str | Iterable[str]) -> None:
        """As `Engine.abort`; waits until the replicas have done so."""
        ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        told: dict[Handle, list[str]] = {}
        with self._lock:
            for request_id in ids:
                entry = self._entries.get(request_id)
                if entry is not None and entry.handle is None:
                    self._end(entry, ended(entry.request, "abort"))
                elif entry is not None and entry.handle is not None:
                    entry.aborted = True
                    told.setdefault(entry.handle, []).append(request_id)
            for handle, its in told.items():
                handle.send("abort", its)
            self._changed.wait_for(lambda: not any(request_id in self._entries for request_id in ids))

    def has_unfinished(self) -> bool:
        return bool(self._entries or self._unclaimed)

    def lost(self) -> str | None:
        """Why nothing can be computed ever again; None while there is a replica left."""
        if self._closed:
            return "the replicas are closed"
        return None if self._group.alive() else f"no replica is left, the last one was: {self.handles[-1].lost}"

    @property
    def num_unfinished(self) -> int:
        return len(self._entries)

    # ---- for fronts ------------------------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raises ValueError for a request that could not finish even alone in a replica's pool."""
        self._fits.check(request)

    def submit(self, requests: list[Request], deliver: Deliver | None = None) -> None:
        """As `Engine.submit`; `deliver` is called in a thread that reads what a replica tells.

        Raises:
            ValueError: an id is in use, a request is too large, or has something with it that cannot be pickled.
            ReplicaLost: there is no replica any more.
        """
        for request in requests:
            self.check(request)
        parcels = [pack_request(request) for request in requests]
        with self._lock:
            self._require()
            ids = [request.request_id for request in requests]
            taken = [id for place, id in enumerate(ids) if id in self._entries or id in ids[:place]] if ids else []
            if taken:
                raise ValueError(f"request id {taken[0]!r} is in use already")
            for request, parcel in zip(requests, parcels, strict=True):
                entry = _Entry(request, parcel, deliver, (request.priority, next(self._arrivals)))
                self._entries[request.request_id] = entry
                self._queue(entry)
            self._hand_out()

    def drive(self) -> bool:
        """Waits a moment for news. Returns whether anything is unfinished: replicas compute by themselves."""
        with self._changed:
            if self._entries:
                self._changed.wait(0.1)
            return bool(self._entries)

    def run(self, requests: list[Request]) -> Iterator[RequestOutput]:
        """As `Engine.run`."""
        self.gate.check()
        box: deque[RequestOutput] = deque()
        unfinished = {request.request_id for request in requests}
        try:
            self.submit(requests, box.append)
            while unfinished:
                with self._changed:
                    self._changed.wait_for(lambda: bool(box))
                while box:
                    output = box.popleft()
                    if output.finished:
                        unfinished.discard(output.request_id)
                    yield output
        finally:
            if unfinished:
                self.abort(unfinished)

    @property
    def stats(self) -> EngineStats:
        """Totals of all replicas."""
        return self._group.stats

    @property
    def load(self) -> EngineLoad:
        """Of all replicas that are there; what waits here waits too."""
        load = self._group.load
        return replace(load, waiting=load.waiting + self._router.num_waiting)

    @property
    def weight_version(self) -> int:
        """The highest of all replicas."""
        return self._group.weight_version

    # ---- what reaches all replicas ---------------------------------------------------------------------------------

    def call(
        self, work: Callable[[Any], Any], timeout_s: float | None = None, *, long: bool = True
    ) -> list[tuple[int, Any]]:
        """Has `work(worker)` done on every replica that is there. All of it must be picklable.

        Args:
            long: it may take as long as it likes; else a replica that finishes no step meanwhile hangs.

        Returns:
            (replica, what it returned there), in order.

        Raises:
            whatever it raises on one of them; ReplicaLost; TimeoutError.
        """
        self._require()
        return self._group.call(work, timeout_s, long=long)

    @property
    def paused(self) -> bool:
        return self.gate.closed

    def pause(self) -> None:
        """As `Engine.pause`."""
        self._group.on_engines("pause")
        self.gate.close(threading.current_thread())

    def resume(self) -> None:
        """As `Engine.resume`."""
        self._group.on_engines("resume")
        self.gate.open()

    def weights_updated(self, kv: str = "keep") -> None:
        """As `Engine.weights_updated`."""
        self._group.on_engines("weights_updated", kv)
        self._forget_prefixes()

    def warm_up(self) -> None:
        """As `Engine.warm_up`."""
        self._group.on_engines("warm_up", long=True)

    def sleep(self, level: int = 1) -> None:
        """As `Engine.sleep`."""
        if self._entries and not self.paused:
            raise RuntimeError(
                f"{len(self._entries)} requests are unfinished: finish or abort them before sleep(), or pause()"
            )
        self._group.on_engines("sleep", level)
        self._forget_prefixes()

    def wake_up(self) -> None:
        """As `Engine.wake_up`."""
        self._group.on_engines("wake_up")

    def reset_prefix_cache(self) -> None:
        """As `Engine.reset_prefix_cache`."""
        self._group.on_engines("reset_prefix_cache")
        self._forget_prefixes()

    def set_tokenizer(self, tokenizer: Any) -> None:
        """As `Engine.set_tokenizer`."""
        self._group.on_engines("set_tokenizer", tokenizer)
        self.intake.tokenizer = tokenizer

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """As `Engine.add_lora`; it is on its way to all replicas then."""
        self._require()
        known = lora_request.lora_int_id in self.list_loras()
        adapter = self.intake.adapter(lora_request)
        with self._lock:
            self._group.tell([adapter] if adapter is not None else [])
        return not known or lora_request.load_inplace

    def remove_lora(self, lora_int_id: int) -> bool:
        """As `Engine.remove_lora`."""
        found = self.intake.need_adapters().remove(lora_int_id)
        with self._lock:
            self._group.tell([])
        return found

    def list_loras(self) -> set[int]:
        """As `Engine.list_loras`."""
        return self.intake.need_adapters().ids()

    def close(self) -> None:
        """Ends the replicas. A second call does nothing."""
        with self._lock:
            closed, self._closed = self._closed, True
            if closed:
                return
            for entry in list(self._entries.values()):
                self._end(entry, ended(entry.request, "abort"))
        self.gate.open()
        replicas.close(self.handles)

    def _forget_prefixes(self) -> None:
        with self._lock:
            self._router.forget_prefixes()

    # ---- who computes what (the lock is held) ----------------------------------------------------------------------

    def _queue(self, entry: _Entry) -> None:
        request = entry.request
        self._router.add(
            request.request_id, entry.order, request.prompt_token_ids, request.sampling.n, request.max_tokens,
            request.adapter_generation,
        )  # fmt: skip

    def _hand_out(self) -> None:
        """Gives replicas what they have room for, in order."""
        while (taken := self._router.take()) is not None:
            request_id, number = taken
            entry = self._entries[request_id]
            entry.handle = self.handles[number]
            self._group.add(entry.handle, entry.request, entry.parcel)

    def _end(self, entry: _Entry, output: RequestOutput) -> None:
        del self._entries[entry.request.request_id]
        self._deliver(entry, output)
        n = entry.request.sampling.n
        normal = output.error is None and not entry.aborted
        self._router.done(entry.request.request_id, [entry.generated // n] * n if normal else ())

    def _deliver(self, entry: _Entry, output: RequestOutput) -> None:
        entry.told = True
        tokens = sum(len(sample.token_ids) for sample in output.outputs)
        entry.generated = tokens + entry.generated * (entry.request.sampling.output_kind is RequestOutputKind.DELTA)
        try:
            (entry.deliver or self._unclaimed.append)(output)
        except Exception:  # whoever waited for it is gone
            logger.exception("an output of %s could not be delivered", output.request_id)
        self._changed.notify_all()

    def _require(self) -> None:
        if self._closed:
            raise ReplicaLost("the replicas were shut down: make a new LLM")
        self._group.require()

    # ---- in threads that read what replicas tell -------------------------------------------------------------------

    def _take(self, handle: Handle, outputs: list[RequestOutput]) -> None:
        tokenizer = self.intake.tokenizer
        decode = None if tokenizer is None else tokenizer.decode
        with self._lock:
            for output in outputs:
                entry = self._entries.get(output.request_id)
                if entry is None or entry.handle is not handle:
                    continue  # it ended here before
                if output.error is not None and not output.outputs:  # it was not taken
                    output = ended(entry.request, "error", output.error)
                output = unpack_output(output, entry.request, decode)
                if output.finished:
                    self._end(entry, output)
                else:
                    self._deliver(entry, output)
            self._hand_out()
        if handle.state is not None and handle.state.record is not None:
            for observer in list(self.observers):
                observer(handle.state.record)

    def _lose(self, handle: Handle) -> None:
        if self._closed:
            return
        logger.error("%s; %d replicas are left", handle.lost, len(self._group.alive()))
        with self._lock:
            self._router.lose(handle.number)
            for entry in [entry for entry in self._entries.values() if entry.handle is handle]:
                entry.tries += 1
                if entry.aborted:
                    self._end(entry, ended(entry.request, "abort"))
                elif entry.told or entry.tries == TRIES or not self._group.alive():
                    self._end(entry, ended(entry.request, "error", handle.lost))
                else:
                    self._router.done(entry.request.request_id)
                    entry.handle = None
                    self._queue(entry)
            if not self._group.alive():
                for entry in list(self._entries.values()):
                    self._end(entry, ended(entry.request, "error", handle.lost))
            self._hand_out()

    def _watch(self) -> None:
        while not self._closed:
            time.sleep(min(1.0, self._timeout_s / 4))
            with self._lock:
                busy = {entry.handle for entry in self._entries.values()} if not self.paused else set()
            replicas.watch(self._group.alive(), self._timeout_s, busy.__contains__)
