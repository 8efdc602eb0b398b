"""Clients that misuse the connection itself: slow ones, malformed HTTP, TLS; and a server that is killed."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from live_server import Live, serve
from replicas import CLIENT, Replica, replicas
from transformers import AutoModelForCausalLM

import hf_paged
from hf_paged.integrations.openai_server import ServerOptions
from hf_paged.integrations.openai_server.connections import timed_protocol

COMPLETION = "/v1/completions"
BODY = json.dumps({"prompt": "x", "max_tokens": 2}).encode()
JSON = {"Content-Type": "application/json"}
POST = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def live(tiny_checkpoint: str) -> Iterator[Live]:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()
    hf_paged.wrap(model, page_size=16, num_pages=256, max_num_seqs=16)
    with serve(model, ServerOptions(request_timeout_s=1), http=timed_protocol(1)) as running:
        yield running


@pytest.fixture(autouse=True)
def left_idle(live: Live) -> Iterator[None]:
    yield
    live.wait_idle()


def connect(live: Live) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2])), timeout=20)


def exchange(live: Live, sent: bytes) -> bytes:
    """What comes until the server closes the connection, or 0.7 s say nothing."""
    with connect(live) as connection:
        with suppress(OSError):  # it may be refused before all of it was sent
            connection.sendall(sent)
        connection.settimeout(0.7)
        return read(connection)


def read(connection: socket.socket) -> bytes:
    found = b""
    try:
        while piece := connection.recv(1 << 16):
            found += piece
    except (TimeoutError, ConnectionError):
        pass
    return found


def trickle(connection: socket.socket, text: bytes, seconds: float) -> float:
    """Sends a byte now and then until the server closes the connection; how long it let us."""
    start = time.monotonic()
    connection.settimeout(0.05)
    for place in range(int(seconds / 0.05)):
        try:
            connection.sendall(text[place % len(text) :][:1])
            if connection.recv(1 << 16) == b"":
                break
        except TimeoutError:
            continue
        except ConnectionError:
            break
    return time.monotonic() - start


def test_slow_headers_and_silence_are_cut_off(live: Live) -> None:
    with connect(live) as slow:
        assert 0.5 < trickle(slow, b"GET /health HTTP/1.1\r\nX-A: " + b"a" * 1000, 10) < 6
    with connect(live) as silent:
        start = time.monotonic()
        assert read(silent) == b"" and time.monotonic() - start < 6
    with connect(live) as second:  # after a request that was in order
        second.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert second.recv(1 << 16).startswith(b"HTTP/1.1 200")
        assert 0.5 < trickle(second, b"GET /health HTTP/1.1\r\nX-A: " + b"a" * 1000, 10) < 6


def test_slow_bodies_get_a_408(live: Live) -> None:
    with connect(live) as slow:
        slow.sendall(POST + b"Content-Length: 1000\r\n\r\n")
        slow.sendall(b" " * 10)
        found = read(slow)
    assert found.startswith(b"HTTP/1.1 408") and b"within 1 s" in found and b"connection: close" in found.lower()


def test_a_long_answer_is_not_cut_off(live: Live) -> None:
    body = {"prompt": "x", "max_tokens": 900, "ignore_eos": True, "n": 4}
    start = time.monotonic()
    assert CLIENT.post(live.url + COMPLETION, json=body).json()["usage"]["completion_tokens"] == 3600
    assert time.monotonic() - start > 1, "the test shows nothing: the answer came before the timeout"


def test_idle_connections_do_not_starve_others(live: Live) -> None:
    idle = [connect(live) for _ in range(400)]
    try:
        start = time.monotonic()
        assert CLIENT.get(live.url + "/health").status_code == 200
        assert CLIENT.post(live.url + COMPLETION, json=json.loads(BODY)).status_code == 200
        assert time.monotonic() - start < 5
    finally:
        for connection in idle:
            connection.close()


@pytest.mark.parametrize(
    "sent",
    [
        POST + b"Content-Length: -5\r\n\r\n{}",
        POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
        POST + b"Transfer-Encoding: chunked\r\n\r\nnothing\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"X-A: b\r\n" * 20_000 + b"\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 10,
        b"GET /health\r\n\r\n",
    ],
    ids=["negative length", "two lengths", "bad chunks", "many headers", "long path", "TLS", "no version"],
)
def test_malformed_requests(live: Live, sent: bytes) -> None:
    found = exchange(live, sent)
    assert found == b"" or found.split()[1] in (b"400", b"413", b"431"), found[:200]
    assert CLIENT.get(live.url + "/health").status_code == 200


def test_pipelined_requests_are_answered_in_order(live: Live) -> None:
    first = POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    found = exchange(live, first * 3 + b"GET /version HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert found.count(b"HTTP/1.1 200") == 4 and found.endswith(b'"%s"}' % hf_paged.__version__.encode())


@pytest.mark.parametrize(
    "kind", ["text/xml", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a", "é"]
)
def test_unknown_content_types(live: Live, kind: str) -> None:
    found = CLIENT.post(live.url + COMPLETION, content=BODY, headers={"Content-Type": kind.encode()})
    assert found.status_code == 400 and "application/json" in found.json()["error"]["message"]


def test_deep_and_large_bodies(live: Live) -> None:
    deep = b'{"prompt": "x", "metadata": {"a": ' + b"[" * 900 + b"]" * 900 + b"}}"
    assert CLIENT.post(live.url + COMPLETION, content=deep, headers=JSON).status_code in (200, 400)
    schema: Any = {"type": "string"}
    for _ in range(400):
        schema = {"type": "array", "items": schema}
    asked = {"prompt": "x", "guided_json": schema}
    assert CLIENT.post(live.url + COMPLETION, json=asked).status_code == 400
    stops = {"prompt": "x", "stop": ["abcdefghi"] * 900_000}
    start = time.monotonic()
    assert CLIENT.post(live.url + COMPLETION, json=stops).status_code in (400, 408)
    assert time.monotonic() - start < 20


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Replica, Path]]:
    """A server in a process of its own, with TLS, and the file of who signed its certificate."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    certificate = authority.issue_cert("localhost")
    certificate.private_key_pem.write_to_path(str(folder / "key.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(folder / "cert.pem"))
    tls = ["--ssl-keyfile", str(folder / "key.pem"), "--ssl-certfile", str(folder / "cert.pem")]
    made = Replica(tiny_checkpoint, "--served-model-name", "tiny", "--api-key", "right", *tls)
    try:
        made.start()
        wait_for_tls(made, folder / "ca.pem")
        yield made, folder / "ca.pem"
    finally:
        if made.running:
            made.stop(signal.SIGKILL)


def tls_client(replica: Replica, authority: Path) -> httpx.Client:
    return httpx.Client(
        base_url=f"https://localhost:{replica.port}",
        verify=ssl.create_default_context(cafile=str(authority)),
        headers={"Authorization": "Bearer right"},
        timeout=60,
    )


def wait_for_tls(replica: Replica, authority: Path) -> None:
    end = time.monotonic() + 120
    with tls_client(replica, authority) as client:
        while replica.running:
            try:
                assert client.get("/health").status_code == 200
                return
            except httpx.ConnectError:
                assert time.monotonic() < end, "the server does not start"
                time.sleep(0.1)
    raise AssertionError("the server ended")


def test_tls(alone: tuple[Replica, Path]) -> None:
    replica, authority = alone
    asked = {"prompt": "x", "max_tokens": 20, "ignore_eos": True}
    with tls_client(replica, authority) as client:
        assert client.post(COMPLETION, json=asked).json()["usage"]["completion_tokens"] == 20
        with client.stream("POST", COMPLETION, json=asked | {"stream": True}) as stream:
            assert list(stream.iter_lines())[-2] == "data: [DONE]"
        assert client.post(COMPLETION, json=asked, headers={"Authorization": "Bearer wrong"}).status_code == 401
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"https://localhost:{replica.port}/health")
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://localhost:{replica.port}/health")


def test_killed_and_started_again(alone: tuple[Replica, Path]) -> None:
    replica, authority = alone
    asked = {"prompt": "x", "max_tokens": 500, "ignore_eos": True, "stream": True}
    with (
        tls_client(replica, authority) as client,
        pytest.raises(httpx.TransportError),
        client.stream("POST", COMPLETION, json=asked) as stream,
    ):
        for number, _ in enumerate(stream.iter_lines()):
            if number == 4:
                replica.stop(signal.SIGKILL)
    replica.start()
    wait_for_tls(replica, authority)
    with tls_client(replica, authority) as client:
        assert client.post(COMPLETION, json={"prompt": "x", "max_tokens": 2}).status_code == 200


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_requests(tiny_checkpoint: str) -> None:
    """Nothing is left over, and a server's resident memory settles: it is no multiple of the requests."""
    import psutil

    async def some(client: httpx.AsyncClient, url: str, first: int, count: int) -> None:
        async def worker(offset: int) -> None:
            for number in range(first + offset, first + count, 32):
                body = {"prompt": f"Number {number}", "max_tokens": number % 7 + 1, "stream": number % 3 == 0}
                async with client.stream("POST", url + COMPLETION, json=body) as found:
                    assert found.status_code == 200
                    if number % 30:  # of the streams, one in ten is left
                        await found.aread()

        await asyncio.gather(*(worker(offset) for offset in range(32)))

    async def soak(replica: Replica) -> list[float]:
        assert replica.process is not None
        memory = psutil.Process(replica.process.pid)
        sizes = []
        async with httpx.AsyncClient(timeout=60) as client:
            for thousand in range(10):
                await some(client, replica.url, 1000 * thousand, 1000)
                sizes.append(memory.memory_info().rss / 2**20)
                print(f"{1000 * (thousand + 1)} requests: {sizes[-1]:.1f} MiB")
        return sizes

    with replicas(tiny_checkpoint, 1) as (replica,):
        sizes = asyncio.run(soak(replica))
        assert replica.load == 0 and replica.metric("num_requests_running") == 0
        assert replica.metric("kv_cache_usage_perc") == 0
        assert replica.metric("request_success_total") == 10_000
    assert sizes[-1] - sizes[4] < 24, f"MiB after each thousand requests: {sizes}"
