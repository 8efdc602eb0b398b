"""When a sequence ends, and what its tokens say: stop conditions, incremental detokenization, RequestOutput."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from hf_paged.engine.request import Request, Sequence
from hf_paged.outputs import CompletionLogprobs, CompletionOutput, Logprob, RequestOutput, logprobs_of
from hf_paged.sampling_params import RequestOutputKind, SamplingParams

INCOMPLETE = "\ufffd"
"""What a decoder writes for bytes that are not (yet) a character."""

MOST_PENDING = 64
"""Tokens held back for the rest of a character, at most; more than that is not a character but noise."""


class SequenceText:
    """The text of one growing list of token ids, and which of it may be shown already.

    Text is taken over only up to whole characters, and not shown while it could be the beginning of a stop string, so
    what was shown is never taken back.
    """

    def __init__(self, tokenizer: Any, sampling: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._options = {
            "skip_special_tokens": sampling.skip_special_tokens,
            "spaces_between_special_tokens": sampling.spaces_between_special_tokens,
        }
        self._stops = sampling.stop_strings
        self._include_stop = sampling.include_stop_str_in_output
        self._min_tokens = sampling.min_tokens
        self._first_stop_char = 0
        """Where a stop string may end at the earliest: what the first `min_tokens` tokens say does not count."""
        # Decoding starts at token `_begin`, whose text up to token `_read` is known: context enough for the next ones.
        self._begin = self._read = 0
        self._known = ""
        self._given = 0  # tokens at the last update
        self._waited = 0  # tokens up to which waiting for a whole character was given up
        self._shown = 0
        self.text = ""
        self.stopped: str | None = None

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, **self._options)

    def update(self, ids: list[int], *, last: bool = False) -> str | None:
        """Takes over the text of new tokens. Returns the stop string that now ends it, if one does."""
        if self.stopped is not None or self._read == len(ids):
            return self.stopped
        if self._given < self._min_tokens < len(ids):  # several at once, across the border
            self.update(ids[: self._min_tokens])
        self._given = len(ids)
        window = self.decode(ids[self._begin :])
        begin = len(self.text)
        if window.endswith(INCOMPLETE) and not last:
            # Whole characters are taken over; the broken one at the end may yet become whole. Noise without end is not
            # waited for, less what may be the beginning of a character (byte fallback writes one mark per byte).
            noise = len(ids) - max(self._read, self._waited) >= MOST_PENDING
            whole = window[:-3] if noise else window.rstrip(INCOMPLETE)
            if len(whole) > len(self._known):
                self.text += whole[len(self._known) :]
                self._known = whole
            if noise:
                self._waited = len(ids)
        else:
            self.text += window[len(self._known) :]
            self._begin, self._read = self._read, len(ids)
            self._known = self.decode(ids[self._begin :])
        if len(ids) <= self._min_tokens:
            self._first_stop_char = len(self.text)
            return None
        return self._find_stop(begin)

    def _find_stop(self, begin: int) -> str | None:
        found: tuple[int, str] | None = None
        for stop in self._stops:
            at = self.text.find(stop, max(max(self._first_stop_char, begin) - len(stop) + 1, 0))
            if at >= 0 and (found is None or at < found[0]):
                found = (at, stop)
        if found is not None:
            at, self.stopped = found
            self.text = self.text[: at + len(self.stopped) * self._include_stop]
        return self.stopped

    def take(self, *, last: bool) -> str:
        """The text that may be shown now and was not before."""
        end = len(self.text)
        if not last and not self._include_stop:
            end -= self._held_back()
        new = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return new

    def _held_back(self) -> int:
        """Characters at the end that could be the beginning of a stop string."""
        for size in range(min(max(map(len, self._stops), default=1) - 1, len(self.text)), 0, -1):
            tail = self.text[-size:]
            if any(stop.startswith(tail) for stop in self._stops):
                return size
        return 0


def choose_best(output: RequestOutput, asked: SamplingParams) -> RequestOutput:
    """What is left of the samples that were drawn for `best_of`: the n likeliest, likeliest first."""
    ranked = sorted(output.outputs, key=lambda sample: -(sample.cumulative_logprob or 0.0))[: asked.n]
    hidden: dict[str, Any] = {} if asked.logprobs is not None else {"logprobs": None, "cumulative_logprob": None}
    return replace(output, outputs=[replace(sample, index=i, **hidden) for i, sample in enumerate(ranked)])


class OutputProcessor:
    """Turns sampled tokens into finished sequences and outputs.

    Args:
        tokenizer: transformers' tokenizer, or None: then there is no text.
    """

    def __init__(self, tokenizer: Any = None) -> None:
        self.tokenizer = tokenizer

    # ---- the end of a sequence -----------------------------------------------------------------------------

    def end_of(self, sequence: Sequence) -> tuple[str, int | str | None] | None:
        """Whether the sequence ends with its last token: (finish_reason, stop_reason), or None.

        Raises:
            whatever a stopping criterion of the caller raises.
        """
        request, token = sequence.request, sequence.tokens[-1]
        count = len(sequence.tokens) - sequence.num_prompt
        if token in request.stop_token_ids and count > request.sampling.min_tokens:
            own = request.sampling.stop_token_ids or ()
            return "stop", token if token in own else None
        if request.sampling.stop is not None:
            stop = self._text_of(sequence).update(sequence.generated)
            if stop is not None:
                return "stop", stop
        if request.hooks is not None and request.hooks.stopping_criteria and self._criteria_met(sequence):
            return "stop", None
        if count >= request.max_tokens:
            return "length", None
        return None

    def _criteria_met(self, sequence: Sequence) -> bool:
        hooks = sequence.request.hooks
        assert hooks is not None
        scores = tuple(row[None] for row in hooks.scores[: sequence.num_generated])
        ids = torch.tensor([hooks.padding + sequence.tokens], device=scores[-1].device)
        return any(bool(torch.as_tensor(met(ids, scores)).all()) for met in hooks.stopping_criteria)

    # ---- what is reported ----------------------------------------------------------------------------------

    def output(self, request: Request, *, with_text: bool = True) -> RequestOutput | None:
        """What a request's reader gets after a step that touched it; None when it asked to be told only at the end."""
        kind, finished = request.sampling.output_kind, request.finished
        if kind is RequestOutputKind.FINAL_ONLY and not finished:
            return None
        delta = kind is RequestOutputKind.DELTA
        completions = [self._completion(sequence, delta, with_text) for sequence in request.sequences]
        if delta:
            completions = [c for c in completions if c is not None]
        output = RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            prompt_logprobs=self._prompt_logprobs(request),
            outputs=[c for c in completions if c is not None],
            finished=finished,
            metrics=request.metrics,
            lora_request=None if request.adapter is None else request.adapter.request,
            num_cached_tokens=request.num_cached_tokens,
            error=request.error,
        )
        return output if request.asked is request.sampling else choose_best(output, request.asked)

    def _completion(self, sequence: Sequence, delta: bool, with_text: bool) -> CompletionOutput | None:
        start = sequence.num_reported if delta else 0
        tokens = sequence.generated[start:]
        text = self._report_text(sequence, delta) if with_text else ""
        if delta:
            if sequence.end_reported or not (tokens or text or sequence.finished):
                return None
            sequence.num_reported = sequence.num_generated
            sequence.end_reported = sequence.finished
        wants_logprobs = sequence.request.sampling.logprobs is not None
        decode = self._decode(sequence.request)
        return CompletionOutput(
            index=sequence.index,
            text=text,
            token_ids=tokens,
            cumulative_logprob=sum(sequence.logprobs.values) if wants_logprobs else None,
            logprobs=CompletionLogprobs(sequence.logprobs.since(start), decode) if wants_logprobs else None,
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
            lora_request=None if sequence.request.adapter is None else sequence.request.adapter.request,
            weight_versions=sequence.weight_versions[start:],
        )

    def _report_text(self, sequence: Sequence, delta: bool) -> str:
        if self.tokenizer is None or not sequence.request.sampling.detokenize:
            return ""
        text, ids = self._text_of(sequence), self._visible(sequence)
        if text.stopped is None:
            text.update(ids, last=sequence.finished)
        return text.take(last=sequence.finished) if delta else text.text

    def _visible(self, sequence: Sequence) -> list[int]:
        """The generated ids that have text: all, less a stop token at the end unless that was to be included."""
        ids, sampling = sequence.generated, sequence.request.sampling
        by_token = sequence.finish_reason == "stop" and not isinstance(sequence.stop_reason, str)
        if by_token and not sampling.include_stop_str_in_output and ids and ids[-1] in sequence.request.stop_token_ids:
            return ids[:-1]
        return ids

    def _text_of(self, sequence: Sequence) -> SequenceText:
        if sequence.text is None:
            sequence.text = SequenceText(self.tokenizer, sequence.request.sampling)
        return sequence.text

    def _prompt_logprobs(self, request: Request) -> list[dict[int, Logprob] | None] | None:
        if request.prompt_logprobs is None:
            return None
        decode = self._decode(request)
        return [None if entry is None else logprobs_of(entry, decode) for entry in request.prompt_logprobs]

    def _decode(self, request: Request) -> Callable[[list[int]], str] | None:
        return self.tokenizer.decode if self.tokenizer is not None and request.sampling.detokenize else None
