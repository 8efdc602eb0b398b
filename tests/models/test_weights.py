"""WeightWatch: every way in which weights change is seen, and nothing else is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import make_model, make_prompts

from hf_paged.model.weights import WeightWatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IDS = torch.tensor(make_prompts([7])[0], device=DEVICE)[None]


@pytest.fixture
def model() -> Any:
    return make_model("Llama").to(DEVICE)


@pytest.fixture
def watch(model: Any) -> WeightWatch:
    watch = WeightWatch(model)
    assert watch.changed(), "the first look finds everything new"
    assert not watch.changed()
    return watch


def step(model: Any, optimizer: Any) -> None:
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()


def swap(model: Any, place: Any) -> None:
    """Two rows change places."""
    weight = model.model.layers[0].mlp.down_proj.weight.data
    weight[place] = weight[place].flip(0)


def write(value: float) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.model.layers[2].input_layernorm.weight.data[5] += value

    return change


CHANGES: dict[str, Callable[[Any], object]] = {
    "one element through .data": write(1.0),
    "one bit": lambda m: m.lm_head.weight.data.view(torch.int32)[3, 4].bitwise_xor_(1),
    "a sign": lambda m: m.lm_head.weight.data[0, 0].neg_(),
    "all negated": lambda m: m.lm_head.weight.data.neg_(),
    "rows that change places": lambda m: swap(m, torch.tensor([1, 2])),
    "rows far apart that change places": lambda m: swap(m, torch.tensor([0, 63])),
    "layers that change places": lambda m: m.load_state_dict(
        m.state_dict() | {k: m.state_dict()[k.replace("layers.0", "layers.1")].clone() for k in _layer(m, 0)}
    ),
    "to zero": lambda m: m.model.norm.weight.data.zero_(),
    "a buffer": lambda m: m.model.rotary_emb.inv_freq.mul_(1.01),
    "another memory": lambda m: setattr(m.lm_head.weight, "data", m.lm_head.weight.data.clone()),
    "another dtype": lambda m: m.bfloat16(),
    "SGD": lambda m: step(m, torch.optim.SGD(m.parameters(), lr=0.1)),
    "AdamW": lambda m: step(m, torch.optim.AdamW(m.parameters(), lr=0.1)),
    "AdamW, fused": lambda m: step(m, torch.optim.AdamW(m.parameters(), lr=0.1, fused=True)),
    "a hook": lambda m: m.lm_head.register_forward_hook(lambda module, args, out: out * 2),
}


def _layer(model: Any, index: int) -> list[str]:
    return [name for name in model.state_dict() if f"layers.{index}." in name]


@pytest.mark.parametrize("name", list(CHANGES))
def test_a_change_is_seen_once(name: str, model: Any, watch: WeightWatch) -> None:
    CHANGES[name](model)
    assert watch.changed()
    assert not watch.changed()


UNCHANGING: dict[str, Callable[[Any], object]] = {
    "a forward": lambda m: m(IDS),
    "a backward": lambda m: m(input_ids=IDS, labels=IDS).loss.backward(),
    "another mode": lambda m: m.train(),
    "written with what was there": lambda m: m.lm_head.weight.data.copy_(m.lm_head.weight.data.clone()),
    "there and back": lambda m: (write(1.0)(m), write(-1.0)(m)),
    "a copy": copy.deepcopy,
    "other weights": lambda m: make_model("Llama").lm_head.weight.data.zero_(),
}


@pytest.mark.parametrize("name", list(UNCHANGING))
def test_what_is_no_change(name: str, model: Any, watch: WeightWatch) -> None:
    UNCHANGING[name](model)
    assert not watch.changed()


def test_optimizer_steps_are_seen_at_no_cost(model: Any, watch: WeightWatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any optimizer in the process: whose parameters it has is not asked, nor is any weight read."""
    monkeypatch.setattr(watch, "_read_checksum", lambda signs: pytest.fail("weights were read"))
    assert not watch.optimizer_stepped()
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert watch.optimizer_stepped()
    assert not watch.optimizer_stepped()
    other = torch.nn.Parameter(torch.ones(2))
    other.grad = torch.ones(2)
    torch.optim.SGD([other], lr=0.1).step()
    assert watch.optimizer_stepped()


def test_changed_counts_as_a_look_at_the_optimizers(model: Any, watch: WeightWatch) -> None:
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert watch.changed()
    assert not watch.optimizer_stepped()


def test_signs_tell_what_moved_and_not_what_was_written(model: Any, watch: WeightWatch) -> None:
    """Graphs and aliases are good for as long as signs stay the same."""
    before = watch.signs()
    write(1.0)(model)
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert watch.signs() == before
    model.lm_head.weight.data = model.lm_head.weight.data.clone()
    assert watch.signs() != before


def test_who_forgets_finds_everything_new(watch: WeightWatch) -> None:
    watch.forget()
    assert watch.changed()
    assert not watch.changed()


def test_adapters_that_are_switched() -> None:
    """PEFT's switches change no weight."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model("Llama").to(DEVICE), peft.LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    watch = WeightWatch(model.get_base_model())
    assert watch.changed()
    assert not watch.changed()
    with model.disable_adapter():
        assert watch.changed()
    assert watch.changed()
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"]))
    assert watch.changed()
    model.set_adapter("other")
    assert watch.changed()
    assert not watch.changed()
    model.set_adapter("default")
    model.merge_adapter()
    assert watch.changed()
