"""Tool calls over the wire: what streams is what an answer in one piece says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from live_server import Live, say, serve
from transformers import AutoModelForCausalLM

import hf_paged
from hf_paged.integrations.openai_server import ServerOptions

CHAT: Any = [{"role": "user", "content": "What is the weather?"}]
TOOLS: Any = [{"type": "function", "function": {"name": name}} for name in ("look", "tell")]
NAMED: Any = {"type": "function", "function": {"name": "look"}}
PLACE = '{"place":  "Tromsø 🌊 </tool_call> \\"}", "deep": {"a": [{}, 1.50]}}'
"""As a serialiser would not write it; its wave is several tokens."""

ASKED: list[tuple[str, str, dict[str, Any], str | None, list[tuple[str, str]]]] = [
    ("hermes", f'Hm.<tool_call>{{"name": "look", "arguments": {PLACE}}}</tool_call>\n<tool_call>{{"name": "tell", '
     f'"arguments": {PLACE}}}</tool_call>', {"tool_choice": "auto"}, "Hm.", [("look", PLACE), ("tell", PLACE)]),
    ("hermes", f'<tool_call>{{"name": "look", "arguments": {PLACE}}}</tool_call><tool_call>{{"name": "tell"}}',
     {"parallel_tool_calls": False}, None, [("look", PLACE)]),
    ("hermes", "No <tool_calls> here <tool_call>", {}, "No <tool_calls> here <tool_call>", []),
    ("llama3_json", f'{{"name": "look", "parameters": {PLACE}}}; {{"name": "tell", "parameters": {{}}}}', {}, None,
     [("look", PLACE), ("tell", "{}")]),
    ("mistral", f'[TOOL_CALLS][{{"name": "look", "arguments": {PLACE}}}, {{"name": "tell", "arguments": {{}}}}]', {},
     None, [("look", PLACE), ("tell", "{}")]),
    ("mistral", f"[TOOL_CALLS]look{PLACE}[TOOL_CALLS]tell[ARGS]{{}}", {}, None, [("look", PLACE), ("tell", "{}")]),
    ("hermes", f'[{{"name": "look", "parameters": {PLACE}}}, {{"name": "tell", "parameters": {{}}}}]',
     {"tool_choice": "required"}, None, [("look", PLACE), ("tell", "{}")]),
    ("hermes", PLACE, {"tool_choice": NAMED}, None, [("look", PLACE)]),
]  # fmt: skip


@pytest.fixture(scope="module")
def live(tiny_checkpoint: str) -> Iterator[Live]:
    model = hf_paged.wrap(
        AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval(), page_size=16, num_pages=256, max_num_seqs=16
    )
    options = ServerOptions(
        enable_auto_tool_choice=True, tool_call_parser="hermes", served_model_name=["tiny"], reasoning_parser="qwen3"
    )
    with serve(model, options) as running:
        yield running


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live.url + "/v1", api_key="any", max_retries=0) as client:
        yield client
    live.wait_idle()


@pytest.mark.parametrize(
    ("parser", "text", "choice", "content", "calls"), ASKED, ids=[str(i) for i in range(len(ASKED))]
)
def test_a_stream_says_what_a_whole_answer_does(
    monkeypatch: Any, live: Live, client: openai.OpenAI, parser: str, text: str, choice: dict[str, Any],
    content: str | None, calls: list[tuple[str, str]],
) -> None:  # fmt: skip
    free = choice.get("tool_choice", "auto") == "auto"  # a grammar leaves no room for thoughts
    say(monkeypatch, live.model, f"<think>Look?</think>{text}" if free else text)
    monkeypatch.setattr(live.app.state.serving.options, "tool_call_parser", parser)
    asked: dict[str, Any] = {"model": "tiny", "messages": CHAT, "tools": TOOLS, "max_tokens": 400} | choice
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.message.content == content
    assert not free or whole.message.reasoning == "Look?"
    told = whole.message.tool_calls or []
    assert [(call.function.name, call.function.arguments) for call in told] == calls
    expected = "tool_calls" if calls and choice.get("tool_choice") != NAMED else "stop"
    assert whole.finish_reason == expected

    with client.chat.completions.stream(**asked) as stream:
        done = stream.get_final_completion().choices[0]
    assert (done.message.content or None, done.finish_reason) == (content, expected)
    streamed = done.message.tool_calls or []
    assert [(call.function.name, call.function.arguments) for call in streamed] == calls


def test_the_deltas_of_a_call(monkeypatch: Any, live: Live, client: openai.OpenAI) -> None:
    """First what it is, and then its arguments, as they are written."""
    say(monkeypatch, live.model, ASKED[0][1])
    deltas = [
        delta
        for chunk in client.chat.completions.create(
            model="tiny", messages=CHAT, tools=TOOLS, max_tokens=400, stream=True, logprobs=True
        )
        for delta in chunk.choices[0].delta.tool_calls or []
    ]
    for index, name in enumerate(("look", "tell")):
        first, *rest = [delta for delta in deltas if delta.index == index]
        assert first.id and first.type == "function"
        assert (first.function.name, first.function.arguments) == (name, "")
        assert len(rest) > 10 and all(delta.function.arguments for delta in rest)
        assert not any(delta.id or delta.type or delta.function.name for delta in rest)
        assert "".join(delta.function.arguments for delta in rest) == PLACE
    assert [delta.index for delta in deltas] == sorted(delta.index for delta in deltas)


def test_every_token_has_its_logprobs_once(monkeypatch: Any, live: Live, client: openai.OpenAI) -> None:
    say(monkeypatch, live.model, ASKED[0][1])
    asked: dict[str, Any] = {"model": "tiny", "messages": CHAT, "tools": TOOLS, "max_tokens": 400, "logprobs": True}
    whole = client.chat.completions.create(**asked).choices[0].logprobs.content
    chunks = [chunk.choices[0].logprobs for chunk in client.chat.completions.create(**asked, stream=True)]
    assert [entry.token for told in chunks if told for entry in told.content] == [entry.token for entry in whole]


@pytest.mark.parametrize(("parser", "text", "choice"), [ASKED[0][:3], *(one[:3] for one in ASKED[-2:])])
def test_an_answer_that_is_cut_short(
    monkeypatch: Any, live: Live, client: openai.OpenAI, parser: str, text: str, choice: dict[str, Any]
) -> None:
    """In the middle of the arguments: the call has what there is of them."""
    say(monkeypatch, live.model, text)
    asked: dict[str, Any] = {"model": "tiny", "messages": CHAT, "tools": TOOLS} | choice
    size = len(live.model.engine.intake.tokenizer(text[: text.index("Troms")], add_special_tokens=False)["input_ids"])
    choice_found = client.chat.completions.create(**asked, max_tokens=size).choices[0]
    (call,) = choice_found.message.tool_calls
    assert choice_found.finish_reason == "length"
    assert call.function.name == "look" and call.function.arguments
    assert PLACE.startswith(call.function.arguments) and call.function.arguments != PLACE
    failed = {"role": "tool", "tool_call_id": call.id, "content": "these arguments are no JSON"}
    again = [*CHAT, choice_found.message.model_dump(exclude_none=True), failed]
    assert client.chat.completions.create(**asked | {"messages": again, "max_tokens": 1}).choices
    deltas = [
        delta
        for chunk in client.chat.completions.create(**asked, max_tokens=size, stream=True)
        for delta in chunk.choices[0].delta.tool_calls or []
    ]
    assert "".join(delta.function.arguments for delta in deltas) == call.function.arguments
