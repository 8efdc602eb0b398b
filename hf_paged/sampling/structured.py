"""Structured output: which tokens a form allows next, by xgrammar, and their masks over logits."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import threading
from collections.abc import Callable
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

MOST_FORCED = 512
"""Characters of a forced text that are cut into tokens at once; a step verifies less."""

MANY = 4
"""From so many masks on, threads make them."""
MOST_THREADS = 8


class Form:
    """What a request's completions must look like, compiled; shared by requests that want the same.

    Args:
        compiled: xgrammar's CompiledGrammar.
        stop_token_ids: what may come when it is complete.
        encode: a text that is certain to come next -> the tokens that are likely to spell it.
    """

    def __init__(
        self, compiled: Any, stop_token_ids: list[int], encode: Callable[[str], list[int]] = lambda text: []
    ) -> None:
        self._compiled, self._stop_token_ids, self.encode = compiled, stop_token_ids, encode

    def matcher(self) -> Any:
        """A new xgrammar GrammarMatcher."""
        import xgrammar

        return xgrammar.GrammarMatcher(self._compiled, override_stop_tokens=self._stop_token_ids)

    def __reduce__(self) -> tuple[Any, ...]:
        """Requests travel to other ranks; xgrammar's objects do as JSON alone, and the tokenizer does not."""
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
        self.begin_anew()

    def begin_anew(self) -> None:
        self.matcher = self._form.matcher()
        self._accepted: list[int] = []

    @property
    def goes_on(self) -> bool:
        """Whether anything may come next."""
        return not self.matcher.is_terminated()

    def follow(self, row: Sequence) -> None:
        """Goes to where a row stands. Its tokens begin with those that it has followed, or it begins anew.

        Raises:
            ValueError: they are not of the form.
        """
        known = len(self._accepted)
        if known > row.num_generated:
            self.go_back(row.num_generated)
        elif known and _generated(row, known - 1)[0] != self._accepted[-1]:
            self.begin_anew()
        for token in _generated(row, len(self._accepted)):
            if not self.accept(token):
                raise ValueError(f"token {token} at place {len(self._accepted)} is not of the form that was asked for")

    def forced(self, sequence: Sequence) -> list[int]:
        """Tokens that are likely to come after those that are known, there being no choice about their text."""
        try:
            self.follow(sequence)
        except (ValueError, RuntimeError):
            self.begin_anew()  # whoever asks for the mask is told
            return []
        except BaseException:
            self.begin_anew()  # an interrupt may have come between the matcher and what is known of it
            raise
        text = self._certain_text()[:MOST_FORCED]
        return self._form.encode(text) if text else []

    def _certain_text(self) -> str:
        """What must come next, in whole characters from where the tokens end."""
        try:
            return self.matcher.find_jump_forward_string() if self.goes_on else ""
        except UnicodeDecodeError as error:
            # The matcher knows bytes: the last token may have ended within a character, or a choice begins within one.
            return error.object[: error.start].decode()

    def accept(self, token: int) -> bool:
        """Goes on by a token, if it may come next."""
        if not self.goes_on or not self.matcher.accept_token(token):
            return False
        self._accepted.append(token)
        return True

    def go_back(self, count: int) -> None:
        """To where it was after so many tokens."""
        if len(self._accepted) > count:
            self.matcher.rollback(len(self._accepted) - count)
            del self._accepted[count:]


