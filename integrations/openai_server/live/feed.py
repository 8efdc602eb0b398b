"""Feed: what an engine does, five times a second, for whoever looks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from hf_paged.engine.engine import Engine
from hf_paged.integrations.openai_server.live.watch import Watch

logger = logging.getLogger(__name__)

INTERVAL_S = 0.2
MOST_BEHIND = 25
"""Messages that a client may lag; beyond, it starts over."""

Client = asyncio.Queue[dict[str, Any] | None]


class Feed:
    """Messages for live pages. The engine is watched only while somebody follows.

    Args:
        about: told to every page at its start.
    """

    def __init__(self, engine: Engine, about: dict[str, Any]) -> None:
        self._engine = engine
        self._about = about
        self._clients: set[Client] = set()
        self._watch: Watch | None = None
        self._pump: asyncio.Task[None] | None = None
        self._closed = False

    def close(self) -> None:
        """Ends everybody's stream, lest a server that shuts down wait for them. For the event loop's thread."""
        self._closed = True
        for client in self._clients:
            _start_over(client, None)

    async def follow(self) -> AsyncIterator[dict[str, Any]]:
        """Messages for one page. The first one says all that is (it has `about`), and so does one after a page was too
        slow, or the engine too fast; the others, what has happened since the last."""
        if self._closed:
            return
        client = Client(MOST_BEHIND)
        if self._watch is None:
            self._watch = Watch(self._engine)
            self._pump = asyncio.get_running_loop().create_task(self._run())
        self._publish()  # the others get what has happened until now, and the new one all of it
        client.put_nowait(self._picture(self._watch))
        self._clients.add(client)
        try:
            while (message := await client.get()) is not None:
                yield message
        finally:
            self._clients.discard(client)
            if not self._clients:
                self._leave()

    def _leave(self) -> None:
        if self._pump is not None:
            self._pump.cancel()
        if self._watch is not None:
            self._watch.close()
        self._pump = self._watch = None

    async def _run(self) -> None:
        try:
            while True:
                await asyncio.sleep(INTERVAL_S)
                self._publish()
        except Exception:
            logger.exception("live pages get no more news")
            for client in self._clients:
                _start_over(client, None)

    def _publish(self) -> None:
        watch = self._watch
        assert watch is not None
        if watch.overrun:
            watch.close()
            watch = self._watch = Watch(self._engine)
            watch.collect()
            for client in self._clients:
                _start_over(client, self._picture(watch))
            return
        message = watch.collect()
        for client in self._clients:
            if client.full():
                _start_over(client, self._picture(watch))
            else:
                client.put_nowait(message)

    def _picture(self, watch: Watch) -> dict[str, Any]:
        return {"about": self._about} | watch.picture()


def _start_over(client: Client, message: dict[str, Any] | None) -> None:
    """A message in place of all that a client has not read."""
    while not client.empty():
        client.get_nowait()
    client.put_nowait(message)
