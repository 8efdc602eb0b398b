"""`hf-paged bench server-overhead`: what HTTP, JSON and another process add to the engine's own time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from statistics import median
from typing import Any

from rich.table import Table

from hf_paged.bench.child_server import ServedModel, started
from hf_paged.bench.datasets import BenchRequest
from hf_paged.bench.requests import EngineRequests, Send, ServerRequests, Timing
from hf_paged.bench.serve import drive
from hf_paged.engine.async_engine import AsyncEngine
from hf_paged.sampling_params import SamplingParams

ALONE = 48
"""Requests per round and side that are sent one after the other, the sides taking turns."""
ALONE_LEN = 16
"""Tokens of their prompts at most: the longer these take, the more of what is measured is the machine's mood."""


def run_overhead(
    served: ServedModel,
    *,
    streams: int = 64,
    tokens: int = 64,
    input_len: int = 128,
    rounds: int = 3,
    log: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The same greedy requests to a server in a child process and to an `AsyncEngine` in this one, in turns.

    Args:
        streams: requests at once.
        tokens: of every answer.
        input_len: token ids of every prompt, random ones.
        rounds: the median of them counts.

    Returns:
        seconds per round on both sides; `overhead`, the part of the engine's time that the server adds;
        `added_ttft_ms` at all streams, and `added_ttft_alone_ms` of a request that has the server to itself (medians).

    Raises:
        ImportError: the server's packages are not installed.
        RuntimeError: the server does not start, or a request fails.
    """
    log(f"starting a server of {served.name}")
    with started(served) as url:
        log("loading the same model here")
        model = served.load()
        found = asyncio.run(_measure(url, model, streams, tokens, input_len, rounds, log))
    return {"model": served.name, "streams": streams, "tokens": tokens, "input_len": input_len} | found


async def _measure(
    url: str, model: Any, streams: int, tokens: int, input_len: int, rounds: int, log: Callable[[str], None]
) -> dict[str, Any]:
    body = {"temperature": 0.0, "ignore_eos": True}
    sampling = SamplingParams(temperature=0.0, ignore_eos=True)
    seconds: dict[str, list[float]] = {"server": [], "engine": []}
    ttfts: dict[str, list[float]] = {"server": [], "engine": []}
    alone: dict[str, list[float]] = {"server": [], "engine": []}
    vocabulary = model.engine.intake.vocab_size
    async with AsyncEngine(model.engine) as engine, ServerRequests(url, "/v1/completions", body) as server:
        sides: dict[str, Send] = {"server": server.send, "engine": EngineRequests(engine, sampling).send}
        for number in range(rounds + 1):  # the first one warms up
            requests = _requests(number, streams, tokens, input_len, vocabulary)
            singles = _requests(-1 - number, ALONE, 1, min(input_len, ALONE_LEN), vocabulary)
            order = list(sides) if number % 2 else list(reversed(sides))
            for side in order:
                timings, took = await drive(requests, sides[side], [0.0] * streams)
                _check(timings)
                if number:
                    seconds[side].append(took)
                    ttfts[side] += [timing.ttft for timing in timings]
            for single in singles:
                for side in order:
                    timing = await sides[side](single)
                    _check([timing])
                    if number:
                        alone[side].append(timing.ttft)
            if number:
                log(f"round {number}: server {seconds['server'][-1]:.3f} s, engine {seconds['engine'][-1]:.3f} s")
    return {
        "server_s": seconds["server"],
        "engine_s": seconds["engine"],
        "server_tokens_per_s": streams * tokens / median(seconds["server"]),
        "engine_tokens_per_s": streams * tokens / median(seconds["engine"]),
        "overhead": median(seconds["server"]) / median(seconds["engine"]) - 1,
        "added_ttft_ms": (median(ttfts["server"]) - median(ttfts["engine"])) * 1000,
        "added_ttft_alone_ms": (median(alone["server"]) - median(alone["engine"])) * 1000,
    }


def _requests(seed: int, count: int, tokens: int, input_len: int, vocabulary: int) -> list[BenchRequest]:
    """Prompts that no other seed has, so that no prefix is cached on either side."""
    draw = random.Random(seed)
    return [
        BenchRequest([draw.randrange(vocabulary) for _ in range(input_len)], input_len, tokens) for _ in range(count)
    ]


def _check(timings: list[Timing]) -> None:
    if error := next((timing.error for timing in timings if timing.error), None):
        raise RuntimeError(f"a request failed: {error}")


def as_table(result: dict[str, Any]) -> Table:
    """The same for people."""
    table = Table(title=f"{result['streams']} streams of {result['tokens']} tokens, {result['model']}")
    for column in ("", "seconds, each round", "tokens/s"):
        table.add_column(column, justify="right" if column else "left")
    for side in ("engine", "server"):
        rounds = ", ".join(f"{took:.3f}" for took in result[f"{side}_s"])
        table.add_row(side, rounds, f"{result[f'{side}_tokens_per_s']:,.1f}")
    table.caption = (
        f"the server adds {result['overhead']:.1%} of time, {result['added_ttft_ms']:.2f} ms to the median first token "
        f"of all streams, {result['added_ttft_alone_ms']:.2f} ms to that of a request alone"
    )
    return table
