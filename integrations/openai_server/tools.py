"""How models write tool calls, by themselves (Hermes, Llama 3, Mistral) and where a grammar makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_paged.integrations.openai_server.tool_parser import CallPiece, Reading, ToolParser


@dataclass(frozen=True)
class ToolCall:
    """A call, whole."""

    name: str
    arguments: str
    """JSON, as the model wrote it."""


class HermesParser(ToolParser):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Hermes, Qwen 2.5 and 3, ...)."""

    marks = ("<tool_call>",)

    def _call(self) -> Reading:
        yield from self._take("<tool_call>")
        if (yield from self._skip()) != "{" or not (yield from self._object()):
            return False
        yield from self._skip()
        yield from self._take("</tool_call>")
        return True


class Llama3Parser(ToolParser):
    """`{"name": ..., "parameters": {...}}` for a whole answer, after `<|python_tag|>` or not; several with "; "."""

    marks = ("<|python_tag|>",)
    opening = "{"
    special = True
    between = " ;\n"

    def _call(self) -> Reading:
        yield from self._take("<|python_tag|>")
        return (yield from self._skip()) == "{" and (yield from self._object())


class MistralParser(ToolParser):
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, or `[TOOL_CALLS]name{...}`, or with `[ARGS]` between."""

    marks = ("[TOOL_CALLS]",)
    special = True

    def _call(self) -> Reading:
        yield from self._take("[TOOL_CALLS]")
        first = yield from self._skip()
        if first == "[":
            return (yield from self._array())
        if first == "{":
            return (yield from self._object())
        name = yield from self._word()
        if not (name[:1].isalpha() or name[:1] == "_"):
            return False
        yield from self._skip()
        if (yield from self._take("[CALL_ID]")):
            yield from self._skip()
            yield from self._word()
            yield from self._skip()
        yield from self._take("[ARGS]")
        if (yield from self._skip()) != "{":
            return False
        yield from self._stream(name)
        return True


class RequiredCalls(ToolParser):
    """A list of `{"name", "parameters"}`, which a grammar has made the whole answer."""

    opening = "["

    def _call(self) -> Reading:
        return (yield from self._array())


class NamedCall(ToolParser):
    """The arguments of one function, which a grammar has made the whole answer."""

    opening = "{"

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def _call(self) -> Reading:
        yield from self._stream(self._name)
        return True


TOOL_PARSERS: dict[str, type[ToolParser]] = {
    "hermes": HermesParser,
    "qwen": HermesParser,
    "llama3_json": Llama3Parser,
    "llama": Llama3Parser,
    "mistral": MistralParser,
}


def whole_calls(pieces: Sequence[CallPiece]) -> list[ToolCall]:
    """The calls that all pieces of an answer make."""
    names = [piece.name for piece in pieces if piece.name is not None]
    return [
        ToolCall(name, "".join(piece.arguments for piece in pieces if piece.index == index))
        for index, name in enumerate(names)
    ]
