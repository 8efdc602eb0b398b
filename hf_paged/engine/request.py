"""Request (a prompt) and Sequence (one of its n samples). Plain Python, no torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_paged.engine.logprobs import LogprobHistory, TokenLogprobs

if TYPE_CHECKING:
    from hf_paged.cache.prefix import Node
    from hf_paged.engine.output import SequenceText
    from hf_paged.lora.adapter import Adapter
    from hf_paged.sampling.structured import Form, FormState
    from hf_paged.sampling_params import SamplingParams
    from hf_paged.speculative.config import SpeculativeConfig


@dataclass(eq=False, slots=True)
class Sequence:
    """One sample of a request: its tokens, and how far the KV cache has followed them.

    `tokens` is the truth; everything else about a sequence can be computed again from it, which is what preemption
    and recovery do. Tokens `[0, num_computed)`, pending ones included, have keys and values in `pages`.
    """

    request: Request
    index: int
    tokens: list[int]
    num_prompt: int
    num_computed: int = 0
    num_pending: int = 0
    """Tokens after the last of `tokens` that are sampled, or will be by a step on its way, and not known here yet."""
    pages: list[int] = field(default_factory=list)
    path: list[Node] = field(default_factory=list)
    """The prefix tree's nodes for the first `len(path)` pages."""
    epoch: int = -1
    """The prefix tree's epoch when the sequence was admitted."""
    slot: int = -1
    """The row of the per-sequence tables that it occupies while it runs; -1 while it waits."""
    may_share_tail: bool = False
    """Its last, partly filled page may be a sibling's too: look before writing."""
    order: tuple[int, int, int] = (0, -1, 0)
    """Who goes first: priority (lower first), then arrival, then the sample's index. The scheduler gives it."""
    finish_reason: str | None = None
    """None while unfinished, then "stop", "length", "abort" or "error"."""
    stop_reason: int | str | None = None
    logprobs: LogprobHistory = field(default_factory=LogprobHistory)
    """One entry per generated token, where the request asked for them."""
    weight_runs: list[tuple[int, int]] = field(default_factory=list)
    """(version of the weights, the first generated token computed with it), in order."""
    text: SequenceText | None = None
    """Its text so far, where somebody reads along; the output processor's."""
    form_state: FormState | None = None
    """How far it has followed its request's form; whoever makes masks or drafts brings it to the tokens first."""
    num_reported: int = 0
    """Generated tokens that a reader of deltas has been given."""
    end_reported: bool = False

    @property
    def origin(self) -> Sequence:
        """The sequence itself; for rows that verify drafts, the one that these are for."""
        return self

    @property
    def ahead(self) -> list[int]:
        """The drafted ones among `tokens`."""
        return []

    @property
    def last_token(self) -> int:
        return self.tokens[-1]

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def logits_from(self) -> int | None:
        """The first token of the prompt whose logits are wanted, and so are all after it; None where nobody wants more
        than the last one's."""
        return self.request.logits_from if self.num_generated == 0 else None

    @property
    def weight_versions(self) -> list[int]:
        """Per generated token, the version of the weights that computed it."""
        ends = [start for _, start in self.weight_runs[1:]] + [self.num_generated]
        runs = zip(self.weight_runs, ends, strict=False)  # before the first token there is no run
        return [version for (version, start), end in runs for _ in range(start, end)]

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(eq=False, slots=True)
class Hooks:
    """What transformers' `generate` asks of single rows, beyond `SamplingParams`. All tensors are on the model's
    device."""

    processors: list[Callable[[Any, Any], Any]] = field(default_factory=list)
    """transformers-style logits processors, `(input_ids [1, L], scores [1, V]) -> scores`, in order."""
    stopping_criteria: list[Callable[[Any, Any], Any]] = field(default_factory=list)
    """transformers-style criteria, `(input_ids [1, L], scores) -> bool tensor [1]`; scores is a tuple of [1, V]."""
    padding: list[int] = field(default_factory=list)
    """The pad tokens that stood left of the prompt: processors see them, the model does not."""
    keep_logits: bool = False
    keep_scores: bool = False
    logits: list[Any] = field(default_factory=list)
    """With `keep_logits`: the raw logits [V] of each generated token, float32."""
    scores: list[Any] = field(default_factory=list)
    """With `keep_scores`: the processed scores [V] of each generated token, float32."""


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request, in seconds of `time.monotonic()`; None until they have."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0


