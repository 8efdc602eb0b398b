"""Two replicas behind a load balancer, all in processes of their own."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from replicas import CLIENT, Replica, free_port, nginx, replicas, running, wait_until

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
LONG: dict[str, Any] = {"model": "tiny", "prompt": "The sea", "max_tokens": 500, "ignore_eos": True, "stream": True}
needs_nginx = pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")


@pytest.fixture(scope="module")
def pair(tiny_checkpoint: str) -> Iterator[list[Replica]]:
    with replicas(tiny_checkpoint, 2, "--served-model-name", "tiny") as made:
        yield made


@pytest.fixture(params=["least-conn", "conversation"])
def either(request: Any, pair: list[Replica], tmp_path: Path) -> Iterator[str]:
    with nginx(request.param, pair, tmp_path) as url:
        yield url


@pytest.fixture
def least_conn(pair: list[Replica], tmp_path: Path) -> Iterator[str]:
    with nginx("least-conn", pair, tmp_path) as url:
        yield url


def check_stream(pair: list[Replica], url: str) -> None:
    """Tokens come while the replica still computes, all of them, and a client that leaves ends its request."""
    with CLIENT.stream("POST", url + COMPLETION, json=LONG) as stream:
        lines = stream.iter_lines()
        assert stream.status_code == 200 and next(lines)
        assert sum(replica.load for replica in pair) == 1
        assert list(lines)[-2] == "data: [DONE]"
    aborted = sum(counted(pair))
    with CLIENT.stream("POST", url + COMPLETION, json=LONG) as stream:
        next(stream.iter_lines())
    wait_until(lambda: sum(replica.load for replica in pair) == 0, 10, "the request of a client that left goes on")
    wait_until(lambda: sum(counted(pair)) == aborted + 1, 10, "is not counted")


def conversation(url: str, opening: str, turns: int, pair: list[Replica], parts: bool = False) -> list[int]:
    """The replica that answered each turn."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}]
    places = []
    for turn in range(turns):
        text: Any = opening if turn == 0 else f"Go on, {turn}"
        messages.append({"role": "user", "content": [{"type": "text", "text": text}] if parts else text})
        before = counted(pair)
        found = CLIENT.post(url + CHAT, json={"messages": messages, "max_tokens": 4, "model": "tiny"})
        assert found.status_code == 200, found.text
        messages.append({"role": "assistant", "content": found.json()["choices"][0]["message"]["content"]})
        # An answer may be there before it is counted.
        wait_for_count(pair, sum(before) + 1)
        grown = [now - b for now, b in zip(counted(pair), before, strict=True)]
        assert sorted(grown) == [0, 1]
        places.append(grown.index(1))
    return places


def wait_for_count(pair: list[Replica], count: float) -> None:
    wait_until(lambda: sum(counted(pair)) == count, 10, f"{count:g} requests should be counted")


def counted(pair: list[Replica]) -> list[float]:
    """The requests that each replica has answered."""
    return [replica.metric("request_success_total") for replica in pair]


@needs_nginx
def test_streams_pass_nginx_unbuffered(pair: list[Replica], either: str) -> None:
    check_stream(pair, either)
    assert CLIENT.get(either + "/metrics").status_code == 404


@needs_nginx
def test_nginx_keeps_a_conversation_at_one_replica(pair: list[Replica], tmp_path: Path) -> None:
    with nginx("conversation", pair, tmp_path) as url:
        places = [conversation(url, f'Story {i} "of"\nthe sea', 3, pair, parts=i % 2 == 0) for i in range(10)]
        assert all(len(set(turns)) == 1 for turns in places)
        assert len({turns[0] for turns in places}) == 2, "all conversations are at one replica"
        # A key of the client's own goes before what it says.
        for field in ({"headers": {"X-Session-Id": "mine"}}, {"json": {"prompt_cache_key": "mine"}}):
            before = counted(pair)
            for i in range(6):
                body = {"prompt": f"{i}", "max_tokens": 1} | field.get("json", {})
                assert CLIENT.post(url + COMPLETION, json=body, headers=field.get("headers")).status_code == 200
            wait_for_count(pair, sum(before) + 6)
            grown = [now - b for now, b in zip(counted(pair), before, strict=True)]
            assert sorted(grown) == [0, 6]


