"""Clients that send nonsense, too much, or go away: clear errors, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from live_server import Live, serve
from transformers import AutoModelForCausalLM

import hf_paged
from hf_paged.integrations.openai_server import ServerOptions

OPTIONS = {"page_size": 16, "num_pages": 256, "max_num_seqs": 16}
KEYS = ["first-key", "second-key"]
HEADERS = {"Authorization": "Bearer second-key", "Content-Type": "application/json"}


@pytest.fixture(scope="module")
def model(tiny_checkpoint: str) -> Any:
    return hf_paged.wrap(AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval(), **OPTIONS)


@pytest.fixture(scope="module")
def live(model: Any) -> Iterator[Live]:
    options = ServerOptions(served_model_name=["tiny"], api_key=KEYS, max_request_bytes=1 << 20, metrics_prefix="vllm")
    with serve(model, options) as running:
        yield running


@pytest.fixture(autouse=True)
def left_idle(live: Live) -> Iterator[None]:
    yield
    live.wait_idle()


def post(live: Live, path: str, body: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(live.url + path, content=content, headers=HEADERS, timeout=60)


PROMPT = {"prompt": "x"}
MESSAGES = {"messages": [{"role": "user", "content": "x"}]}
COMPLETION, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
BAD: list[tuple[str, Any, int, str]] = [
    (COMPLETION, b"", 400, ""),
    (COMPLETION, b"{", 400, "no JSON"),
    (COMPLETION, b'{"prompt": "\xff\xfe"}', 400, ""),
    (COMPLETION, b"[" * 200_000, 400, ""),
    (COMPLETION, b'{"prompt": "x", "temperature": NaN}', 400, "temperature"),
    (COMPLETION, b'{"prompt": "x", "top_p": Infinity}', 400, "top_p"),
    (COMPLETION, b'{"prompt": "x", "seed": 1' + b"0" * 5000 + b"}", 400, ""),
    (COMPLETION, [1, 2], 400, "JSON object"),
    (COMPLETION, {}, 400, "prompt"),
    (COMPLETION, {"prompt": []}, 400, "prompt"),
    (COMPLETION, {"prompt": ""}, 400, "empty"),
    (COMPLETION, {"prompt": [10**9]}, 400, "vocabulary"),
    (COMPLETION, {"prompt": [-1]}, 400, "prompt"),
    (COMPLETION, {"prompt": [5] * 2000}, 400, "model's length"),
    (COMPLETION, {"prompt": ["x"] * 5000}, 400, "5000 prompts"),
    (COMPLETION, PROMPT | {"n": 10**9}, 400, "n"),
    (COMPLETION, PROMPT | {"n": 0}, 400, "n"),
    (COMPLETION, PROMPT | {"best_of": 2, "n": 3}, 400, "best_of"),
    (COMPLETION, PROMPT | {"best_of": 4, "stream": True}, 400, "best_of"),
    (COMPLETION, PROMPT | {"max_tokens": 16.0}, 400, "max_tokens: Input should be a valid integer, got 16.0"),
    (COMPLETION, PROMPT | {"temperature": "1"}, 400, "temperature: Input should be a valid number, got '1'"),
    (COMPLETION, {"prompt": [1, "a"]}, 400, "prompt.1: Input should be a valid integer, got 'a'"),
    (COMPLETION, PROMPT | {"stop": [5]}, 400, "stop.0: Input should be a valid string, got 5"),
    (COMPLETION, PROMPT | {"max_tokens": -5}, 400, "max_tokens"),
    (COMPLETION, PROMPT | {"max_tokens": 0}, 400, "max_tokens"),
    (COMPLETION, PROMPT | {"suffix": "y"}, 400, "suffix"),
    (COMPLETION, PROMPT | {"stop": ["a"] * 1000}, 400, "stop"),
    (COMPLETION, PROMPT | {"stop": "a" * 5000}, 400, "stop"),
    (COMPLETION, PROMPT | {"stop": ["" ]}, 400, "stop"),
    (COMPLETION, PROMPT | {"stop_token_ids": [10**9]}, 400, "stop_token_ids"),
    (COMPLETION, PROMPT | {"logit_bias": {"a": 1}}, 400, "logit_bias"),
    (COMPLETION, PROMPT | {"logit_bias": {"99999999": 1}}, 400, "logit_bias"),
    (COMPLETION, PROMPT | {"logprobs": 500}, 400, "logprobs"),
    (COMPLETION, PROMPT | {"temperature": -1}, 400, "temperature"),
    (COMPLETION, PROMPT | {"temprature": 1}, 400, "did you mean 'temperature'"),
    (COMPLETION, PROMPT | {"stream_options": {"include_usage": True}}, 400, "stream_options"),
    (COMPLETION, PROMPT | {"use_beam_search": True}, 400, "use_beam_search"),
    (COMPLETION, PROMPT | {"model": "gpt"}, 404, "does not exist"),
    (COMPLETION, PROMPT | {"response_format": {"type": "xml"}}, 400, "response_format"),
    (COMPLETION, PROMPT | {"guided_regex": "a", "guided_choice": ["b"]}, 400, "one form"),
    (COMPLETION, PROMPT | {"structured_outputs": {"jsn": {}}}, 400, "jsn"),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {"messages": [{"content": "x"}]}, 400, "role"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "only text"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, 400, "content"),
    (CHAT, MESSAGES | {"top_logprobs": 2}, 400, "top_logprobs"),
    (CHAT, MESSAGES | {"tool_choice": {"type": "function"}}, 400, "tool_choice.function: Field required"),
    (CHAT, MESSAGES | {"tool_choice": "auto"}, 400, "tools"),
    (CHAT, MESSAGES | {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto"}, 400,
     "enable-auto-tool-choice"),
    (CHAT, MESSAGES | {"chat_template": "{{ raise_exception('no') }}"}, 400, "template"),
    (CHAT, MESSAGES | {"chat_template": "{% for"}, 400, "template"),
    (CHAT, MESSAGES | {"continue_final_message": True}, 400, "add_generation_prompt"),
    (CHAT, MESSAGES | {"chat_template_kwargs": {"tokenize": True}}, 400, "tokenize"),
    (RESPONSES, {"input": [{"type": "function_call"}]}, 400, "function_call"),
    (RESPONSES, {"input": "x", "previous_response_id": "resp-1"}, 400, "previous_response_id"),
    ("/tokenize", {}, 400, "prompt or messages"),
    ("/detokenize", {"tokens": [10**8]}, 400, "vocabulary"),
    ("/v1/embeddings", {"input": "x"}, 404, "/v1/embeddings"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "told"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_requests(live: Live, path: str, body: Any, status: int, told: str) -> None:
    found = post(live, path, body)
    assert found.status_code == status, found.text
    error = found.json()["error"]
    assert told in error["message"] and error["type"] and "code" in error
    if path in (COMPLETION, CHAT) and isinstance(body, dict):
        streamed = post(live, path, body | {"stream": True})
        assert streamed.status_code == status or "stream_options" in body, "an error comes before a stream begins"


def test_bodies_that_are_too_large(live: Live) -> None:
    assert post(live, COMPLETION, PROMPT | {"stop": ["abcdefghi"] * 10**6}).status_code == 413

    def endless() -> Iterator[bytes]:
        for _ in range(64):
            yield b" " * (1 << 16)

    # Without a length, too; the server may hang up before all of it is sent.
    try:
        found = httpx.post(live.url + COMPLETION, content=endless(), headers=HEADERS, timeout=60)
        assert found.status_code == 413
    except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        pass
    assert post(live, COMPLETION, PROMPT | {"max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer third"}, {"Authorization": "first-key"}, {"Authorization": "Basic first-key"},
     {"Authorization": "Bearer"}, {"Authorization": b"Bearer \xff\xfe"}],
)  # fmt: skip
def test_wrong_keys(live: Live, headers: Any) -> None:
    found = httpx.post(live.url + COMPLETION, json=PROMPT, headers=headers)
    assert found.status_code == 401 and "API key" in found.json()["error"]["message"]
    assert httpx.get(live.url + "/v1/models", headers=headers).status_code == 401


def test_right_keys_and_open_paths(live: Live) -> None:
    for key in KEYS:
        assert httpx.get(live.url + "/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    assert httpx.get(live.url + "/health").status_code == 200
    assert 'vllm:num_requests_running{model_name="tiny"}' in httpx.get(live.url + "/metrics").text


def test_cors(live: Live) -> None:
    asked = {"Origin": "http://a", "Access-Control-Request-Method": "POST"}
    found = httpx.options(live.url + COMPLETION, headers=asked)
    assert found.status_code == 200 and found.headers["access-control-allow-origin"] in ("*", "http://a")


def test_hundreds_of_streams_and_random_disconnects(live: Live) -> None:
    """Some clients read to the end, some leave before the first token, in the middle, or without a stream."""
    rng = random.Random(0)
    finished = 0

    async def one(client: httpx.AsyncClient, number: int) -> None:
        nonlocal finished
        body = {"prompt": f"Number {number}", "max_tokens": rng.randint(2, 40), "ignore_eos": True, "n": number % 3 + 1}
        fate = rng.choice(["read", "leave", "time out", "cancel"])
        try:
            if fate == "time out":
                await client.post(live.url + COMPLETION, json=body | {"max_tokens": 400}, timeout=rng.random())
                return
            async with client.stream("POST", live.url + COMPLETION, json=body | {"stream": True}) as stream:
                assert stream.status_code == 200
                most = rng.randint(0, 10) if fate == "leave" else 10**9
                lines = 0
                async for line in stream.aiter_lines():
                    lines += 1
                    if lines > most:
                        return
                    if fate == "cancel" and lines > 4:
                        raise asyncio.CancelledError
                    finished += line == "data: [DONE]"
        except (httpx.TimeoutException, asyncio.CancelledError):
            pass

    async def main() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(headers=HEADERS, limits=limits, timeout=120) as client:
            await asyncio.gather(*(one(client, number) for number in range(300)))

    asyncio.run(main())
    live.wait_idle(60)
    assert finished > 40
    assert post(live, COMPLETION, PROMPT | {"max_tokens": 2}).status_code == 200


def test_a_full_queue(model: Any) -> None:
    with serve(model, ServerOptions(max_queued_requests=0)) as small:
        model.engine.pause()
        try:
            most = small.app.state.serving.load.most

            async def main() -> None:
                async with httpx.AsyncClient(timeout=60) as client:
                    body = PROMPT | {"max_tokens": 1}
                    waiting = [asyncio.create_task(client.post(small.url + COMPLETION, json=body)) for _ in range(most)]
                    while small.app.state.serving.load.count < most:
                        await asyncio.sleep(0.01)
                    refused = await client.post(small.url + COMPLETION, json=body)
                    assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
                    assert (await client.get(small.url + "/load")).json() == {"server_load": most}
                    await asyncio.to_thread(model.engine.resume)
                    assert {found.status_code for found in await asyncio.gather(*waiting)} == {200}

            asyncio.run(main())
        finally:
            model.engine.resume()


def test_a_request_that_fails_alone(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong with one request while it runs is an error of its own, in a stream an event."""
    request = live.model.engine.intake.request

    def broken(*args: Any, **options: Any) -> Any:
        made = request(*args, **options)
        made.sampling = made.asked = made.sampling.clone(logits_processors=[lambda ids, logits: 1 / 0])
        made.simple = made.fused = False
        return made

    monkeypatch.setattr(live.model.engine.intake, "request", broken)
    found = post(live, COMPLETION, PROMPT)
    assert found.status_code == 500 and "ZeroDivisionError" in found.json()["error"]["message"]
    streamed = post(live, COMPLETION, PROMPT | {"stream": True})
    assert streamed.status_code == 200 and "ZeroDivisionError" in streamed.text


