"""Structured output over the wire: every way to ask for it, and tools that must be called."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from live_server import Live, serve
from pydantic import BaseModel
from transformers import AutoModelForCausalLM

import hf_paged
from hf_paged.integrations.openai_server import ServerOptions

CHAT: Any = [{"role": "user", "content": "Which one?"}]
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"type": "boolean"}},
    "required": ["n", "b"],
    "additionalProperties": False,
}
COMPACT = {"json": SCHEMA, "disable_any_whitespace": True}


@pytest.fixture(scope="module")
def live(tiny_checkpoint: str) -> Iterator[Live]:
    model = hf_paged.wrap(
        AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval(), page_size=16, num_pages=256, max_num_seqs=16
    )
    with serve(model, ServerOptions(served_model_name=["tiny"])) as running:
        yield running


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live.url + "/v1", api_key="any", max_retries=0) as client:
        yield client
    live.wait_idle()


WAYS: list[tuple[dict[str, Any], Any]] = [
    ({"structured_outputs": COMPACT}, lambda text: json.loads(text).keys() == {"n", "b"}),
    ({"structured_outputs": {"choice": ["red", "blue"]}}, lambda text: text in ("red", "blue")),
    ({"guided_regex": "[a-c]{4}"}, lambda text: re.fullmatch("[a-c]{4}", text)),
    ({"guided_choice": ["red", "blue"]}, lambda text: text in ("red", "blue")),
    ({"guided_grammar": 'root ::= "(" [0-9] ")"'}, lambda text: re.fullmatch(r"\([0-9]\)", text)),
    ({"guided_json": {"enum": [1, 2]}}, lambda text: int(text) in (1, 2)),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [7]}}}},
     lambda text: text == "7"),
    ({"response_format": {"type": "text"}}, lambda text: True),
]  # fmt: skip


@pytest.mark.parametrize(("way", "holds"), WAYS, ids=[str(i) for i in range(len(WAYS))])
def test_ways_to_ask(client: openai.OpenAI, way: dict[str, Any], holds: Any) -> None:
    chat = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=32, seed=1, extra_body=way)
    assert holds(chat.choices[0].message.content)
    stream = client.completions.create(model="tiny", prompt="x", max_tokens=32, seed=2, stream=True, extra_body=way)
    assert holds("".join(chunk.choices[0].text for chunk in stream))


def test_a_pydantic_model_of_the_client(client: openai.OpenAI) -> None:
    class Pick(BaseModel):
        colour: bool

    answer = client.chat.completions.parse(
        model="tiny", messages=CHAT, max_tokens=64, response_format=Pick, extra_body={"logit_bias": BLANKS}
    )
    assert isinstance(answer.choices[0].message.parsed, Pick)


def test_responses(client: openai.OpenAI) -> None:
    text: Any = {"format": {"type": "json_schema", "name": "x", "schema": {"enum": ["only this"]}}}
    found = client.responses.create(model="tiny", input="x", text=text)
    assert found.output_text == '"only this"' and found.status == "completed"
    assert found.text is not None and found.text.format is not None and found.text.format.type == "json_schema"
    with client.responses.stream(model="tiny", input="x", text=text) as stream:
        pieces = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert stream.get_final_response().output_text == "".join(pieces) == '"only this"'
    short = client.responses.create(model="tiny", input="x", text=text, max_output_tokens=1)
    assert short.status == "incomplete" and '"only this"'.startswith(short.output_text)
    plain = client.responses.create(model="tiny", input="x", max_output_tokens=1)
    assert plain.text is not None and plain.text.format is not None and plain.text.format.type == "text"


def test_a_pydantic_model_as_a_response(client: openai.OpenAI) -> None:
    class Pick(BaseModel):
        colour: Literal["red", "blue"]

    found = client.responses.parse(model="tiny", input="x", text_format=Pick, max_output_tokens=200, temperature=0)
    assert isinstance(found.output_parsed, Pick)


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"type": "json_schema", "name": "x"}, "text.format: json_schema needs a schema"),
        ({"type": "yaml"}, "text.format: type must be"),
        ({"type": "json_schema", "name": "x", "schema": {"type": "objekt"}}, "Unsupported type"),
    ],
)
def test_malformed_forms_of_responses(client: openai.OpenAI, form: Any, said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        client.responses.create(model="tiny", input="x", text={"format": form})


def test_a_form_leaves_no_room_for_reasoning(
    monkeypatch: pytest.MonkeyPatch, live: Live, client: openai.OpenAI
) -> None:
    """Of a model that reasons from its first token on, too."""
    monkeypatch.setattr(live.app.state.serving.options, "reasoning_parser", "deepseek_r1")
    named: Any = {"type": "function", "function": {"name": "paint"}}
    message = client.chat.completions.create(
        model="tiny", messages=CHAT, tools=TOOLS, tool_choice=named, max_tokens=64
    ).choices[0].message  # fmt: skip
    assert message.tool_calls and message.content is None and not hasattr(message, "reasoning")
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [7]}}}
    answer = client.chat.completions.create(model="tiny", messages=CHAT, response_format=form)
    assert answer.choices[0].message.content == "7"
    text: Any = {"format": {"type": "json_schema", "name": "x", "schema": {"enum": [7]}}}
    assert client.responses.create(model="tiny", input="x", text=text).output_text == "7"


@pytest.mark.parametrize(
    "way",
    [
        {"structured_outputs": {"json": {"type": "objekt"}}},
        {"structured_outputs": {"regex": "(a"}},
        {"structured_outputs": {}},
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/x"}}}},
        {"guided_grammar": 'root ::= root "a"'},
        {"structural_tag": "{"},
        {"guided_regex": "a", "ignore_eos": True},
    ],
    ids=str,
)
def test_malformed_forms(live: Live, client: openai.OpenAI, way: dict[str, Any]) -> None:
    steps = live.model.engine.stats.steps
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=4, extra_body=way)
    assert live.model.engine.stats.steps == steps


TOOLS: Any = [
    {"type": "function", "function": {"name": "paint", "parameters": {"enum": [{"colour": "red"}]}}},
    {"type": "function", "function": {"name": "wash", "parameters": {"const": {}}}},
]


def test_a_named_tool(client: openai.OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "paint"}}
    choice = client.chat.completions.create(
        model="tiny", messages=CHAT, tools=TOOLS, tool_choice=named, max_tokens=64
    ).choices[0]
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("paint", {"colour": "red"})
    assert choice.message.content is None and choice.finish_reason == "stop"


def test_a_required_tool(client: openai.OpenAI) -> None:
    """Any of them, whatever the model would say; one that its length cuts short says so."""
    names = set()
    for seed in range(12):
        choice = client.chat.completions.create(
            model="tiny", messages=CHAT, tools=TOOLS, tool_choice="required", max_tokens=48, seed=seed,
            parallel_tool_calls=False, extra_body={"logit_bias": BLANKS},
        ).choices[0]  # fmt: skip
        if choice.finish_reason == "length":
            continue
        (call,) = choice.message.tool_calls
        names.add(call.function.name)
        assert choice.finish_reason == "tool_calls" and json.loads(call.function.arguments) in ({}, {"colour": "red"})
    assert names and names <= {"paint", "wash"}


BLANKS: dict[str, int] = {}
"""Filled in by the fixture below: tokens of nothing but blanks, which a model of random weights likes too well."""


@pytest.fixture(autouse=True, scope="module")
def fewer_blanks(live: Live) -> None:
    tokenizer = live.model.engine.intake.tokenizer
    blank = [i for i in range(len(tokenizer)) if (text := tokenizer.decode([i])) and not text.strip()]
    BLANKS.update({str(token): -100 for token in blank})
