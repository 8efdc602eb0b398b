"""Answers that end when the client goes away: server-sent events, and plain ones that take long."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hf_paged.integrations.openai_server.errors import as_api_error, error_body

T = TypeVar("T")


class Disconnected(Exception):
    """The client has gone away: nobody wants the answer."""


async def until_disconnect(request: Request, work: Awaitable[T]) -> T:
    """What `work` gives; it is cancelled when the client goes away first.

    Raises:
        Disconnected: it did.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Disconnected
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


class EventStream(Response):
    """Server-sent events: each item as JSON (a pair is an event's name and its data), then [DONE].

    What goes wrong on the way is told as an event. `items` is closed in any case.

    Args:
        done: end with "data: [DONE]".
    """

    media_type = "text/event-stream"

    def __init__(self, items: AsyncIterator[Any], *, done: bool = True) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._items, self._done = items, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, gone):
                task.cancel()
            with suppress(asyncio.CancelledError, OSError):
                await sending

    async def _send(self, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for item in self._items:
                    await _send_text(send, _event(item))
            except OSError:  # the client is gone
                raise
            except Exception as error:
                told = as_api_error(error)
                await _send_text(send, _event(error_body(told.status, told.message, told.param, told.code)))
            if self._done:
                await _send_text(send, "data: [DONE]\n\n")
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._items.aclose()  # type: ignore[attr-defined]


async def _send_text(send: Send, text: str) -> None:
    # What a tokenizer makes of broken bytes may be half a surrogate pair.
    await send({"type": "http.response.body", "body": text.encode("utf-8", "replace"), "more_body": True})


def _event(item: Any) -> str:
    if isinstance(item, tuple):
        return f"event: {item[0]}\ndata: {json.dumps(item[1], ensure_ascii=False)}\n\n"
    return f"data: {json.dumps(item, ensure_ascii=False)}\n\n"


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
