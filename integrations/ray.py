"""hf_paged on Ray: a Ray Serve application whose replicas serve OpenAI's API, and a Ray Data stage for batch inference.

    serve.run(openai_deployment("Qwen/Qwen3-0.6B", autoscaling_config={"min_replicas": 1, "max_replicas": 8}))

    dataset = generate_over(ray.data.read_parquet(path), "Qwen/Qwen3-0.6B", prompt_column="prompt", concurrency=4)

Which machines there are, and what runs where, is Ray's to say.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from typing import Any

import numpy as np

from hf_paged.llm.arguments import EngineArgs
from hf_paged.sampling_params import SamplingParams

try:
    import ray.data
    from ray import serve
    from ray.serve.config import RequestRouterConfig
    from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
    from starlette.requests import Request
    from starlette.responses import Response, StreamingResponse
except ImportError as error:
    raise ImportError(f"hf_paged on Ray needs {error.name}: pip install 'hf_paged[ray]'") from error

BLOCK_CHARS = 256
"""Of the pieces in which the beginnings of prompts are compared: some 64 tokens."""
MAX_BLOCKS = 64
"""Pieces that are compared at most."""
KNOWN_BLOCKS = 1 << 16
"""Pieces that a router remembers of each replica."""
INGRESS_REQUESTS = 10_000
"""That the ingress passes on at once."""


# ---- serving -------------------------------------------------------------------------------------------------------


def openai_deployment(
    model: str,
    *,
    server_options: Mapping[str, Any] | None = None,
    autoscaling_config: Any = None,
    num_replicas: int | None = None,
    ray_actor_options: Mapping[str, Any] | None = None,
    max_ongoing_requests: int = 256,
    imbalance: int = 16,
    **engine_args: Any,
) -> Any:
    """A Ray Serve application: replicas of the OpenAI server, and before them an ingress that sends each request to the
    replica that has computed the beginning of its prompt, unless this one has much more to do than others.

    Args:
        model: a checkpoint's folder or name, to be found on every machine.
        server_options: fields of `ServerOptions` (served_model_name, api_key, tool_call_parser, ...). Host, port and
            TLS are Ray Serve's.
        autoscaling_config: Ray Serve's, as a dict or an AutoscalingConfig.
        num_replicas: a fixed number instead.
        ray_actor_options: what a replica takes; None is `tensor_parallel_size` GPUs, or none with device="cpu".
        max_ongoing_requests: that a replica has at once.
        imbalance: requests that a replica may have more than the one with the fewest, and still be sent another one for
            its beginning's sake.
        engine_args: of `EngineArgs` and `EngineConfig`, as `LLM` takes them.

    Returns:
        the application, for `serve.run`.

    Raises:
        ValueError, TypeError: options that make no sense, before anything is started.
    """
    from hf_paged.integrations.openai_server.options import ServerOptions

    args, options = EngineArgs.parse(model, engine_args), ServerOptions(**(server_options or {}))
    _one_replica(args)
    if autoscaling_config is not None and num_replicas is not None:
        raise ValueError("autoscaling_config and num_replicas contradict each other: give one of them")
    settings: dict[str, Any] = {"autoscaling_config": autoscaling_config, "num_replicas": num_replicas}
    replicas = serve.deployment(
        name="hf_paged",
        max_ongoing_requests=max_ongoing_requests,
        ray_actor_options=dict(ray_actor_options) if ray_actor_options is not None else {"num_gpus": _num_gpus(args)},
        request_router_config=RequestRouterConfig(
            request_router_class=PrefixRouter, request_router_kwargs={"imbalance": imbalance}
        ),
        **{name: value for name, value in settings.items() if value is not None},
    )(OpenAIServer)
    ingress = serve.deployment(
        name="hf_paged_ingress", max_ongoing_requests=INGRESS_REQUESTS, ray_actor_options={"num_cpus": 0}
    )(Ingress)
    return ingress.bind(replicas.bind(args, options), options.max_request_bytes)


class OpenAIServer:
    """A replica: the OpenAI server's application, called with whole requests."""

    def __init__(self, args: EngineArgs, options: Any) -> None:
        from hf_paged.integrations.openai_server.app import make_app
        from hf_paged.llm.llm import sampling_defaults

        self._model, self._ranks = args.load()
        self._app = make_app(self._model, options, defaults=sampling_defaults(self._model, args), name=str(args.model))

    async def __call__(self, scope: dict[str, Any], body: bytes, beginning: list[str]) -> AsyncIterator[dict[str, Any]]:
        """ASGI's messages of the answer, as they come. Leaving early is the client's going away.

        Args:
            scope: ASGI's.
            beginning: of the prompt, for the router.
        """
        messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        gone = asyncio.Event()
        unread = [body]

        async def receive() -> dict[str, Any]:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def answer() -> None:
            try:
                await self._app(scope, receive, messages.put)
            finally:
                messages.put_nowait(None)

        task = asyncio.create_task(answer())
        try:
            while (message := await messages.get()) is not None:
                yield message
            await task
        finally:
            gone.set()
            if not task.done():
                task.cancel()

    def __del__(self) -> None:
        if getattr(self, "_ranks", None) is not None:
            self._ranks.stop()

    def check_health(self) -> None:
        """Ray Serve starts another replica where this raises."""
        if self._model.engine.lost() is not None:
            raise RuntimeError("a process of this replica is lost: look for its own error in the log")


