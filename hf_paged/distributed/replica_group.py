"""ReplicaGroup: several replicas that are asked, and told, together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

from hf_paged.distributed.errors import ReplicaLost
from hf_paged.distributed.replicas import Handle
from hf_paged.engine.request import Request
from hf_paged.engine.stats import EngineLoad, EngineStats
from hf_paged.lora.adapter import Adapter
from hf_paged.lora.travel import AdapterSender


class ReplicaGroup:
    """Replicas that were started together, those that were lost since included.

    Args:
        handles: replicas that are ready.
    """

    def __init__(self, handles: Sequence[Handle]) -> None:
        self.handles = list(handles)
        self._senders = {handle: AdapterSender() for handle in self.handles}

    def alive(self) -> list[Handle]:
        return [handle for handle in self.handles if handle.lost is None]

    def require(self) -> list[Handle]:
        """Those that are there.

        Raises:
            ReplicaLost: there is none.
        """
        if not (alive := self.alive()):
            raise ReplicaLost(f"no replica is left, the last one was: {self.handles[-1].lost}")
        return alive

    def call(self, work: Callable[[Any], Any], timeout_s: float | None, *, long: bool) -> list[tuple[int, Any]]:
        """As `ReplicatedEngine.call`."""
        answers = [(handle.number, handle.call(work, long)) for handle in self.require()]
        _, late = futures.wait([answer for _, answer in answers], timeout_s)
        for number, answer in answers:
            if answer in late:
                raise TimeoutError(f"replica {number} has not answered within {timeout_s:g} s")
        return [(number, answer.result()) for number, answer in answers]

    def on_engines(self, method: str, *args: Any, long: bool = False) -> None:
        """Calls a method of every engine; `long` as in `ReplicatedEngine.call`."""
        self.call(functools.partial(_on_engine, method, args), None, long=long)

    # ---- with adapters; callers take turns -------------------------------------------------------------------------

    def add(self, handle: Handle, request: Request, parcel: bytes) -> None:
        """Gives a replica a request, with its adapter if that was not there yet."""
        send = functools.partial(handle.send, "add", request.request_id, parcel)
        self._senders[handle].tell([request.adapter], send)

    def tell(self, adapters: Sequence[Adapter]) -> None:
        """Tells all replicas of adapters, and which are gone."""
        for handle in self.alive():
            self._senders[handle].tell(adapters, functools.partial(handle.send, "adapters"))

    # ---- how they are ----------------------------------------------------------------------------------------------

    @property
    def stats(self) -> EngineStats:
        """Totals."""
        each = [handle.state.stats for handle in self.handles if handle.state is not None]
        return EngineStats(
            steps=sum(stats.steps for stats in each),
            prompt_tokens=sum(stats.prompt_tokens for stats in each),
            generation_tokens=sum(stats.generation_tokens for stats in each),
        )

    @property
    def load(self) -> EngineLoad:
        """Of those that are there."""
        each = [handle.state.load for handle in self.alive() if handle.state is not None]
        return EngineLoad(
            running=sum(load.running for load in each),
            waiting=sum(load.waiting for load in each),
            active_pages=sum(load.active_pages for load in each),
            num_pages=max(sum(load.num_pages for load in each), 1),
            max_num_seqs=sum(load.max_num_seqs for load in each),
        )

    @property
    def weight_version(self) -> int:
        """The highest."""
        return max((handle.state.weight_version for handle in self.handles if handle.state is not None), default=0)


def _on_engine(method: str, args: tuple[Any, ...], worker: Any) -> None:
    getattr(worker.engine, method)(*args)
