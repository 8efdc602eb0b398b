"""Tool calls out of a model's text, as it comes in: the formats of Hermes, Llama 3 and Mistral."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from hf_paged.integrations.openai_server.reasoning import overlap


@dataclass(frozen=True)
class ToolCall:
    """A call that the model has written in full."""

    name: str
    arguments: str
    """JSON."""


class ToolParser:
    """Takes calls out of a growing text. What turns out to be none stays text.

    A subclass says what begins a call, and reads calls off the beginning of what follows.
    """

    marks: tuple[str, ...] = ()
    """What may begin a call."""
    special = False
    """The marks are special tokens, so these must not be left out of the text."""

    between = " \n"
    """Characters that stand between calls and are no text."""

    def __init__(self) -> None:
        self._pending = ""
        self._calling = False
        self.num_calls = 0

    def feed(self, text: str, *, last: bool = False) -> tuple[str, list[ToolCall]]:
        """What a new piece of text adds: (text for the user, calls that are complete now)."""
        self._pending += text
        pieces: list[str] = []
        calls: list[ToolCall] = []

        def show(piece: str) -> None:
            if piece.strip(self.between) or not (self.num_calls or calls):
                pieces.append(piece)

        while self._pending:
            if not self._calling:
                found = [at for mark in self.marks if (at := self._find(mark)) >= 0]
                if not found:
                    held = 0 if last else max(self._overlap(mark) for mark in self.marks)
                    show(self._pending[: len(self._pending) - held])
                    self._pending = self._pending[len(self._pending) - held :]
                    break
                show(self._pending[: min(found)])
                self._pending, self._calling = self._pending[min(found) :], True
            read = self.read(self._pending, last)
            if read is None:
                if last:
                    show(self._pending)
                    self._pending = ""
                break
            new, used = read
            calls += new
            if not used:  # no call after all: the mark is text
                show(self._pending[:1])
                self._pending = self._pending[1:]
            else:
                self._pending = self._pending[used:]
            self._calling = False
        self.num_calls += len(calls)
        return "".join(pieces), calls

    def read(self, text: str, last: bool) -> tuple[list[ToolCall], int] | None:
        """Reads calls at the beginning of a text that begins with a mark: (calls, characters read), (_, 0) if there is
        none, or None while more text is needed to know."""
        raise NotImplementedError

    def _find(self, mark: str) -> int:
        return self._pending.find(mark)

    def _overlap(self, mark: str) -> int:
        return overlap(self._pending, mark)


class HermesParser(ToolParser):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Hermes, Qwen 2.5 and 3, ...)."""

    marks = ("<tool_call>",)

    def read(self, text: str, last: bool) -> tuple[list[ToolCall], int] | None:
        end = text.find("</tool_call>")
        body = text[len("<tool_call>") : end if end >= 0 else None]
        if end < 0:
            if not last:
                return None
            call = _call(_json(body))
            return ([call], len(text)) if call else ([], 0)
        call = _call(_json(body))
        return ([call], end + len("</tool_call>")) if call else ([], 0)


class Llama3Parser(ToolParser):
    """`{"name": ..., "parameters": {...}}` for a whole answer, after `<|python_tag|>` or not; several with "; "."""

    marks = ("<|python_tag|>", "{")
    special = True
    between = " ;\n"

    def __init__(self) -> None:
        super().__init__()
        self._text_before = False

    def feed(self, text: str, *, last: bool = False) -> tuple[str, list[ToolCall]]:
        shown, calls = super().feed(text, last=last)
        if shown.strip(self.between):
            self._text_before = True  # braces in the middle of an answer call nothing
        return shown, calls

    def _find(self, mark: str) -> int:
        if mark == "{" and (self._text_before or self._pending.lstrip(self.between)[:1] not in ("{", "")):
            return -1
        return super()._find(mark)

    def _overlap(self, mark: str) -> int:
        blank = len(self._pending) if not self._text_before and not self._pending.strip(self.between) else 0
        return max(super()._overlap(mark), blank)

    def read(self, text: str, last: bool) -> tuple[list[ToolCall], int] | None:
        start = len("<|python_tag|>") if text.startswith("<|python_tag|>") else 0
        start += len(text[start:]) - len(text[start:].lstrip())
        if start == len(text):
            return ([], 0) if last else None
        if text[start] != "{":
            return [], 0
        try:
            value, end = json.JSONDecoder().raw_decode(text, start)
        except (json.JSONDecodeError, RecursionError):
            return ([], 0) if last else None
        call = _call(value)
        return ([call], end) if call else ([], 0)


class MistralParser(ToolParser):
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, or `[TOOL_CALLS]name{...}`, or with `[ARGS]` between."""

    marks = ("[TOOL_CALLS]",)
    special = True
    _named = re.compile(r"\s*([A-Za-z_][\w.-]*)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\])?\s*(?=\{)")

    def read(self, text: str, last: bool) -> tuple[list[ToolCall], int] | None:
        start = len("[TOOL_CALLS]")
        unknown: tuple[list[ToolCall], int] | None = ([], 0) if last else None
        start += len(text[start:]) - len(text[start:].lstrip())
        name = None
        if not text[start:].startswith("["):
            named = self._named.match(text, start)
            if named is None:
                return unknown
            name, start = named.group(1), named.end()
        try:
            value, end = json.JSONDecoder().raw_decode(text, start)
        except (json.JSONDecodeError, RecursionError):
            return unknown
        values = [{"name": name, "arguments": value}] if name else value if isinstance(value, list) else [value]
        calls = [call for call in map(_call, values) if call]
        return (calls, end) if len(calls) == len(values) and calls else ([], 0)


TOOL_PARSERS: dict[str, type[ToolParser]] = {
    "hermes": HermesParser,
    "qwen": HermesParser,
    "llama3_json": Llama3Parser,
    "llama": Llama3Parser,
    "mistral": MistralParser,
}


def calls_in_json(text: str, name: str | None) -> list[ToolCall]:
    """The calls of a text that a grammar has made JSON: the arguments of the function `name`, or a list of
    `{"name", "parameters"}`. Empty while the text is not whole."""
    value = _json(text)
    if name is not None:
        return [ToolCall(name, text)] if isinstance(value, dict) else []
    return [call for call in map(_call, value) if call] if isinstance(value, list) else []


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None


def _call(value: Any) -> ToolCall | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # some models write JSON within JSON
        return ToolCall(value["name"], arguments) if isinstance(_json(arguments), dict) else None
    return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None
