"""Structured output: which tokens a form allows next, by xgrammar, and their masks over logits."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence as SequenceOf
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from hf_paged.engine.request import Sequence
from hf_paged.structured_outputs import StructuredOutputsParams

MAX_FORM_CHARS = 512 << 10
"""Of a schema, expression or grammar."""

MAX_DEPTH = 64
"""Of nested objects in a schema: xgrammar's time grows with a high power of it."""

CACHE_BYTES = 512 << 20


class Form:
    """What a request's completions must look like, compiled; shared by requests that want the same.

    Args:
        compiled: xgrammar's CompiledGrammar.
        stop_token_ids: what may come when it is complete.
    """

    def __init__(self, compiled: Any, stop_token_ids: list[int]) -> None:
        self._compiled, self._stop_token_ids = compiled, stop_token_ids

    def matcher(self) -> Any:
        """A new xgrammar GrammarMatcher."""
        import xgrammar

        return xgrammar.GrammarMatcher(self._compiled, override_stop_tokens=self._stop_token_ids)

    def __reduce__(self) -> tuple[Any, ...]:
        """Requests travel to other ranks; xgrammar's objects do as JSON alone."""
        parts = self._compiled.serialize_json(), self._compiled.tokenizer_info.serialize_json()
        return _read_form, (*parts, self._stop_token_ids)


def _read_form(grammar: str, tokenizer: str, stop_token_ids: list[int]) -> Form:
    import xgrammar

    info = xgrammar.TokenizerInfo.deserialize_json(tokenizer)
    return Form(xgrammar.CompiledGrammar.deserialize_json(grammar, info), stop_token_ids)


class FormState:
    """How far a sequence has followed its form. Whatever interrupts it, it begins anew from the tokens."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self._matcher = form.matcher()
        self._accepted: list[int] = []

    def fill(self, rows: list[list[int]], mask: Tensor, places: SequenceOf[int]) -> None:
        """What may come after each of some texts.

        Args:
            rows: token ids; each row begins with the one before it, as those that verify a draft do.
            mask: int32 `[R, V / 32]`, a bit per token.
            places: of the rows in it. One whose text is not of the form, as after a wrong draft, allows everything:
                nobody wants its token.

        Raises:
            ValueError: the first row is not of the form.
        """
        try:
            self._go_to(rows[0])
            matched = 0  # drafted tokens beyond the first row
            of_the_form = True
            for place, tokens in zip(places, rows, strict=True):
                new = tokens[len(rows[0]) + matched :]
                matched += len(new)
                of_the_form = of_the_form and all(self._accept(token) for token in new)
                if not of_the_form or self._matcher.is_terminated():
                    mask[place] = -1
                else:
                    self._matcher.fill_next_token_bitmask(mask, place)
            self._back_to(len(rows[0]))
        except BaseException:
            self._matcher, self._accepted = self._form.matcher(), []
            raise

    def _go_to(self, tokens: list[int]) -> None:
        known = len(self._accepted)
        if known > len(tokens) or self._accepted != tokens[:known]:
            self._back_to(0)
            known = 0
        for place in range(known, len(tokens)):
            if not self._accept(tokens[place]):
                raise ValueError(f"token {tokens[place]} at place {place} is not of the form that was asked for")

    def _accept(self, token: int) -> bool:
        if self._matcher.is_terminated() or not self._matcher.accept_token(token):
            return False
        self._accepted.append(token)
        return True

    def _back_to(self, count: int) -> None:
        if len(self._accepted) > count:
            self._matcher.rollback(len(self._accepted) - count)
            del self._accepted[count:]


class FormCompiler:
    """Compiles forms for one tokenizer; equal ones once. Any thread may call it.

    Raises:
        ImportError: the extra is not installed; the message names it.
        ValueError: a tokenizer that xgrammar does not know.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        xgrammar = _require_xgrammar()
        try:
            info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size)
        except (ValueError, RuntimeError, TypeError) as error:
            raise ValueError(f"structured outputs cannot be had with this tokenizer: {error}") from error
        self._vocab_size = vocab_size
        self._compiler = xgrammar.GrammarCompiler(info, cache_limit_bytes=CACHE_BYTES)
        self._lock = threading.Lock()

    def compile(self, params: StructuredOutputsParams, stop_token_ids: SequenceOf[int]) -> Form:
        """A form, checked.

        Args:
            stop_token_ids: what ends a completion; at least one.

        Raises:
            ValueError: malformed, or nothing can be of this form.
        """
        if not stop_token_ids:
            raise ValueError(
                "structured outputs end with an end-of-sequence token, and this request has none: leave ignore_eos "
                "out, or give stop_token_ids"
            )
        _check_size(params)
        with self._lock:
            try:
                form = Form(self._compile(params), sorted(stop_token_ids))
            except (RuntimeError, ValueError, TypeError, RecursionError) as error:
                raise ValueError(f"structured outputs: {params.kind} cannot be compiled: {_told(error)}") from error
        self._check_possible(form, params.kind)
        return form

    def _compile(self, params: StructuredOutputsParams) -> Any:
        compiler: Any = self._compiler
        whitespace = not params.disable_any_whitespace
        if params.kind == "json":
            schema = params.json if isinstance(params.json, str) else json.dumps(params.json)
            return compiler.compile_json_schema(schema, any_whitespace=whitespace)
        if params.kind == "json_object":
            return compiler.compile_json_schema('{"type": "object"}', any_whitespace=whitespace, strict_mode=False)
        if params.kind == "regex":
            return compiler.compile_regex(str(params.regex))
        if params.kind == "choice":
            return compiler.compile_grammar("root ::= " + " | ".join(_literal(text) for text in params.choice or ()))
        if params.kind == "grammar":
            return compiler.compile_grammar(str(params.grammar))
        return compiler.compile_structural_tag(params.structural_tag or "")

    def _check_possible(self, form: Form, kind: str) -> None:
        mask = new_mask(1, self._vocab_size)
        form.matcher().fill_next_token_bitmask(mask, 0)
        if not bool(mask.any()):
            raise ValueError(f"structured outputs: no text can be of this {kind}")


