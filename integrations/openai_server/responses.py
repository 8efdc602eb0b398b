"""/v1/responses, for text."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from starlette.responses import Response

from hf_paged.chat import render_chat
from hf_paged.engine.intake import Prompt
from hf_paged.engine.request import Request
from hf_paged.integrations.openai_server.errors import ApiError
from hf_paged.integrations.openai_server.events import EventStream, until_disconnect
from hf_paged.integrations.openai_server.protocol import ResponsesRequest
from hf_paged.integrations.openai_server.reasoning import reasoning_parser
from hf_paged.integrations.openai_server.sampling import response_format
from hf_paged.integrations.openai_server.serving import Serving, Usage, new_id
from hf_paged.outputs import CompletionOutput
from hf_paged.sampling_params import RequestOutputKind, SamplingParams
from hf_paged.structured_outputs import StructuredOutputsParams

EMPTY = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


async def create_response(serving: Serving, body: ResponsesRequest, http: HttpRequest) -> Response:
    """Answers an input."""
    model = serving.check_model(body.model)
    sampling = _sampling(serving, body)
    messages = _messages(body)
    rendered: list[str] = []

    def make() -> Iterator[tuple[Prompt, SamplingParams]]:
        tokenizer = serving.intake.need_tokenizer("an input")
        text, ids = render_chat(tokenizer, messages, chat_template=serving.chat_template)
        rendered.append(text)
        yield {"prompt": text, "prompt_token_ids": ids}, sampling

    id = new_id("resp")
    requests = await serving.make_requests(make, id, model, http.headers)
    answer = _Answer(serving, body, requests, rendered[0], id, model)
    if body.stream:
        return EventStream(answer.stream(), done=False)
    output = (await until_disconnect(http, serving.finish(requests)))[0]
    answer.usage.add(output)
    answer.take(output.outputs[0])
    return JSONResponse(answer.told())


def _sampling(serving: Serving, body: ResponsesRequest) -> SamplingParams:
    given = dict(serving.defaults)
    for name in ("temperature", "top_p", "top_k", "seed"):
        if getattr(body, name) is not None:
            given[name] = getattr(body, name)
    given["max_tokens"] = body.max_output_tokens or given.get("max_tokens")
    if body.truncation == "auto":
        given["truncate_prompt_tokens"] = -1
    found = response_format(body.text.format, "text.format") if body.text is not None and body.text.format else None
    form = StructuredOutputsParams(**found) if found else None
    kind = RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY
    return SamplingParams(**given, priority=body.priority, structured_outputs=form, output_kind=kind)


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for item in body.input:
        if item.get("type", "message") == "reasoning":
            continue
        if item.get("type", "message") != "message" or "role" not in item:
            raise ApiError(400, f"input: an item of type {item.get('type')!r:.80} is not served", param="input")
        role = "system" if item["role"] == "developer" else item["role"]
        messages.append({"role": role, "content": item.get("content")})
    return messages


class _Answer:
    """One sample's text in the shape of a response, whole or as events."""

    def __init__(
        self, serving: Serving, body: ResponsesRequest, requests: list[Request], prompt: str, id: str, model: str
    ) -> None:
        self._serving, self._body, self._requests = serving, body, requests
        self._id, self._model, self._created = id, model, int(time.time())
        self._message_id = new_id("msg")
        self._parser = reasoning_parser(serving.options.reasoning_parser, prompt, requests[0].asked.structured_outputs)
        self._text = ""
        self._thoughts = ""
        self._status = "in_progress"
        self.usage = Usage()

    def take(self, sample: CompletionOutput) -> str:
        """Takes over what is new of a sample. Returns what that adds to the answer."""
        thought, text = "", sample.text
        if self._parser is not None:
            thought, text = self._parser.feed(text, last=sample.finished())
        self._text += text
        self._thoughts += thought
        if sample.finished():
            self._status = "completed" if sample.finish_reason == "stop" else "incomplete"
        return text

    def told(self) -> dict[str, Any]:
        """The response as it stands."""
        body, done = self._body, self._status != "in_progress"
        usage = None
        if done:
            usage = {
                "input_tokens": self.usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": self.usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": self.usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": self.usage.prompt_tokens + self.usage.completion_tokens,
            }
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "model": self._model,
            "status": self._status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            "instructions": body.instructions,
            "metadata": body.metadata or {},
            "max_output_tokens": body.max_output_tokens,
            "output": self._reasoning() + [self._message()] if done else [],
            "parallel_tool_calls": bool(body.parallel_tool_calls),
            "temperature": body.temperature,
            "text": {"format": {"type": "text"}} | (body.text.model_dump(exclude_none=True) if body.text else {}),
            "top_p": body.top_p,
            "tool_choice": "none",
            "tools": [],
            "truncation": body.truncation or "disabled",
            "usage": usage,
        }

    def _reasoning(self) -> list[dict[str, Any]]:
        if not self._thoughts:
            return []
        content = [{"type": "reasoning_text", "text": self._thoughts}]
        return [{"type": "reasoning", "id": "rs_" + self._id, "summary": [], "content": content}]

    def _message(self) -> dict[str, Any]:
        return {
            "id": self._message_id,
            "type": "message",
            "role": "assistant",
            "status": self._status,
            "content": [EMPTY | {"text": self._text}] if self._status != "in_progress" else [],
        }

    async def stream(self) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        number = -1

        def event(kind: str, **data: Any) -> tuple[str, dict[str, Any]]:
            nonlocal number
            number += 1
            return f"response.{kind}", {"type": f"response.{kind}", "sequence_number": number} | data

        yield event("created", response=self.told())
        yield event("in_progress", response=self.told())
        yield event("output_item.added", output_index=0, item=self._message())
        here: dict[str, Any] = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        yield event("content_part.added", **here, part=EMPTY)
        outputs = self._serving.follow(self._requests)
        try:
            async for output in outputs:
                self.usage.add(output)
                for sample in output.outputs:
                    if text := self.take(sample):
                        yield event("output_text.delta", **here, delta=text, logprobs=[])
        finally:
            await outputs.aclose()
        yield event("output_text.done", **here, text=self._text, logprobs=[])
        yield event("content_part.done", **here, part=EMPTY | {"text": self._text})
        yield event("output_item.done", output_index=0, item=self._message())
        yield event("completed" if self._status == "completed" else "incomplete", response=self.told())
