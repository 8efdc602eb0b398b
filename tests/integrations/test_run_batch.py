"""`hf-paged run-batch`: every request answered exactly once, as the server would, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import serve
from models.families import make_model
from models.tiny_tokenizer import make_tokenizer
from typer.testing import CliRunner

import hf_paged
from hf_paged.cli import app
from hf_paged.integrations.openai_server import make_app
from hf_paged.integrations.openai_server.batch_files import BatchOutput, check_batch, read_batch
from hf_paged.integrations.openai_server.run_batch import open_batch, run_batch

OPTIONS = {"page_size": 16, "num_pages": 128, "max_num_seqs": 4, "max_model_len": 400}
CHAT, TEXT, RESPONSE = "/v1/chat/completions", "/v1/completions", "/v1/responses"


def line(id: Any, url: str = TEXT, method: str = "POST", **body: Any) -> str:
    return json.dumps({"custom_id": id, "method": method, "url": url, "body": {"max_tokens": 6} | body}) + "\n"


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_model("Llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Iterator[Any]:
    yield hf_paged.load(checkpoint, **OPTIONS)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "in.jsonl"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def answer(model: Any, source: Path, target: Path, **options: Any) -> int:
    output, total = open_batch(source, target)
    with output:
        bad = asyncio.run(run_batch(make_app(model, name="tiny"), source, output, total, **options))
    assert not model.engine.has_unfinished() and model.engine.scheduler.num_active_pages == 0
    return bad


def test_answers_are_the_servers(model: Any, source: Path, target: Path) -> None:
    bodies = [
        (CHAT, {"messages": [{"role": "user", "content": "the sea"}], "temperature": 0}),
        (TEXT, {"prompt": "the sea", "temperature": 1, "seed": 5, "n": 2}),
        (TEXT, {"prompt": [5, 6, 7], "temperature": 0, "ignore_eos": True, "max_tokens": 20}),
        (TEXT, {"prompt": ["a", "b"], "temperature": 0, "model": "tiny"}),
        (TEXT, {"prompt": "x", "model": "gpt"}),
        (CHAT, {"messages": [], "temperature": 0}),
        (TEXT, {"prompt": "x", "temprature": 0}),
    ]
    source.write_text("".join(line(str(place), url, **body) for place, (url, body) in enumerate(bodies)))
    assert answer(model, source, target, window=3) == 3
    found = {entry["custom_id"]: entry for entry in lines_of(target)}
    with serve(model) as live:
        for place, (url, body) in enumerate(bodies):
            wanted = httpx.post(live.url + url, json={"max_tokens": 6} | body)
            entry = found.pop(str(place))
            assert entry["error"] is None and entry["id"].startswith("batch_req_")
            response = entry["response"]
            assert response["status_code"] == wanted.status_code
            if wanted.status_code == 200:
                assert response["request_id"] == response["body"]["id"]
            changing = {"id": None, "created": None, "usage": None}  # usage has cached tokens
            assert response["body"] | changing == wanted.json() | changing
    assert not found


def test_structured_answers(monkeypatch: pytest.MonkeyPatch, model: Any, source: Path, target: Path) -> None:
    """In every way to ask for them; a form that cannot be is an error of its line."""
    monkeypatch.setattr(model.generation_config, "eos_token_id", 2)
    city = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": city}}
    said = {"messages": [{"role": "user", "content": "the sea"}]}
    tool = {"type": "function", "function": {"name": "go", "parameters": {"enum": [{"city": "Oslo"}]}}}
    compact = {"json": city, "disable_any_whitespace": True}
    bodies: dict[str, tuple[str, dict[str, Any]]] = {
        "chat": (CHAT, said | {"structured_outputs": compact}),
        "text": (TEXT, {"prompt": "x", "structured_outputs": compact}),
        "choice": (CHAT, said | {"guided_choice": ["red", "blue"]}),
        "named": (CHAT, said | {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "go"}}}),
        "two forms": (CHAT, said | {"response_format": form, "guided_choice": ["red"]}),
        "bad form": (TEXT, {"prompt": "x", "guided_regex": "(a"}),
    }
    lines = [line(id, url, **{"max_tokens": 60, "seed": 3} | body) for id, (url, body) in bodies.items()]
    enum = {"format": {"type": "json_schema", "name": "x", "schema": {"enum": ["only this"]}}}
    asked = {"input": "x", "max_output_tokens": 60, "text": enum}
    lines.append(json.dumps({"custom_id": "response", "method": "POST", "url": RESPONSE, "body": asked}) + "\n")
    source.write_text("".join(lines))
    assert answer(model, source, target) == 2
    found = {entry["custom_id"]: entry["response"] for entry in lines_of(target)}
    assert {id for id, told in found.items() if told["status_code"] == 400} == {"two forms", "bad form"}
    assert json.loads(found["chat"]["body"]["choices"][0]["message"]["content"])["city"] in ("Oslo", "Rome")
    assert json.loads(found["text"]["body"]["choices"][0]["text"])["city"] in ("Oslo", "Rome")
    assert found["choice"]["body"]["choices"][0]["message"]["content"] in ("red", "blue")
    (call,) = found["named"]["body"]["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}
    assert found["response"]["body"]["output"][0]["content"][0]["text"] == '"only this"'
    assert "one form of output" in found["two forms"]["body"]["error"]["message"]
    assert "cannot be compiled" in found["bad form"]["body"]["error"]["message"]


def test_bad_lines_are_errors_of_their_own(model: Any, source: Path, target: Path) -> None:
    bad = [
        ("{half", "line 1 is no JSON"),
        ("[1]", "line 2 is no JSON object"),
        ('{"custom_id": 3}', "line 3 has no custom_id"),
        (line("get", method="GET").strip(), "line 4: method must be"),
        (line("url", "/v1/embeddings").strip(), "line 5: url must be"),
        ('{"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": 1}', "line 6: body must be"),
        (line("stream", prompt="x", stream=True).strip(), "leave stream out"),
        ("[" * 100_000, "line 8 is no JSON"),
    ]
    source.write_bytes("\n".join(text for text, _ in bad).encode() + b"\n\n\xff\n" + line("good", prompt="x").encode())
    assert answer(model, source, target) == len(bad) + 1
    found = lines_of(target)
    assert len(found) == len(bad) + 2
    by_line = {entry["error"]["line"]: entry for entry in found if entry["error"]}
    for number, (_, said) in enumerate(bad, 1):
        assert said in by_line[number]["error"]["message"] and by_line[number]["response"] is None
    assert by_line[10]["custom_id"] is None
    # Lines without an id are not asked again either.
    before = target.read_bytes()
    assert answer(model, source, target) == 0 and target.read_bytes() == before


def test_a_batch_that_cannot_be_is_refused_before_any_work(source: Path, target: Path) -> None:
    runner = CliRunner()

    def refused(*extra: str, model: str = "nowhere") -> str:
        command = ["run-batch", "-i", str(source), "-o", str(target), "--model", model, *extra]
        found = runner.invoke(app, command)
        assert found.exit_code == 1, found.output
        return " ".join(found.stderr.split())

    assert "there is no input file" in refused()
    source.write_text("\n")
    assert "has no requests" in refused()
    source.write_text(line("a") + line("b") + line("a"))
    assert "lines 1 and 3 have the same custom_id 'a'" in refused()
    source.write_text(line("a") + line("b"))
    assert "Did you mean --max-num-seqs?" in refused("--max-num-sequences", "3")
    assert not target.exists()
    target.write_text("notes of mine")
    assert "no answer of a batch" in refused() and target.read_text() == "notes of mine"
    target.write_text('{"id": "batch_req_1", "custom_id": "z", "response": null, "error": null}\n')
    assert "such as 'z': it belongs to another batch" in refused()
    os.unlink(target)
    with BatchOutput(target):
        assert "another run writes" in refused()
    assert "no checkpoint at 'nowhere'" in refused()
    target.unlink()
    os.link(source, target)
    assert "is the input" in refused()
    found = runner.invoke(app, ["run-batch", "-i", str(source), "-o", str(target)])
    assert found.exit_code == 2 and "which model?" in found.stderr


def test_half_a_line_is_asked_again(model: Any, source: Path, target: Path) -> None:
    source.write_text("".join(line(f"r{i}", prompt="x") for i in range(5)))
    answer(model, source, target)
    whole = target.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in (last, last + 1, last + 40, len(whole) - 1):
        target.write_bytes(whole[:cut])
        output, _ = open_batch(source, target)
        output.close()
        assert target.read_bytes() == whole[:last] and len(output.done) == 4
        answer(model, source, target)
        assert sorted(entry["custom_id"] for entry in lines_of(target)) == [f"r{i}" for i in range(5)]
    for cut in (1, 10, 30):
        target.write_bytes(whole[:cut])
        answer(model, source, target)
        assert len(lines_of(target)) == 5


def test_a_failing_engine_leaves_its_requests_for_the_next_run(
    model: Any, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.write_text("".join(line(f"r{i}", prompt="x") for i in range(40)))
    step, steps = model.engine._step, 0

    def failing(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > 20:
            raise RuntimeError("the device is gone")
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(model.engine, "_step", failing)
        with pytest.raises(RuntimeError, match=r"a step of the engine failed.*asks them again"):
            answer(model, source, target, window=4)
    done = lines_of(target)
    assert 0 < len(done) < 40 and all(entry["response"]["status_code"] == 200 for entry in done)
    assert answer(model, source, target) == 0
    assert sorted(entry["custom_id"] for entry in lines_of(target)) == sorted(f"r{i}" for i in range(40))


def test_a_full_disk_ends_the_run(model: Any, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source.write_text("".join(line(f"r{i}", prompt="x") for i in range(20)))
    append = BatchOutput.append

    def full(self: BatchOutput, entries: Any) -> None:
        if len(self_written) > 1:
            raise OSError(28, "No space left on device")
        self_written.append(entries)
        append(self, entries)

    self_written: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(BatchOutput, "append", full)
        with pytest.raises(OSError, match="No space left"):
            answer(model, source, target, window=2)
    answer(model, source, target)
    assert sorted(entry["custom_id"] for entry in lines_of(target)) == sorted(f"r{i}" for i in range(20))


def test_a_bounded_number_is_under_way(model: Any, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source.write_text("".join(line(f"r{i}", prompt="x") for i in range(30)))
    submit, most = model.engine.submit, []

    def watched(requests: Any, deliver: Any) -> None:
        scheduler = model.engine.scheduler
        most.append(scheduler.num_waiting + len(scheduler.running))
        submit(requests, deliver)

    monkeypatch.setattr(model.engine, "submit", watched)
    answer(model, source, target, window=5)
    assert len(most) == 30 and 2 <= max(most) < 5


def test_reading_is_lazy_and_keys_are_unique(source: Path) -> None:
    source.write_text(line("a") + "\n" + "bad\n" + line("b"))
    assert check_batch(source) == {"a", 3, "b"}
    first = next(read_batch(source))
    assert (first.number, first.custom_id, first.url, first.problem) == (1, "a", TEXT, None)


def start(checkpoint: Path, source: Path, target: Path) -> subprocess.Popen[bytes]:
    program = [sys.executable, "-c", "from hf_paged.cli import main; main()", "run-batch", "--model", str(checkpoint)]
    options = ["--max-num-seqs", "4", "--max-model-len", "400", "--num-pages", "128", "--page-size", "16"]
    command = [*program, "-i", str(source), "-o", str(target), *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)


def grown(process: subprocess.Popen[bytes], target: Path, size: int) -> bool:
    """Waits until the output has grown; False when the program has ended before."""
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        if target.exists() and target.stat().st_size > size:
            return True
        time.sleep(0.002)
    return False


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_9_and_again(checkpoint: Path, source: Path, target: Path) -> None:
    """Killed four times at random moments, stopped by Ctrl-C once, then left alone: each request has one answer, and
    greedy ones are those of a run that nobody disturbed."""
    draw = random.Random(time.time_ns())
    count = 240
    bodies = [
        {"prompt": f"the sea {i}", "temperature": 0, "ignore_eos": True, "max_tokens": 1 + i % 40} for i in range(count)
    ]
    source.write_text("".join(line(f"r{i}", **body) for i, body in enumerate(bodies)) + "{bad\n")
    for ending in (signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGKILL):
        size = target.stat().st_size if target.exists() else 0
        process = start(checkpoint, source, target)
        assert process.stderr is not None
        if grown(process, target, size):
            time.sleep(draw.random() * 0.3)
            process.send_signal(ending)
        said = process.stderr.read().decode()
        assert process.wait() in (0, -ending, 130), said
        if process.returncode == 130:
            assert "the same command goes on" in said
    process = start(checkpoint, source, target)
    said = process.communicate()[1].decode()
    assert process.returncode == 0 and f"answers to all {count + 1} requests" in said
    entries = lines_of(target)
    ids = [entry["custom_id"] for entry in entries]
    assert len(ids) == count + 1 and set(ids) == {f"r{i}" for i in range(count)} | {None}
    undisturbed = target.with_name("again.jsonl")
    process = start(checkpoint, source, undisturbed)
    process.communicate()
    assert texts(entries) == texts(lines_of(undisturbed))


def texts(entries: list[dict[str, Any]]) -> dict[str, str]:
    return {
        entry["custom_id"]: entry["response"]["body"]["choices"][0]["text"] for entry in entries if entry["response"]
    }
