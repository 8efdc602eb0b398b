"""The ASGI application: which path does what."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import PlainTextResponse

import hf_paged
from hf_paged.distributed.replicated import ReplicatedEngine
from hf_paged.engine.async_engine import AsyncEngine
from hf_paged.integrations.openai_server.chat import create_chat_completion, render
from hf_paged.integrations.openai_server.completions import create_completion
from hf_paged.integrations.openai_server.errors import ApiError, add_handlers
from hf_paged.integrations.openai_server.events import Disconnected, EventStream
from hf_paged.integrations.openai_server.guard import LimitBody, LimitQueue, RequireKey
from hf_paged.integrations.openai_server.live import Feed, live_page
from hf_paged.integrations.openai_server.openapi import describe
from hf_paged.integrations.openai_server.options import ServerOptions
from hf_paged.integrations.openai_server.profile import Profiler, add_profile
from hf_paged.integrations.openai_server.prometheus import exposition
from hf_paged.integrations.openai_server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    LoadLoraRequest,
    ResponsesRequest,
    TokenizeRequest,
    UnloadLoraRequest,
)
from hf_paged.integrations.openai_server.responses import create_response
from hf_paged.integrations.openai_server.serving import Serving
from hf_paged.lora.request import LoRARequest
from hf_paged.observe.logs import RequestLog, StatsLog
from hf_paged.observe.metrics import EngineMetrics
from hf_paged.observe.replicas import ReplicaMetrics, metrics_of
from hf_paged.observe.spans import RequestSpans, otlp_provider

logger = logging.getLogger(__name__)


def make_app(
    model: Any, options: ServerOptions | None = None, *, defaults: dict[str, Any] | None = None, name: str | None = None
) -> FastAPI:
    """An ASGI application that serves a model.

    Args:
        model: wrapped.
        options: of the server; host, port and TLS are for whoever runs the application.
        defaults: sampling parameters where clients say nothing.
        name: the model's, where the options name none.
    """
    options = options or ServerOptions()
    names = options.served_model_name or [name or getattr(model.config, "_name_or_path", "") or "model"]
    async_engine = AsyncEngine(model.engine)
    serving = Serving(async_engine, names, options, defaults or {})
    metrics = metrics_of(model.engine)
    if isinstance(model.engine, ReplicatedEngine):
        options = _without_steps(options)

    profiler = Profiler(model.engine, Path(options.profile_dir)) if options.profile_dir is not None else None
    spans = otlp_provider(options.otlp_traces_endpoint) if options.otlp_traces_endpoint is not None else None

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.callback(metrics.close)
            if spans is not None:
                stack.callback(RequestSpans(model.engine, spans, names[0]).close)
            if not options.disable_log_requests:
                stack.callback(RequestLog(model.engine, names[0]).close)
            if not options.disable_log_stats:
                stack.callback(StatsLog(model.engine).close)
            if profiler is not None:
                stack.callback(profiler.close)
            await stack.enter_async_context(async_engine)
            yield

    app = FastAPI(title="hf_paged", version=hf_paged.__version__, lifespan=lifespan, root_path=options.root_path)
    app.state.serving = serving
    add_handlers(app)
    app.exception_handler(Disconnected)(_nobody)
    # The last one added is the first that a request meets.
    app.add_middleware(LimitQueue, load=serving.load)
    app.add_middleware(LimitBody, max_bytes=options.max_request_bytes, timeout_s=options.request_timeout_s)
    keys = options.api_key + [key for key in [os.environ.get("HF_PAGED_API_KEY")] if key]
    if keys:
        app.add_middleware(RequireKey, keys=keys)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=options.allowed_origins,
        allow_methods=options.allowed_methods,
        allow_headers=options.allowed_headers,
        allow_credentials=options.allow_credentials,
    )
    _add_generation(app, serving)
    _add_tokens(app, serving)
    _add_adapters(app, serving)
    _add_probes(app, serving, metrics)
    if profiler is not None:
        add_profile(app, profiler)
    if not options.disable_live_page:
        _add_live_page(app, serving)
    describe(app, needs_key=bool(keys))
    return app


def _without_steps(options: ServerOptions) -> ServerOptions:
    """What can be had of replicas, whose steps and requests are looked at in their own processes.

    Raises:
        ValueError: something was asked for that cannot.
    """
    for name in ("profile_dir", "otlp_traces_endpoint"):
        if getattr(options, name) is not None:
            raise ValueError(f"{name} is for one replica: leave it or data_parallel_size out")
    logger.info("with replicas there is no live page and no log of requests and steps; /metrics has all of them")
    return replace(options, disable_live_page=True, disable_log_requests=True, disable_log_stats=True)


async def _nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


def _add_generation(app: FastAPI, serving: Serving) -> None:
    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, http: Request) -> Response:
        return await create_completion(serving, body, http)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatCompletionRequest, http: Request) -> Response:
        return await create_chat_completion(serving, body, http)

    @app.post("/v1/responses", response_model=None)
    async def responses(body: ResponsesRequest, http: Request) -> Response:
        return await create_response(serving, body, http)


def _add_tokens(app: FastAPI, serving: Serving) -> None:
    @app.post("/tokenize")
    def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        serving.check_model(body.model)
        tokenizer = serving.intake.need_tokenizer("/tokenize")
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give a prompt or messages, one of them")
        if body.messages is not None:
            tools = [tool.model_dump(exclude_none=True) for tool in body.tools or []]
            ids = render(serving, body, tools or None)[1]
        else:
            ids = list(tokenizer(body.prompt, add_special_tokens=body.add_special_tokens)["input_ids"])
        texts = tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
        return {"tokens": ids, "count": len(ids), "max_model_len": serving.intake.max_model_len, "token_strs": texts}

    @app.post("/detokenize")
    def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        serving.check_model(body.model)
        tokenizer = serving.intake.need_tokenizer("/detokenize")
        for token in body.tokens:
            if token >= serving.intake.vocab_size:
                raise ApiError(400, f"token id {token} is outside the vocabulary of {serving.intake.vocab_size}")
        return {"prompt": tokenizer.decode(body.tokens)}


def _add_adapters(app: FastAPI, serving: Serving) -> None:
    def allowed() -> None:
        if not serving.options.allow_runtime_lora:
            raise ApiError(404, "adapters are loaded and unloaded at servers with --enable-lora --allow-runtime-lora")

    @app.post("/v1/load_lora_adapter")
    def load_adapter(body: LoadLoraRequest) -> Response:
        allowed()
        return PlainTextResponse(serving.adapters.load(body, serving.names))

    @app.post("/v1/unload_lora_adapter")
    def unload_adapter(body: UnloadLoraRequest) -> Response:
        allowed()
        return PlainTextResponse(serving.adapters.unload(body))


def _add_probes(app: FastAPI, serving: Serving, metrics: EngineMetrics | ReplicaMetrics) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        cards = [_card(serving, name) for name in serving.names]
        cards += [_card(serving, adapter.lora_name, adapter) for adapter in serving.adapters.all()]
        return {"object": "list", "data": cards}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return _card(serving, name, serving.adapter(name))

    @app.get("/health", response_class=Response)
    @app.get("/ping", response_class=Response)
    @app.post("/ping", response_class=Response)
    async def health() -> Response:
        serving.check_engine()
        return Response(status_code=200)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": hf_paged.__version__}

    @app.get("/load")
    async def load() -> dict[str, int]:
        return {"server_load": serving.load.count}

    @app.get("/metrics", response_class=PlainTextResponse)
    def prometheus() -> Response:
        text = exposition(metrics, serving.options.metrics_prefix, {"model_name": serving.names[0]})
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_live_page(app: FastAPI, serving: Serving) -> None:
    page = live_page()
    about = {"model": serving.names[0], "version": hf_paged.__version__}
    app.state.feed = feed = Feed(serving.engine.engine, about)

    @app.get("/", include_in_schema=False)
    async def live() -> Response:
        return page

    @app.get("/live/events", include_in_schema=False)
    async def live_events() -> Response:
        return EventStream(feed.follow(), done=False)


def _card(serving: Serving, name: str, adapter: LoRARequest | None = None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": serving.created,
        "owned_by": "hf_paged",
        "root": serving.names[0] if adapter is None else adapter.lora_path,
        "parent": None if adapter is None else adapter.base_model_name or serving.names[0],
        "max_model_len": serving.intake.max_model_len,
    }