def new_mask(rows: int, vocab_size: int, *, pinned: bool = False) -> Tensor:
    """int32 `[rows, ceil(V / 32)]` on the CPU, zeros."""
    return torch.zeros(rows, -(-vocab_size // 32), dtype=torch.int32, device="cpu", pin_memory=pinned)


def forbid_others(logits: Tensor, sequences: list[Sequence], errors: dict[int, Exception]) -> None:
    """Minus infinity for what the rows' forms do not allow, in place on float32 `[R, V]`.

    The masks are made on the host, while a device may still be at work on the logits.

    Args:
        errors: gets, by row, what went wrong with one.
    """
    places = [row for row, sequence in enumerate(sequences) if sequence.request.form is not None]
    if not places:
        return
    import xgrammar

    on_gpu = logits.device.type == "cuda"
    mask = new_mask(len(logits), logits.shape[-1], pinned=on_gpu)
    start = 0
    while start < len(places):
        origin = sequences[places[start]].origin
        end = start + 1
        while end < len(places) and sequences[places[end]].origin is origin:
            end += 1
        form = origin.request.form
        assert form is not None
        origin.form_state = origin.form_state or FormState(form)
        try:
            origin.form_state.fill([sequences[row].generated for row in places[start:end]], mask, places[start:end])
        except (ValueError, RuntimeError) as error:
            for row in places[start:end]:
                mask[row] = -1
                errors[row] = error
        start = end
    mask = mask.to(logits.device, non_blocking=True)
    # Indices are those of rows in both.
    xgrammar.apply_token_bitmask_inplace(logits, mask, indices=None if len(places) == len(logits) else places)


class StructuredLogitsProcessor(LogitsProcessor):
    """A form in transformers' `generate`. The engine takes `params` out of it; the stock loop calls it.

    It keeps no state, so that rows may change places (beams); each call reads all that was generated.
    """

    def __init__(self, params: StructuredOutputsParams, form: Form) -> None:
        self.params = params
        self._form = form
        self._num_prompt: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        import xgrammar

        if self._num_prompt is None:  # the first call sees prompts alone
            self._num_prompt = input_ids.shape[1]
        mask = new_mask(len(scores), scores.shape[-1])
        for row, tokens in enumerate(input_ids[:, self._num_prompt :].tolist()):
            matcher = self._form.matcher()
            if all(not matcher.is_terminated() and matcher.accept_token(token) for token in tokens):
                if not matcher.is_terminated():
                    matcher.fill_next_token_bitmask(mask, row)
                    continue
            mask[row] = -1  # it has ended: what follows is padding
        scores = scores.float().clone()
        xgrammar.apply_token_bitmask_inplace(scores, mask.to(scores.device))
        return scores


def _literal(text: str) -> str:
    """A text in the grammar's notation."""
    escaped = json.dumps(text)[1:-1]  # non-ASCII as \uXXXX, in pairs beyond the first plane: put these right
    pair = re.compile(r"\\u(d[89ab]..)\\u(d[c-f]..)", re.IGNORECASE)

    def whole(match: re.Match[str]) -> str:
        high, low = int(match.group(1), 16), int(match.group(2), 16)
        return f"\\U{0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00):08x}"

    return f'"{pair.sub(whole, escaped)}"'


def check_schema(schema: dict[str, Any]) -> None:
    """Looks at a JSON schema before there is a tokenizer to compile it for.

    Raises:
        ValueError: it cannot be compiled for any.
        ImportError: the extra is not installed; the message names it.
    """
    xgrammar = _require_xgrammar()
    _check_size(StructuredOutputsParams(json=schema))
    try:
        xgrammar.Grammar.from_json_schema(json.dumps(schema))
    except (RuntimeError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"the schema cannot be compiled: {_told(error)}") from error


def _require_xgrammar() -> Any:
    try:
        import xgrammar
    except ImportError as error:
        raise ImportError("structured outputs need xgrammar: pip install 'hf_paged[structured]'") from error
    return xgrammar


def _check_size(params: StructuredOutputsParams) -> None:
    if len(params.key()) > MAX_FORM_CHARS:
        raise ValueError(f"structured outputs: {params.kind} has more than {MAX_FORM_CHARS} characters")
    value = params.json if params.kind == "json" else params.structural_tag if params.kind == "structural_tag" else None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"structured outputs: {params.kind} is no JSON: {error}") from error
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"structured outputs: {params.kind} is nested more than {MAX_DEPTH} levels deep")
        inner = [part for part in level if isinstance(part, dict | list)]
        level = [part for one in inner for part in (one.values() if isinstance(one, dict) else one)]


def _told(error: BaseException) -> str:
    """xgrammar's message without the place in its source."""
    return re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", str(error)).strip()
