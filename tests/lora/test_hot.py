"""Adapters that come, change and go while requests run, and the caches that hold them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lora.adapters import GREEDY, OPTIONS, SMALL, Stock, assert_idle, save_adapters, tokens
from many_threads import in_threads
from models.families import make_model, make_prompts

import hf_paged
from hf_paged import LoRARequest

PROMPTS = make_prompts([5, 9, 17, 12])


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: Any) -> dict[str, LoRARequest]:
    return save_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def stock(adapters: dict[str, LoRARequest]) -> Stock:
    return Stock(make_model("Llama", **SMALL), adapters)


@pytest.fixture
def model() -> Any:
    return hf_paged.wrap(make_model("Llama", **SMALL), **OPTIONS)


def finish(engine: Any) -> dict[str, list[int]]:
    found = {}
    while engine.has_unfinished():
        for output in engine.step():
            if output.finished:
                found[output.request_id] = output.outputs[0].token_ids
    return found


def test_removed_and_changed_under_way(
    model: Any, adapters: dict[str, LoRARequest], stock: Stock, tmp_path: Path
) -> None:
    """What began with an adapter ends with it; what comes later has what is there now."""
    folder = shutil.copytree(adapters["a"].lora_path, tmp_path / "changing")
    changing = LoRARequest("changing", 9, str(folder))
    engine = model.engine
    engine.add_request(PROMPTS[2], GREEDY, request_id="before", lora_request=changing)
    for _ in range(3):
        engine.step()
    shutil.rmtree(folder)
    shutil.copytree(adapters["b"].lora_path, folder)
    engine.add_request(PROMPTS[2], GREEDY, request_id="not yet", lora_request=changing)
    in_place = LoRARequest("changing", 9, str(folder), load_inplace=True)
    assert engine.add_lora(in_place) and not engine.add_lora(changing)
    engine.add_request(PROMPTS[2], GREEDY, request_id="after", lora_request=changing)
    engine.step()
    assert engine.remove_lora(9) and engine.list_loras() == set()
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError):
        engine.add_request(PROMPTS[2], GREEDY, lora_request=changing)
    of_a, of_b = stock.greedy(PROMPTS[2], "a"), stock.greedy(PROMPTS[2], "b")
    assert finish(engine) == {"before": of_a, "not yet": of_a, "after": of_b}
    assert_idle(model)


def test_read_anew_after_leaving_the_host(stock: Stock, adapters: dict[str, LoRARequest]) -> None:
    model = hf_paged.wrap(make_model("Llama", **SMALL), **OPTIONS | {"max_cpu_loras": 2})
    for name in "abcabc":
        assert tokens(model.generate_many(PROMPTS[:1], GREEDY, lora_request=adapters[name])) == [
            stock.greedy(PROMPTS[0], name)
        ]
        assert len(model.engine.list_loras()) <= 2 and adapters[name].lora_int_id in model.engine.list_loras()
    # More of them in one call than the host keeps: requests hold their own.
    names = ["a", "b", "c", "a"]
    outputs = model.generate_many(PROMPTS, GREEDY, lora_request=[adapters[name] for name in names])
    assert tokens(outputs) == [stock.greedy(prompt, name) for prompt, name in zip(PROMPTS, names, strict=True)]


def test_many_threads(model: Any, stock: Stock, adapters: dict[str, LoRARequest]) -> None:
    names = ["a", "b", "c", None]
    calls = [
        lambda prompt=prompt, name=name: tokens(model.generate_many([prompt], GREEDY, lora_request=adapters.get(name)))[
            0
        ]
        for prompt in PROMPTS
        for name in names
    ]
    expected = [stock.greedy(prompt, name) for prompt in PROMPTS for name in names]
    assert in_threads(*calls) == expected
    assert_idle(model)


@pytest.mark.parametrize("place", ["write", "upload", "forward"])
def test_a_failed_step_starts_over(
    model: Any, stock: Stock, adapters: dict[str, LoRARequest], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted while an adapter is half way to its slot, or later: the next step brings it there again."""
    slots = model.engine.executor.adapters
    target, name = {
        "write": (slots.layers, "write"),
        "upload": (slots, "_upload"),
        "forward": (model.engine.executor._runner, "forward"),
    }[place]
    work, failed = getattr(target, name), []

    def fails_once(*args: Any, **options: Any) -> Any:
        found = work(*args, **options)
        if not failed:
            failed.append(1)
            if place == "write":
                stand_in = next(iter(slots.layers._stand_ins.values()))
                stand_in.room.a.data[args[0]].zero_()
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(target, name, fails_once)
    names = ["a", "b", None, "a"]
    with pytest.raises(KeyboardInterrupt):
        model.generate_many(PROMPTS, GREEDY, lora_request=[adapters.get(name) for name in names])
    assert failed
    assert_idle(model)
    outputs = model.generate_many(PROMPTS, GREEDY, lora_request=[adapters.get(name) for name in names])
    assert tokens(outputs) == [stock.greedy(prompt, name) for prompt, name in zip(PROMPTS, names, strict=True)]


def test_changed_weights_and_sleep(model: Any, stock: Stock, adapters: dict[str, LoRARequest]) -> None:
    """The model below an adapter may change, lose its pages, or have a layer replaced."""
    before = tokens(model.generate_many(PROMPTS, GREEDY, lora_request=adapters["a"]))
    model.engine.sleep()
    assert tokens(model.generate_many(PROMPTS, GREEDY, lora_request=adapters["a"])) == before
    with torch.no_grad():
        layer = model.model.layers[0].mlp.down_proj
        own = layer.weight.clone()
        layer.weight.mul_(-1.0)
    changed = tokens(model.generate_many(PROMPTS, GREEDY, lora_request=adapters["a"]))
    assert changed != before
    replacement = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
    replacement.weight.data.copy_(own)
    model.model.layers[0].mlp.down_proj = replacement
    assert tokens(model.generate_many(PROMPTS, GREEDY, lora_request=adapters["a"])) == before


def test_a_layer_that_adapters_do_not_fit_any_more(model: Any, adapters: dict[str, LoRARequest]) -> None:
    model.generate_many(PROMPTS, GREEDY, lora_request=adapters["a"])
    model.model.layers[0].self_attn.q_proj = torch.nn.Sequential(model.model.layers[0].self_attn.q_proj)
    with pytest.raises(RuntimeError, match=r"q_proj is not the linear layer any more"):
        model.generate_many(PROMPTS, GREEDY, lora_request=adapters["a"])
    assert_idle(model)
    assert tokens(model.generate_many(PROMPTS, GREEDY)), "the model itself goes on"
