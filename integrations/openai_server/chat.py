"""/v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from starlette.responses import Response

from hf_paged.chat import render_chat
from hf_paged.engine.intake import Prompt
from hf_paged.engine.request import Request
from hf_paged.integrations.openai_server.errors import ApiError
from hf_paged.integrations.openai_server.events import EventStream, until_disconnect
from hf_paged.integrations.openai_server.logprobs import chat_logprobs, prompt_logprobs
from hf_paged.integrations.openai_server.protocol import ChatCompletionRequest, NamedToolChoice
from hf_paged.integrations.openai_server.reasoning import ReasoningParser, reasoning_parser
from hf_paged.integrations.openai_server.sampling import form_of, sampling_of
from hf_paged.integrations.openai_server.serving import Serving, Usage, new_id
from hf_paged.integrations.openai_server.tool_parser import CallPiece, ToolParser
from hf_paged.integrations.openai_server.tools import TOOL_PARSERS, NamedCall, RequiredCalls, whole_calls
from hf_paged.outputs import CompletionOutput, RequestOutput
from hf_paged.sampling_params import SamplingParams
from hf_paged.structured_outputs import StructuredOutputsParams


async def create_chat_completion(serving: Serving, body: ChatCompletionRequest, http: HttpRequest) -> Response:
    """Answers a chat."""
    model = serving.check_model(body.model)
    tools = ToolUse.of(body, serving)
    form = form_of(body)
    if form is not None and tools.form is not None:
        raise ApiError(400, "tool_choice gives the answer its form: leave the other one out")
    sampling = sampling_of(body, serving.defaults, serving.options.max_logprobs, form or tools.form)
    if tools.special:
        sampling = sampling.clone(skip_special_tokens=False)
    rendered: list[str] = []

    def make() -> Iterator[tuple[Prompt, SamplingParams]]:
        text, ids = render(serving, body, tools.shown)
        rendered.append(text)
        yield {"prompt": text, "prompt_token_ids": ids}, sampling

    id = new_id("chatcmpl")
    requests = await serving.make_requests(make, id, model, http.headers)
    answer = _Answer(serving, body, tools, requests, rendered[0], id, model)
    if body.stream:
        return EventStream(answer.stream())
    return JSONResponse(answer.whole((await until_disconnect(http, serving.finish(requests)))[0]))


def render(serving: Serving, body: Any, tools: list[dict[str, Any]] | None) -> tuple[str, list[int]]:
    """A chat or a request to tokenize one, through the template."""
    options = dict(body.chat_template_kwargs or {})
    if getattr(body, "reasoning_effort", None) is not None:
        options.setdefault("reasoning_effort", body.reasoning_effort)
    return render_chat(
        serving.intake.need_tokenizer("a chat"),
        body.messages,
        chat_template=body.chat_template or serving.chat_template,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        tools=tools,
        documents=getattr(body, "documents", None),
        chat_template_kwargs=options,
    )


@dataclass
class ToolUse:
    """What tools mean for one request."""

    shown: list[dict[str, Any]] | None = None
    """To the model."""
    parser: Callable[[], ToolParser] | None = None
    """Makes what takes the calls out of a sample."""
    special: bool = False
    """They may begin with special tokens."""
    form: StructuredOutputsParams | None = None
    """Of an answer that must be calls."""
    named: bool = False
    """It must be of one function, and all of it is its arguments."""
    parallel: bool = True

    @classmethod
    def of(cls, body: ChatCompletionRequest, serving: Serving) -> ToolUse:
        """Raises ApiError for a choice that the tools or the server do not offer."""
        tools, choice = body.tools or [], body.tool_choice
        names = [tool.function.name for tool in tools]
        if not tools:
            if choice not in (None, "none"):
                raise ApiError(400, "tool_choice needs tools", param="tool_choice")
            return cls()
        if choice == "none":
            return cls()
        shown = [tool.model_dump(exclude_none=True) for tool in tools]
        parallel = body.parallel_tool_calls is not False
        if choice in (None, "auto"):
            if not serving.options.enable_auto_tool_choice:
                if choice is None:
                    return cls(shown)
                raise ApiError(
                    400,
                    '"auto" tool choice needs a server started with --enable-auto-tool-choice and --tool-call-parser',
                    param="tool_choice",
                )
            parser = TOOL_PARSERS[serving.options.tool_call_parser or "hermes"]
            return cls(shown, parser, special=parser.special, parallel=parallel)
        if isinstance(choice, NamedToolChoice):
            if choice.function.name not in names:
                raise ApiError(400, f"tool_choice: there is no tool {choice.function.name!r}", param="tool_choice")
            tool = tools[names.index(choice.function.name)].function
            form = StructuredOutputsParams(json=tool.parameters or {"type": "object"})
            return cls(shown, partial(NamedCall, tool.name), form=form, named=True)
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool.function.name},
                    "parameters": tool.function.parameters or {"type": "object"},
                },
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
            for tool in tools
        ]
        schema = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
        if not parallel:
            schema["maxItems"] = 1
        return cls(shown, RequiredCalls, form=StructuredOutputsParams(json=schema))


@dataclass
class _Split:
    """A sample's text on its way to the client, taken apart."""

    reasoning: ReasoningParser | None
    tools: ToolParser | None
    single: bool
    called: bool = False
    """There was a call."""

    def feed(self, text: str, last: bool) -> tuple[str, str, list[CallPiece]]:
        """(reasoning, answer, news of calls) in a new piece of text."""
        thought = ""
        if self.reasoning is not None:
            thought, text = self.reasoning.feed(text, last=last)
        if self.tools is None:
            return thought, text, []
        text, pieces = self.tools.feed(text, last=last)
        if self.single:
            pieces = [piece for piece in pieces if piece.index == 0]
        self.called |= bool(pieces)
        return thought, text, pieces


