"""Connections that say nothing, or say it too slowly, are closed."""

from __future__ import annotations

import asyncio
import resource
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


def timed_protocol(timeout_s: float) -> type[H11Protocol]:
    """A protocol for uvicorn's `http` that closes a connection when the head of a request is not complete `timeout_s`
    seconds after the connection was made, or after the head's first byte. uvicorn itself only closes those that are
    silent after a response.
    """

    class TimedProtocol(H11Protocol):
        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self._head_timer is not None:
                self._head_timer.cancel()

        def _watch(self) -> None:
            waiting = self.cycle is None or self.cycle.response_complete
            if not waiting and self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None
            elif waiting and self._head_timer is None:
                self._head_timer = self.loop.call_later(timeout_s, self.transport.close)

    return TimedProtocol


def allow_many_connections() -> None:
    """Lets this process have as many open files, so connections, as the system grants it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
