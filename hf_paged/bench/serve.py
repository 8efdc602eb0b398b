"""`hf-paged bench serve`: requests that arrive by a clock of their own, and how a server keeps up with them."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from tqdm import tqdm

from hf_paged.bench.datasets import BenchRequest
from hf_paged.bench.requests import Send, ServerRequests, Timing

METRICS = {
    "ttft": "Time to first token",
    "tpot": "Time per output token, the first left out",
    "itl": "Inter-token latency",
    "e2el": "End-to-end latency",
}
DETAILS = (
    *("input_lens", "output_lens", "ttfts", "itls", "latencies"),
    *("start_times", "queue_times", "generated_texts", "errors"),
)
"""What a result has for every request."""


def arrival_times(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds from the start at which requests arrive.

    Args:
        rate: requests per second; infinite is all at once.
        burstiness: shape of the gamma distribution of the gaps. 1 is a Poisson process, less has bursts, more is
            steadier.
    """
    if math.isinf(rate):
        return [0.0] * count
    gaps = np.random.default_rng(seed).gamma(burstiness, 1.0 / (rate * burstiness), count)
    return [float(at) for at in np.cumsum(gaps)]


async def drive(
    requests: Sequence[BenchRequest],
    send: Send,
    arrivals: Sequence[float],
    *,
    max_concurrency: int | None = None,
    progress: bool = False,
) -> tuple[list[Timing], float]:
    """Sends each request when its time has come, whatever became of those before it.

    Args:
        max_concurrency: requests that have arrived wait while so many are under way.

    Returns:
        (timings in the requests' order, seconds from the start to the last answer).
    """
    gate = asyncio.Semaphore(max_concurrency) if max_concurrency else nullcontext()
    start = time.perf_counter()
    bar = tqdm(total=len(requests), unit="req", disable=None if progress else True)

    async def one(request: BenchRequest, at: float) -> Timing:
        await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
        arrived = time.perf_counter()
        async with gate:
            timing = await send(request)
        timing.queue_time = timing.start - arrived
        bar.update()
        return timing

    with bar:
        timings = await asyncio.gather(*(one(*pair) for pair in zip(requests, arrivals, strict=True)))
    return timings, time.perf_counter() - start


async def warm_up(send: Send, request: BenchRequest, count: int, max_concurrency: int | None) -> None:
    """Sends one request some times, not timed.

    Raises:
        ConnectionError: it is not answered, so the others would not be either.
    """
    if count:
        first = await send(request)
        if first.error is not None:
            raise ConnectionError(f"the first request, to warm up, failed: {first.error}")
        await drive([request] * (count - 1), send, [0.0] * (count - 1), max_concurrency=max_concurrency)


def summarize(
    timings: Sequence[Timing],
    duration: float,
    *,
    metrics: Sequence[str] = ("ttft", "tpot", "itl"),
    percentiles: Sequence[float] = (99.0,),
    goodput: dict[str, float] | None = None,
) -> dict[str, Any]:
    """What a run comes to, in the words of vLLM's result files: times there are in milliseconds where their name says
    so, else in seconds.

    Args:
        metrics: those of `METRICS` to give mean, median, deviation and percentiles of.
        goodput: the most milliseconds that a request may take by ttft, tpot and e2el to count as good.
    """
    done = [timing for timing in timings if timing.error is None]
    tokens_in, tokens_out = sum(t.prompt_len for t in done), sum(t.output_len for t in done)
    busiest, most = _peaks(done)
    result: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(timings) - len(done),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": len(done) / duration,
        "request_goodput": sum(_good(t, goodput) for t in done) / duration if goodput else None,
        "output_throughput": tokens_out / duration,
        "total_token_throughput": (tokens_in + tokens_out) / duration,
        "max_output_tokens_per_s": busiest,
        "max_concurrent_requests": most,
        "input_lens": [t.prompt_len for t in timings],
        "output_lens": [t.output_len for t in timings],
        "ttfts": [t.ttft for t in timings],
        "itls": [t.itls for t in timings],
        "latencies": [t.latency for t in timings],
        "start_times": [t.start for t in timings],
        "queue_times": [t.queue_time for t in timings],
        "generated_texts": [t.text for t in timings],
        "errors": [t.error or "" for t in timings],
    }
    values = {
        "ttft": [t.ttft for t in done if t.output_len],
        "tpot": [t.tpot for t in done if t.tpot is not None],
        "itl": [itl for t in done for itl in t.itls],
        "e2el": [t.latency for t in done],
    }
    for name in metrics:
        ms = np.asarray(values[name] or [0.0]) * 1000
        result |= {f"mean_{name}_ms": ms.mean(), f"median_{name}_ms": np.median(ms), f"std_{name}_ms": ms.std()}
        result |= {f"p{percentile:g}_{name}_ms": np.percentile(ms, percentile) for percentile in percentiles}
    return {name: float(value) if isinstance(value, np.floating) else value for name, value in result.items()}


