"""Adapters of layers that are computed as one product: their parts are added to it at once, and nobody can tell."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora.adapters import GREEDY, OPTIONS, SMALL, Stock, assert_idle, save_adapter, tokens
from models.families import make_model, make_prompts
from torch import Tensor, nn

import hf_paged
from hf_paged import LoRARequest
from hf_paged.lora import layers as lora_layers
from hf_paged.lora.layers import LoraLayers
from hf_paged.model.fuse import FusedLinears, find_groups
from hf_paged.model.introspect import dry_forward, inspect_model

PROMPTS = make_prompts([3, 9, 17, 5])
TARGETS: dict[str, Any] = {
    "usual": ["q_proj", "v_proj"],  # PEFT's default for most models
    "middle": ["k_proj", "up_proj"],
    "all": "all-linear",
}
MIX = ["usual", None, "middle", "all"]


@pytest.fixture(scope="module", params=["Llama", "Qwen2"])
def case(request: Any, tmp_path_factory: Any) -> Any:
    family, root = request.param, tmp_path_factory.mktemp("adapters")
    adapters = {}
    for number, (name, targets) in enumerate(TARGETS.items(), start=1):
        path = save_adapter(root / name, make_model(family, **SMALL), number, r=4 * number, target_modules=targets)
        adapters[name] = LoRARequest(name, number, str(path))
    return family, adapters, Stock(make_model(family, **SMALL), adapters)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[int]]]:
    """Within it, the sizes of every call of the operator."""
    calls, real = [], lora_layers.add_adapters

    def add(*args: Any) -> Tensor:
        calls.append(args[-1])
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(lora_layers, "add_adapters", add)
        yield calls


def wrap(family: str, **options: Any) -> Any:
    return hf_paged.wrap(make_model(family, **SMALL), **OPTIONS | {"max_loras": 3, "fuse_linear": True} | options)


def answers(model: Any, adapters: dict[str, LoRARequest]) -> list[list[int]]:
    return tokens(model.generate_many(PROMPTS, GREEDY, lora_request=[adapters.get(name) for name in MIX]))


def in_layer(calls: list[list[int]]) -> list[int]:
    """How many layers each call of one decoder layer was for."""
    return [len(sizes) for sizes in calls[: len(calls) // SMALL["num_hidden_layers"]]]


@pytest.mark.parametrize("fused", [True, False])
def test_adapters_of_some_layers_of_a_group(case: Any, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that an adapter does not have are the model's own, as PEFT says; one call adds what all have."""
    family, adapters, stock = case
    expected = [stock.greedy(prompt, name) for prompt, name in zip(PROMPTS, MIX, strict=True)]
    model = wrap(family, fuse_linear=fused)
    assert answers(model, adapters) == expected
    with counted(monkeypatch) as calls:
        model.generate_many(PROMPTS[:1], GREEDY.clone(max_tokens=1), lora_request=adapters["usual"])
    assert in_layer(calls) == ([3, 1, 2, 1] if fused else [1] * 7)
    assert_idle(model)


