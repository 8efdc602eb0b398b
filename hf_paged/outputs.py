"""What comes back: RequestOutput, CompletionOutput, Logprob, with vLLM's fields."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hf_paged.engine.request import RequestMetrics


@dataclass(slots=True)
class Logprob:
    """A token's log-probability (natural logarithm), its rank among all tokens (1 is the likeliest), and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One sample of a request."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    """Sum of the tokens' log-probabilities, where `logprobs` was asked for."""
    logprobs: list[dict[int, Logprob]] | None
    """Per token: the sampled one and the likeliest, by id."""
    finish_reason: str | None = None
    """"stop", "length", "abort" or "error"; None while it goes on."""
    stop_reason: int | str | None = None
    """The stop string or stop token id; None for an end-of-sequence id or when nothing stopped it."""
    lora_request: Any = None
    weight_versions: list[int] = field(default_factory=list)
    """Per token: `Engine.weight_version` when the step that computed it was launched."""

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """A request and its samples, so far or in the end."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    """Per prompt token, the first of which has none."""
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    lora_request: Any = None
    num_cached_tokens: int | None = None
    """Prompt tokens whose keys and values were found in the prefix cache."""
    error: Exception | None = field(default=None, repr=False)
    """What ended the request with finish_reason "error", such as a logits processor that raised."""

    def __iter__(self) -> Iterator[CompletionOutput]:
        return iter(self.outputs)