class Ingress:
    """What clients meet: it finds out how a prompt begins, and passes the request to a replica and the answer back."""

    def __init__(self, replicas: Any, max_request_bytes: int) -> None:
        self._replicas = replicas.options(stream=True)
        self._max_bytes = max_request_bytes

    async def __call__(self, request: Request) -> Response:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > self._max_bytes:
                from hf_paged.integrations.openai_server.errors import error_response

                return error_response(413, f"the body is larger than {self._max_bytes} bytes")
        scope = {name: request.scope[name] for name in SCOPE if name in request.scope}
        messages = self._replicas.remote(scope, bytes(body), beginning_of(bytes(body)))
        start = await anext(messages)
        response = StreamingResponse(_pieces(messages), start["status"])
        response.raw_headers = start.get("headers", [])
        return response


async def _pieces(messages: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    async for message in messages:
        if message.get("body"):
            yield message["body"]


SCOPE = (
    "type",
    "http_version",
    "method",
    "path",
    "raw_path",
    "query_string",
    "headers",
    "scheme",
    "root_path",
    "client",
)
"""Of ASGI's scope, what a replica is told."""


# ---- routing -------------------------------------------------------------------------------------------------------


class PrefixRouter(RequestRouter):
    """Sends a request to the replica that was sent the longest beginning of its prompt; where none was, or that one has
    many more requests than others, to the one with the fewest. Each handle has a router of its own."""

    def initialize_state(self, imbalance: int) -> None:
        """
        Args:
            imbalance: requests that a replica may have more than the one with the fewest.
        """
        self._imbalance = imbalance
        self._known: dict[ReplicaID, OrderedDict[str, None]] = {}
        """By replica: the blocks it was sent, the last used last."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        lengths = {r: self.replica_queue_len_cache.get(r.replica_id) or 0 for r in candidate_replicas}
        fewest = min(lengths.values(), default=0)
        blocks = _blocks(pending_request)
        matches = {r: self._matching(r.replica_id, blocks) for r, n in lengths.items() if n <= fewest + self._imbalance}
        most = max(matches.values(), default=0)
        if not most:
            return [candidate_replicas]
        best = [replica for replica, count in matches.items() if count == most]
        return [best, [replica for replica in candidate_replicas if replica not in best]]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        known = self._known.setdefault(replica_id, OrderedDict())
        for block in reversed(_blocks(pending_request)):  # so that a beginning is forgotten after what follows it
            known[block] = None
            known.move_to_end(block)
        while len(known) > KNOWN_BLOCKS:
            known.popitem(last=False)
        for gone in self._known.keys() - self.curr_replicas.keys() - {replica_id}:
            del self._known[gone]

    def _matching(self, replica_id: ReplicaID, blocks: list[str]) -> int:
        """Blocks at the beginning that a replica was sent before."""
        known = self._known.get(replica_id, OrderedDict())
        return next((count for count, block in enumerate(blocks) if block not in known), len(blocks))


def beginning_of(body: bytes) -> list[str]:
    """A hash per block of the prompt in a request's body, of everything up to its end, for the first blocks; empty
    where there is no prompt. A last block that is not full counts only where it is the first."""
    try:
        told = json.loads(body)
    except ValueError:  # the replica will say so
        return []
    if not isinstance(told, dict):
        return []
    prompt = next((told[name] for name in ("messages", "prompt", "input") if told.get(name)), "")
    text = prompt if isinstance(prompt, str) else json.dumps(prompt)
    hashes: list[str] = []
    for first in range(0, min(len(text) - len(text) % BLOCK_CHARS or len(text), MAX_BLOCKS * BLOCK_CHARS), BLOCK_CHARS):
        block = (hashes[-1] if hashes else "") + text[first : first + BLOCK_CHARS]
        hashes.append(hashlib.blake2b(block.encode(errors="surrogatepass"), digest_size=8).hexdigest())
    return hashes


def _blocks(request: PendingRequest | None) -> list[str]:
    """What the ingress has found of a request's beginning."""
    return request.args[2] if request is not None and len(request.args) > 2 else []


# ---- batch inference -----------------------------------------------------------------------------------------------


def generate_over(
    dataset: Any,
    model: str,
    *,
    prompt_column: str = "prompt",
    output_column: str = "generated_text",
    sampling_params: SamplingParams | None = None,
    batch_size: int = 1024,
    concurrency: int | tuple[int, int] = 1,
    ray_remote_args: Mapping[str, Any] | None = None,
    **engine_args: Any,
) -> Any:
    """A Ray dataset with completions of one of its columns, by workers that have an engine each.

    Args:
        dataset: a `ray.data.Dataset`.
        model: a checkpoint's folder or name, to be found on every machine.
        prompt_column: text, token ids, or chat messages.
        output_column: gets the text; `<output_column>_token_ids` and `<output_column>_finish_reason` come with it. With
            n > 1 each of them is a list.
        sampling_params: None: the model's own.
        batch_size: rows that are in an engine together.
        concurrency: workers, or (fewest, most) of them.
        ray_remote_args: what a worker takes; None is `tensor_parallel_size` GPUs, or none with device="cpu".
        engine_args: of `EngineArgs` and `EngineConfig`, as `LLM` takes them.

    Returns:
        the dataset, which Ray Data computes when it is read.

    Raises:
        ValueError, TypeError: options that make no sense, before anything is started.
    """
    args = EngineArgs.parse(model, engine_args)
    _one_replica(args)
    if sampling_params is not None and not isinstance(sampling_params, SamplingParams):
        raise TypeError(f"sampling_params must be SamplingParams, got {type(sampling_params).__name__}")
    fewest, most = (concurrency, concurrency) if isinstance(concurrency, int) else concurrency
    resources = dict(ray_remote_args) if ray_remote_args is not None else {"num_gpus": _num_gpus(args)}
    return dataset.map_batches(
        GenerateStage,
        fn_constructor_args=(model, engine_args, prompt_column, output_column, sampling_params),
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(min_size=fewest, max_size=most),
        batch_format="numpy",
        **resources,
    )


class GenerateStage:
    """A worker of `generate_over`: batches of columns in, the same with completions out. A row whose request ended with
    an error has finish_reason "error"."""

    def __init__(
        self,
        model: str,
        engine_args: Mapping[str, Any],
        prompt_column: str,
        output_column: str,
        sampling_params: SamplingParams | None,
    ) -> None:
        from hf_paged import LLM

        self._llm = LLM(model, **engine_args)
        self._prompts, self._outputs, self._sampling = prompt_column, output_column, sampling_params

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        if self._prompts not in batch:
            raise ValueError(f"there is no column {self._prompts!r}: the dataset has {', '.join(batch)}")
        prompts = [prompt if isinstance(prompt, str) else list(prompt) for prompt in batch[self._prompts]]
        outputs = self._llm.generate(prompts, self._sampling, use_tqdm=False)
        columns = {"": "text", "_token_ids": "token_ids", "_finish_reason": "finish_reason"}
        found: dict[str, list[Any]] = {self._outputs + suffix: [] for suffix in columns}
        for output in outputs:
            for suffix, name in columns.items():
                each = [getattr(one, name) for one in output.outputs]
                found[self._outputs + suffix].append(each if len(each) > 1 else each[0])
        return batch | {name: _column(values) for name, values in found.items()}


def _column(values: list[Any]) -> np.ndarray:
    """Lists of different lengths, too, one in each row."""
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column


# ---- both ----------------------------------------------------------------------------------------------------------


def _one_replica(args: EngineArgs) -> None:
    if args.data_parallel_size > 1:
        raise ValueError("data_parallel_size is Ray's here: say how many replicas with num_replicas or concurrency")


def _num_gpus(args: EngineArgs) -> int:
    return 0 if str(args.device) == "cpu" else args.tensor_parallel_size * args.pipeline_parallel_size
