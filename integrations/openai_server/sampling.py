"""Sampling parameters out of what clients send."""

from __future__ import annotations

from typing import Any

from hf_paged.integrations.openai_server.errors import ApiError
from hf_paged.integrations.openai_server.protocol import ChatCompletionRequest, CompletionRequest, SamplingFields
from hf_paged.sampling_params import RequestOutputKind, SamplingParams
from hf_paged.structured_outputs import StructuredOutputsParams

SAME_NAME = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "allowed_token_ids",
    "bad_words",
    "min_tokens",
    "ignore_eos",
    "prompt_logprobs",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "truncate_prompt_tokens",
    "priority",
)


def sampling_of(
    body: SamplingFields, defaults: dict[str, Any], max_logprobs: int, form: StructuredOutputsParams | None
) -> SamplingParams:
    """What a completion or chat request asks for.

    Args:
        defaults: of the model's generation config, for fields that the client leaves out.
        form: of the completion, where tools or the request give it one.

    Raises:
        ValueError, TypeError: a value makes no sense.
    """
    given: dict[str, Any] = dict(defaults)
    given |= {name: value for name in SAME_NAME if (value := getattr(body, name)) is not None}
    if body.logit_bias:
        given["logit_bias"] = dict(body.logit_bias)
    limit, logprobs = body.max_tokens, None
    if isinstance(body, ChatCompletionRequest):
        limit = body.max_completion_tokens if body.max_completion_tokens is not None else limit
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        given["max_tokens"] = limit if limit is not None else defaults.get("max_tokens")
    elif isinstance(body, CompletionRequest):
        logprobs = body.logprobs
        if limit == 0 and body.echo:
            limit = 1  # only the prompt is wanted
        if limit is not None:
            given["max_tokens"] = limit
        if body.best_of is not None:
            if body.stream and body.best_of > (body.n or 1):
                raise ApiError(400, "best_of chooses among finished samples and cannot be streamed", param="best_of")
            given["best_of"] = body.best_of
    for name, value in (("logprobs", logprobs), ("prompt_logprobs", body.prompt_logprobs)):
        if value is not None and max_logprobs >= 0 and not 0 <= value <= max_logprobs:
            raise ApiError(400, f"{name}={value}: this server gives 0 to {max_logprobs}", param=name)
    given["logprobs"] = logprobs
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")
    kind = RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY
    return SamplingParams(**given, structured_outputs=form, output_kind=kind)


def form_of(body: SamplingFields) -> StructuredOutputsParams | None:
    """What form a request wants its completion to have, in any of the ways to say it.

    Raises:
        ApiError: several at once, or a format that is not known.
    """
    ways: list[tuple[str, dict[str, Any]]] = []
    if body.response_format is not None and (found := response_format(body.response_format)):
        ways.append(("response_format", found))
    if body.structured_outputs is not None:
        ways.append(("structured_outputs", body.structured_outputs))
    older = {
        "json": body.guided_json,
        "regex": body.guided_regex,
        "choice": body.guided_choice,
        "grammar": body.guided_grammar,
        "json_object": body.guided_json_object,
        "structural_tag": body.structural_tag,
    }
    ways += [("guided", {name: value}) for name, value in older.items() if value]
    if len(ways) > 1:
        raise ApiError(400, f"one form of output, please; got {' and '.join(sorted(name for name, _ in ways))}")
    if not ways:
        return None
    try:
        return StructuredOutputsParams(**ways[0][1])
    except TypeError as error:
        raise ApiError(400, str(error).replace("StructuredOutputsParams.__init__() ", "structured_outputs ")) from error


def response_format(given: dict[str, Any], field: str = "response_format") -> dict[str, Any] | None:
    """OpenAI's `response_format`, or `text.format`, as fields of StructuredOutputsParams; None is plain text.

    Args:
        field: which of them.
    """
    kind = given.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind == "json_schema":
        schema = given.get("json_schema", given)
        schema = schema.get("schema") if isinstance(schema, dict) else None
        if schema is None:
            raise ApiError(400, f"{field}: json_schema needs a schema", param=field)
        return {"json": schema}
    if kind == "structural_tag":
        return {"structural_tag": given}
    told = '"text", "json_object", "json_schema" or "structural_tag"'
    raise ApiError(400, f"{field}: type must be {told}, got {kind!r:.80}", param=field)
