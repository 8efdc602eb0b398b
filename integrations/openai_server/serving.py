"""Serving: what all endpoints have in common. Requests in, outputs as they come."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hf_paged.chat import load_chat_template
from hf_paged.engine.async_engine import AsyncEngine
from hf_paged.engine.intake import Intake, Prompt
from hf_paged.engine.request import Request
from hf_paged.integrations.openai_server.adapters import Adapters
from hf_paged.integrations.openai_server.errors import ApiError
from hf_paged.integrations.openai_server.options import ServerOptions
from hf_paged.lora.request import LoRARequest
from hf_paged.observe.spans import TRACE_HEADERS
from hf_paged.outputs import RequestOutput
from hf_paged.sampling_params import SamplingParams

T = TypeVar("T")


@dataclass
class Usage:
    """Tokens of a request, so far."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    _seen: set[str] = field(default_factory=set)

    def add(self, output: RequestOutput) -> None:
        """Counts an output; of a stream, each one."""
        if output.request_id not in self._seen:
            self._seen.add(output.request_id)
            self.prompt_tokens += len(output.prompt_token_ids)
            self.cached_tokens += output.num_cached_tokens or 0
        self.completion_tokens += sum(len(sample.token_ids) for sample in output.outputs)

    def told(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass
class Load:
    """Requests for generation that are under way."""

    most: int
    """More are turned away."""
    count: int = 0


class Serving:
    """An engine behind asyncio, and what clients may know of it.

    Args:
        names: the model's; the first is reported.
        defaults: sampling parameters that the model's generation config says.
    """

    def __init__(self, engine: AsyncEngine, names: list[str], options: ServerOptions, defaults: dict[str, Any]) -> None:
        self.engine = engine
        self.names = names
        self.options = options
        self.defaults = defaults
        self.created = int(time.time())
        self.chat_template = load_chat_template(options.chat_template)
        self.adapters = Adapters(engine.engine, options.adapters())
        self.load = Load(engine.engine.load.max_num_seqs + options.max_queued_requests)

    @property
    def intake(self) -> Intake:
        return self.engine.engine.intake

    def check_engine(self) -> None:
        """Raises ApiError (503) when nothing can be generated until the server is started again."""
        if (why := self.engine.lost()) is not None:
            raise ApiError(503, f"the server must be started again: {why}")

    def check_model(self, name: str | None) -> str:
        """The name to answer with.

        Raises:
            ApiError: 404, another model was asked for.
        """
        if name and name not in self.names and self.adapters.get(name) is None:
            raise _no_model(name, self.names[0])
        return name or self.names[0]

    def adapter(self, model: str) -> LoRARequest | None:
        """The adapter that a model's name stands for; None where it is the model itself.

        Raises:
            ApiError: 404, it is gone.
        """
        found = self.adapters.get(model)
        if found is None and model not in self.names:
            raise _no_model(model, self.names[0])
        return found

    async def make_requests(
        self,
        make: Callable[[], Iterable[tuple[Prompt, SamplingParams]]],
        id: str,
        model: str,
        headers: Mapping[str, str],
    ) -> list[Request]:
        """Requests, checked; tokenizing, compiling grammars and reading adapters is left to a thread.

        Args:
            model: the name that `check_model` gave.
            headers: of the HTTP request; they may say which trace it belongs to.

        Raises:
            ValueError, TypeError: whatever is wrong with a prompt or its parameters.
            ApiError: 404, the adapter is gone; 503, the engine is.
        """
        self.check_engine()

        def work() -> list[Request]:
            made = []
            adapter = self.adapter(model)
            try:
                for place, (prompt, sampling) in enumerate(make()):
                    made.append(self.intake.request(prompt, sampling, request_id=f"{id}-{place}", lora_request=adapter))
                    made[-1].trace_headers = {name: headers[name] for name in TRACE_HEADERS if name in headers}
                    self.engine.engine.check(made[-1])
            except FileNotFoundError as error:
                raise ApiError(404, str(error), param="model") from error
            return made

        return await asyncio.to_thread(work)

    async def follow(self, requests: list[Request]) -> AsyncIterator[RequestOutput]:
        """Outputs as they come. Leaving early aborts what is unfinished.

        Raises:
            ApiError: 500, a request failed for a reason of its own.
        """
        outputs = self.engine.follow(requests)
        try:
            async for output in outputs:
                if output.error is not None:
                    raise ApiError(500, f"{type(output.error).__name__}: {output.error}")
                yield output
        finally:
            await outputs.aclose()  # type: ignore[attr-defined]

    async def finish(self, requests: list[Request]) -> list[RequestOutput]:
        """The last output of each."""
        outputs = self.follow(requests)
        try:
            found = {output.request_id: output async for output in outputs if output.finished}
        finally:
            await outputs.aclose()  # type: ignore[attr-defined]
        return [found[request.request_id] for request in requests]


def _no_model(name: str, here: str) -> ApiError:
    return ApiError(404, f"the model {name!r:.200} does not exist; here is {here!r}", param="model")


def new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"


def plain_text(serving: Serving, text: str, *, add_special_tokens: bool) -> Prompt:
    """A text as a prompt."""
    tokenizer = serving.intake.need_tokenizer("a text prompt")
    ids = list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
    return {"prompt": text, "prompt_token_ids": ids}
