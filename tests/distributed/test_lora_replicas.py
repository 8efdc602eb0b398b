"""Adapters by request over two replicas: read once, and with every request wherever it goes."""

from __future__ import annotations

import gc
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import replica_jobs
import torch
from transformers import AutoModelForCausalLM

from hf_paged import LLM, LoRARequest, SamplingParams
from hf_paged.engine.request import Request
from hf_paged.lora.adapter import Adapter
from hf_paged.lora.travel import AdapterNews, AdapterReceiver, AdapterSender

pytest.importorskip("peft")
sys.path.append(str(Path(__file__).resolve().parents[1] / "integrations"))

from lora.adapters import save_adapter

SMALL = {"num_pages": 128, "block_size": 16, "max_num_seqs": 8, "dtype": "float32"}
ADAPTED = SMALL | {"enable_lora": True, "max_loras": 2, "max_cpu_loras": 3}
TEXTS = [f"The {number} seas are" for number in range(12)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module")
def adapters(tiny_checkpoint: str, tmp_path_factory: Any) -> dict[str, LoRARequest]:
    root = tmp_path_factory.mktemp("adapters")
    targets: Any = ["q_proj", "v_proj"], "all-linear", ["down_proj"]
    found = {}
    for number, (name, target) in enumerate(zip("abc", targets, strict=True), start=1):
        model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
        folder = save_adapter(root / name, model, number, r=4, lora_alpha=16, target_modules=target)
        found[name] = LoRARequest(name, number, str(folder))
    return found


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: str) -> Any:
    return LLM(tiny_checkpoint, **ADAPTED)


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: str) -> Iterator[Any]:
    llm = LLM(tiny_checkpoint, data_parallel_size=2, **ADAPTED)
    yield llm
    llm.shutdown()


def said(llm: Any, texts: list[str], requests: Any) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(texts, GREEDY, False, requests)]


def test_as_in_one_process(llm: Any, alone: Any, adapters: dict[str, LoRARequest]) -> None:
    """Several adapters and none in one call, more of them than run in a step."""
    names = ["a", None, "b", "c"] * 3
    requests = [adapters.get(name) for name in names]  # type: ignore[arg-type]
    expected = said(alone, TEXTS, requests)
    plain = said(alone, TEXTS, None)
    assert [mine != other for mine, other in zip(expected, plain, strict=True)] == [name is not None for name in names]
    before = [handle.state.stats.generation_tokens for handle in llm.engine.handles]
    assert said(llm, TEXTS, requests) == expected
    after = [handle.state.stats.generation_tokens for handle in llm.engine.handles]
    assert all(now > then for now, then in zip(after, before, strict=True)), "both replicas had some"
    outputs = llm.generate(TEXTS, GREEDY, False, requests)
    assert [output.lora_request and output.lora_request.lora_name for output in outputs] == names
    assert said(llm, TEXTS, None) == plain
    assert said(llm, [TEXTS[0]] * 3, [adapters["b"], adapters["a"], None]) == said(
        alone, [TEXTS[0]] * 3, [adapters["b"], adapters["a"], None]
    ), "adapters share no pages"
    assert llm.collective_rpc(replica_jobs.pages) == [0, 0]


def test_what_cannot_be_loaded_is_said_before_any_work(llm: Any, tmp_path: Path) -> None:
    steps = llm.engine.stats.steps
    with pytest.raises(FileNotFoundError, match="prompt 1: there is no folder with an adapter at"):
        llm.generate(TEXTS[:2], GREEDY, False, [None, LoRARequest("none", 9, str(tmp_path / "nowhere"))])
    with pytest.raises(FileNotFoundError, match="has no adapter_config"):
        llm.engine.add_lora(LoRARequest("empty", 9, str(tmp_path)))
    with pytest.raises(TypeError, match="LoRARequest"):
        llm.generate(TEXTS[:1], GREEDY, False, "a")
    assert llm.engine.stats.steps == steps and 9 not in llm.engine.list_loras()


def test_changed_and_removed_under_way(llm: Any, alone: Any, adapters: dict[str, LoRARequest], tmp_path: Path) -> None:
    """What began with an adapter ends with it, also where it has waited until the folder was gone."""
    folder = shutil.copytree(adapters["a"].lora_path, tmp_path / "changing")
    changing = LoRARequest("changing", 9, str(folder))
    engine = llm.engine
    assert engine.add_lora(changing) and not engine.add_lora(changing) and 9 in engine.list_loras()
    before = [engine.add_request(text, GREEDY, lora_request=changing) for text in TEXTS * 3]
    shutil.rmtree(folder)
    shutil.copytree(adapters["b"].lora_path, folder)
    assert engine.add_lora(LoRARequest("changing", 9, str(folder), load_inplace=True))
    after = [engine.add_request(text, GREEDY, lora_request=changing) for text in TEXTS]
    assert engine.remove_lora(9) and not engine.remove_lora(9) and 9 not in engine.list_loras()
    shutil.rmtree(folder)
    found = {}
    while engine.has_unfinished():
        found |= {output.request_id: output.outputs[0].token_ids for output in engine.step() if output.finished}
    assert [found[name] for name in before] == said(alone, TEXTS, adapters["a"]) * 3
    assert [found[name] for name in after] == said(alone, TEXTS, adapters["b"])
    with pytest.raises(FileNotFoundError):
        engine.add_request(TEXTS[0], GREEDY, lora_request=changing)