class _Answer:
    """Outputs in the shape of chat completions."""

    def __init__(
        self,
        serving: Serving,
        body: ChatCompletionRequest,
        tools: ToolUse,
        requests: list[Request],
        prompt: str,
        id: str,
        model: str,
    ) -> None:
        self._serving, self._body, self._tools, self._requests = serving, body, tools, requests
        self._prompt, self._id, self._model, self._created = prompt, id, model, int(time.time())
        self._form = requests[0].asked.structured_outputs
        self._role = body.messages[-1].get("role", "assistant") if body.continue_final_message else "assistant"
        self._echo = ""
        if body.echo and body.continue_final_message and isinstance(body.messages[-1].get("content"), str):
            self._echo = body.messages[-1]["content"]

    def _split(self) -> _Split:
        return _Split(
            reasoning_parser(self._serving.options.reasoning_parser, self._prompt, self._form),
            self._tools.parser() if self._tools.parser is not None else None,
            not self._tools.parallel,
        )

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        usage = Usage()
        usage.add(output)
        choices = []
        for sample in output.outputs:
            split = self._split()
            thought, text, pieces = split.feed(sample.text, True)
            calls = whole_calls(pieces)
            message: dict[str, Any] = {
                "role": self._role,
                "content": self._echo + text if text or self._echo or not (calls or thought) else None,
            }
            if thought and self._body.include_reasoning:
                message |= {"reasoning": thought, "reasoning_content": thought}
            if calls:
                message["tool_calls"] = [_told(call.name, call.arguments) for call in calls]
            choice = {"index": sample.index, "message": message} | self._ending(sample, split)
            choice["logprobs"] = self._logprobs(sample)
            if self._body.return_token_ids:
                choice["token_ids"] = sample.token_ids
            choices.append(choice)
        answer = {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
            "usage": usage.told(),
        }
        if self._body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        if self._body.return_token_ids:
            answer["prompt_token_ids"] = output.prompt_token_ids
        return answer

    async def stream(self) -> AsyncIterator[dict[str, Any]]:
        options, usage = self._body.stream_options, Usage()
        splits: dict[int, _Split] = {}
        outputs = self._serving.follow(self._requests)

        def chunk(choices: list[dict[str, Any]], with_usage: bool) -> dict[str, Any]:
            told = {
                "id": self._id,
                "object": "chat.completion.chunk",
                "created": self._created,
                "model": self._model,
                "choices": choices,
            }
            return told | {"usage": usage.told()} if with_usage else told

        always = options is not None and options.continuous_usage_stats
        try:
            async for output in outputs:
                usage.add(output)
                for sample in output.outputs:
                    if sample.index not in splits:
                        splits[sample.index] = self._split()
                        delta = {"role": self._role, "content": self._echo}
                        yield chunk([{"index": sample.index, "delta": delta, "finish_reason": None}], always)
                    for choice in self._choices(sample, splits[sample.index]):
                        yield chunk([choice], always)
        finally:
            await outputs.aclose()
        if options is not None and options.include_usage:
            yield chunk([], True)

    def _choices(self, sample: CompletionOutput, split: _Split) -> list[dict[str, Any]]:
        """What is new of a sample: each piece of a call has a delta of its own, since clients put those together that
        come one after the other."""
        thought, text, pieces = split.feed(sample.text, sample.finished())
        said: dict[str, Any] = {}
        if thought and self._body.include_reasoning:
            said |= {"reasoning": thought, "reasoning_content": thought}
        if text:
            said["content"] = text
        deltas = [said] if said else []
        deltas += [{"tool_calls": [{"index": piece.index} | _told(piece.name, piece.arguments)]} for piece in pieces]
        about: dict[str, Any] = {}
        if (logprobs := self._logprobs(sample)) is not None:
            about["logprobs"] = logprobs
        if self._body.return_token_ids:
            about["token_ids"] = sample.token_ids
        if not deltas and (about or sample.finished()):
            deltas = [{}]
        choices = [{"index": sample.index, "delta": delta, "finish_reason": None} for delta in deltas]
        if choices:
            choices[0] |= about
        if sample.finished():
            choices[-1] |= self._ending(sample, split)
        return choices

    def _ending(self, sample: CompletionOutput, split: _Split) -> dict[str, Any]:
        reason = sample.finish_reason
        if split.called and not self._tools.named and reason == "stop":  # which OpenAI says of a named function too
            reason = "tool_calls"
        return {"finish_reason": reason, "stop_reason": sample.stop_reason}

    def _logprobs(self, sample: CompletionOutput) -> dict[str, Any] | None:
        if sample.logprobs is None:
            return None
        count = self._body.top_logprobs or 0
        as_ids = self._body.return_tokens_as_token_ids
        return chat_logprobs(sample.logprobs, sample.token_ids, count, as_ids)


def _told(name: str | None, arguments: str) -> dict[str, Any]:
    """A call, or a piece of one: only the first has the name."""
    if name is None:
        return {"function": {"arguments": arguments}}
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
