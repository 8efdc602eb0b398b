"""Intake: prompts and sampling parameters become requests, or a clear error before any work starts."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hf_paged.chat import render_chat
from hf_paged.engine.request import Hooks, Request
from hf_paged.lora.adapter import Adapter
from hf_paged.lora.cache import AdapterCache
from hf_paged.lora.request import LoRARequest
from hf_paged.sampling.structured import Form, FormCompiler
from hf_paged.sampling_params import RequestOutputKind, SamplingParams
from hf_paged.speculative.config import SpeculativeConfig
from hf_paged.structured_outputs import StructuredOutputsParams

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | Mapping[str, Any] | torch.Tensor | np.ndarray
"""Text, token ids, chat messages (a list of dicts with a role and content), or vLLM's `{"prompt": ...}` and
`{"prompt_token_ids": [...]}`."""


class Intake:
    """Checks and tokenizes.

    Args:
        tokenizer: transformers' tokenizer, or None: then only token ids are taken.
        vocab_size: ids run from 0 to this, exclusive.
        max_model_len: prompt and output together.
        pool_tokens: what fits in the whole page pool.
        eos_token_ids: gives the ids that end a sequence unless `ignore_eos`, as they are when a request is made.
        logprobs_mode: for requests that name none.
        speculation: how tokens are drafted for requests that do not say.
        seed: where requests without a seed get theirs from; None is torch's global generator.
        draw_seed: gives these seeds instead.
        adapters: those that requests can have; None is none.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        vocab_size: int,
        max_model_len: int,
        pool_tokens: int,
        eos_token_ids: Callable[[], frozenset[int]],
        logprobs_mode: str = "raw_logprobs",
        speculation: SpeculativeConfig | None = None,
        seed: int | None = None,
        draw_seed: Callable[[], int] | None = None,
        adapters: AdapterCache | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.pool_tokens = pool_tokens
        self.eos_token_ids = eos_token_ids
        self.logprobs_mode = logprobs_mode
        self.speculation = speculation
        self.adapters = adapters
        self._generator = None if seed is None else torch.Generator("cpu").manual_seed(seed % 2**63)
        self._draw_seed = draw_seed or self._own_seed
        self._numbers = itertools.count()
        self._said_greedy = False
        self._compiling = threading.Lock()
        self._forms: tuple[Any, FormCompiler] | None = None
        """A tokenizer, and what compiles forms for it."""

    def _own_seed(self) -> int:
        return int(torch.randint(2**62, (), generator=self._generator, device="cpu").item())

    def request(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        *,
        request_id: str | None = None,
        speculation: SpeculativeConfig | None = None,
        hooks: Hooks | None = None,
        lora_request: LoRARequest | None = None,
    ) -> Request:
        """A request for one prompt.

        Raises:
            TypeError: a prompt of a kind that is not known.
            ValueError: an empty or too long prompt, ids outside the vocabulary, text without a tokenizer; an adapter
                that does not fit the model.
            FileNotFoundError: no adapter where it should be.
        """
        text, ids = self.tokenize(prompt)
        ids = self._truncate(ids, sampling)
        self._check_ids(ids)
        room = self.max_model_len - len(ids)
        if room < 1:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and the model's length is {self.max_model_len}: nothing is left to "
                "generate. Shorten the prompt, or raise max_model_len if the model allows it."
            )
        if sampling.max_tokens is None:
            room = min(room, max(1, self.pool_tokens - len(ids) + 1))
        self._check_sampling(sampling)
        asked, sampling = sampling, _drawn(sampling)
        eos = frozenset() if sampling.ignore_eos else self.eos_token_ids()
        stop_token_ids = eos | frozenset(sampling.stop_token_ids or ())
        form = None
        if sampling.structured_outputs is not None:
            form = self.compile_form(sampling.structured_outputs, stop_token_ids)
        adapter = self.adapter(lora_request)
        seed = sampling.seed if sampling.seed is not None else self._draw_seed()
        return Request(
            request_id if request_id is not None else f"request-{next(self._numbers)}",
            ids,
            sampling,
            prompt=text,
            seed=seed % 2**64,
            max_tokens=room if sampling.max_tokens is None else min(sampling.max_tokens, room),
            stop_token_ids=stop_token_ids,
            bad_words=self._bad_words(sampling.bad_words or []),
            logprobs_mode=self.logprobs_mode,
            speculation=speculation or self.speculation,
            hooks=hooks,
            asked=asked,
            form=form,
            adapter=adapter,
        )

    def scored_request(
        self, prompt: list[int], completion: list[int], temperature: float, lora_request: LoRARequest | None = None
    ) -> Request:
        """A request for the log-probabilities of a completion, at this temperature; see `Request.scored`.

        Args:
            prompt, completion: token ids, at least one of each.

        Raises:
            TypeError, ValueError: a bad temperature, or ids that are outside the vocabulary, missing, or too many.
        """
        self._check_ids(prompt)
        self._check_ids(completion, "completion")
        total = len(prompt) + len(completion)
        if total > self.max_model_len:
            raise ValueError(
                f"prompt and completion have {len(prompt)} and {len(completion)} tokens, and the model's length is "
                f"{self.max_model_len}. Shorten them, or raise max_model_len if the model allows it."
            )
        sampling = SamplingParams(
            temperature=temperature,
            logprobs_mode="scaled_logprobs",
            max_tokens=1,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        name = f"request-{next(self._numbers)}"
        adapter = self.adapter(lora_request)
        return Request(name, (prompt + completion)[:-1], sampling, scored=completion, adapter=adapter)

    def adapter(self, lora_request: LoRARequest | None) -> Adapter | None:
        """The adapter that a request asks for, read if need be; None is none.

        Raises:
            TypeError: something else than a LoRARequest.
            ValueError, FileNotFoundError: as `AdapterCache.get`; or the engine was made without room for adapters.
        """
        if lora_request is None:
            return None
        if not isinstance(lora_request, LoRARequest):
            raise TypeError(f"lora_request must be a hf_paged.LoRARequest, got {_describe(lora_request)}")
        return self.need_adapters().get(lora_request)

    def need_adapters(self) -> AdapterCache:
        """The adapters, or a ValueError that says how to get room for some."""
        if self.adapters is None:
            raise ValueError(
                "lora_request needs an engine with room for adapters: wrap(model, enable_lora=True, max_loras=...), "
                "LLM(..., enable_lora=True) or hf-paged serve --enable-lora"
            )
        return self.adapters

    def compile_form(self, params: StructuredOutputsParams, stop_token_ids: frozenset[int]) -> Form:
        """What completions must look like, compiled, or found where it was compiled before.

        Raises:
            ValueError: it is malformed, nothing can be of this form, or there is no tokenizer.
            ImportError: xgrammar is not installed.
        """
        tokenizer = self.need_tokenizer("structured output")
        with self._compiling:
            if self._forms is None or self._forms[0] is not tokenizer:
                self._forms = tokenizer, FormCompiler(tokenizer, self.vocab_size)
            compiler = self._forms[1]
        return compiler.compile(params, sorted(stop_token_ids))

    # ---- prompts -------------------------------------------------------------------------------------------

    def tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """A prompt as (text if it came as text, token ids)."""
        if type(prompt) is list and set(map(type, prompt)) == {int}:  # the usual case, and a hot path
            return None, list(prompt)
        if isinstance(prompt, str):
            return prompt, list(self.need_tokenizer("a text prompt")(prompt)["input_ids"])
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                return prompt.get("prompt"), self.tokenize(prompt["prompt_token_ids"])[1]
            if "prompt" in prompt:
                return self.tokenize(prompt["prompt"])
            raise TypeError(
                'a prompt given as a dict needs "prompt" or "prompt_token_ids", '
                f"got keys {sorted(map(str, prompt))}; a chat is a list of messages"
            )
        if isinstance(prompt, torch.Tensor | np.ndarray):
            if prompt.ndim != 1:
                raise TypeError(f"a prompt of token ids must be one-dimensional, got shape {tuple(prompt.shape)}")
            return None, [int(i) for i in prompt.tolist()]
        if isinstance(prompt, Sequence) and not isinstance(prompt, bytes):
            if prompt and all(isinstance(part, Mapping) for part in prompt):
                return render_chat(self.need_tokenizer("a chat"), list(prompt))  # type: ignore[arg-type]
            if all(isinstance(part, int | np.integer) and not isinstance(part, bool) for part in prompt):
                return None, [int(part) for part in prompt]  # type: ignore[arg-type]
        raise TypeError(
            "a prompt must be a string, a list of token ids, or a list of chat messages (dicts with role and content), "
            f"got {_describe(prompt)}"
        )

    def tokenize_completion(self, completion: str | Sequence[int] | torch.Tensor | np.ndarray) -> list[int]:
        """Text, without the special tokens that a tokenizer begins a text with, or token ids."""
        if isinstance(completion, str):
            return list(self.need_tokenizer("a text completion")(completion, add_special_tokens=False)["input_ids"])
        if isinstance(completion, torch.Tensor | np.ndarray) or (
            isinstance(completion, Sequence) and not any(isinstance(part, Mapping | str) for part in completion)
        ):
            return self.tokenize(completion)[1]
        raise TypeError(f"a completion must be a string or a list of token ids, got {_describe(completion)}")

    def need_tokenizer(self, what: str) -> Any:
        """The tokenizer, or a ValueError that says what needs one."""
        if self.tokenizer is None:
            raise ValueError(
                f"{what} needs a tokenizer and none was found beside the model: give one with "
                "wrap(model, tokenizer=...), or give prompts as token ids"
            )
        return self.tokenizer

    # ---- checks --------------------------------------------------------------------------------------------

    def _check_ids(self, ids: list[int], what: str = "prompt") -> None:
        if not ids:
            raise ValueError(f"the {what} is empty: it has no tokens to continue from")
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            bad = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise ValueError(f"token id {bad} in the {what} is outside the model's vocabulary of {self.vocab_size}")

    def _truncate(self, ids: list[int], sampling: SamplingParams) -> list[int]:
        """The end of a prompt, where sampling parameters say how much of it is wanted."""
        if not isinstance(sampling, SamplingParams):
            raise TypeError(f"sampling must be SamplingParams, got {_describe(sampling)}")
        kept = sampling.truncate_prompt_tokens
        if kept is None:
            return ids
        return ids[-(max(self.max_model_len - (sampling.max_tokens or 1), 1) if kept < 0 else kept) :]

    def _check_sampling(self, sampling: SamplingParams) -> None:
        for name, ids in sampling.token_ids().items():
            for token in ids:
                if not 0 <= token < self.vocab_size:
                    raise ValueError(f"{name}: token id {token} is outside the model's vocabulary of {self.vocab_size}")
        if sampling.stop_strings:
            self.need_tokenizer("a stop string")
        if sampling.greedy and sampling.n > 1 and not self._said_greedy:
            self._said_greedy = True
            logger.warning("n=%d with temperature 0: the samples will all be the same", sampling.n)

    def _bad_words(self, words: list[str]) -> list[list[int]]:
        """Each word's tokenizations, alone and after a space."""
        found = []
        for word in words:
            tokenizer = self.need_tokenizer("bad_words")
            for text in (word, " " + word.lstrip()):
                ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
                if ids and ids not in found:
                    found.append(ids)
        return found


def _drawn(sampling: SamplingParams) -> SamplingParams:
    """`best_of` as a number of samples, with the log-probabilities to choose by; the choice is made at the end."""
    if sampling.best_of in (None, sampling.n):
        return sampling
    logprobs = sampling.logprobs or 0
    return sampling.clone(n=sampling.best_of, best_of=None, logprobs=logprobs, output_kind=RequestOutputKind.FINAL_ONLY)


def _describe(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        kinds = sorted({type(part).__name__ for part in value}) or ["nothing"]
        return f"{type(value).__name__} of {', '.join(kinds)}"
    return f"{type(value).__name__} {value!r}"[:120]
