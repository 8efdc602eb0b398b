"""Tool calls and reasoning out of text, however it is cut into pieces."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_paged.integrations.openai_server.reasoning import REASONING_PARSERS, reasoning_parser
from hf_paged.integrations.openai_server.tool_parser import CallPiece, ToolParser
from hf_paged.integrations.openai_server.tools import (
    TOOL_PARSERS,
    HermesParser,
    NamedCall,
    RequiredCalls,
    ToolCall,
    whole_calls,
)


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


def parse(name: str, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """The text and the calls that come of a text in pieces, as a client puts them together."""
    parser = PARSERS[name]()
    text: str = ""
    calls: list[tuple[str, str]] = []
    for place, piece in enumerate(pieces):
        shown, news = parser.feed(piece, last=place == len(pieces) - 1)
        text += shown
        for new in news:
            if new.name is not None:
                assert (new.index, new.arguments) == (len(calls), "")
                calls.append((new.name, ""))
            else:
                assert new.index == len(calls) - 1 and new.arguments
                calls[-1] = calls[-1][0], calls[-1][1] + new.arguments
    return text, calls


PARSERS: dict[str, Callable[[], ToolParser]] = {
    **TOOL_PARSERS,
    "required": RequiredCalls,
    "named": lambda: NamedCall("f"),
}

TRICKY = '{"s": "</tool_call> \\"}\\\\", "[TOOL_CALLS]": [{"{": "]"}],  "ö": "世界 🌊 \\ud83c\\udf0a"}'
"""Markers, brackets and quotes in strings, characters of several bytes, and blanks as no serialiser makes them."""

CASES: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    ("hermes", 'Hm.<tool_call>{"name": "f", "arguments": {"x": [{}]}}</tool_call>', "Hm.", [("f", '{"x": [{}]}')]),
    ("hermes", f'<tool_call>{{"name": "f", "arguments": {TRICKY}}}</tool_call>\n', "", [("f", TRICKY)]),
    ("hermes", "a < b <tool>", "a < b <tool>", []),
    ("hermes", " \n", " \n", []),
    ("hermes", "<tool_call>no json</tool_call> so", "<tool_call>no json</tool_call> so", []),
    ("hermes", '<tool_call>{"name": "f", "argu', '<tool_call>{"name": "f", "argu', []),
    ("hermes", '<tool_call>{"name": 7, "arguments": {}}', '<tool_call>{"name": 7, "arguments": {}}', []),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}', '<tool_call>{"name": "f", "arguments": [1]}', []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": "y', "", [("f", '{"x": "y')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": "\\', "", [("f", '{"x": "\\')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1}}', "", [("f", '{"x": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1,}}</tool_call>', "", [("f", '{"x": 1,}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1</tool_call> so', " so", [("f", '{"x": 1')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1}</tool_call>', "", [("f", '{"x": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [("f", '{"x": 1}')]),
    ("hermes", '<tool_call>{"arguments": {"x": 1}, "id": [7], "name": "f\\u0067"}</tool_call>', "",
     [("fg", '{"x": 1}')]),
    ("hermes", '<tool_call>\n{"name": "f"}\n</tool_call>', "", [("f", "{}")]),
    ("hermes", '<tool_call>\n<tool_call>\n{"name": "f"}\n</tool_call>', "<tool_call>\n", [("f", "{}")]),
    ("hermes", '\n<tool_call>{"name": "f", "arguments": {}, "id": "a"}</tool_call>\n<tool_call>{"name": "g"} So.',
     "So.", [("f", "{}"), ("g", "{}")]),
    ("llama3_json", f'{{"name": "f", "parameters": {TRICKY}}}', "", [("f", TRICKY)]),
    ("llama3_json", ' <|python_tag|>{"name": "f", "parameters": {}}; {"type": "function", "name": "g"}', "",
     [("f", "{}"), ("g", "{}")]),
    ("llama3_json", "The set {1, 2} is small.", "The set {1, 2} is small.", []),
    ("llama3_json", 'So: {"name": "f", "parameters": {}}', 'So: {"name": "f", "parameters": {}}', []),
    ("llama3_json", ' {"answer": 42}', ' {"answer": 42}', []),
    ("llama3_json", '{"name": "f", "parameters"', '{"name": "f", "parameters"', []),
    ("mistral", 'Sure. [TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]', "Sure. ",
     [("f", '{"x": 1}'), ("g", "{}")]),
    ("mistral", f'[TOOL_CALLS]f{TRICKY}[TOOL_CALLS]g[CALL_ID]a1[ARGS]{{}}', "", [("f", TRICKY), ("g", "{}")]),
    ("mistral", '[TOOL_CALLS]{"name": "f", "arguments": {}}', "", [("f", "{}")]),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": 1}]', '{"name": 1}]', [("f", "{}")]),
    ("mistral", "[TOOL_CALLS] oh no", "[TOOL_CALLS] oh no", []),
    ("mistral", "[TOOL_CALLS][]", "[TOOL_CALLS][]", []),
    ("mistral", "a list [1, 2]", "a list [1, 2]", []),
    ("required", f' [\n{{"name": "f", "parameters": {TRICKY}}}, {{"name": "g", "parameters": {{}}}}]', "",
     [("f", TRICKY), ("g", "{}")]),
    ("required", '[{"name": "f", "parameters": {"x": 1}}, {"name": "g"', '{"name": "g"', [("f", '{"x": 1}')]),
    ("required", '[{"name": "f", "par', '[{"name": "f", "par', []),
    ("named", f" {TRICKY}", "", [("f", TRICKY)]),
    ("named", '{"x": "y', "", [("f", '{"x": "y')]),
    ("named", " 7", " 7", []),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "shown", "calls"), CASES)
@given(cuts=st.lists(st.integers(0, 200), max_size=12))
def test_calls(name: str, text: str, shown: str, calls: list[tuple[str, str]], cuts: list[int]) -> None:
    assert parse(name, pieces_of(text, cuts)) == (shown, calls)
    assert parse(name, [*text, ""]) == (shown, calls)


FRAGMENTS = (
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<think>", "</think>"),
    *(
        '{"name": "f", "arguments": {',
        '{"name": "g", "parameters": {}}',
        '"arguments": "{}"',
        '"name": ',
        '"x": "',
        "\\",
    ),
    *'{}[]",:; \n',
    *("f", "7", "null", "世", "🌊"),
)
"""What texts are made of that are nearly calls."""


@pytest.mark.parametrize("name", sorted(PARSERS))
@settings(max_examples=200)
@given(text=st.lists(st.sampled_from(FRAGMENTS), max_size=16).map("".join), cuts=st.lists(st.integers(0, 200)))
def test_no_cut_changes_anything(name: str, text: str, cuts: list[int]) -> None:
    whole, calls = parse(name, [text])
    assert parse(name, pieces_of(text, cuts) or [""]) == parse(name, [*text, ""]) == (whole, calls)
    assert calls or whole == text
    for _, arguments in calls:
        assert arguments in text or arguments == "{}"


@given(
    names=st.lists(st.sampled_from("fgh"), min_size=1, max_size=3),
    values=st.lists(
        st.dictionaries(
            st.text(max_size=3),
            st.recursive(
                st.none() | st.integers() | st.text(max_size=5) | st.sampled_from(FRAGMENTS),
                lambda value: (
                    st.lists(value, max_size=2) | st.dictionaries(st.sampled_from(FRAGMENTS), value, max_size=2)
                ),
                max_leaves=4,
            ),
            max_size=3,
        ),
        min_size=3,
        max_size=3,
    ),
    ascii=st.booleans(),
    size=st.integers(1, 30),
)
def test_calls_of_any_arguments(names: list[str], values: list[dict[str, Any]], ascii: bool, size: int) -> None:
    """In every format, in pieces of every size, they are those that were written."""
    calls = [(name, json.dumps(value, ensure_ascii=ascii)) for name, value in zip(names, values, strict=False)]
    objects = [f'{{"name": "{name}", "arguments": {arguments}}}' for name, arguments in calls]
    written = {
        "hermes": "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in objects),
        "llama": "; ".join(objects),
        "mistral": f"[TOOL_CALLS][{', '.join(objects)}]",
        "required": f"[{', '.join(objects)}]",
    }
    written |= {"mistral named": "".join(f"[TOOL_CALLS]{name}[ARGS]{arguments}" for name, arguments in calls)}
    for name, text in written.items():
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        assert parse(name.split()[0], pieces) == ("", calls)


def test_arguments_come_as_they_are_written() -> None:
    """Each character in the piece that brings it, once the call is known."""
    parser = HermesParser()
    for text in ("<tool_call>", '{"name": "f"', ', "arguments": '):
        assert parser.feed(text) == ("", [])
    assert parser.feed('{"x": ') == ("", [CallPiece(0, "f", ""), CallPiece(0, None, '{"x": ')])
    for piece in ('"a', " long", ' text"', "}"):
        assert parser.feed(piece) == ("", [CallPiece(0, None, piece)])
    assert parser.feed("}</tool_call>", last=True) == ("", [])


@pytest.mark.parametrize(
    "text", ["<tool_call>" + '{"name":' * 100_000, '<tool_call>{"a":' + "[" * 100_000 + "</tool_call>"]
)
def test_deep_json_is_no_call(text: str) -> None:
    assert parse("hermes", [text]) == (text, [])


def test_deep_arguments_are_passed_on() -> None:
    deep = '{"x":' * 50_000
    assert parse("hermes", [f'<tool_call>{{"name": "f", "arguments": {deep}']) == ("", [("f", deep)])


@pytest.mark.parametrize("name", sorted(REASONING_PARSERS))
@given(
    text=st.lists(st.sampled_from(("THINK", "END", "<", "a", " ", "\n")), max_size=9), cuts=st.lists(st.integers(0, 80))
)
def test_no_cut_changes_the_reasoning(name: str, text: list[str], cuts: list[int]) -> None:
    kind = REASONING_PARSERS[name]
    written = "".join({"THINK": kind.start, "END": kind.end}.get(word, word) for word in text)
    for prompt in ("", kind.start, kind.end):
        assert reason(name, prompt, pieces_of(written, cuts)) == reason(name, prompt, [written])


@pytest.mark.parametrize("name", sorted(PARSERS))
@given(text=st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join), cuts=st.lists(st.integers(0, 150)))
def test_reasoning_content_and_calls_of_one_text(name: str, text: str, cuts: list[int]) -> None:
    """What one parser leaves over is what the other gets, as a server has it."""

    def taken_apart(pieces: list[str]) -> tuple[str, str, list[CallPiece]]:
        reasoning, tools = reasoning_parser("qwen3", ""), PARSERS[name]()
        assert reasoning is not None
        thoughts, shown, news = "", "", []
        for place, piece in enumerate(pieces):
            last = place == len(pieces) - 1
            thought, rest = reasoning.feed(piece, last=last)
            content, new = tools.feed(rest, last=last)
            thoughts, shown, news = thoughts + thought, shown + content, news + new
        return thoughts, shown, news

    def said(found: tuple[str, str, list[CallPiece]]) -> tuple[str, str, list[ToolCall]]:
        return *found[:2], whole_calls(found[2])

    assert (
        said(taken_apart(pieces_of(text, cuts) or [""])) == said(taken_apart([*text, ""])) == said(taken_apart([text]))
    )


def reason(name: str, prompt: str, pieces: list[str]) -> tuple[str, str]:
    parser = reasoning_parser(name, prompt)
    assert parser is not None
    found = [parser.feed(piece, last=place == len(pieces) - 1) for place, piece in enumerate(pieces)]
    return "".join(thought for thought, _ in found), "".join(answer for _, answer in found)


@pytest.mark.parametrize(
    ("name", "prompt", "text", "expected"),
    [
        ("qwen3", "", "<think>a</think>b", ("a", "b")),
        ("qwen3", "", "b only", ("", "b only")),
        ("qwen3", "", "b <think>only", ("", "b <think>only")),
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
    assert reason(name, prompt, pieces_of(text, cuts)) == expected