def test_groups_that_are_fused_anew(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters that moved are joined again, and adapters go on beside the new products."""
    family, adapters, stock = case
    model = wrap(family)
    expected = [stock.greedy(prompt, name) for prompt, name in zip(PROMPTS, MIX, strict=True)]
    assert answers(model, adapters) == expected
    executor = model.engine.executor
    before = weakref.ref(executor._fused._products[0].weight)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    executor.prepare()
    gc.collect()
    assert before() is None, "what was joined before is not kept beside"
    assert answers(model, adapters) == expected
    with counted(monkeypatch) as calls:
        model.generate_many(PROMPTS[:1], GREEDY.clone(max_tokens=1), lora_request=adapters["usual"])
    assert in_layer(calls) == [3, 1, 2, 1]


def test_groups_that_are_fused_otherwise(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that has a hook by then is left alone, and its group goes on layer by layer."""
    family, adapters, stock = case
    model = wrap(family)
    expected = [stock.greedy(prompt, name) for prompt, name in zip(PROMPTS, MIX, strict=True)]
    assert answers(model, adapters) == expected
    for layer in model.model.layers:
        layer.self_attn.k_proj.register_forward_hook(lambda *_: None)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    assert answers(model, adapters) == expected
    with counted(monkeypatch) as calls:
        model.generate_many(PROMPTS[:1], GREEDY.clone(max_tokens=1), lora_request=adapters["usual"])
    assert in_layer(calls) == [1, 1, 1, 1, 2, 1]


# ---- the stand-ins themselves ----------------------------------------------------------------------------------------


class Case:
    """A model whose layers are fused and have two random adapters; rows take turns: the first, none, the second."""

    def __init__(self, family: str = "Llama", max_rows: int = 32) -> None:
        self.model = model = make_model(family, **SMALL)
        self.fused = FusedLinears(find_groups(model, lambda: dry_forward(model)))
        attending = inspect_model(model).modules
        self.layers = LoraLayers(model, attending, 2, 16, torch.float32, max_rows, self.fused.groups)
        generator = torch.Generator().manual_seed(0)
        for stand_in in self.layers._stand_ins.values():
            for matrix in (stand_in.room.a, stand_in.room.b):
                matrix.data.copy_(torch.randn(matrix.shape, generator=generator) * 0.1)

    def rows(self, count: int) -> None:
        """The next step has so many rows."""
        slots = np.resize([0, 2, 1], count)
        arrays = self.layers.rows.next()
        arrays["order"][:count] = np.argsort(slots, kind="stable")
        arrays["starts"][:] = np.searchsorted(np.sort(slots), range(3))
        self.layers.rows.upload()

    @contextmanager
    def installed(self, fused: bool = True) -> Iterator[None]:
        with ExitStack() as stack:
            if fused:
                stack.enter_context(self.fused.installed())
            stack.enter_context(self.layers.installed())
            yield

    @property
    def attention(self) -> Any:
        return self.model.model.layers[1].self_attn


QKV = ["q_proj", "k_proj", "v_proj"]


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
@torch.no_grad()
def test_calls_that_differ_from_the_dry_forward(family: str) -> None:
    """Other order, other inputs, members left out: each layer's own output and its own adapters' part."""
    case = Case(family)
    case.rows(5)
    x, other = torch.randn(2, 1, 5, 64)
    with case.installed(fused=False):
        expected = {(name, value): getattr(case.attention, name)(value) for name in QKV for value in (x, other)}
    with case.installed():
        for calls in (
            [("q_proj", x), ("k_proj", x), ("v_proj", x)],
            [("v_proj", x), ("k_proj", x), ("q_proj", x)],
            [("q_proj", x), ("k_proj", other), ("v_proj", x)],
            [("k_proj", other)],
        ):
            for name, value in calls:
                torch.testing.assert_close(getattr(case.attention, name)(value), expected[name, value])
    assert all(group._product.held is None for group in case.layers._groups), "nothing is held afterwards"


@torch.no_grad()
def test_another_thread_between_two_members() -> None:
    """Each has its own product and its own rows' adapters, which are none for a forward that is not the engine's."""
    case = Case()
    case.rows(5)
    x, other = torch.randn(2, 1, 5, 64)
    plain = [getattr(case.attention, name)(other) for name in QKV]
    with case.installed(fused=False):
        expected = [getattr(case.attention, name)(x) for name in QKV]

    def in_thread(work: Callable[[], Tensor]) -> Tensor:
        found: list[Tensor] = []

        @torch.no_grad()
        def run() -> None:
            found.append(work())

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return found[0]

    with case.installed():
        for name, mine, own in zip(QKV, expected, plain, strict=True):
            layer = getattr(case.attention, name)
            torch.testing.assert_close(layer(x), mine)
            torch.testing.assert_close(in_thread(lambda layer=layer: layer(other)), own)


def test_with_grad_there_are_no_adapters() -> None:
    case = Case()
    case.rows(5)
    x = torch.randn(1, 5, 64)
    expected = [getattr(case.attention, name)(x) for name in QKV]
    with case.installed():
        found = [getattr(case.attention, name)(x) for name in QKV]
    assert all(map(torch.equal, found, expected)) and all(out.requires_grad for out in found)


def test_stand_ins_are_the_layers_to_whoever_looks() -> None:
    case = Case()
    linear = case.attention.k_proj
    with case.installed():
        stand_in = case.attention.k_proj
        assert stand_in is not linear and isinstance(stand_in, nn.Linear) and stand_in.weight is linear.weight
        saved = io.BytesIO()
        torch.save(stand_in, saved)
        saved.seek(0)
        for copied in (copy.deepcopy(stand_in), torch.load(saved, weights_only=False)):
            assert type(copied) is nn.Linear and torch.equal(copied.weight, linear.weight)
    assert case.attention.k_proj is linear


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_identical_layers_compile_once(family: str) -> None:
    """Without a break in the graph, and with the adapters' shapes and the sizes as constants."""
    torch._dynamo.reset()
    case = Case(family, max_rows=17)
    prompts = [torch.tensor(prompt)[None] for prompt in make_prompts([9, 5, 17])]

    def logits(ids: Tensor, fused: bool = True) -> Tensor:
        case.rows(ids.shape[1])
        with torch.no_grad(), case.installed(fused):
            return case.model(ids, use_cache=False).logits

    expected = [logits(ids, fused=False) for ids in prompts]
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    for layer in case.model.model.layers:
        layer.compile(backend=backend, dynamic=True, fullgraph=True)
    for ids, own in zip(prompts, expected, strict=True):
        torch.testing.assert_close(logits(ids), own, rtol=1e-5, atol=1e-4)
    assert len(graphs) == 1
    added = [node for node in graphs[0].graph.nodes if "add_adapters" in str(node.target)]
    assert [len(node.args[-1]) for node in added] == [3, 1, 2, 1]
    assert all(type(size) is int for node in added for size in node.args[-1])
    for node in added:
        shapes = [argument.meta["example_value"].shape for argument in node.args[2:6]]
        assert all(type(size) is int for shape in shapes for size in shape), "constants, not symbols"
    torch._dynamo.reset()


def test_the_usual_adapter_in_a_file(tmp_path: Path) -> None:
    """What an adapter leaves out is zero in its slot, whatever was there."""
    case = Case()
    path = save_adapter(tmp_path, make_model("Llama", **SMALL), r=4, target_modules=["q_proj", "v_proj"])
    from hf_paged.lora.adapter import read_adapter

    adapter = read_adapter(LoRARequest("a", 1, str(path)), case.layers.targets, max_rank=16, dtype=torch.float32)
    case.layers.write(1, adapter)
    group = case.layers._groups[0]
    assert [path.rpartition(".")[2] for path in group.paths] == QKV
    room, sizes = group._room, group._room.sizes
    downs, ups = room.a[1].split(16), room.b[1].split(sizes)
    assert [bool(up.any()) for up in ups] == [True, False, True] == [bool(down.any()) for down in downs]
    for place in (0, 2):
        a, b = adapter.layers[group.paths[place]]
        assert torch.equal(downs[place][:4], a) and torch.equal(ups[place][:, :4], b)
        assert not downs[place][4:].any() and not ups[place][:, 4:].any()
    assert all(up.any() for up in room.b[0].split(sizes)), "the other slot is as it was"
