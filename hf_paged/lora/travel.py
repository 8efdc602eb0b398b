"""Adapters on their way to other processes: each travels once, and requests name it by its generation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from weakref import WeakValueDictionary

from hf_paged.engine.request import Request
from hf_paged.lora.adapter import Adapter


@dataclass(frozen=True, slots=True)
class AdapterNews:
    """What another process must know before it is given requests."""

    arriving: dict[int, Adapter]
    """By their generations where they come from."""
    gone: list[int]
    """Generations that no request will name again."""


class AdapterSender:
    """What another process was told of adapters. Its callers take turns."""

    def __init__(self) -> None:
        self._told: set[int] = set()
        self._alive: WeakValueDictionary[int, Adapter] = WeakValueDictionary()

    def tell(self, adapters: Iterable[Adapter | None], send: Callable[[AdapterNews], object]) -> None:
        """Has it sent those that it does not have; None is no adapter. What nobody holds here any more is gone there
        too."""
        new = {a.generation: a for a in adapters if a is not None and a.generation not in self._told}
        gone = [generation for generation in self._told if generation not in self._alive]
        send(AdapterNews(new, gone))
        # Noted after it: what an interrupt comes between is sent again, which does no harm.
        self._alive.update(new)
        self._told = self._told.difference(gone) | new.keys()


class AdapterReceiver:
    """The adapters that another process tells of.

    Args:
        pin: keep them where a GPU can copy them from while the host goes on.
    """

    def __init__(self, *, pin: bool) -> None:
        self._pin = pin
        self._held: dict[int, Adapter] = {}

    def take(self, news: AdapterNews) -> None:
        """Keeps what arrives, and lets go of what is gone."""
        for generation in news.gone:
            self._held.pop(generation, None)
        for generation, adapter in news.arriving.items():
            self._held[generation] = adapter.pinned() if self._pin else adapter

    def restore(self, request: Request) -> None:
        """Gives a request that has arrived its adapter again, if it has one."""
        if request.adapter_generation:
            request.set_adapter(self._held[request.adapter_generation])
