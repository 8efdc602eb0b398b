"""Logs: JSON lines, a line per request, and a line about the engine."""

from __future__ import annotations

import json
import logging
import time

import pytest

from hf_paged.bench.host import simulated_engine
from hf_paged.observe.logs import JsonFormatter, RequestLog, StatsLog
from hf_paged.sampling_params import SamplingParams

SAMPLING = SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False)


def lines(caplog: pytest.LogCaptureFixture, what: str) -> list[dict[str, object]]:
    """What was logged of one kind, as JSON would have it."""
    found = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    return [line for line in found if line.get("event") == what]


def test_a_line_per_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    engine = simulated_engine(num_pages=32, page_size=4, max_num_seqs=2, max_model_len=64, prepare=True)
    log = RequestLog(engine, "tiny")
    engine.add_request([1, 2, 3], SAMPLING, request_id="a\nb")
    engine.add_request([1, 2, 3], SAMPLING, request_id="gone")
    engine.abort("gone")
    while engine.has_unfinished():
        engine.step()
    log.close()
    assert not engine.request_observers
    gone, done = lines(caplog, "request")
    assert done["request_id"] == "a\nb" and done["model"] == "tiny" and done["finish_reason"] == "length"
    assert (done["prompt_tokens"], done["completion_tokens"]) == (3, 4)
    assert 0 <= float(str(done["ttft_s"])) <= float(str(done["e2e_s"]))
    assert gone["finish_reason"] == "abort" and gone["ttft_s"] is None
    assert "prompt_tokens=3" in str(done["message"]) and "ttft_s" not in str(gone["message"])


def test_json_lines() -> None:
    def shown(record: logging.LogRecord) -> dict[str, object]:
        text = JsonFormatter().format(record)
        assert "\n" not in text
        return dict(json.loads(text))

    try:
        raise ValueError("bad\nvalue")
    except ValueError as error:
        exc_info = (type(error), error, error.__traceback__)
    found = shown(logging.LogRecord("x", logging.ERROR, "f", 1, 'two\nlines, "%s"', ("ü",), exc_info))
    assert (
        found["message"] == 'two\nlines, "ü"' and found["level"] == "ERROR" and "ValueError" in str(found["exception"])
    )
    assert time.strftime("%Y-", time.gmtime()) in str(found["time"])
    args = ("127.0.0.1:5", "GET", "/health", "1.1", 200)
    access = shown(logging.LogRecord("uvicorn.access", logging.INFO, "f", 1, '%s - "%s %s HTTP/%s" %d', args, None))
    assert (access["method"], access["path"], access["status"]) == ("GET", "/health", 200)


def test_a_line_about_the_engine_while_it_works(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    engine = simulated_engine(num_pages=32, page_size=4, max_num_seqs=2, max_model_len=64, prepare=True)
    log = StatsLog(engine, interval_s=0.02)
    time.sleep(0.1)
    assert not lines(caplog, "engine"), "an idle engine has nothing to tell"
    for _ in range(3):
        engine.add_request([1, 2, 3], SAMPLING.clone(max_tokens=8))
    engine.step()
    end = time.monotonic() + 10
    while not lines(caplog, "engine") and time.monotonic() < end:
        time.sleep(0.01)
    while engine.has_unfinished():
        engine.step()
    while (lines(caplog, "engine") or [{"running": 1}])[-1]["running"] and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.1)
    count = len(lines(caplog, "engine"))
    time.sleep(0.1)
    log.close()
    first, *_, last = lines(caplog, "engine")
    assert (first["running"], first["waiting"]) == (2, 1) and float(str(first["kv_cache_usage"])) > 0
    assert (last["running"], last["waiting"], last["kv_cache_usage"]) == (0, 0, 0.0)
    assert len(lines(caplog, "engine")) == count, "the end of work is told once"
    assert not log._thread.is_alive()
