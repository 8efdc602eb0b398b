"""What comes back: RequestOutput, CompletionOutput, Logprob, with vLLM's fields."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from hf_paged.engine.logprobs import LogprobHistory, TokenLogprobs
from hf_paged.engine.request import RequestMetrics


@dataclass(slots=True)
class Logprob:
    """A token's log-probability (natural logarithm), its rank among all tokens (1 is the likeliest), and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


def logprobs_of(entry: TokenLogprobs, decode: Callable[[list[int]], str] | None) -> dict[int, Logprob]:
    """A token and the likeliest beside it, by id; `decode` gives them their texts."""
    likeliest = zip(entry.token_ids[1:], entry.logprobs[1:], strict=True)
    found = {token: Logprob(value, rank) for rank, (token, value) in enumerate(likeliest, start=1)}
    own = entry.token_ids[0]
    found = {own: Logprob(entry.logprobs[0], entry.rank)} | {t: lp for t, lp in found.items() if t != own}
    if decode is not None:
        for token, logprob in found.items():
            logprob.decoded_token = decode([token])
    return found


class CompletionLogprobs(Sequence[dict[int, Logprob]]):
    """A completion's log-probabilities, token by token: a list of dicts that are made when they are looked at.

    Who only wants the numbers takes `values` (or `CompletionOutput.token_logprobs`).
    """

    def __init__(self, history: LogprobHistory, decode: Callable[[list[int]], str] | None) -> None:
        self._history, self._decode = history, decode

    @property
    def values(self) -> list[float]:
        """Of the tokens themselves."""
        return self._history.values

    def decoded_by(self, decode: Callable[[list[int]], str] | None) -> CompletionLogprobs:
        """The same with texts from `decode`, or without any."""
        return CompletionLogprobs(self._history, decode)

    def __len__(self) -> int:
        return len(self._history)

    @overload
    def __getitem__(self, place: int) -> dict[int, Logprob]: ...

    @overload
    def __getitem__(self, place: slice) -> list[dict[int, Logprob]]: ...

    def __getitem__(self, place: int | slice) -> dict[int, Logprob] | list[dict[int, Logprob]]:
        places = range(len(self))[place]
        if isinstance(places, range):
            return [self[i] for i in places]
        return logprobs_of(self._history.entry(places), self._decode)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))


@dataclass
class CompletionOutput:
    """One sample of a request."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    """Sum of the tokens' log-probabilities, where `logprobs` was asked for."""
    logprobs: Sequence[dict[int, Logprob]] | None
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

    @property
    def token_logprobs(self) -> list[float] | None:
        """The log-probability of each token of `token_ids`, where `logprobs` was asked for."""
        if isinstance(self.logprobs, CompletionLogprobs):
            return self.logprobs.values
        if self.logprobs is None:
            return None
        return [entry[token].logprob for entry, token in zip(self.logprobs, self.token_ids, strict=True)]


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