def test_a_server(llm: Any, alone: Any, adapters: dict[str, LoRARequest]) -> None:
    httpx = pytest.importorskip("httpx")
    from live_server import serve

    from hf_paged.integrations.openai_server import ServerOptions

    for number in llm.engine.list_loras():  # the server numbers its own
        llm.engine.remove_lora(number)
    modules = [f"a={adapters['a'].lora_path}"]
    options = ServerOptions(served_model_name=["tiny"], lora_modules=modules, allow_runtime_lora=True)
    with serve(llm.model, options) as live:

        def ask(name: str) -> Any:
            body = {"model": name, "prompt": TEXTS[0], "max_tokens": 10, "temperature": 0, "ignore_eos": True}
            return httpx.post(f"{live.url}/v1/completions", json=body, timeout=30)

        def text(adapter: str | None) -> str:
            request = adapters[adapter] if adapter else None
            return str(alone.generate(TEXTS[0], GREEDY, False, request)[0].outputs[0].text)

        def change(what: str, name: str, **more: Any) -> int:
            body = {"lora_name": name, **more}
            return int(httpx.post(f"{live.url}/v1/{what}_lora_adapter", json=body, timeout=30).status_code)

        assert [ask(name).json()["choices"][0]["text"] for name in ("tiny", "a")] == [text(None), text("a")]
        assert ask("new").status_code == 404
        assert change("load", "new", lora_path="/nowhere") == 404
        assert change("load", "new", lora_path=adapters["b"].lora_path) == 200
        assert ask("new").json()["choices"][0]["text"] == text("b")
        assert change("load", "new", lora_path=adapters["c"].lora_path, load_inplace=True) == 200
        assert ask("new").json()["choices"][0]["text"] == text("c")
        assert 'hf_paged:lora_requests_info{engine="1"' in httpx.get(f"{live.url}/metrics").text
        assert change("unload", "new") == 200
        assert ask("new").status_code == 404


@pytest.mark.slow
def test_replicas_of_several_ranks(tiny_checkpoint: str, alone: Any, adapters: dict[str, LoRARequest]) -> None:
    """An adapter goes to each replica, and on to its ranks."""
    requests = [adapters["a"], None, adapters["b"], adapters["c"]] * 3
    expected = said(alone, TEXTS, requests)
    llm = LLM(tiny_checkpoint, data_parallel_size=2, tensor_parallel_size=2, **ADAPTED)
    try:
        assert said(llm, TEXTS, requests) == expected
    finally:
        llm.shutdown()


# ---- on their way ----------------------------------------------------------------------------------------------------


def make_adapter(generation: int) -> Adapter:
    layers = {"layer": (torch.full((2, 3), float(generation)), torch.ones(4, 2, dtype=torch.bfloat16))}
    return Adapter(LoRARequest(f"number {generation}", generation, "somewhere"), generation, layers)


def test_each_travels_once_and_is_let_go() -> None:
    sender, receiver = AdapterSender(), AdapterReceiver(pin=False)
    adapters = [make_adapter(1), make_adapter(2)]

    def send(*given: Adapter | None) -> list[int]:
        sent: list[AdapterNews] = []
        sender.tell(given, sent.append)
        receiver.take(pickle.loads(pickle.dumps(sent[0])))
        return sorted(sent[0].arriving)

    def interrupt(news: AdapterNews) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sender.tell(adapters, interrupt)
    assert send(adapters[0], None, adapters[0]) == [1]
    assert send(*adapters) == [2]
    assert send(adapters[1]) == []
    original = Request("one", [1, 2], GREEDY, adapter=adapters[1])
    sent = pickle.loads(pickle.dumps(original))
    assert sent.adapter is None and original.adapter is adapters[1]
    receiver.restore(sent)
    assert sent.adapter.request == adapters[1].request and sent.adapter_generation == sent.adapter.generation
    for mine, other in zip(sent.adapter.layers["layer"], adapters[1].layers["layer"], strict=True):
        assert mine.dtype == other.dtype and torch.equal(mine, other)
    adapters.pop(0)
    gc.collect()
    assert send(None) == [] and set(receiver._held) == {2}
