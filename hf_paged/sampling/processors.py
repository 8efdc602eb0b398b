"""What changes logits before the draw: biases, penalties, forbidden tokens, and the callers' own processors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_paged.engine.request import Sequence


class PenaltyState:
    """Which tokens each running sequence has seen: a row per slot, kept up to date by what was appended since.

    Made only once a request asks for a penalty; it grows with the slots that do.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._owners: dict[int, tuple[Sequence, int]] = {}  # slot -> (sequence, tokens counted)
        self._counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._in_prompt = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)

    def rows(self, sequences: list[Sequence]) -> tuple[Tensor, Tensor]:
        """For each sequence: int32 `[R, V]` how often each token was generated, bool `[R, V]` whether the prompt has
        it."""
        slots, new_slots, new_tokens = [], [], []
        for sequence in sequences:
            # Samples that fork in this step have no slot yet and no token of their own: they look like the first.
            holder = sequence.origin if sequence.slot >= 0 else sequence.request.sequences[0]
            slot = holder.slot
            slots.append(slot)
            owner, counted = self._owners.get(slot, (None, 0))
            if owner is not holder or counted > len(holder.tokens):
                self._begin(slot, holder)
                counted = holder.num_prompt
            fresh = holder.tokens[counted:]
            new_slots.extend([slot] * len(fresh))
            new_tokens.extend(fresh)
            self._owners[slot] = (holder, len(holder.tokens))
        if new_tokens:
            where = torch.tensor([new_slots, new_tokens], device=self._device)
            ones = torch.ones(len(new_tokens), dtype=torch.int32, device=self._device)
            self._counts.index_put_((where[0], where[1]), ones, accumulate=True)
        index = torch.tensor(slots, device=self._device)
        counts = self._counts[index]  # a copy
        drafted = [(row, token) for row, sequence in enumerate(sequences) for token in sequence.ahead]
        if drafted:
            where = torch.tensor(drafted, device=self._device)
            ones = torch.ones(len(drafted), dtype=torch.int32, device=self._device)
            counts.index_put_((where[:, 0], where[:, 1]), ones, accumulate=True)
        return counts, self._in_prompt[index]

    def _begin(self, slot: int, sequence: Sequence) -> None:
        if slot >= len(self._counts):
            more = max(slot + 1, 2 * len(self._counts)) - len(self._counts)
            self._counts = torch.cat([self._counts, self._counts.new_zeros(more, self._vocab_size)])
            self._in_prompt = torch.cat([self._in_prompt, self._in_prompt.new_zeros(more, self._vocab_size)])
        self._counts[slot] = 0
        self._in_prompt[slot] = False
        self._in_prompt[slot, torch.tensor(sequence.tokens[: sequence.num_prompt], device=self._device)] = True


def apply_penalties(logits: Tensor, sequences: list[Sequence], state: PenaltyState) -> None:
    """Repetition, presence and frequency penalties, in place on `[R, V]`."""
    counts, in_prompt = state.rows(sequences)
    params = [sequence.request.sampling for sequence in sequences]
    repetition, presence, frequency = (
        torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]
        for values in zip(
            *((p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in params), strict=True
        )
    )
    generated = counts > 0
    factor = torch.where(generated | in_prompt, repetition, 1.0)
    logits.copy_(torch.where(logits > 0, logits / factor, logits * factor))
    logits.sub_(frequency * counts).sub_(presence * generated)


def forbidden(sequence: Sequence) -> list[int]:
    """What bad_words and min_tokens forbid after the tokens that are known."""
    request = sequence.request
    ids = []
    for word in request.bad_words:
        head = word[:-1]
        if not head or sequence.tokens[-len(head) :] == head:
            ids.append(word[-1])
    if sequence.num_generated < request.sampling.min_tokens:
        ids.extend(sorted(request.stop_token_ids))
    return ids


def forbid(logits: Tensor, sequence: Sequence) -> None:
    """bad_words, min_tokens and allowed_token_ids, in place on one row `[V]`."""
    request = sequence.request
    if ids := forbidden(sequence):
        logits[ids] = -torch.inf
    if request.sampling.allowed_token_ids is not None:
        allowed = torch.tensor(request.sampling.allowed_token_ids, device=logits.device)
        kept = logits[allowed]
        logits.fill_(-torch.inf)
        logits[allowed] = kept


def bias(logits: Tensor, logit_bias: dict[int, float]) -> None:
    """logit_bias, in place on one row `[V]`."""
    ids = torch.tensor(list(logit_bias), device=logits.device)
    logits[ids] += torch.tensor(list(logit_bias.values()), dtype=logits.dtype, device=logits.device)


def call_processors(logits: Tensor, sequence: Sequence) -> Tensor:
    """The request's own processors, each on one row `[V]`, in order: first those of SamplingParams, then `generate`'s.

    Raises:
        whatever a processor raises; ValueError when one returns something that is not a row of logits.
    """
    request = sequence.request
    for processor in request.sampling.logits_processors or ():
        logits = _checked(_call(processor, logits, sequence), logits, processor)
    if request.hooks is not None and request.hooks.processors:
        ids = torch.tensor([request.hooks.padding + sequence.tokens], device=logits.device)
        for processor in request.hooks.processors:
            logits = _checked(processor(ids, logits[None])[0], logits, processor)
    return logits


def _call(processor: Callable[..., Any], logits: Tensor, sequence: Sequence) -> Any:
    from transformers import LogitsProcessor

    if isinstance(processor, LogitsProcessor):
        return processor(torch.tensor([sequence.tokens], device=logits.device), logits[None])[0]
    if _num_parameters(processor) == 3:
        return processor(list(sequence.request.prompt_token_ids), sequence.generated, logits)
    return processor(sequence.generated, logits)


def _num_parameters(processor: Callable[..., Any]) -> int:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(processor).parameters.values()
    return sum(parameter.kind in kinds and parameter.default is parameter.empty for parameter in parameters)


def _checked(result: Any, before: Tensor, processor: Callable[..., Any]) -> Tensor:
    if not isinstance(result, Tensor) or result.shape != before.shape:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"logits processor {processor!r} must return logits of shape {tuple(before.shape)}, got {got}")
    return result
