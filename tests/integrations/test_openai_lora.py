"""Adapters as models of a server, through the official openai client."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from live_server import Live, serve
from transformers import AutoModelForCausalLM

import hf_paged
from hf_paged import LoRARequest
from hf_paged.integrations.openai_server import ServerOptions, make_app
from hf_paged.integrations.openai_server.live.watch import Watch
from hf_paged.integrations.openai_server.options import parse_options
from hf_paged.observe.logs import RequestLog
from hf_paged.observe.metrics import EngineMetrics
from hf_paged.observe.spans import span_attributes

pytest.importorskip("peft")

from lora.adapters import save_adapter

OPTIONS = {"page_size": 16, "num_pages": 256, "max_num_seqs": 8, "enable_lora": True, "max_loras": 2}
GREEDY = hf_paged.SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
ASKED: dict[str, Any] = {"prompt": "The sea is", "max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}}


def fresh(checkpoint: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def folders(tiny_checkpoint: str, tmp_path_factory: Any) -> dict[str, str]:
    root = tmp_path_factory.mktemp("adapters")
    targets: Any = ["q_proj", "v_proj"], "all-linear", ["down_proj"]
    return {
        name: str(save_adapter(root / name, fresh(tiny_checkpoint), seed, r=4, lora_alpha=16, target_modules=target))
        for seed, (name, target) in enumerate(zip("abc", targets, strict=True))
    }


@pytest.fixture(scope="module")
def live(tiny_checkpoint: str, folders: dict[str, str]) -> Iterator[Live]:
    model = hf_paged.wrap(fresh(tiny_checkpoint), **OPTIONS)
    modules = [f"a={folders['a']}", f'{{"name": "b", "path": "{folders["b"]}", "base_model_name": "its base"}}']
    options = ServerOptions(served_model_name=["tiny"], lora_modules=modules, allow_runtime_lora=True)
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


def post(live: Live, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{live.url}/v1/{path}", json=body, timeout=30)


def test_adapters_are_models(folders: dict[str, str], client: openai.OpenAI) -> None:
    cards = {card.id: card for card in client.models.list()}
    assert list(cards) == ["tiny", "a", "b"]
    assert (cards["tiny"].parent, cards["a"].parent, cards["b"].parent) == (None, "tiny", "its base")
    assert cards["a"].root == folders["a"] and cards["tiny"].root == "tiny"
    assert client.models.retrieve("b").root == folders["b"]


def test_the_model_names_the_adapter(live: Live, folders: dict[str, str], client: openai.OpenAI) -> None:
    adapters = {"tiny": None, "a": LoRARequest("a", 1, folders["a"]), "b": LoRARequest("b", 2, folders["b"])}
    texts = {}
    for name, adapter in adapters.items():
        expected = live.model.generate_many(["The sea is"], GREEDY, lora_request=adapter)[0].outputs[0].text
        found = client.completions.create(model=name, **ASKED)
        assert (found.model, found.choices[0].text) == (name, expected)
        texts[name] = expected
        pieces = [chunk.choices[0].text for chunk in client.completions.create(model=name, stream=True, **ASKED)]
        assert "".join(pieces) == expected
        chat = [{"role": "user", "content": "What is the sea?"}]
        (expected_chat,) = live.model.generate_many([chat], GREEDY, lora_request=adapter)
        options: Any = {"temperature": 0, "extra_body": {"ignore_eos": True}}
        answer = client.chat.completions.create(model=name, messages=chat, max_tokens=8, **options)
        assert answer.model == name and answer.choices[0].message.content == expected_chat.outputs[0].text
        limit = {"max_output_tokens": 8, "temperature": 0}
        response = client.responses.create(model=name, input="What is the sea?", **limit)
        assert response.model == name and expected_chat.outputs[0].text.startswith(response.output_text)
    assert len(set(texts.values())) == 3, "the adapters must matter"


def test_load_and_unload(live: Live, folders: dict[str, str], client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'c' does not exist"):
        client.completions.create(model="c", **ASKED)
    loaded = post(live, "load_lora_adapter", lora_name="c", lora_path=folders["c"])
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'c' added successfully.")
    text = client.completions.create(model="c", **ASKED).choices[0].text
    assert text != client.completions.create(model="tiny", **ASKED).choices[0].text
    again = post(live, "load_lora_adapter", lora_name="c", lora_path=folders["a"])
    assert again.status_code == 400 and "already been loaded" in again.json()["error"]["message"]
    assert client.completions.create(model="c", **ASKED).choices[0].text == text

    # In its place: what is cached of the one before is not found.
    inplace = post(live, "load_lora_adapter", lora_name="c", lora_path=folders["a"], load_inplace=True)
    assert inplace.status_code == 200
    of_a = client.completions.create(model="a", **ASKED).choices[0].text
    assert client.completions.create(model="c", **ASKED).choices[0].text == of_a != text

    gone = post(live, "unload_lora_adapter", lora_name="c")
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'c' removed successfully.")
    assert [card.id for card in client.models.list()] == ["tiny", "a", "b"]
    with pytest.raises(openai.NotFoundError, match="'c' does not exist"):
        client.completions.create(model="c", **ASKED)
    assert post(live, "unload_lora_adapter", lora_name="c").status_code == 404


def test_unloaded_under_way(live: Live, folders: dict[str, str], client: openai.OpenAI) -> None:
    """The name is gone at once, what began goes on."""
    asked = ASKED | {"max_tokens": 60}
    assert post(live, "load_lora_adapter", lora_name="c", lora_path=folders["c"]).status_code == 200
    expected = client.completions.create(model="c", **asked).choices[0].text
    stream = client.completions.create(model="c", stream=True, **asked)
    pieces = [next(stream).choices[0].text]
    assert post(live, "unload_lora_adapter", lora_name="c").status_code == 200
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="c", **asked)
    pieces += [chunk.choices[0].text for chunk in stream]
    assert "".join(pieces) == expected


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ({"lora_name": "x", "lora_path": "/nowhere/at/all"}, 404, "no folder"),
        ({"lora_name": "x", "lora_path": "HERE"}, 404, "adapter_config.json"),
        ({"lora_name": "x"}, 400, "lora_path"),
        ({"lora_name": "", "lora_path": "y"}, 400, "lora_name"),
        ({"lora_name": "tiny", "lora_path": "y"}, 400, "the model itself"),
        ({"lora_name": "x", "lora_path": "y", "load_in_place": True}, 400, "no such field"),
    ],
)
def test_adapters_that_cannot_be_loaded(live: Live, tmp_path: Path, body: Any, status: int, told: str) -> None:
    body = {name: str(tmp_path) if value == "HERE" else value for name, value in body.items()}
    answer = post(live, "load_lora_adapter", **body)
    assert answer.status_code == status and told in answer.json()["error"]["message"]


def test_adapters_of_another_model(live: Live, tmp_path: Path, client: openai.OpenAI) -> None:
    from models.families import make_model

    folder = save_adapter(tmp_path, make_model("Llama"), r=4, target_modules=["q_proj"])
    answer = post(live, "load_lora_adapter", lora_name="x", lora_path=str(folder))
    assert answer.status_code == 400 and "another model" in answer.json()["error"]["message"]
    assert [card.id for card in client.models.list()] == ["tiny", "a", "b"]


def info_of(metrics: EngineMetrics) -> dict[str, str]:
    (found,) = [value for value in metrics.values() if value.name == "lora_requests_info"]
    assert abs(found.value - time.time()) < 60
    return dict(found.labels)


def test_metrics_say_whose_requests_run_and_wait(tiny_checkpoint: str, folders: dict[str, str]) -> None:
    engine = hf_paged.wrap(fresh(tiny_checkpoint), **OPTIONS | {"max_num_seqs": 2}).engine
    metrics = EngineMetrics(engine)
    nobody = {"running_lora_adapters": "", "waiting_lora_adapters": "", "max_lora": "2"}
    assert info_of(metrics) == nobody
    adapters = [LoRARequest("b", 2, folders["b"]), LoRARequest("a", 1, folders["a"]), LoRARequest("c", 3, folders["c"])]
    for place, adapter in enumerate([*adapters, None, adapters[0]]):
        engine.add_request("The sea", GREEDY, request_id=str(place), lora_request=adapter)
    engine.step()
    assert info_of(metrics) == nobody | {"running_lora_adapters": "a,b", "waiting_lora_adapters": "b,c"}
    engine.abort([str(place) for place in range(5)])
    assert info_of(metrics) == nobody
    metrics.close()


def test_metrics_of_a_server_with_adapters(live: Live) -> None:
    info = [line for line in httpx.get(live.url + "/metrics").text.splitlines() if "lora" in line and line[:1] != "#"]
    labels = 'max_lora="2",model_name="tiny",running_lora_adapters="",waiting_lora_adapters=""'
    assert [line.rpartition(" ")[0] for line in info] == [f"hf_paged:lora_requests_info{{{labels}}}"]


def test_spans_logs_and_the_live_page_name_the_adapter(
    tiny_checkpoint: str, folders: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    engine = hf_paged.wrap(fresh(tiny_checkpoint), **OPTIONS).engine
    watch, log = Watch(engine), RequestLog(engine, "tiny")
    ended: list[Any] = []
    engine.request_observers.append(ended.append)
    engine.add_request("The sea", GREEDY, request_id="x", lora_request=LoRARequest("a", 1, folders["a"]))
    engine.add_request("The sea", GREEDY.clone(n=2), request_id="y")
    engine.step()
    watch.collect()
    assert [lane[1:] for lane in watch.picture()["lanes"]] == [["x", 0, "a"], ["y", 0, None], ["y", 1, None]]
    while engine.has_unfinished():
        engine.step()
    watch.close()
    log.close()
    attributes = {request.request_id: span_attributes(request) for request in ended}
    assert attributes["x"]["gen_ai.request.lora_name"] == "a"
    assert "gen_ai.request.lora_name" not in attributes["y"]
    logged = {
        record.fields["request_id"]: record.fields["adapter"] for record in caplog.records if "fields" in vars(record)
    }
    assert logged == {"x": "a", "y": None}


def test_loading_must_be_allowed(tiny_checkpoint: str, folders: dict[str, str]) -> None:
    model = hf_paged.wrap(fresh(tiny_checkpoint), **OPTIONS)
    with serve(model, ServerOptions(served_model_name=["tiny"])) as closed:
        for path in ("load_lora_adapter", "unload_lora_adapter"):
            answer = post(closed, path, lora_name="a", lora_path=folders["a"]) if path[0] == "l" else None
            answer = answer or post(closed, path, lora_name="a")
            assert answer.status_code == 404 and "--allow-runtime-lora" in answer.json()["error"]["message"]


def test_a_server_without_room_for_adapters(tiny_checkpoint: str, folders: dict[str, str]) -> None:
    model = hf_paged.wrap(fresh(tiny_checkpoint), **OPTIONS | {"enable_lora": False})
    assert not [value for value in EngineMetrics(model.engine).values() if "lora" in value.name]
    with pytest.raises(ValueError, match="enable_lora=True"):
        make_app(model, ServerOptions(lora_modules=[f"a={folders['a']}"]))


def test_options(tmp_path: Path) -> None:
    line = ["m", "--enable-lora", "--max-loras", "4", "--max-lora-rank", "32", "--max-cpu-loras", "9"]
    server, args = parse_options([*line, "--lora-modules", "a=x=y", '{"name": "b", "path": "z"}', "--port", "1"])
    told = [(adapter.lora_name, adapter.lora_int_id, adapter.lora_path) for adapter in server.adapters()]
    assert told == [("a", 1, "x=y"), ("b", 2, "z")] and server.port == 1
    config = args.engine_config()
    assert (config.enable_lora, config.max_loras, config.max_lora_rank, config.max_cpu_loras) == (True, 4, 32, 9)
    file = tmp_path / "options.yaml"
    file.write_text("model: m\nenable-lora: true\nlora-modules:\n  - a=x\n  - name: b\n    path: y\n")
    found = parse_options(["--config", str(file)])[0].adapters()
    assert [(adapter.lora_name, adapter.lora_path) for adapter in found] == [("a", "x"), ("b", "y")]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("m --lora-modules a=x", "need --enable-lora"),
        ("m --allow-runtime-lora", "need --enable-lora"),
        ("m --enable-lora --lora-modules a", "NAME=PATH"),
        ("m --enable-lora --lora-modules a=x a=y", "given twice"),
        ("m --enable-lora --lora-modules {a=x", "is no JSON"),
        ('m --enable-lora --lora-modules {"name":"a"}', "a name, a path"),
        ("m --enable-lora --max-loras 0", "max_loras"),
        ("m --enable-lora --max-loras 4 --max-cpu-loras 2", "max_cpu_loras"),
        ("m --enable-lora --exact", "exact=True cannot be had with enable_lora"),
    ],
)
def test_bad_options(line: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_options(line.split())
