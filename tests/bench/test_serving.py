"""`hf-paged bench serve`: its arithmetic by hand, its clock on a server whose delays are known, and what goes wrong."""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from models.tiny_tokenizer import make_tokenizer
from typer.testing import CliRunner

from hf_paged.bench import datasets, overhead, structured
from hf_paged.bench.child_server import ServedModel, started
from hf_paged.bench.datasets import BenchRequest, Lengths
from hf_paged.bench.requests import ServerRequests, Timing
from hf_paged.bench.serve import arrival_times, as_table, drive, errors_text, run_serve, summarize
from hf_paged.cli import app

runner = CliRunner()
FIRST, NEXT, PIECES = 0.2, 0.05, 6


def timing(start: float, ttft: float, itls: list[float], tokens: int, error: str | None = None) -> Timing:
    return Timing(10, start, ttft, itls, ttft + sum(itls), tokens, "x", error)


def test_the_arithmetic() -> None:
    timings = [
        timing(0.0, 0.1, [0.1, 0.3], 5),  # 0.5 s in all, TPOT 0.4 / 4
        timing(0.2, 0.3, [0.2], 2),  # 0.5 s, TPOT 0.2
        timing(1.0, 0.2, [], 1),  # one token has no TPOT
        timing(1.1, 0.0, [], 0, "refused"),
    ]
    goodput = {"ttft": 200.0, "tpot": 150.0}
    found = summarize(timings, 2.0, metrics=["ttft", "tpot", "itl", "e2el"], percentiles=[50, 90.5], goodput=goodput)
    exact = {
        "completed": 3, "failed": 1, "total_input_tokens": 30, "total_output_tokens": 8, "request_throughput": 1.5,
        "request_goodput": 1.0, "output_throughput": 4.0, "total_token_throughput": 19.0, "max_concurrent_requests": 2,
        "mean_ttft_ms": 200, "median_ttft_ms": 200, "std_ttft_ms": statistics.pstdev([100, 200, 300]),
        "p50_ttft_ms": 200, "p90.5_ttft_ms": 281, "mean_tpot_ms": 150, "mean_itl_ms": 200, "median_itl_ms": 200,
        "mean_e2el_ms": 400, "median_e2el_ms": 500,
    }  # fmt: skip
    assert {name: found[name] for name in exact} == pytest.approx(exact)
    assert found["errors"] == ["", "", "", "refused"] and errors_text(found) == "1 x refused"
    # The busiest second is the first: 5 tokens of the first request, 2 of the second.
    assert found["max_output_tokens_per_s"] == pytest.approx(7.0)
    assert summarize(timings, 2.0)["request_goodput"] is None
    assert as_table(found).row_count > 20
    nothing = summarize(timings[3:], 2.0, goodput=goodput)
    assert nothing["completed"] == nothing["mean_ttft_ms"] == nothing["request_goodput"] == 0


def test_arrivals() -> None:
    assert arrival_times(3, math.inf, 1.0, 0) == [0.0, 0.0, 0.0]
    for burstiness in (0.25, 1.0, 9.0):
        times = arrival_times(20_000, 4.0, burstiness, 1)
        gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
        mean = statistics.fmean(gaps)
        assert mean == pytest.approx(0.25, rel=0.05)
        # The coefficient of variation of a gamma distribution is the inverse root of its shape: 1 for Poisson.
        assert statistics.pstdev(gaps) / mean == pytest.approx(burstiness**-0.5, rel=0.05)
    assert arrival_times(5, 4.0, 1.0, 1) == arrival_times(5, 4.0, 1.0, 1) != arrival_times(5, 4.0, 1.0, 2)


def test_requests_wait_for_their_time_and_not_for_each_other() -> None:
    under_way, most = 0, 0

    async def send(request: BenchRequest) -> Timing:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        start = time.perf_counter()
        await asyncio.sleep(0.3)
        under_way -= 1
        return Timing(1, start, latency=0.3)

    requests = [BenchRequest("x", 1, 1)] * 6
    times = [0.05 * place for place in range(6)]
    timings, took = asyncio.run(drive(requests, send, times))
    assert most > 3 and 0.55 <= took < 3
    starts = [timing.start - timings[0].start for timing in timings]
    assert all(start >= time - 0.06 for start, time in zip(starts, times, strict=True))
    most = 0
    timings, took = asyncio.run(drive(requests, send, times, max_concurrency=2))
    assert most == 2 and took >= 0.9 and max(timing.queue_time for timing in timings) > 0.2