class Request:
    """A prompt and what was asked of it.

    Args:
        request_id: any string that no unfinished request has.
        prompt_token_ids: at least one token id.
        sampling: how to sample; `sampling.n` sequences are made.
        prompt: the text, for the output; not used otherwise.
        logprobs_mode: where `sampling` names none.
        scored: the tokens that come after each of the last `len(scored)` of `prompt_token_ids`; at least one. Then
            nothing is sampled, n is 1 and the request ends when their log-probabilities are known.
        speculation: how tokens are drafted for it; None is not at all.
        hooks: only from `generate`; then n must be 1.
        asked: the parameters as they were given, where they are others than `sampling`: of its samples the best are
            reported.
        form: what its completions must look like, compiled.
        adapter: what its tokens are computed with, on top of the model; None is the model alone.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        *,
        prompt: str | None = None,
        seed: int = 0,
        max_tokens: int | None = None,
        stop_token_ids: frozenset[int] = frozenset(),
        bad_words: list[list[int]] | None = None,
        logprobs_mode: str = "raw_logprobs",
        scored: list[int] | None = None,
        speculation: SpeculativeConfig | None = None,
        hooks: Hooks | None = None,
        asked: SamplingParams | None = None,
        form: Form | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.sampling = sampling
        self.asked = asked or sampling
        self.seed = seed
        self.max_tokens = max_tokens if max_tokens is not None else (sampling.max_tokens or 1)
        self.stop_token_ids = stop_token_ids
        """Every id that ends a sequence: the model's end-of-sequence ids and the request's own."""
        self.bad_words = bad_words or []
        """`sampling.bad_words` as token ids."""
        self.logprobs_mode = sampling.logprobs_mode or logprobs_mode
        scaled = self.logprobs_mode == "scaled_logprobs" and not sampling.greedy
        self.logprob_temperature = sampling.temperature if scaled else 1.0
        """What raw logits are divided by before the softmax that log-probabilities are of."""
        self.scored = scored
        self.scores: list[float] = []
        """Log-probabilities of `scored`, as far as they are known."""
        self.speculation = speculation
        self.hooks = hooks
        self.form = form
        self.adapter: Adapter | None
        self.adapter_generation: int
        """Whose keys and values are its own; 0 is the model alone."""
        self.set_adapter(adapter)
        self.penalised = (
            sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
        )
        untouched = not (self.penalised or sampling.logit_bias or sampling.logits_processors or hooks is not None)
        self.masked = bool(
            self.bad_words or sampling.min_tokens or sampling.allowed_token_ids is not None or form is not None
        )
        """What may be drawn next depends on the tokens before it."""
        self.simple = untouched and not self.masked and sampling.logprobs is None
        """Nothing touches its logits before temperature, and nobody asks for log-probabilities."""
        self.shows_processed = self.logprobs_mode == "processed_logprobs" and sampling.logprobs is not None
        """Its log-probabilities are of what its tokens are drawn from."""
        self.device_drawn = (
            untouched
            and not self.shows_processed
            and sampling.logprobs in (None, 0)
            and sampling.prompt_logprobs is None
        )
        """A device can sample it, given a mask of what may be drawn if it is masked: nothing else touches its logits
        before temperature, and nobody asks for more than the log-probabilities of the sampled tokens, before
        filters."""
        self.fused = self.device_drawn and not self.masked
        """A device can sample it alone, before the host knows the token that comes before."""
        self.priority = sampling.priority
        self.reserved = 0
        """Slots kept free for siblings while the first sample's prompt is prefilled; the scheduler's."""
        num_prompt = len(prompt_token_ids)
        self.num_prompt = num_prompt
        self.logits_from = num_prompt - len(scored) if scored else None if sampling.prompt_logprobs is None else 0
        """See `Sequence`."""
        self.sequences = [Sequence(self, i, list(prompt_token_ids), num_prompt) for i in range(sampling.n)]
        self.num_unfinished = sampling.n
        self.forked = sampling.n == 1
        """False until the prompt is computed and all samples run on their own."""
        self.num_cached_tokens = 0
        """Prompt tokens found in the prefix tree at first admission."""
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.error: Exception | None = None
        self.trace_headers: dict[str, str] = {}
        """W3C Trace Context of whoever asked: "traceparent", "tracestate"."""
        self.metrics = RequestMetrics(arrival_time=time.monotonic())

    def set_adapter(self, adapter: Adapter | None) -> None:
        """Another one, or none; before anything is computed."""
        self.adapter = adapter
        self.adapter_generation = 0 if adapter is None else adapter.generation

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"adapter": None}  # which is too large to go with each; see `lora/travel.py`

    @property
    def finished(self) -> bool:
        return self.num_unfinished == 0

    @property
    def adapter_name(self) -> str | None:
        """Of its LoRA adapter; None is the model alone."""
        return None if self.adapter is None else self.adapter.request.lora_name
