"""What clients send: OpenAI's fields and vLLM's extras. Unknown fields are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_N = 128
"""Samples per prompt, as OpenAI has it."""

MAX_PROMPTS = 2048
"""Prompts per request, as OpenAI has it."""

StopString = Annotated[str, Field(max_length=1024)]
TokenIds = list[Annotated[int, Field(ge=0)]]


def _say_null(schema: dict[str, Any]) -> None:
    """Has the OpenAPI document say what `Body` does with null."""
    for name, field in schema.get("properties", {}).items():
        kinds = [field, *field.get("anyOf", [])]
        if name not in schema.get("required", []) and not any(kind.get("type") == "null" for kind in kinds):
            default = {"default": field.pop("default")} if "default" in field else {}
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}]} | default


class Body(BaseModel):
    """Strict: a number in quotes or a boolean is no number. A field that is null is one that was left out."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=(), json_schema_extra=_say_null
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_unsaid(cls, given: Any) -> Any:
        """OpenAI's optional fields may be null, which many programs send for what they leave alone."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None or name not in cls.model_fields}


class StreamOptions(Body):
    include_usage: bool = False
    """A last chunk with the tokens of the whole request."""
    continuous_usage_stats: bool = False
    """In every chunk, the tokens so far."""
    include_obfuscation: bool = False


class SamplingFields(Body):
    """What completions and chats have in common."""

    model: str | None = None
    n: int | None = Field(None, ge=1, le=MAX_N)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=64)] | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=1024)] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=4096)] | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: Annotated[list[StopString], Field(max_length=1024)] | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = None
    priority: int = 0
    return_tokens_as_token_ids: bool = False
    """Tokens in log-probabilities are written "token_id:17"."""
    return_token_ids: bool = False
    """Also report token ids of prompt and output."""
    stream: bool = False
    stream_options: StreamOptions | None = None

    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None
    guided_whitespace_pattern: str | None = None
    structural_tag: str | dict[str, Any] | None = None

    # Accepted, and of no consequence here.
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    length_penalty: float | None = None
    early_stopping: bool | None = None
    guided_decoding_backend: str | None = None

    # The routers of vLLM and SGLang write these into every request.
    no_stop_trim: Literal[False] | None = None
    return_hidden_states: Literal[False] | None = None
    separate_reasoning: Literal[True] | None = None
    stream_reasoning: Literal[True] | None = None

    # Known, and not served.
    use_beam_search: Literal[False] | None = None
    mm_processor_kwargs: None = None
    kv_transfer_params: None = None


class CompletionRequest(SamplingFields):
    prompt: str | TokenIds | list[str] | list[TokenIds]
    suffix: None = None
    best_of: int | None = Field(None, ge=1, le=MAX_N)
    echo: bool = False
    logprobs: int | None = Field(None, ge=-1)
    add_special_tokens: bool = True


class FunctionDefinition(Body):
    model_config = ConfigDict(extra="allow")
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    type: Literal["function"] = "function"
    function: FunctionDefinition


class NamedFunction(Body):
    name: str


class NamedToolChoice(Body):
    type: Literal["function"] = "function"
    function: NamedFunction


class ChatCompletionRequest(SamplingFields):
    messages: list[dict[str, Any]] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=-1)
    tools: Annotated[list[Tool], Field(max_length=512)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    documents: list[dict[str, str]] | None = None
    echo: bool = False
    include_reasoning: bool = True
    reasoning_effort: str | None = None
    verbosity: str | None = None
    modalities: list[Literal["text"]] | None = None
    functions: None = None
    function_call: None = None
    audio: None = None


class ResponsesText(Body):
    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponsesRequest(Body):
    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stream: bool = False
    text: ResponsesText | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    reasoning: dict[str, Any] | None = None
    include: list[str] | None = None
    priority: int = 0
    stream_options: dict[str, Any] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None


class TokenizeRequest(Body):
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: TokenIds


class LoadLoraRequest(Body):
    """What `/v1/load_lora_adapter` takes."""

    lora_name: str = Field(min_length=1, max_length=256)
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = False
    """Read it anew, though one of this name is there."""


class UnloadLoraRequest(Body):
    """What `/v1/unload_lora_adapter` takes."""

    lora_name: str = Field(min_length=1, max_length=256)
    lora_int_id: int | None = None
    """Accepted as vLLM has it; the name says which."""