class Fake:
    """An OpenAI server that says how long it takes: `FIRST` to the first piece, `NEXT` between the others."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []

    def app(self) -> Any:
        app = FastAPI()

        @app.get("/v1/models")
        async def models() -> Any:
            return {"data": [{"id": "fake"}]}

        @app.post("/v1/completions")
        @app.post("/v1/chat/completions")
        async def complete(request: Request) -> Any:
            body = json.loads(await request.body())
            self.bodies.append(body)
            if body["max_tokens"] == 13:
                return JSONResponse({"error": {"message": "unlucky"}}, 500)
            return StreamingResponse(self.stream(body), media_type="text/event-stream")

        return app

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        chat = "messages" in body
        if chat:  # the role comes at once, and is no token
            yield 'data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}\n\n'
        await asyncio.sleep(FIRST)
        for piece in range(PIECES):
            if piece:
                await asyncio.sleep(NEXT)
            if body["max_tokens"] == 14 and piece == 3:
                return  # breaks off
            if body["max_tokens"] == 15 and piece == 3:
                await asyncio.sleep(3600)
            choice = {"delta": {"content": "ab "}} if chat else {"text": "ab "}
            data = json.dumps({"choices": [choice]})
            yield f"data: {data[:9]}"  # events come in pieces
            yield f"{data[9:]}\n\n"
        yield 'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 11}}\n\n'
        yield "data: [DONE]\n\n"


@pytest.fixture(scope="module")
def fake() -> Iterator[tuple[Fake, str]]:
    import socket

    import uvicorn

    server = Fake()
    running = uvicorn.Server(uvicorn.Config(server.app(), log_level="error", timeout_graceful_shutdown=1))
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: running.run(sockets=[listening]), daemon=True)
    thread.start()
    yield server, f"http://127.0.0.1:{listening.getsockname()[1]}"
    running.should_exit = True
    thread.join(20)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_times_are_the_servers_delays(fake: tuple[Fake, str], path: str) -> None:
    requests = [BenchRequest("a b", 2, 20)] * 8
    server = ServerRequests
    timings, took = run_serve(requests, [0.0] * 8, lambda: server(fake[1], path, {"model": "fake"}), warmups=2)
    assert took >= FIRST + (PIECES - 1) * NEXT
    for timing in timings:
        assert (timing.error, timing.prompt_len, timing.output_len, timing.text) == (None, 7, 11, "ab " * PIECES)
        assert FIRST <= timing.ttft < FIRST + 1 and len(timing.itls) == PIECES - 1
        assert timing.latency == pytest.approx(timing.ttft + sum(timing.itls), abs=0.05)
        assert timing.tpot == pytest.approx((timing.latency - timing.ttft) / 10)
    itls = [itl for timing in timings for itl in timing.itls]
    assert statistics.median(itls) == pytest.approx(NEXT, abs=NEXT)
    found = summarize(timings, took)
    assert found["output_throughput"] == pytest.approx(8 * 11 / took)


def test_errors_are_counted_and_nothing_hangs(fake: tuple[Fake, str]) -> None:
    requests = [BenchRequest("a", 1, length) for length in (20, 13, 14, 15, 20)]
    start = time.monotonic()
    timings, took = run_serve(
        requests, [0.0] * 5, lambda: ServerRequests(fake[1], "/v1/completions", {"model": "fake"}, timeout=2.0)
    )
    assert time.monotonic() - start < 30
    said = [timing.error or "" for timing in timings]
    assert said[0] == said[4] == "" and "unlucky" in said[1] and "without [DONE]" in said[2] and "in 2 s" in said[3]
    found = summarize(timings, took)
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (2, 3, 22)
    with pytest.raises(ConnectionError, match="the first request, to warm up, failed: status 500"):
        run_serve(requests[1:], [0.0] * 4, lambda: ServerRequests(fake[1], "/v1/completions", {}))


def test_the_command(fake: tuple[Fake, str], tmp_path: Path) -> None:
    command = ["bench", "serve", "--base-url", fake[1] + "/v1", "--backend", "openai-chat", "--num-prompts", "6"]
    command += ["--request-rate", "50", "--random-input-len", "5", "--goodput", "ttft:9999", "tpot:0.001", "--json"]
    command += ["--save-result", "--result-dir", str(tmp_path), "--metadata", "tp=1", "note=x", "--temperature", "0"]
    command += ["--extra-body", '{"top_p": 0.5}', "--metric-percentiles", "50,99.9", "--ignore-eos"]
    fake[0].bodies.clear()
    found = runner.invoke(app, command)
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    (file,) = tmp_path.iterdir()
    kept = json.loads(file.read_text())
    assert file.name.startswith("openai-chat-50.0qps-fake-")
    about = {"backend": "openai-chat", "label": "openai-chat", "model_id": "fake", "num_prompts": 6, "tp": "1"}
    assert kept | about | {"note": "x", "request_rate": 50.0, "burstiness": 1.0, "max_concurrency": None} == kept
    assert {name: kept[name] for name in told} == told and "ttfts" not in kept
    assert told["completed"] == 6 and told["request_goodput"] == 0 and told["p99.9_ttft_ms"] >= FIRST * 1000
    wanted = {"model": "fake", "max_tokens": 128, "temperature": 0.0, "top_p": 0.5, "ignore_eos": True, "stream": True}
    assert len(fake[0].bodies) == 7 and all(body | wanted == body for body in fake[0].bodies)
    again = [*command, "--save-detailed", "--result-filename", "mine.json", "--max-concurrency", "2"]
    assert runner.invoke(app, again).exit_code == 0
    assert len(json.loads((tmp_path / "mine.json").read_text())["ttfts"]) == 6


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--backend", "tgi"], 2, "unknown backend 'tgi': choose from openai"),
        (["--dataset-name", "sonnet"], 2, "unknown dataset 'sonnet'"),
        (["--percentile-metrics", "ttft,x"], 2, "unknown metric 'x'"),
        (["--metric-percentiles", "50,101"], 2, "numbers from 0 to 100"),
        (["--goodput", "itl:5"], 2, "takes ttft, tpot and e2el"),
        (["--goodput", "ttft:200", "tpot=5"], 2, "what is 'tpot=5'?"),
        (["--goodput", "ttft:x"], 2, "got 'ttft:x'"),
        (["--metadata", "x"], 2, "key=value pairs, got 'x'"),
        (["now"], 2, "what is 'now'?"),
        (["--request-rate", "0"], 2, "--request-rate must be positive"),
        (["--burstiness", "0"], 2, "--burstiness must be positive"),
        (["--extra-body", "{"], 2, "--extra-body is no JSON"),
        (["--base-url", "localhost"], 2, "begins with http://"),
        (["--dataset-name", "sharegpt"], 1, "needs --dataset-path"),
        (["--dataset-name", "custom", "--dataset-path", "nowhere"], 1, "there is no data set nowhere"),
        (["--tokenizer", "./nowhere"], 1, "there is no tokenizer './nowhere'"),
        (["--port", "9"], 1, "start a server with hf-paged serve MODEL"),
    ],
)
def test_wrong_arguments(arguments: list[str], status: int, said: str) -> None:
    found = runner.invoke(app, ["bench", "serve", *arguments], env={"COLUMNS": "200"})
    assert found.exit_code == status and said in " ".join(found.stderr.replace("│", "").split())


def test_random_prompts_have_their_lengths() -> None:
    tokenizer = make_tokenizer()
    options = {"input_len": 50, "output_len": 20, "range_ratio": 0.5, "prefix_len": 3}
    made = datasets.random_lengths(Lengths(tokenizer, as_ids=True), 200, 0, **options)
    sizes, outputs = [request.prompt_len for request in made], [request.output_len for request in made]
    assert all(len(request.prompt) == request.prompt_len for request in made)
    assert len({tuple(request.prompt[:3]) for request in made}) == 1 and len({tuple(r.prompt) for r in made}) == 200
    assert (min(sizes) - 3, max(sizes) - 3) == (25, 75) and (min(outputs), max(outputs)) == (10, 30)
    assert not {id for request in made for id in request.prompt} & set(tokenizer.all_special_ids)
    words = datasets.random_lengths(Lengths(None, as_ids=True), 3, 0, **options)
    assert [len(request.prompt.split()) for request in words] == [request.prompt_len for request in words]
    assert made == datasets.random_lengths(Lengths(tokenizer, as_ids=True), 200, 0, **options)


def test_lognormal_lengths_are_like_sharegpts() -> None:
    made = datasets.lognormal_lengths(Lengths(None, as_ids=False), 4000, 0)
    sizes, outputs = [request.prompt_len for request in made], [request.output_len for request in made]
    assert min(sizes + outputs) >= 4 and max(sizes) <= 1024
    assert all(request.prompt_len + request.output_len <= 2048 for request in made)
    assert 120 < statistics.fmean(sizes) < 170 and 280 < statistics.fmean(outputs) < 345
    assert statistics.median(sizes) < 0.7 * statistics.fmean(sizes)


def test_files(tmp_path: Path) -> None:
    words = Lengths(None, as_ids=False)
    turns = [[{"value": "question " * 8}, {"value": "answer " * n}] for n in (20, 30)]
    turns += [[{"value": "x"}, {"value": "y"}], [{"value": "alone " * 9}], [{"value": "long " * 9000}] * 2]
    file = tmp_path / "data.json"
    file.write_text(json.dumps([{"conversations": turn} for turn in turns] + [{}, 3]))
    made = datasets.sharegpt(words, 5, 0, file, None)
    assert len(made) == 5 and {request.output_len for request in made} == {35, 52}
    assert {request.output_len for request in datasets.sharegpt(words, 5, 0, file, 9)} == {9}
    file.write_text("{}")
    with pytest.raises(ValueError, match="is not ShareGPT's"):
        datasets.sharegpt(words, 5, 0, file, None)
    file.write_text('{"prompt": "a b", "output_tokens": 3}\n\n{"prompt": "c"}\n')
    made = datasets.custom(words, 4, 0, file, 50)
    assert sorted((request.prompt, request.output_len) for request in made) == [("a b", 3)] * 2 + [("c", 50)] * 2
    file.write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    with pytest.raises(ValueError, match="line 2"):
        datasets.custom(words, 4, 0, file, 50)


def test_the_default_words_are_plain() -> None:
    assert len(set(datasets.WORDS)) == len(datasets.WORDS) > 150 and all(word.isalpha() for word in datasets.WORDS)
    draw = random.Random(0)
    assert Lengths(None, as_ids=True).make(draw, 4) != Lengths(None, as_ids=True).make(draw, 4)


@pytest.mark.slow
def test_server_overhead() -> None:
    found = overhead.run_overhead(ServedModel("tiny", device="cpu"), streams=4, tokens=8, input_len=16, rounds=2)
    assert len(found["server_s"]) == len(found["engine_s"]) == 2
    assert found["overhead"] == pytest.approx(
        statistics.median(found["server_s"]) / statistics.median(found["engine_s"]) - 1
    )
    assert found["added_ttft_alone_ms"] > 0 and overhead.as_table(found).row_count == 2
    with pytest.raises(RuntimeError, match=r"the server did not start: .*nowhere"), started(ServedModel("nowhere")):
        pass


def test_structured(tmp_path: Path) -> None:
    from models.families import make_model

    model = make_model("Llama")
    model.generation_config.eos_token_id = 2
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    served = ServedModel(str(tmp_path), options={"num_pages": 256, "page_size": 16})
    found = structured.run_structured(served, streams=3, tokens=10, rounds=2)
    assert 3 <= found["tokens"] <= 30 and found["ratio"] > 0
    assert structured.as_table(found).row_count == 2
    with pytest.raises(ValueError, match="tokenizer"):
        structured.run_structured(ServedModel("tiny", device="cpu"), streams=1)
