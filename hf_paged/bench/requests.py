"""One timed request: to a server with OpenAI's API, or straight to an engine. Both are timed in the same way."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from hf_paged.bench.datasets import BenchRequest


@dataclass
class Timing:
    """What came of a request; times in seconds."""

    prompt_len: int
    start: float = 0.0
    """When it was sent, on the clock of `time.perf_counter`."""
    ttft: float = 0.0
    """From `start` to the first token."""
    itls: list[float] = field(default_factory=list)
    """Between a piece of the answer and the next; a piece may be several tokens."""
    latency: float = 0.0
    """From `start` to the last piece."""
    output_len: int = 0
    """Tokens, as the server counts them; pieces where it does not tell."""
    text: str = ""
    error: str | None = None
    """Why there is no whole answer."""
    queue_time: float = 0.0
    """From its arrival to `start`: waiting for --max-concurrency."""

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None where there is none."""
        return (self.latency - self.ttft) / (self.output_len - 1) if self.output_len > 1 else None


Send = Callable[[BenchRequest], Awaitable[Timing]]


class Stopwatch:
    """Takes the times of an answer's pieces."""

    def __init__(self, prompt_len: int) -> None:
        self.timing = Timing(prompt_len, start=time.perf_counter())
        self._last = self.timing.start

    def piece(self, text: str, now: float) -> None:
        timing = self.timing
        if timing.output_len == 0:
            timing.ttft = now - timing.start
        else:
            timing.itls.append(now - self._last)
        timing.output_len += 1
        timing.text += text
        self._last = now
        timing.latency = now - timing.start


class ServerRequests:
    """Requests to a server. Use it in `async with`.

    Args:
        base_url: without the endpoint.
        endpoint: one that ends with /chat/completions is asked with messages, any other with prompts.
        body: fields of every request, model included.
        timeout: seconds that an answer may take in all.

    Raises:
        ImportError: httpx is not installed; the message names the extra.
    """

    def __init__(
        self, base_url: str, endpoint: str, body: dict[str, Any], *, api_key: str | None = None, timeout: float = 1800.0
    ) -> None:
        try:
            import httpx
        except ImportError as error:
            raise ImportError("timing a server needs httpx: pip install 'hf_paged[server]'") from error
        self._endpoint, self._body, self._timeout = endpoint, body, timeout
        self._chat = endpoint.rstrip("/").endswith("/chat/completions")
        self._errors = (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError)
        self.http = httpx.AsyncClient(
            base_url=base_url,
            timeout=httpx.Timeout(None, connect=30.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        )

    async def __aenter__(self) -> ServerRequests:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    async def first_model(self) -> str:
        """The first model that the server lists.

        Raises:
            ConnectionError: nobody answers, or there is none; the message says what to do.
        """
        try:
            response = await asyncio.wait_for(self.http.get("/v1/models"), 30)
            response.raise_for_status()
            return str(response.json()["data"][0]["id"])
        except (*self._errors, asyncio.TimeoutError, LookupError, TypeError) as error:
            raise ConnectionError(
                f"{self.http.base_url} lists no model ({error or type(error).__name__}): start a server with "
                "hf-paged serve MODEL, or give --base-url and --model"
            ) from error

    async def send(self, request: BenchRequest) -> Timing:
        """Sends a request and reads its answer; whatever goes wrong is in the timing."""
        watch = Stopwatch(request.prompt_len)
        try:
            await asyncio.wait_for(self._stream(request, watch), self._timeout)
        except asyncio.TimeoutError:
            watch.timing.error = f"no whole answer in {self._timeout:g} s"
        except self._errors as error:
            watch.timing.error = f"{type(error).__name__}: {error}"
        return watch.timing

    async def _stream(self, request: BenchRequest, watch: Stopwatch) -> None:
        asked: dict[str, Any] = {"max_tokens": request.output_len, "stream": True}
        asked["stream_options"] = {"include_usage": True}
        if self._chat:
            asked["messages"] = [{"role": "user", "content": request.prompt}]
        else:
            asked["prompt"] = request.prompt
        async with self.http.stream("POST", self._endpoint, json=asked | self._body) as response:
            if response.status_code != 200:
                said = (await response.aread()).decode("utf-8", "replace")
                watch.timing.error = f"status {response.status_code}: {said[:300]}"
                return
            async for data, now in _events(response.aiter_bytes()):
                if data == b"[DONE]":
                    return
                self._take(json.loads(data), watch, now)
            watch.timing.error = watch.timing.error or "the answer ended without [DONE]"

    def _take(self, event: dict[str, Any], watch: Stopwatch, now: float) -> None:
        if event.get("error"):
            watch.timing.error = str(event["error"])[:300]
        for choice in event.get("choices") or ():
            if not self._chat:
                watch.piece(choice.get("text") or "", now)
                continue
            delta = choice.get("delta") or {}
            text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""
            if text or delta.get("tool_calls"):  # the role comes before there is any token
                watch.piece(text, now)
            else:
                watch.timing.latency = now - watch.timing.start
        if usage := event.get("usage"):
            watch.timing.output_len = usage.get("completion_tokens") or watch.timing.output_len
            watch.timing.prompt_len = usage.get("prompt_tokens") or watch.timing.prompt_len


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[tuple[bytes, float]]:
    """(data, when it came) of server-sent events."""
    rest = b""
    async for chunk in chunks:
        now = time.perf_counter()
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip(), now


class EngineRequests:
    """The same requests without a server: through `AsyncEngine`, text and all.

    Args:
        engine: an `AsyncEngine`.
        sampling: a `SamplingParams` for all of them; each request says its own length.
    """

    def __init__(self, engine: Any, sampling: Any) -> None:
        from hf_paged.sampling_params import RequestOutputKind

        self._engine = engine
        self._sampling = sampling.clone(output_kind=RequestOutputKind.DELTA)

    async def send(self, request: BenchRequest) -> Timing:
        watch = Stopwatch(request.prompt_len)
        tokens = 0
        try:
            async for output in self._engine.generate(
                request.prompt, self._sampling.clone(max_tokens=request.output_len)
            ):
                if output.error is not None:
                    raise output.error
                watch.timing.prompt_len = len(output.prompt_token_ids)
                for sample in output.outputs:
                    tokens += len(sample.token_ids)
                    watch.piece(sample.text, time.perf_counter())
        except Exception as error:  # whatever a server would have answered 400 or 500 to
            watch.timing.error = f"{type(error).__name__}: {error}"
        return replace(watch.timing, output_len=tokens)