def _generated(row: Sequence, first: int) -> list[int]:
    """A row's generated tokens from one on."""
    start, end = row.num_prompt + first, row.num_tokens - len(row.ahead)
    return row.origin.tokens[start:end] + row.ahead[max(start - end, 0) :]


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
        self._encode = _speller(tokenizer, info)
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
                form = Form(self._compile(params), sorted(stop_token_ids), self._encode)
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
        mask = torch.zeros(1, -(-self._vocab_size // 32), dtype=torch.int32, device="cpu")
        form.matcher().fill_next_token_bitmask(mask, 0)
        if not bool(mask.any()):
            raise ValueError(f"structured outputs: no text can be of this {kind}")


def fill_forms(mask: Tensor, sequences: list[Sequence], places: SequenceOf[int], errors: dict[int, Exception]) -> None:
    """Writes what the forms of some rows allow into a mask of all rows, int32 `[R, ceil(V / 32)]` on the CPU.

    Where a text has come to its end, or is not of the form, as after a wrong draft, the row stays as it is: nobody
    wants its token.

    Args:
        places: the rows, those of one sequence one after another, each beginning with the one before it.
        errors: gets, by row, what went wrong with one.
    """
    walks: dict[FormState, list[int]] = {}
    for place in places:
        if (form := sequences[place].request.form) is not None:
            origin = sequences[place].origin
            origin.form_state = origin.form_state or FormState(form)
            walks.setdefault(origin.form_state, []).append(place)
    try:
        _walk(mask, sequences, walks, errors)
        for state, rows in walks.items():
            state.go_back(sequences[rows[0]].num_generated)  # what was drafted may be rejected
    except BaseException:
        for state in walks:
            state.begin_anew()
        raise


def _walk(
    mask: Tensor, sequences: list[Sequence], walks: dict[FormState, list[int]], errors: dict[int, Exception]
) -> None:
    """Row by row of each sequence, all sequences at once."""
    depth = 0
    while walks:
        here: dict[FormState, list[int]] = {}
        for state, rows in walks.items():
            try:
                state.follow(sequences[rows[depth]])
            except (ValueError, RuntimeError) as error:
                if not depth:
                    state.begin_anew()
                    errors.update(dict.fromkeys(rows, error))
                continue
            if state.goes_on:
                here[state] = rows
        matchers, places = [state.matcher for state in here], [rows[depth] for rows in here.values()]
        if len(matchers) < MANY:
            for matcher, place in zip(matchers, places, strict=True):
                matcher.fill_next_token_bitmask(mask, place)
        else:
            with _threads_lock:
                _threads().batch_fill_next_token_bitmask(matchers, mask, places)
        depth += 1
        walks = {state: rows for state, rows in here.items() if len(rows) > depth}


_threads_lock = threading.Lock()
"""Several engines may be at work, and what they find in `_threads` ends the process if it is called by two at once."""


@functools.cache
def _threads() -> Any:
    """Fill masks on several cores, of those that this process may use."""
    import xgrammar

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return xgrammar.BatchGrammarMatcher(max_threads=max(1, min(cores // 2, MOST_THREADS)))


def forbid_others(logits: Tensor, sequences: list[Sequence], errors: dict[int, Exception]) -> None:
    """Minus infinity for what the rows' forms do not allow, in place on float32 `[R, V]`.

    Args:
        errors: gets, by row, what went wrong with one.
    """
    places = [row for row, sequence in enumerate(sequences) if sequence.request.form is not None]
    if not places:
        return
    import xgrammar

    mask = torch.full((len(logits), -(-logits.shape[-1] // 32)), -1, dtype=torch.int32, device="cpu")
    fill_forms(mask, sequences, places, errors)
    # Indices are those of rows in both.
    xgrammar.apply_token_bitmask_inplace(
        logits, mask.to(logits.device), indices=None if len(places) == len(logits) else places
    )


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
        mask = torch.zeros(len(scores), -(-scores.shape[-1] // 32), dtype=torch.int32, device="cpu")
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


def _speller(tokenizer: Any, info: Any) -> Callable[[str], list[int]]:
    """Cuts a piece of a text into the tokens that a model has learnt for it, all but the last one: that one depends on
    what follows. No tokens where they would not spell the piece exactly (a tokenizer that begins every text with a
    space, say) or the model has not all of them, or by a tokenizer in Python, which is slow."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return lambda text: []
    own = copy.deepcopy(backend)  # others may be at work with theirs, and change its settings
    own.no_truncation()
    own.no_padding()
    vocabulary = info.decoded_vocab

    @functools.lru_cache(maxsize=4096)
    def encode(text: str) -> list[int]:
        ids = own.encode(text, add_special_tokens=False).ids
        if any(token >= len(vocabulary) for token in ids):  # added to the tokenizer, not to the model
            return []
        return ids[:-1] if b"".join(vocabulary[token] for token in ids) == text.encode() else []

    return encode


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