def test_the_program_drains_on_sigterm(tiny_checkpoint: str, tmp_path: Any) -> None:
    """`hf-paged serve` as users run it, with options out of a file; what is under way when it is told to stop is
    finished first."""
    (tmp_path / "options.yaml").write_text("served-model-name: [mine]\nport: 1\nnum-pages: 256\nblock_size: 16\n")
    port = free_port()
    command = [
        sys.executable,
        "-c",
        "from hf_paged.cli import main; main()",
        "serve",
        tiny_checkpoint,
        "--port",
        str(port),
    ]
    command += ["--config", str(tmp_path / "options.yaml")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            url, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
            while not healthy(url) and process.poll() is None and time.monotonic() < end:
                time.sleep(0.2)
            assert httpx.get(url + "/v1/models").json()["data"][0]["id"] == "mine"
            body = PROMPT | {"max_tokens": 300, "ignore_eos": True, "stream": True}
            with httpx.stream("POST", url + COMPLETION, json=body, timeout=60) as stream:
                lines = stream.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                assert "data: [DONE]" in list(lines)
            assert process.wait(30) in (0, -signal.SIGTERM)
        finally:
            process.kill()


def free_port() -> int:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def healthy(url: str) -> bool:
    try:
        return httpx.get(url + "/health").status_code == 200
    except httpx.TransportError:
        return False
