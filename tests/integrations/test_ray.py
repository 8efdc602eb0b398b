"""On a Ray cluster of this machine."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("ray", reason="pip install '.[ray]'")

import httpx
import ray
from ray import serve

from hf_paged import LLM, SamplingParams
from hf_paged.integrations.ray import beginning_of, generate_over, openai_deployment

pytestmark = pytest.mark.slow

SMALL = {"num_pages": 256, "block_size": 16, "max_num_seqs": 8, "dtype": "float32", "device": "cpu"}
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
SCALING = {"min_replicas": 2, "max_replicas": 3}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def url(cluster: None, tiny_checkpoint: str) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    options = {"served_model_name": ["tiny"]}
    serve.run(openai_deployment(tiny_checkpoint, server_options=options, autoscaling_config=SCALING, **SMALL))
    return f"http://127.0.0.1:{port}"


def complete(url: str, prompt: Any, **more: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0} | more
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: str) -> Any:
    return LLM(tiny_checkpoint, **SMALL)


def test_answers(url: str, alone: Any) -> None:
    prompts = [f"The {number} seas are" for number in range(12)]
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda prompt: complete(url, prompt), prompts))
    expected = alone.generate(prompts, GREEDY, use_tqdm=False)
    assert [answer["choices"][0]["text"] for answer in answers] == [output.outputs[0].text for output in expected]


def test_streams_and_errors(url: str) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 6, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert events[-1] == "[DONE]" and len(events) > 4
    assert json.loads(events[0])["object"] == "chat.completion.chunk"
    assert httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"] == "tiny"
    wrong = httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokenz": 3}, timeout=60)
    assert wrong.status_code == 400 and "max_tokens" in wrong.text
    large = httpx.post(f"{url}/v1/completions", content=b"x" * (17 << 20), timeout=60)
    assert large.status_code == 413


def test_prefixes_meet(url: str) -> None:
    """Who continues a conversation is sent where it began: nearly all of the prompt is cached there."""
    for number in range(6):
        text = f"{number} " + f"Story {number} goes on and on. " * 40
        first = complete(url, text)
        again = complete(url, text + " And then?")
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] < 100
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0.8 * first["usage"]["prompt_tokens"]


def test_clients_that_go_away(url: str) -> None:
    """Their requests end: others find room, and no page is held for them."""
    body = {"model": "tiny", "prompt": "The sea", "max_tokens": 900, "ignore_eos": True, "stream": True}
    for _ in range(4):
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
            next(stream.iter_lines())
    aborted = 'request_success_total{finished_reason="abort",model_name="tiny"} 4.0'
    end = time.monotonic() + 20
    while aborted not in (metrics := _metrics_where(url, "The sea")) and time.monotonic() < end:
        time.sleep(0.2)
    assert aborted in metrics and 'num_requests_running{model_name="tiny"} 0.0' in metrics


def _metrics_where(url: str, prompt: str) -> str:
    """Of the replica that such a prompt is sent to."""
    body = json.dumps({"prompt": prompt}).encode()
    return httpx.request("GET", f"{url}/metrics", content=body, timeout=60).text


def test_a_dataset(cluster: None, tiny_checkpoint: str, alone: Any) -> None:
    serve.delete("default")
    rows = [{"number": n, "prompt": f"The {n} seas are"} for n in range(20)]
    dataset = generate_over(
        ray.data.from_items(rows), tiny_checkpoint, sampling_params=GREEDY, batch_size=8, concurrency=2, **SMALL
    )
    found = sorted(dataset.take_all(), key=lambda row: row["number"])
    expected = alone.generate([row["prompt"] for row in rows], GREEDY, use_tqdm=False)
    assert [row["generated_text"] for row in found] == [output.outputs[0].text for output in expected]
    assert [list(row["generated_text_token_ids"]) for row in found] == [o.outputs[0].token_ids for o in expected]
    assert {row["generated_text_finish_reason"] for row in found} <= {"length", "stop"}


def test_arguments(tiny_checkpoint: str) -> None:
    with pytest.raises(ValueError, match="num_replicas or concurrency"):
        openai_deployment(tiny_checkpoint, data_parallel_size=2)
    with pytest.raises(ValueError, match="contradict"):
        openai_deployment(tiny_checkpoint, num_replicas=2, autoscaling_config={"max_replicas": 2})
    with pytest.raises(TypeError, match="max_model_len"):
        openai_deployment(tiny_checkpoint, max_model_length=64)
    with pytest.raises(TypeError, match="sampling_params"):
        generate_over(None, tiny_checkpoint, sampling_params={"n": 1})  # type: ignore[arg-type]


def test_beginnings() -> None:
    def of(body: Any) -> list[str]:
        return beginning_of(json.dumps(body).encode())

    long = "x" * 600
    assert len(of({"prompt": long})) == 2 and of({"prompt": long}) == of({"prompt": long + "y"})
    assert of({"prompt": "y" + long})[0] != of({"prompt": long})[0]
    chat = [{"role": "user", "content": long}]
    assert of({"messages": chat})[:2] == of({"messages": [*chat, {"role": "user", "content": "?"}]})[:2]
    assert len(of({"prompt": "short"})) == 1 and len(of({"prompt": [1, 2, 3]})) == 1
    assert beginning_of(b"nonsense") == beginning_of(b"[1]") == of({}) == []