@needs_nginx
def test_nginx_balances_by_connections(pair: list[Replica], least_conn: str) -> None:
    with (
        CLIENT.stream("POST", least_conn + COMPLETION, json=LONG) as first,
        CLIENT.stream("POST", least_conn + COMPLETION, json=LONG) as second,
    ):
        lines = first.iter_lines(), second.iter_lines()  # kept: an iterator that is let go closes its stream
        assert all(next(one) for one in lines)
        assert (first.status_code, second.status_code) == (200, 200)
        assert [replica.load for replica in pair] == [1, 1]


async def many(url: str, count: int, meanwhile: Any) -> list[int | str]:
    """How each of `count` requests ended, half of them streams, while something is done to the servers."""

    async def one(client: httpx.AsyncClient, number: int) -> int | str:
        await asyncio.sleep(number * 0.02)
        body = {"prompt": f"Number {number}", "max_tokens": 60, "ignore_eos": True}
        try:
            if number % 2:
                found = await client.post(url + COMPLETION, json=body)
                if found.status_code == 200 and found.json()["usage"]["completion_tokens"] != 60:
                    return "cut short"
                return found.status_code
            async with client.stream("POST", url + COMPLETION, json=body | {"stream": True}) as stream:
                lines = [line async for line in stream.aiter_lines()]
                return stream.status_code if "data: [DONE]" in lines else "cut short"
        except httpx.TransportError as error:
            return type(error).__name__

    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as client:
        tasks = [asyncio.create_task(one(client, number)) for number in range(count)]
        await asyncio.sleep(count * 0.02 / 2)
        await asyncio.to_thread(meanwhile)
        return await asyncio.gather(*tasks)


@needs_nginx
def test_a_drain_behind_nginx_loses_nothing(pair: list[Replica], either: str) -> None:
    answered = pair[1].metric("request_success_total")
    try:
        ends = asyncio.run(many(either, 120, lambda: pair[0].stop(signal.SIGTERM)))
        assert ends == [200] * 120
        assert pair[1].metric("request_success_total") > answered
    finally:
        restart(pair[0])


@needs_nginx
def test_a_killed_replica_costs_only_what_it_streamed(pair: list[Replica], least_conn: str) -> None:
    try:
        ends = asyncio.run(many(least_conn, 120, lambda: pair[0].stop(signal.SIGKILL)))
        # An answer that has begun cannot begin again; whatever had not is answered by the other one.
        assert ends[1::2] == [200] * 60
        assert ends[-40:] == [200] * 40
        assert ends.count(200) > 90
    finally:
        restart(pair[0])
    assert CLIENT.post(pair[0].url + COMPLETION, json={"prompt": "x", "max_tokens": 2}).status_code == 200


def restart(replica: Replica) -> None:
    if replica.running:
        replica.stop(signal.SIGKILL)
    replica.start()
    replica.wait_ready()


@pytest.mark.parametrize("router", ["sglang_router", "vllm_router"])
def test_routers(router: str, pair: list[Replica]) -> None:
    """The routers of other engines, with prefix-aware routing, before our replicas."""
    if importlib.util.find_spec(router) is None:
        pytest.skip(f"{router} is not installed")
    port = free_port()
    command = [sys.executable, "-m", f"{router}.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--policy", "cache_aware", "--prometheus-port", str(free_port()), "--worker-urls"]
    with running([*command, *(replica.url for replica in pair)], f"http://127.0.0.1:{port}", "/readiness") as url:
        check_stream(pair, url)
        places = [conversation(url, f"{i} " * 40, 3, pair) for i in range(4)]
        assert all(len(set(turns)) == 1 for turns in places)
