"""Adapters by request against PEFT's own model, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lora.adapters import GREEDY, NEW, OPTIONS, Stock, assert_idle, save_adapters, tokens
from models.families import make_model, make_prompts

import hf_paged

PROMPTS = make_prompts([3, 9, 17, 5, 12, 30, 8, 21])
MIX = ["a", None, "b", "a", "b", None, "b", "a"]


@pytest.fixture(scope="module", params=["Llama", "Qwen3"])
def case(request: Any, tmp_path_factory: Any) -> Any:
    family = request.param
    adapters = save_adapters(tmp_path_factory.mktemp("adapters"), family)
    return family, adapters, Stock(make_model(family), adapters)


def test_a_batch_of_several_adapters(case: Any) -> None:
    family, adapters, stock = case
    expected = [stock.greedy(prompt, name) for prompt, name in zip(PROMPTS, MIX, strict=True)]
    plain = [stock.greedy(prompt, None) for prompt in PROMPTS]
    assert all((e != p) == (n is not None) for e, p, n in zip(expected, plain, MIX, strict=True)), "they must matter"
    model = hf_paged.wrap(make_model(family), **OPTIONS)
    outputs = model.generate_many(PROMPTS, GREEDY, lora_request=[adapters.get(name) for name in MIX])
    assert tokens(outputs) == expected
    assert [o.lora_request and o.lora_request.lora_name for o in outputs] == MIX
    assert_idle(model)
