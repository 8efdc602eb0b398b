"""OpenTelemetry spans: what they say, and which trace they belong to."""

from __future__ import annotations

import builtins
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk.trace", reason="the extra hf_paged[otel] is not installed")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from hf_paged.bench.host import simulated_engine
from hf_paged.engine.engine import Engine
from hf_paged.observe.spans import RequestSpans, otlp_provider, require_opentelemetry
from hf_paged.sampling_params import SamplingParams

SAMPLING = SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False, temperature=0.5, top_p=0.9)


@pytest.fixture
def watched() -> Iterator[tuple[Engine, InMemorySpanExporter]]:
    engine = simulated_engine(num_pages=32, page_size=4, max_num_seqs=2, max_model_len=64, prepare=True)
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    spans = RequestSpans(engine, provider, "tiny")
    yield engine, exporter
    spans.close()
    assert not engine.request_observers


def test_a_span_per_request(watched: tuple[Engine, InMemorySpanExporter]) -> None:
    engine, exporter = watched
    before = time.time_ns()
    engine.add_request([1, 2, 3], SAMPLING.clone(n=2), request_id="a")
    while engine.has_unfinished():
        engine.step()
    (span,) = exporter.get_finished_spans()
    assert (span.name, span.kind, span.parent) == ("llm_request", SpanKind.SERVER, None)
    found: dict[str, Any] = dict(span.attributes or {})
    assert found["gen_ai.request.id"] == "a" and found["gen_ai.response.model"] == "tiny"
    assert found["gen_ai.usage.prompt_tokens"] == 3 and found["gen_ai.usage.completion_tokens"] == 8
    assert (found["gen_ai.request.n"], found["gen_ai.request.max_tokens"]) == (2, 4)
    assert (found["gen_ai.request.temperature"], found["gen_ai.request.top_p"]) == (0.5, 0.9)
    assert 0 <= found["gen_ai.latency.time_in_queue"] <= found["gen_ai.latency.time_to_first_token"]
    assert found["gen_ai.latency.time_to_first_token"] <= found["gen_ai.latency.e2e"]
    parts = [found[f"gen_ai.latency.time_in_{part}"] for part in ("queue", "model_prefill", "model_decode")]
    assert sum(parts) == pytest.approx(found["gen_ai.latency.e2e"])
    assert before - 1_000_000 <= (span.start_time or 0) <= (span.end_time or 0) <= time.time_ns() + 1_000_000
    assert [event.name for event in span.events] == ["first_scheduled", "first_token"]


def test_a_client_s_trace_is_continued(watched: tuple[Engine, InMemorySpanExporter]) -> None:
    engine, exporter = watched
    request = engine.intake.request([1, 2, 3], SAMPLING)
    request.trace_headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    nonsense = engine.intake.request([1, 2, 3], SAMPLING)
    nonsense.trace_headers = {"traceparent": "nonsense"}
    engine.submit([request, nonsense])
    while engine.has_unfinished():
        engine.step()
    continued, alone = exporter.get_finished_spans()
    assert continued.context is not None and continued.parent is not None
    assert continued.context.trace_id == 0x0AF7651916CD43DD8448EB211C80319C
    assert continued.parent.span_id == 0xB7AD6B7169203331
    assert alone.parent is None


def test_aborted_and_failed_requests_have_spans(watched: tuple[Engine, InMemorySpanExporter]) -> None:
    engine, exporter = watched
    engine.add_request([1, 2, 3], SAMPLING, request_id="gone")
    engine.abort("gone")
    request = engine.intake.request([1, 2, 3], SAMPLING, request_id="failed")
    engine.submit([request])
    engine.output_processor.end_of = _raise  # type: ignore[method-assign]
    while engine.has_unfinished():
        engine.step()
    gone, failed = exporter.get_finished_spans()
    assert (gone.attributes or {})["gen_ai.response.finish_reason"] == "abort"
    assert "gen_ai.latency.time_to_first_token" not in (gone.attributes or {})
    assert failed.status.status_code is StatusCode.ERROR and "no end" in (failed.status.description or "")


def _raise(*_: Any) -> None:
    raise LookupError("no end")


def test_exporters(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    provider = otlp_provider("http://127.0.0.1:9/v1/traces")
    assert provider.resource.attributes["service.name"] == "hf_paged"
    provider.shutdown()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "pigeon")
    with pytest.raises(ValueError, match="pigeon"):
        otlp_provider("http://127.0.0.1:9")


def test_without_opentelemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError("no such module", name=name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"hf_paged\[otel\]"):
        require_opentelemetry()
