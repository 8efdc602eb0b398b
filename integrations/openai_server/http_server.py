"""The HTTP server that runs the application."""

from __future__ import annotations

import socket
from typing import Any

import uvicorn


class HttpServer(uvicorn.Server):
    """uvicorn, which when it shuts down waits for streams to end; those of live pages have no end of their own."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        feed: Any = getattr(self.config.app.state, "feed", None)  # type: ignore[union-attr]
        if feed is not None:
            feed.close()
        await super().shutdown(sockets)
