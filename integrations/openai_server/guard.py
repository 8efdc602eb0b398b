"""What stands before every endpoint: keys, the size of bodies, the length of the queue."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hf_paged.integrations.openai_server.errors import error_response
from hf_paged.integrations.openai_server.events import Disconnected
from hf_paged.integrations.openai_server.serving import Load

OPEN_PATHS = ("/", "/health", "/ping", "/version", "/metrics", "/load")
"""Probes and scrapers have no key, nor has a browser that opens the live page, which then asks for one."""


class RequireKey:
    """Answers 401 to requests without one of these keys in `Authorization: Bearer`.

    All keys are compared in time that does not depend on where they differ.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._allowed(scope):
            await self._app(scope, receive, send)
        else:
            response = error_response(401, "no valid API key: send one as Authorization: Bearer KEY")
            await response(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["method"] == "OPTIONS" or path in OPEN_PATHS:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = given.partition(b" ")
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        return kind.lower() == b"bearer" and any(matches)


class LimitBody:
    """Reads bodies, and answers 413 to those that are larger, whatever their headers say, before they are read in full,
    and 408 to those that take longer than `timeout_s` seconds.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app, self._max_bytes, self._timeout_s = app, max_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = dict(scope["headers"]).get(b"content-length", b"0")
        body: bytes | None = None
        if told.isdigit() and int(told) <= self._max_bytes:
            # Read here, so that nothing has begun when it turns out too large or too slow.
            try:
                body = await asyncio.wait_for(self._read(receive), self._timeout_s)
            except asyncio.TimeoutError:
                response = error_response(408, f"the body did not arrive within {self._timeout_s:g} s")
                await response(scope, receive, send)
                return
            except Disconnected:
                return
        if body is None:
            response = error_response(413, f"the body is larger than {self._max_bytes} bytes")
            await response(scope, receive, send)
            return
        read = False

        async def replay() -> Message:
            nonlocal read
            if read:
                return await receive()
            read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The body; None is a larger one."""
        body = bytearray()
        message: Message = {"more_body": True}
        while message.get("more_body"):
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                return None
        return bytes(body)


GENERATING = ("/v1/completions", "/v1/chat/completions", "/v1/responses")


class LimitQueue:
    """Counts requests for generation, streams until their end, and answers 429 when there are too many."""

    def __init__(self, app: ASGIApp, load: Load) -> None:
        self._app, self._load = app, load

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or path not in GENERATING:
            await self._app(scope, receive, send)
        elif self._load.count >= self._load.most:
            response = error_response(429, f"{self._load.count} requests are under way already: try again later")
            await response(scope, receive, send)
        else:
            self._load.count += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._load.count -= 1
