"""Steps with adapters as graphs: without a GPU, a graph is a function that is called again, and kernels are
interpreted."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from lora.adapters import NEW, Stock, save_adapter
from models.test_graphs_on_cpu import graph_engine, prompts
from transformers import LlamaConfig, LlamaForCausalLM

import hf_paged
from hf_paged import LoRARequest
from hf_paged.lora import operator

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter stands in for a missing GPU")


def make_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.3,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: Any) -> dict[str, LoRARequest]:
    root: Path = tmp_path_factory.mktemp("adapters")
    targets: Any = ["q_proj", "v_proj"], "all-linear", ["down_proj"]
    return {
        name: LoRARequest(
            name, number, str(save_adapter(root / name, make_model(), number, r=4, target_modules=target))
        )
        for number, (name, target) in enumerate(zip("abc", targets, strict=True), start=1)
    }


@pytest.fixture(scope="module")
def stock(adapters: dict[str, LoRARequest]) -> Stock:
    return Stock(make_model(), adapters)


@pytest.fixture(params=["plain torch", "kernels"])
def way(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the operator does on a GPU, too."""
    if request.param == "kernels":
        from hf_paged.kernels.triton.lora import add_lora

        monkeypatch.setattr(operator, "add_lora_plainly", add_lora)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("lookahead", [False, True])
def test_replays_with_and_without_adapters(
    adapters: dict[str, LoRARequest], stock: Stock, monkeypatch: pytest.MonkeyPatch, lookahead: bool
) -> None:
    """More requests than slots, so that decodes and prefill mix, and adapters come and go between replays."""
    engine, recorder = graph_engine(make_model(), monkeypatch, lookahead=lookahead, enable_lora=True, max_loras=2)
    executor: Any = engine.executor
    greedy = hf_paged.SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
    names = ["a", None, "b", "c", None, "a", "c", "b"]
    many = list(itertools.islice(itertools.cycle(prompts()), len(names)))
    requests = [
        engine.intake.request(prompt, greedy, lora_request=adapters.get(name))
        for prompt, name in zip(many, names, strict=True)
    ]
    last = {output.request_id: output for output in engine.run(requests)}
    found = [last[request.request_id].outputs[0].token_ids for request in requests]
    assert found == [stock.greedy(prompt, name) for prompt, name in zip(many, names, strict=True)]
    assert any(kind.adapted for kind in executor._mixed._captured)
    assert engine.scheduler.num_active_pages == 0

    # Without adapters the graphs are those of an engine that has none.
    plain = [engine.intake.request(prompt, greedy) for prompt in prompts()]
    last = {output.request_id: output for output in engine.run(plain)}
    assert [last[r.request_id].outputs[0].token_ids for r in plain] == [stock.greedy(p, None) for p in prompts()]
    assert {kind.adapted for kind in executor._graphs._captured} == {True, False} and recorder.count


def test_warming_up_captures_both_kinds(
    adapters: dict[str, LoRARequest], stock: Stock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even right after a step of more rows than the smallest graph has."""
    engine, _ = graph_engine(make_model(), monkeypatch, enable_lora=True)
    greedy = hf_paged.SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)

    def run() -> list[list[int]]:
        requests = [engine.intake.request(prompt, greedy, lora_request=adapters["b"]) for prompt in prompts()]
        last = {output.request_id: output for output in engine.run(requests)}
        return [last[request.request_id].outputs[0].token_ids for request in requests]

    expected = [stock.greedy(prompt, "b") for prompt in prompts()]
    assert run() == expected
    engine.warm_up()
    executor: Any = engine.executor
    captured = {(kind.size, kind.adapted) for kind in executor._graphs._captured}
    assert captured >= set(itertools.product((1, 2, 4), (False, True)))
    assert run() == expected
