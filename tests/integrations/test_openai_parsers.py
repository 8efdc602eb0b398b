"""Tool calls and reasoning out of text, however it is cut into pieces."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_paged.integrations.openai_server.reasoning import reasoning_parser
from hf_paged.integrations.openai_server.tools import TOOL_PARSERS, calls_in_json


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


def parse(name: str, pieces: list[str]) -> tuple[str, list[tuple[str, Any]]]:
    parser = TOOL_PARSERS[name]()
    text, calls = "", []
    for place, piece in enumerate(pieces):
        shown, found = parser.feed(piece, last=place == len(pieces) - 1)
        text += shown
        calls += [(call.name, json.loads(call.arguments)) for call in found]
    return text, calls


A, B = ("f", {"x": 1, "s": "</tool_call}"}), ("g.h", {})
CASES: list[tuple[str, str, str, list[tuple[str, Any]]]] = [
    ("hermes", 'Hm.<tool_call>{"name": "f", "arguments": {"x": [{}]}}</tool_call>', "Hm.", [("f", {"x": [{}]})]),
    ("hermes", "a < b <tool>", "a < b <tool>", []),
    ("hermes", "<tool_call>no json</tool_call> so", "<tool_call>no json</tool_call> so", []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {', '<tool_call>{"name": "f", "arguments": {', []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1}}', "", [("f", {"x": 1})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [("f", {"x": 1})]),
    ("llama3_json", '{"name": "f", "parameters": {"x": "}"}}', "", [("f", {"x": "}"})]),
    (
        "llama3_json",
        ' <|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}',
        " ",
        [("f", {}), ("g", {})],
    ),
    ("llama3_json", "The set {1, 2} is small.", "The set {1, 2} is small.", []),
    ("llama3_json", '{"answer": 42}', '{"answer": 42}', []),
    ("llama3_json", '{"name": "f", "parameters"', '{"name": "f", "parameters"', []),
    ("mistral", 'Sure. [TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]', "Sure. ",
     [("f", {"x": 1}), ("g", {})]),
    ("mistral", '[TOOL_CALLS]f{"x": 1}[TOOL_CALLS]g[ARGS]{}', "", [("f", {"x": 1}), ("g", {})]),
    ("mistral", "[TOOL_CALLS] oh no", "[TOOL_CALLS] oh no", []),
    ("mistral", "a list [1, 2]", "a list [1, 2]", []),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "shown", "calls"), CASES)
@given(cuts=st.lists(st.integers(0, 200), max_size=8))
def test_calls(name: str, text: str, shown: str, calls: list[tuple[str, Any]], cuts: list[int]) -> None:
    assert parse(name, pieces_of(text, cuts)) == (shown, calls)


@pytest.mark.parametrize("name", sorted(TOOL_PARSERS))
@given(text=st.text('[]{}<>":,;| \nTOOL_CALSname/tool_call1f', max_size=60), cuts=st.lists(st.integers(0, 60)))
def test_no_text_is_lost(name: str, text: str, cuts: list[int]) -> None:
    whole, calls = parse(name, [text])
    assert parse(name, pieces_of(text, cuts) or [""]) == (whole, calls)
    if not calls:
        assert whole == text


def test_deep_json_is_no_call() -> None:
    text = "<tool_call>" + '{"name":' * 100_000 + "</tool_call>"
    assert parse("hermes", [text]) == (text, [])


@pytest.mark.parametrize(
    ("name", "prompt", "text", "expected"),
    [
        ("qwen3", "", "<think>a</think>b", ("a", "b")),
        ("qwen3", "", "b only", ("", "b only")),
        ("qwen3", "<think>\n", "a\n</think>\n\nb", ("a\n", "b")),
        ("qwen3", "<think>\n\n</think>\n\n", "b", ("", "b")),
        ("qwen3", "", "\n<think>never ends", ("never ends", "")),
        ("qwen3", "", "a < b </think> c", ("", "a < b </think> c")),
        ("deepseek_r1", "", "a</think>b", ("a", "b")),
        ("deepseek_r1", "<think>\n\n</think>", "b", ("", "b")),
        ("mistral", "", "[THINK]a[/THINK]b [THINK]", ("a", "b [THINK]")),
    ],
)
@given(cuts=st.lists(st.integers(0, 40), max_size=6))
def test_reasoning(name: str, prompt: str, text: str, expected: tuple[str, str], cuts: list[int]) -> None:
    parser = reasoning_parser(name, prompt)
    assert parser is not None
    pieces = pieces_of(text, cuts)
    found = [parser.feed(piece, last=place == len(pieces) - 1) for place, piece in enumerate(pieces)]
    assert ("".join(thought for thought, _ in found), "".join(answer for _, answer in found)) == expected


def test_calls_that_a_grammar_made() -> None:
    assert [(c.name, c.arguments) for c in calls_in_json('{"x": 1}', "f")] == [("f", '{"x": 1}')]
    assert calls_in_json('{"x": 1', "f") == []
    assert [c.name for c in calls_in_json('[{"name": "f", "parameters": {}}]', None)] == ["f"]
