"""/v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from starlette.responses import Response

from hf_paged.engine.intake import Prompt
from hf_paged.engine.request import Request
from hf_paged.integrations.openai_server.errors import ApiError
from hf_paged.integrations.openai_server.events import EventStream, until_disconnect
from hf_paged.integrations.openai_server.logprobs import completion_logprobs, prompt_logprobs
from hf_paged.integrations.openai_server.protocol import MAX_PROMPTS, CompletionRequest
from hf_paged.integrations.openai_server.sampling import form_of, sampling_of
from hf_paged.integrations.openai_server.serving import Serving, Usage, new_id, plain_text
from hf_paged.outputs import CompletionOutput, RequestOutput
from hf_paged.sampling_params import SamplingParams


async def create_completion(serving: Serving, body: CompletionRequest, http: HttpRequest) -> Response:
    """Continues one or several prompts."""
    model = serving.check_model(body.model)
    sampling = sampling_of(body, serving.defaults, serving.options.max_logprobs, form_of(body))
    if body.echo and sampling.logprobs is not None and sampling.prompt_logprobs is None:
        sampling = sampling.clone(prompt_logprobs=sampling.logprobs)
    prompts = _prompts(body)

    def make() -> Iterator[tuple[Prompt, SamplingParams]]:
        for prompt in prompts:
            if isinstance(prompt, str):
                yield plain_text(serving, prompt, add_special_tokens=body.add_special_tokens), sampling
            else:
                yield prompt, sampling

    id = new_id("cmpl")
    requests = await serving.make_requests(make, id, model, http.headers)
    answer = _Answer(serving, body, requests, id, model)
    if body.stream:
        return EventStream(answer.stream())
    return JSONResponse(answer.whole(await until_disconnect(http, serving.finish(requests))))


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise ApiError(400, "prompt is empty", param="prompt")
    if isinstance(prompt[0], int):
        return [prompt]
    if len(prompt) > MAX_PROMPTS:
        raise ApiError(400, f"{len(prompt)} prompts: at most {MAX_PROMPTS} go into one request", param="prompt")
    return list(prompt)


class _Answer:
    """Outputs in the shape of completions."""

    def __init__(self, serving: Serving, body: CompletionRequest, requests: list[Request], id: str, model: str) -> None:
        self._serving, self._body, self._requests = serving, body, requests
        self._id, self._model, self._created = id, model, int(time.time())
        self._n = requests[0].asked.n
        self._only_prompt = body.echo and body.max_tokens == 0

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        usage = Usage()
        choices = []
        for place, output in enumerate(outputs):
            usage.add(output)
            choices += [self._choice(place, output, sample, True, 0) for sample in output.outputs]
        if self._only_prompt:
            usage.completion_tokens = 0
        return self._body_of(choices) | {"usage": usage.told()}

    async def stream(self) -> AsyncIterator[dict[str, Any]]:
        options, usage = self._body.stream_options, Usage()
        places = {request.request_id: place for place, request in enumerate(self._requests)}
        lengths: dict[int, int] = {}
        outputs = self._serving.follow(self._requests)
        try:
            async for output in outputs:
                usage.add(output)
                for sample in output.outputs:
                    place = places[output.request_id]
                    index = place * self._n + sample.index
                    choice = self._choice(place, output, sample, index not in lengths, lengths.get(index, 0))
                    lengths[index] = lengths.get(index, 0) + len(choice["text"])
                    chunk = self._body_of([choice])
                    if options is not None and options.continuous_usage_stats:
                        chunk["usage"] = usage.told()
                    yield chunk
        finally:
            await outputs.aclose()
        if options is not None and options.include_usage:
            yield self._body_of([]) | {"usage": usage.told()}

    def _body_of(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _choice(
        self, place: int, output: RequestOutput, sample: CompletionOutput, first: bool, offset: int
    ) -> dict[str, Any]:
        """A sample, or what of it is new.

        Args:
            first: whether nothing was told of it before.
            offset: characters told before.
        """
        body, as_ids = self._body, self._body.return_tokens_as_token_ids
        text, tokens = sample.text, list(sample.token_ids)
        entries: list[Any] = list(sample.logprobs) if sample.logprobs is not None else []
        if self._only_prompt:
            text, tokens, entries = "", [], []
        if body.echo and first:
            text = self._prompt_text(output) + text
            tokens = output.prompt_token_ids + tokens
            entries = list(output.prompt_logprobs or []) + entries
        choice: dict[str, Any] = {
            "index": place * self._n + sample.index,
            "text": text,
            "logprobs": None,
            "finish_reason": "length" if self._only_prompt else sample.finish_reason,
            "stop_reason": sample.stop_reason,
        }
        if body.logprobs is not None:
            choice["logprobs"] = completion_logprobs(entries, tokens, body.logprobs, as_ids, offset, self._decode)
        if body.prompt_logprobs is not None and first:
            choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        if body.return_token_ids:
            choice["token_ids"] = sample.token_ids
            choice["prompt_token_ids"] = output.prompt_token_ids if first else None
        return choice

    def _prompt_text(self, output: RequestOutput) -> str:
        if output.prompt is not None and self._body.truncate_prompt_tokens is None:
            return output.prompt
        return self._decode(output.prompt_token_ids)

    def _decode(self, ids: list[int]) -> str:
        tokenizer = self._serving.intake.tokenizer
        return tokenizer.decode(ids) if tokenizer is not None else ""
