"""The official openai client against a live server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from live_server import Live, say, serve
from transformers import AutoModelForCausalLM

import hf_paged
from hf_paged.integrations.openai_server import ServerOptions
from hf_paged.integrations.openai_server.protocol import ChatCompletionRequest, CompletionRequest
from hf_paged.sampling_params import SamplingParams

OPTIONS = {"page_size": 16, "num_pages": 256, "max_num_seqs": 32}
CHAT = [{"role": "user", "content": "What is the sea?"}]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather somewhere",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def live(tiny_checkpoint: str) -> Iterator[Live]:
    model = hf_paged.wrap(AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval(), **OPTIONS)
    options = ServerOptions(
        served_model_name=["tiny", "other"],
        enable_auto_tool_choice=True,
        tool_call_parser="hermes",
        reasoning_parser="qwen3",
    )
    with serve(model, options) as running:
        yield running


@pytest.fixture(autouse=True)
def left_idle(live: Live) -> Iterator[None]:
    yield
    live.wait_idle()


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live.url + "/v1", api_key="any", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "other"]
    assert client.models.retrieve("other").id == "other"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="third", prompt="x")


def test_a_completion_is_what_generate_many_gives(live: Live, client: openai.OpenAI) -> None:
    (expected,) = live.model.generate_many(["The sea is"], GREEDY)
    for prompt in ("The sea is", expected.prompt_token_ids):
        found = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
        )
        assert found.choices[0].text == expected.outputs[0].text
        assert found.choices[0].finish_reason == "length"
        assert found.usage is not None
        assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(expected.prompt_token_ids), 8)


def test_a_stream_is_the_whole(live: Live, client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": ["The sea", "The sky"], "n": 2, "seed": 3, "max_tokens": 9}
    whole = client.completions.create(**options)
    texts = dict.fromkeys(range(4), "")
    usages = []
    for chunk in client.completions.create(
        **options, stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
        usages.append(chunk.usage)
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert usages[-1] == whole.usage and all(usage is not None for usage in usages)
    counts = [usage.completion_tokens for usage in usages]
    assert counts == sorted(counts)


def test_logprobs_and_echo(live: Live, client: openai.OpenAI) -> None:
    (expected,) = live.model.generate_many(["The sea is"], GREEDY.clone(logprobs=2, prompt_logprobs=2))
    found = client.completions.create(
        model="tiny", prompt="The sea is", max_tokens=8, temperature=0, logprobs=2, echo=True,
        extra_body={"ignore_eos": True, "prompt_logprobs": 1, "return_token_ids": True},
    ).choices[0]  # fmt: skip
    sample, told = expected.outputs[0], found.logprobs
    assert told is not None and told.token_logprobs is not None
    assert found.text == "The sea is" + sample.text == "".join(told.tokens)
    assert told.text_offset == [len("".join(told.tokens[:i])) for i in range(len(told.tokens))]
    assert told.token_logprobs[0] is None
    assert told.token_logprobs[-8:] == pytest.approx(sample.token_logprobs, abs=1e-4)
    assert found.token_ids == sample.token_ids
    assert [len(entry or {}) >= 1 for entry in found.prompt_logprobs] == [False] + [True] * (
        len(expected.prompt_token_ids) - 1
    )


def test_only_the_prompt_is_scored(client: openai.OpenAI) -> None:
    found = client.completions.create(model="tiny", prompt="The sea is wide", max_tokens=0, echo=True, logprobs=0)
    assert found.choices[0].text == "The sea is wide"
    assert found.choices[0].logprobs is not None and len(found.choices[0].logprobs.tokens) == found.usage.prompt_tokens
    assert found.usage.completion_tokens == 0


def test_best_of_and_token_ids_for_names(live: Live, client: openai.OpenAI) -> None:
    sampling = SamplingParams(n=4, seed=5, max_tokens=6, logprobs=0, ignore_eos=True)
    drawn = live.model.generate_many(["The sea"], sampling)[0].outputs
    best = max(drawn, key=lambda sample: sample.cumulative_logprob)
    found = client.completions.create(
        model="tiny", prompt="The sea", best_of=4, seed=5, max_tokens=6, logprobs=0,
        extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
    )  # fmt: skip
    assert [choice.text for choice in found.choices] == [best.text]
    assert found.choices[0].logprobs.tokens == [f"token_id:{token}" for token in best.token_ids]


def test_a_chat(live: Live, client: openai.OpenAI) -> None:
    (expected,) = live.model.generate_many([CHAT], GREEDY.clone(logprobs=2))
    found = client.chat.completions.create(
        model="tiny", messages=CHAT, temperature=0, max_completion_tokens=8, logprobs=True, top_logprobs=2,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    choice, sample = found.choices[0], expected.outputs[0]
    assert choice.message.content == sample.text and choice.message.role == "assistant"
    content = choice.logprobs.content
    assert [entry.logprob for entry in content] == pytest.approx(sample.token_logprobs, abs=1e-4)
    assert all(len(entry.top_logprobs) == 2 for entry in content)
    assert bytes(content[0].bytes).decode() == content[0].token


def test_a_stop_string_and_its_reason(monkeypatch: Any, live: Live, client: openai.OpenAI) -> None:
    say(monkeypatch, live.model, "One two three four five")
    found = client.chat.completions.create(model="tiny", messages=CHAT, stop=["four", "nine"])
    assert found.choices[0].message.content == "One two three "
    assert (found.choices[0].finish_reason, found.choices[0].stop_reason) == ("stop", "four")
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(model="tiny", messages=CHAT, stop="four", stream=True)
    ]
    assert "".join(pieces) == "One two three "


def test_a_continued_message(monkeypatch: Any, live: Live, client: openai.OpenAI) -> None:
    say(monkeypatch, live.model, " wide.")
    messages: Any = [*CHAT, {"role": "assistant", "content": "The sea is"}]
    extra = {"continue_final_message": True, "add_generation_prompt": False, "echo": True}
    found = client.chat.completions.create(model="tiny", messages=messages, extra_body=extra)
    assert found.choices[0].message.content == "The sea is wide."


def test_reasoning_apart(monkeypatch: Any, live: Live, client: openai.OpenAI) -> None:
    say(monkeypatch, live.model, "<think>\nIt is blue?\n</think>\n\nIt is green.")
    message = client.chat.completions.create(model="tiny", messages=CHAT).choices[0].message
    assert (message.reasoning, message.content) == ("It is blue?\n", "It is green.")
    thought, text = "", ""
    for chunk in client.chat.completions.create(model="tiny", messages=CHAT, stream=True):
        delta = chunk.choices[0].delta
        thought, text = thought + (getattr(delta, "reasoning", None) or ""), text + (delta.content or "")
    assert (thought, text) == ("It is blue?\n", "It is green.")


CALLS = (
    'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
)


def test_tools(monkeypatch: Any, live: Live, client: openai.OpenAI) -> None:
    say(monkeypatch, live.model, CALLS)
    choice = client.chat.completions.create(model="tiny", messages=CHAT, tools=[WEATHER], tool_choice="auto").choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see.\n"
    assert [call.function.name for call in choice.message.tool_calls] == ["get_weather"] * 2
    assert [call.function.arguments for call in choice.message.tool_calls] == ['{"city": "Oslo"}', '{"city": "Rome"}']
    single = client.chat.completions.create(
        model="tiny", messages=CHAT, tools=[WEATHER], tool_choice="auto", parallel_tool_calls=False
    )
    assert len(single.choices[0].message.tool_calls) == 1
    history: Any = [*CHAT, choice.message.model_dump(exclude_none=True)] + [
        {"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in choice.message.tool_calls
    ]
    say(monkeypatch, live.model, "It rains.")
    answer = client.chat.completions.create(model="tiny", messages=history, tools=[WEATHER], tool_choice="auto")
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("It rains.", "stop")


def test_tools_in_a_stream(monkeypatch: Any, live: Live, client: openai.OpenAI) -> None:
    say(monkeypatch, live.model, CALLS)
    with client.chat.completions.stream(model="tiny", messages=CHAT, tools=[WEATHER], tool_choice="auto") as stream:
        done = stream.get_final_completion().choices[0]
    assert done.message.content == "Let me see.\n"
    assert [call.function.arguments for call in done.message.tool_calls] == ['{"city": "Oslo"}', '{"city": "Rome"}']
    assert done.finish_reason == "tool_calls"


def test_no_tools_without_their_choice(monkeypatch: Any, live: Live, client: openai.OpenAI) -> None:
    say(monkeypatch, live.model, CALLS)
    message = client.chat.completions.create(model="tiny", messages=CHAT, tools=[WEATHER], tool_choice="none")
    assert message.choices[0].message.tool_calls is None
    with pytest.raises(openai.BadRequestError, match="no tool 'nothing'"):
        choice: Any = {"type": "function", "function": {"name": "nothing"}}
        client.chat.completions.create(model="tiny", messages=CHAT, tools=[WEATHER], tool_choice=choice)


def test_responses(monkeypatch: Any, live: Live, client: openai.OpenAI) -> None:
    say(monkeypatch, live.model, "<think>Hm.</think>The sea is wide.")
    found = client.responses.create(model="tiny", input="What is the sea?", instructions="Be brief.")
    assert found.output_text == "The sea is wide." and found.status == "completed"
    assert [item.type for item in found.output] == ["reasoning", "message"]
    again: Any = [{"role": "user", "content": [{"type": "input_text", "text": "What?"}]}, *found.output]
    assert client.responses.create(model="tiny", input=again).output_text == "The sea is wide."
    with client.responses.stream(model="tiny", input="What is the sea?") as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert stream.get_final_response().output_text == "".join(deltas) == "The sea is wide."
    short = client.responses.create(model="tiny", input="What?", max_output_tokens=2)
    assert short.status == "incomplete" and short.incomplete_details.reason == "max_output_tokens"


def test_async_streams_all_at_once(live: Live) -> None:
    prompts = [f"Number {i}" for i in range(24)]
    expected = [output.outputs[0].text for output in live.model.generate_many(prompts, GREEDY)]

    async def one(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(
            model="tiny", prompt=prompt, max_tokens=8, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=live.url + "/v1", api_key="any", max_retries=0) as client:
            return await asyncio.gather(*(one(client, prompt) for prompt in prompts))

    assert asyncio.run(main()) == expected


def test_null_is_what_was_left_out(live: Live) -> None:
    """Of every optional field, as many programs send them."""
    asked = {"prompt": "The sea", "max_tokens": 4, "temperature": 0}
    optional = {name: None for name, field in CompletionRequest.model_fields.items() if not field.is_required()}
    expected = httpx.post(live.url + "/v1/completions", json=asked).json()["choices"]
    found = httpx.post(live.url + "/v1/completions", json=optional | asked)
    assert found.status_code == 200 and found.json()["choices"] == expected, found.text
    chat = {name: None for name, field in ChatCompletionRequest.model_fields.items() if not field.is_required()}
    nested = {"stream": True, "stream_options": {"include_usage": None, "continuous_usage_stats": None}}
    body = chat | nested | {"messages": CHAT, "max_tokens": 2}
    assert "data: [DONE]" in httpx.post(live.url + "/v1/chat/completions", json=body).text
    assert "messages: Field required" in httpx.post(live.url + "/v1/chat/completions", json={"messages": None}).text


def test_tokens_there_and_back(live: Live) -> None:
    text = "Grüße, 世界!"
    found = httpx.post(live.url + "/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"]) and found["max_model_len"] == 1024
    assert httpx.post(live.url + "/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
    chat = httpx.post(live.url + "/tokenize", json={"messages": CHAT}).json()
    assert chat["tokens"] == live.model.engine.intake.tokenize(CHAT)[1]


def test_probes_and_metrics(live: Live, client: openai.OpenAI) -> None:
    assert httpx.get(live.url + "/version").json() == {"version": hf_paged.__version__}
    assert httpx.get(live.url + "/load").json() == {"server_load": 0}
    for path in ("/health", "/ping"):
        assert httpx.get(live.url + path).status_code == 200
    before = scraped(live)
    client.completions.create(model="tiny", prompt="The sea", max_tokens=5, extra_body={"ignore_eos": True})
    after = scraped(live)

    def grown(name: str, labels: str = '{model_name="tiny"}') -> float:
        return after[f"hf_paged:{name}{labels}"] - before[f"hf_paged:{name}{labels}"]

    assert grown("generation_tokens_total") == 5
    assert grown("request_success_total", '{finished_reason="length",model_name="tiny"}') == 1
    assert grown("time_to_first_token_seconds_count") == 1
    assert grown("inter_token_latency_seconds_count") == 4
    assert grown("request_generation_tokens_sum") == 5
    assert after['hf_paged:num_requests_running{model_name="tiny"}'] == 0


def test_health_when_nothing_can_be_generated_any_more(
    live: Live, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live.model.engine.executor, "lost", lambda: "rank 1 ended")
    for path in ("/health", "/ping"):
        told = httpx.get(live.url + path)
        assert told.status_code == 503 and "rank 1 ended" in told.json()["error"]["message"]
    with pytest.raises(openai.APIStatusError, match="started again: rank 1 ended") as refused:
        client.completions.create(model="tiny", prompt="The sea", max_tokens=5)
    assert refused.value.status_code == 503
    monkeypatch.undo()
    assert httpx.get(live.url + "/health").status_code == 200


def scraped(live: Live) -> dict[str, float]:
    lines = httpx.get(live.url + "/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}
