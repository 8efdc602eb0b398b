"""OpenTelemetry: a span per request, with vLLM's names."""

from __future__ import annotations

import os
import time
from typing import Any

from hf_paged.engine.engine import Engine
from hf_paged.engine.request import Request

TRACE_HEADERS = ("traceparent", "tracestate")
"""What of a client's headers says which trace its request belongs to (W3C Trace Context)."""


class RequestSpans:
    """Makes a span of every request that ends, until `close`. Prompts and answers are not in it.

    A request whose `trace_headers` name a trace becomes a part of that.

    Args:
        provider: an OpenTelemetry `TracerProvider`.
        model_name: as spans name it.
    """

    def __init__(self, engine: Engine, provider: Any, model_name: str) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace = trace
        self._context_of = TraceContextTextMapPropagator().extract
        self._engine, self._provider, self._model_name = engine, provider, model_name
        self._tracer = provider.get_tracer("hf_paged")
        engine.request_observers.append(self._ended)

    def close(self) -> None:
        """Makes no more spans, and sends what is not sent yet."""
        self._engine.request_observers.remove(self._ended)
        self._provider.shutdown()

    def _ended(self, request: Request) -> None:
        times = request.metrics
        wall_s = time.time() - time.monotonic()
        span = self._tracer.start_span(
            "llm_request",
            context=self._context_of(request.trace_headers),
            kind=self._trace.SpanKind.SERVER,
            start_time=_ns(wall_s + times.arrival_time),
            attributes=span_attributes(request) | {"gen_ai.response.model": self._model_name},
        )
        if times.first_scheduled_time is not None:
            span.add_event("first_scheduled", timestamp=_ns(wall_s + times.first_scheduled_time))
        if times.first_token_time is not None:
            span.add_event("first_token", timestamp=_ns(wall_s + times.first_token_time))
        if request.error is not None:
            told = f"{type(request.error).__name__}: {request.error}"
            span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, told))
        span.end(_ns(wall_s + (times.finished_time or time.monotonic())))


def span_attributes(request: Request) -> dict[str, str | int | float]:
    """What a span says of a request that has ended: token counts, parameters, and times in seconds."""
    times, sampling = request.metrics, request.sampling
    end = times.finished_time or time.monotonic()
    attributes: dict[str, str | int | float] = {
        "gen_ai.request.id": request.request_id,
        "gen_ai.request.n": sampling.n,
        "gen_ai.request.max_tokens": request.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.usage.num_sequences": len(request.sequences),
        "gen_ai.usage.prompt_tokens": request.num_prompt,
        "gen_ai.usage.completion_tokens": sum(sequence.num_generated for sequence in request.sequences),
        "gen_ai.usage.cached_tokens": request.num_cached_tokens,
        "gen_ai.response.finish_reason": request.sequences[0].finish_reason or "",
        "gen_ai.latency.e2e": end - times.arrival_time,
    }
    if request.adapter_name is not None:
        attributes["gen_ai.request.lora_name"] = request.adapter_name
    if times.first_scheduled_time is not None:
        attributes["gen_ai.latency.time_in_queue"] = times.first_scheduled_time - times.arrival_time
        attributes["gen_ai.latency.time_in_model_inference"] = end - times.first_scheduled_time
        if times.first_token_time is not None:
            prefill = times.first_token_time - times.first_scheduled_time
            attributes["gen_ai.latency.time_in_model_prefill"] = prefill
    if times.first_token_time is not None:
        attributes["gen_ai.latency.time_to_first_token"] = times.first_token_time - times.arrival_time
        attributes["gen_ai.latency.time_in_model_decode"] = end - times.first_token_time
    return attributes


def otlp_provider(endpoint: str) -> Any:
    """A `TracerProvider` that sends spans, in batches and a thread of its own, to an OTLP endpoint.

    The protocol is gRPC; `OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=http/protobuf` makes it HTTP. `OTEL_SERVICE_NAME` names
    the service.

    Raises:
        ImportError: OpenTelemetry is missing; the message names the extra to install.
        ValueError: another protocol.
    """
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc")
    if protocol not in ("grpc", "http/protobuf"):
        raise ValueError(f'OTEL_EXPORTER_OTLP_TRACES_PROTOCOL must be "grpc" or "http/protobuf", got {protocol!r}')
    require_opentelemetry()
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    exporter: Any
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"))
    else:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpSpanExporter

        exporter = HttpSpanExporter(endpoint=endpoint)
    named = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "hf_paged"}
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


def require_opentelemetry() -> None:
    """Raises ImportError, which names the extra to install, where OpenTelemetry or its exporters are missing."""
    try:
        import opentelemetry.exporter.otlp.proto.common
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError as error:
        raise ImportError(f"spans need {error.name}: pip install 'hf_paged[otel]'") from error
