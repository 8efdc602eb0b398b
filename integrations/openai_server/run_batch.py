"""`hf-paged run-batch`: a file of requests through the server's own application, without a server."""

from __future__ import annotations

import asyncio
import json
import os
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from tqdm import tqdm

from hf_paged.integrations.openai_server.batch_files import BatchLine, BatchOutput, check_batch, read_batch

Ask = Callable[[BatchLine], Awaitable[dict[str, Any]]]
"""A line's answer, as a line of the output."""


def open_batch(source: Path, target: Path) -> tuple[BatchOutput, int]:
    """(the output to go on with, lines of the input), checked against each other.

    Raises:
        FileNotFoundError, ValueError, OSError: either file is not what it should be; the message says what to do.
    """
    keys = check_batch(source)
    if target.exists() and target.samefile(source):
        raise ValueError(f"{target} is the input: name another output file")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent} for the output")
    output = BatchOutput(target)
    if strangers := output.done - keys:
        output.close()
        raise ValueError(
            f"{target} has answers to {len(strangers)} requests that {source} does not have, such as "
            f"{next(iter(strangers))!r:.200}: it belongs to another batch. Name another output file"
        )
    return output, len(keys)


async def run_batch(
    app: FastAPI,
    source: Path,
    output: BatchOutput,
    total: int,
    *,
    window: int | None = None,
    api_key: str | None = None,
    progress: bool | None = None,
) -> int:
    """Asks what has no answer yet, and writes each answer when it is there: their order is that of their coming.

    Cancelling it aborts what is under way and leaves the answers so far.

    Args:
        app: as `make_app` makes it.
        total: lines of the input.
        window: requests under way at once; None is twice what the engine runs at once.
        api_key: one of the application's, where it has keys.
        progress: show a bar; None does so on a terminal.

    Returns:
        how many of the new answers are errors.

    Raises:
        RuntimeError: the engine itself fails. The requests that saw it fail have no answer and are asked again by the
            next run.
        OSError: the output cannot be written.
    """
    serving = app.state.serving
    window = window or min(2 * serving.engine.engine.load.max_num_seqs, serving.load.most)
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)  # type: ignore[arg-type]
    lines = (line for line in read_batch(source) if line.key not in output.done)
    with tqdm(total=total, initial=len(output.done), unit="req", desc="batch", disable=_hidden(progress)) as bar:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://batch", headers=headers, timeout=None) as client,
        ):

            async def ask(line: BatchLine) -> dict[str, Any]:
                return await answer_line(client, line)

            return await _answer_all(lines, ask, output, window, bar)


def _hidden(progress: bool | None) -> bool | None:
    return None if progress is None else not progress  # None: tqdm looks whether standard error is a terminal


async def answer_line(client: httpx.AsyncClient, line: BatchLine) -> dict[str, Any]:
    """A line of the output, in OpenAI's shape."""
    entry: dict[str, Any] = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": line.custom_id, "response": None}
    if line.problem is not None:
        return entry | {"error": {"code": "invalid_request", "message": line.problem, "line": line.number}}
    content = json.dumps(line.body)
    response = await client.post(line.url, content=content, headers={"Content-Type": "application/json"})
    body = response.json()
    told = {"status_code": response.status_code, "request_id": body.get("id") or uuid.uuid4().hex, "body": body}
    return entry | {"response": told, "error": None}


@dataclass(frozen=True)
class _Answer:
    """A line of the output, and when it was asked and answered (`time.monotonic`)."""

    entry: dict[str, Any]
    asked: float
    came: float

    @property
    def status(self) -> int | None:
        return None if self.entry["response"] is None else self.entry["response"]["status_code"]


async def _answer_all(lines: Iterator[BatchLine], ask: Ask, output: BatchOutput, window: int, bar: tqdm) -> int:
    """Workers feed the engine and never wait for the disk; one task writes what has come meanwhile in one go."""
    answers: asyncio.Queue[_Answer | None] = asyncio.Queue(4 * window)
    bad = 0

    async def work() -> None:
        for line in lines:  # shared by all workers
            asked = time.monotonic()
            await answers.put(_Answer(await ask(line), asked, time.monotonic()))

    async def write() -> None:
        nonlocal bad
        failed: list[_Answer] = []
        ended = False
        while not ended:
            new = [await answers.get()]
            while not answers.empty():
                new.append(answers.get_nowait())
            ended = None in new
            came = [answer for answer in new if answer is not None]
            failed += [answer for answer in came if (answer.status or 0) >= 500]
            # What was asked after a failure and has an answer shows that the engine goes on: the request was to blame.
            healthy = max((answer.asked for answer in came if answer.status == 200), default=0.0)
            sure = [answer for answer in failed if answer.came < healthy]
            sure += [answer for answer in came if (answer.status or 0) < 500]
            failed = [answer for answer in failed if answer.came >= healthy]
            if sure:
                await asyncio.shield(asyncio.to_thread(output.append, [answer.entry for answer in sure]))
                bar.update(len(sure))
                bad += sum(answer.status != 200 for answer in sure)
            if len(failed) > window or (ended and failed):
                message = failed[0].entry["response"]["body"].get("error", {}).get("message", "no reason given")
                raise RuntimeError(
                    f"the engine fails ({message}): the last {len(failed)} requests have no answer. The same command "
                    "asks them again"
                )

    workers = [asyncio.create_task(work()) for _ in range(window)]
    writer = asyncio.create_task(write())
    feeding = asyncio.gather(*workers)
    try:
        await asyncio.wait({writer, feeding}, return_when=asyncio.FIRST_COMPLETED)
        if not writer.done():
            await feeding
            await answers.put(None)
        await writer
    except asyncio.CancelledError:
        for task in workers:
            task.cancel()
        with suppress(Exception):  # what has been answered is kept
            await asyncio.wait_for(answers.put(None), 30)
            await asyncio.wait_for(writer, 30)
        raise
    finally:
        # A cancellation may arrive as a request ends, and be lost there: the worker would go on to the next line.
        while going := [task for task in (*workers, writer) if not task.done()]:
            for task in going:
                task.cancel()
            await asyncio.wait(going, timeout=0.1)
        await asyncio.gather(*workers, writer, feeding, return_exceptions=True)
    return bad


def batch(source: Path, target: Path, arguments: list[str], window: int | None) -> tuple[int, int, int]:
    """Loads a model and runs a batch through it.

    Args:
        arguments: of `hf-paged serve`, the model included.

    Returns:
        (lines of the input, answers that were there before, new answers that are errors).

    Raises:
        ValueError, TypeError, FileNotFoundError, OSError: bad options or files.
        RuntimeError: the engine fails.
    """
    from hf_paged.integrations.openai_server.app import make_app
    from hf_paged.integrations.openai_server.options import parse_options
    from hf_paged.llm.llm import sampling_defaults

    options, args = parse_options(arguments)
    output, total = open_batch(source, target)
    with output:
        before = len(output.done)
        if before == total:
            return total, before, 0
        model, ranks = args.load()
        try:
            app = make_app(model, options, defaults=sampling_defaults(model, args), name=str(args.model))
            key = next(iter(options.api_key), None) or os.environ.get("HF_PAGED_API_KEY") or None
            bad = asyncio.run(run_batch(app, source, output, total, window=window, api_key=key))
        finally:
            if ranks is not None:
                ranks.stop()
    return total, before, bad
