"""AsyncEngine: the same engine behind asyncio, for streams and servers."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from hf_paged.engine.front import FrontEngine
from hf_paged.engine.intake import Prompt
from hf_paged.engine.request import Request
from hf_paged.lora.request import LoRARequest
from hf_paged.outputs import RequestOutput
from hf_paged.sampling_params import RequestOutputKind, SamplingParams

logger = logging.getLogger(__name__)


class AsyncEngine:
    """Runs an engine's steps in a thread of its own while any request is unfinished.

    Other threads may use the same engine meanwhile. `async with AsyncEngine(model.engine) as engine` ends the thread.
    """

    def __init__(self, engine: FrontEngine) -> None:
        self.engine = engine
        self._wake = threading.Condition()
        self._closed = False
        self._lost: str | None = None
        self._waiting: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[RequestOutput | BaseException]]] = {}
        self._thread = threading.Thread(target=self._drive, name="hf_paged-engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    async def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        lora_request: LoRARequest | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Yields a request's outputs as they come. Leaving early, or cancelling the task, aborts it.

        Raises:
            ValueError, TypeError, FileNotFoundError: a bad prompt, parameter or adapter.
            RuntimeError: the engine is closed, or a step failed.
        """
        make = functools.partial(
            self.engine.intake.request,
            prompt,
            sampling or SamplingParams(),
            request_id=request_id,
            lora_request=lora_request,
        )
        request = make() if lora_request is None else await asyncio.to_thread(make)  # which may read an adapter
        outputs = self.follow([request])
        try:
            async for output in outputs:
                yield output
        finally:
            await outputs.aclose()  # type: ignore[attr-defined]

    async def follow(self, requests: list[Request]) -> AsyncIterator[RequestOutput]:
        """As `generate`, for requests that `Engine.intake` made: their outputs, in the order in which they come.

        Raises:
            ValueError: a request that does not fit the pool, or whose id is in use.
            RuntimeError: the engine is closed, or a step failed.
        """
        if self._closed or self._lost is not None:
            raise RuntimeError(self._lost or "the engine is closed")
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[RequestOutput | BaseException]()

        def deliver(output: RequestOutput) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, output)

        unfinished = {request.request_id for request in requests}
        if taken := unfinished & self._waiting.keys():
            raise ValueError(f"request id {sorted(taken)[0]!r} is in use already")
        # Before the engine knows of them, lest a step of them fail and nobody be told.
        self._waiting.update(dict.fromkeys(unfinished, (loop, queue)))
        try:
            self.engine.submit(requests, deliver)
        except BaseException:
            for request_id in unfinished:
                self._waiting.pop(request_id, None)
            raise
        try:
            with self._wake:
                self._wake.notify()
            while unfinished:
                output = await queue.get()
                if isinstance(output, BaseException):
                    raise RuntimeError("a step of the engine failed") from output
                if output.finished:
                    unfinished.discard(output.request_id)
                    self._waiting.pop(output.request_id, None)
                yield output
        finally:
            for request_id in unfinished:
                self._waiting.pop(request_id, None)
            if unfinished:
                # The abort goes on even if this task is cancelled once more while it waits for it.
                await asyncio.shield(loop.run_in_executor(None, self.engine.abort, list(unfinished)))

    async def stream(self, prompt: Prompt, sampling: SamplingParams | None = None) -> AsyncIterator[str]:
        """The text of one sample, piece by piece; the pieces joined are its final text.

        Raises:
            ValueError: n > 1, or no tokenizer.
        """
        params = (sampling or SamplingParams()).clone(output_kind=RequestOutputKind.DELTA)
        if params.n > 1:
            raise ValueError(f"stream() follows one sample, got n={params.n}")
        if self.engine.intake.tokenizer is None:
            raise ValueError("stream() yields text and needs a tokenizer")
        outputs = self.generate(prompt, params)
        try:
            async for output in outputs:
                if output.error is not None:
                    raise output.error
                for completion in output.outputs:
                    if completion.text:
                        yield completion.text
        finally:
            await outputs.aclose()  # type: ignore[attr-defined]

    async def pause(self) -> None:
        """As `Engine.pause`: the step under way is finished, and none is computed until `resume`. Generators wait."""
        await _in_a_thread_of_its_own(self.engine.pause)

    async def resume(self) -> None:
        """As `Engine.resume`."""
        await _in_a_thread_of_its_own(self.engine.resume)

    @property
    def paused(self) -> bool:
        return self.engine.paused

    def lost(self) -> str | None:
        """Why nothing can be generated ever again; None while it can. It waits for nothing.

        A step that fails is no reason: the next one may succeed. A rank that ended is one, a device that answers
        every call with an error, and a thread that ended.
        """
        if self._lost is not None:
            return self._lost
        if self._closed:
            return "the engine is closed"
        return self.engine.lost()

    def close(self) -> None:
        """Ends the thread after its current step. Whoever still waits for output gets a RuntimeError."""
        self._closed = True
        self.engine.gate.notify()
        with self._wake:
            self._wake.notify()
        self._thread.join()
        self._fail(RuntimeError("the engine was closed"))

    def _drive(self) -> None:
        try:
            self._loop()
        except BaseException as error:  # it ends the thread, and nobody else would tell those who wait
            self._lost = f"the engine's thread ended: {_told(error)}"
            logger.critical("%s", self._lost, exc_info=error)
            self._fail(error)

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not self._closed and not self._waiting:
                    self._wake.wait()
            if self._closed:
                return
            try:
                idle = not self.engine.drive()
            except Exception as error:  # it goes to whoever waits; the engine has put its requests back and can go on
                if isinstance(error, torch.AcceleratorError) and not _device_works():
                    self._lost = f"the device failed: {_told(error)}"
                self._fail(error)
                continue
            if idle:  # the last outputs are on their way to their readers
                self.engine.gate.wait(lambda: self._closed)
                with self._wake:
                    self._wake.wait(0.005)

    def _fail(self, error: BaseException) -> None:
        # Each is let go before it is told: those who come meanwhile wait for something else.
        for request_id in list(self._waiting):
            loop, queue = self._waiting.pop(request_id, (None, None))
            if loop is not None and queue is not None and not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, error)


def _device_works() -> bool:
    """Some of a device's errors are of one call; after others every call fails."""
    try:
        torch.accelerator.synchronize()
    except RuntimeError:
        return False
    return True


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


async def _in_a_thread_of_its_own(work: Callable[[], None]) -> None:
    """A thread that pauses an engine cannot generate with it; those of the loop's executor may have to."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        await asyncio.get_running_loop().run_in_executor(thread, work)