def _good(timing: Timing, goodput: dict[str, float]) -> bool:
    took = {"ttft": timing.ttft, "tpot": timing.tpot or 0.0, "e2el": timing.latency}
    return all(took[name] * 1000 <= most for name, most in goodput.items())


def _peaks(timings: Sequence[Timing]) -> tuple[float, int]:
    """(tokens in the busiest second, requests under way at once)."""
    if not timings:
        return 0.0, 0
    start = min(t.start for t in timings)
    tokens: dict[int, float] = {}
    changes: list[tuple[float, int]] = []
    for t in timings:
        pieces = np.cumsum([t.start - start + t.ttft, *t.itls])
        for at in pieces:  # a piece may be several tokens
            tokens[int(at)] = tokens.get(int(at), 0.0) + t.output_len / len(pieces)
        changes += [(t.start, 1), (t.start + t.latency, -1)]
    under_way = np.cumsum([change for _, change in sorted(changes)])
    return max(tokens.values()), int(under_way.max())


def as_table(result: dict[str, Any]) -> Table:
    """The same for people."""
    table = Table(title="Serving benchmark", show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="right")

    def row(title: str, value: Any, form: str = "{:,.2f}") -> None:
        table.add_row(title, form.format(value))

    row("Successful requests", result["completed"], "{:,}")
    row("Failed requests", result["failed"], "{:,}")
    row("Duration (s)", result["duration"])
    row("Input tokens", result["total_input_tokens"], "{:,}")
    row("Generated tokens", result["total_output_tokens"], "{:,}")
    row("Request throughput (req/s)", result["request_throughput"])
    if result["request_goodput"] is not None:
        row("Request goodput (req/s)", result["request_goodput"])
    row("Output token throughput (tok/s)", result["output_throughput"])
    row("Peak output token throughput (tok/s)", result["max_output_tokens_per_s"])
    row("Total token throughput (tok/s)", result["total_token_throughput"])
    row("Most requests at once", result["max_concurrent_requests"], "{:,}")
    for name, title in METRICS.items():
        if f"mean_{name}_ms" not in result:
            continue
        table.add_section()
        table.add_row(f"[bold]{title}", "")
        for key, value in result.items():
            statistic, _, rest = key.partition("_")
            if rest == f"{name}_ms" and statistic != "std":
                row(f"{statistic.capitalize()} {name.upper()} (ms)", value)
    return table


def errors_text(result: dict[str, Any], most: int = 3) -> str:
    """The commonest errors and how often each came; empty without any."""
    errors = [error for error in result["errors"] if error]
    counts = sorted({error: errors.count(error) for error in set(errors)}.items(), key=lambda pair: -pair[1])
    return "\n".join(f"{count} x {error}" for error, count in counts[:most])


def save(result: dict[str, Any], settings: dict[str, Any], *, folder: Path, name: str | None, detailed: bool) -> Path:
    """Writes settings and result as JSON, in vLLM's words, and says where.

    Args:
        settings: backend, label, model_id, num_prompts, request_rate, max_concurrency and what else there is to know.
        name: of the file; None makes one of the settings and the time, as vLLM does.
        detailed: also what every request took and said.
    """
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    rate = settings["request_rate"]
    limit = f"-concurrency{settings['max_concurrency']}" if settings["max_concurrency"] else ""
    model = str(settings["model_id"]).rstrip("/").split("/")[-1]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / (name or f"{settings['label']}-{rate}qps{limit}-{model}-{now}.json")
    kept = {key: value for key, value in result.items() if detailed or key not in DETAILS}
    rate = {"request_rate": rate if math.isfinite(rate) else "inf"}
    file.write_text(json.dumps({"date": now} | settings | rate | kept, indent=1), encoding="utf-8")
    return file


def first_model(url: str, api_key: str | None) -> str:
    """The first model that a server lists.

    Raises:
        ConnectionError: nobody answers, or it lists none.
    """

    async def ask() -> str:
        async with ServerRequests(url, "", {}, api_key=api_key) as asking:
            return await asking.first_model()

    return asyncio.run(ask())


def run_serve(
    requests: Sequence[BenchRequest],
    arrivals: Sequence[float],
    server: Callable[[], ServerRequests],
    *,
    warmups: int = 1,
    max_concurrency: int | None = None,
    progress: bool = False,
) -> tuple[list[Timing], float]:
    """Warms a server up and runs the requests against it.

    Args:
        server: makes the `ServerRequests`, in the loop that uses them.

    Raises:
        ConnectionError: the server does not answer, or not to the first request.
    """

    async def run() -> tuple[list[Timing], float]:
        async with server() as sending:
            await warm_up(sending.send, requests[0], warmups, max_concurrency)
            return await drive(requests, sending.send, arrivals, max_concurrency=max_concurrency, progress=progress)

    return asyncio.run(run())
