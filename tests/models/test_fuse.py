"""Fused linear layers: the same numbers and tokens, and a model that nobody can tell was touched."""

from __future__ import annotations

import contextlib
import copy
import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from families import FAMILIES, make_model, make_prompts, stock_greedy
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import hf_paged
from hf_paged import SamplingParams
from hf_paged.model.fuse import FusedLinears, find_groups

IDS = torch.tensor(make_prompts([9])[0])[None]
QKV, GATE_UP = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]


def groups_of(model: Any) -> list[Any]:
    return find_groups(model, lambda: model(IDS[:, :2], use_cache=False))


def fuse(model: Any) -> FusedLinears:
    groups = groups_of(model)
    assert groups
    return FusedLinears(groups)


def sizes_of(fused: FusedLinears) -> list[list[int]]:
    """The members' output sizes, group by group."""
    return [product.sizes for product in fused._products]


def names(model: nn.Module, layer: int = 1) -> list[list[str]]:
    """The groups of one layer, by the last parts of their members' names."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = [[paths[id(member.linear)] for member in group] for group in groups_of(model)]
    return [[path.rsplit(".", 1)[1] for path in group] for group in found if f"layers.{layer}." in group[0]]


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(IDS, use_cache=False).logits


@contextlib.contextmanager
def counted_products(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Within it, counts the calls of `F.linear`."""
    calls, real = [], F.linear
    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
        yield calls


def storage_bytes(model: nn.Module) -> int:
    """Of the parameters; each must have a storage of its own, as tools that save weights demand."""
    parameters = list(model.parameters())
    found = {storage.data_ptr(): storage.nbytes() for storage in (p.untyped_storage() for p in parameters)}
    assert list(found.values()) == [parameter.nbytes for parameter in parameters]
    return sum(found.values())


def storages(model: nn.Module) -> list[StorageWeakRef]:
    """Of the layers' linear layers."""
    weights = [p for name, p in model.named_parameters() if "_proj" in name]
    return [StorageWeakRef(weight.untyped_storage()) for weight in weights]


def lora_model() -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=[*QKV, *GATE_UP, "down_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    return peft.get_peft_model(make_model("Llama"), config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_and_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(family)
    expected = {
        "Phi3": [],
        "GptOss": [QKV],
        "Glm4": [QKV],
        "Mixtral": [QKV],
        "Qwen3Moe": [QKV],
        "DeepseekV3": [["q_a_proj", "kv_a_proj_with_mqa"], GATE_UP],  # of the shared expert
        "Cohere": [QKV + GATE_UP],  # attention and MLP side by side
    }.get(family, [QKV, GATE_UP])
    assert names(model) == expected
    if not expected:
        return
    before = logits_of(model)
    with counted_products(monkeypatch) as plain:
        logits_of(model)
    fused = fuse(model)
    assert torch.equal(logits_of(model), before), "outside of the context nothing changes"
    with fused.installed(), counted_products(monkeypatch) as calls:
        found = logits_of(model)
    torch.testing.assert_close(found, before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
    saved = sum(len(group) - 1 for group in sizes_of(fused))
    assert len(plain) - len(calls) == saved >= model.config.num_hidden_layers
    assert fused.intact()


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Gemma3", "Mixtral", "Cohere", "DeepseekV3"])
def test_tokens_through_pages(family: str) -> None:
    model = make_model(family)
    prompts = make_prompts([1, 7, 20])
    expected = [stock_greedy(model, prompt, 12) for prompt in prompts]
    wrapped = hf_paged.wrap(model, page_size=8, num_pages=64)
    with fuse(model).installed():
        outputs = wrapped.generate_many(prompts, SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))
    assert [output.outputs[0].token_ids for output in outputs] == expected


def test_lora_base_layers_fuse() -> None:
    model = lora_model()
    lm = model.get_base_model()
    before = logits_of(model)
    with model.disable_adapter():
        bare = logits_of(model)
    assert not torch.allclose(before, bare, rtol=1e-2)
    assert names(lm) == [["base_layer"] * 3, ["base_layer"] * 2], "adapters themselves come and go"
    fused = fuse(lm)
    with fused.installed():
        torch.testing.assert_close(logits_of(model), before, rtol=1e-5, atol=1e-4)
        with model.disable_adapter():
            torch.testing.assert_close(logits_of(model), bare, rtol=1e-5, atol=1e-4)
    model.merge_adapter()  # writes in place
    assert fused.intact()
    with fused.installed():
        torch.testing.assert_close(logits_of(model), before, rtol=1e-4, atol=1e-3)
    model.unmerge_adapter()
    model.merge_adapter(safe_merge=True)  # writes new tensors
    assert not fused.intact()


def test_adapters_added_later_end_it() -> None:
    peft = pytest.importorskip("peft")
    model = make_model("Llama")
    fused = fuse(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    assert not fused.intact()
    with fused.installed():  # even so, what is there now is not overwritten
        assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear"
        assert hasattr(model.model.layers[0].self_attn.q_proj, "lora_A")
    assert hasattr(adapted.get_base_model().model.layers[0].self_attn.q_proj, "lora_A")


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=False),
    "adamw_foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=True),
    "adamw_fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_steps_and_gradients(optimizer: str) -> None:
    """Two models in step, one of them fused: equal gradients and weights, and the product reads the new ones."""
    stock, model = make_model("Qwen2"), make_model("Qwen2")
    steppers = [OPTIMIZERS[optimizer](m.parameters()) for m in (stock, model)]
    fused = fuse(model)
    for _ in range(2):
        for m, stepper in zip((stock, model), steppers, strict=True):
            stepper.zero_grad()
            # Grad is on, so within the context too this is the plain forward.
            with fused.installed() if m is model else contextlib.nullcontext():
                m(IDS, labels=IDS, use_cache=False).loss.backward()
            stepper.step()
        for (name, ours), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad), name
            assert torch.equal(ours, theirs), name
        assert fused.intact()
        expected = logits_of(stock)
        with fused.installed():
            torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-4)
    original = make_model("Qwen2")
    assert not torch.allclose(logits_of(original), expected, rtol=1e-2), "the steps must show"


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight is there twice, and while they are moved only those of one group are."""
    model = make_model("Qwen2")
    size, old = storage_bytes(model), storages(model)
    groups, real, alive = groups_of(model), torch.cat, []
    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", lambda t: alive.append(sum(not s.expired() for s in old)) or real(t))
        fused = FusedLinears(groups)
    assert alive == sorted(alive, reverse=True) and alive[-1] < alive[0]
    assert storage_bytes(model) == size
    # Those of o_proj and down_proj, which are in no group.
    assert sum(not storage.expired() for storage in old) == 2 * model.config.num_hidden_layers
    joined = [StorageWeakRef(product.weight.untyped_storage()) for product in fused._products]
    fused.release()
    assert all(storage.expired() for storage in joined)
    assert storage_bytes(model) == size


def test_state_dict_and_memory_stay(tmp_path: Path) -> None:
    model = make_model("Qwen2", num_hidden_layers=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    identities, size = {name: id(p) for name, p in model.named_parameters()}, storage_bytes(model)
    fused = fuse(model)
    assert storage_bytes(model) == size
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    for installed in (False, True):
        with fused.installed() if installed else contextlib.nullcontext():
            after = model.state_dict()
            modules = dict(model.named_modules())
            assert list(after) == list(before)
            assert all(torch.equal(after[name], before[name]) for name in before)
            assert all(isinstance(modules[name], nn.Linear) for name in modules if name.endswith("_proj"))
    model.load_state_dict(before)
    assert fused.intact(), "values are copied in place"

    for options in ({}, {"max_shard_size": "20KB"}):
        model.save_pretrained(tmp_path, **options)
        assert fused.intact()
        loaded = type(model).from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(loaded[name], before[name]) for name in before)

    safetensors.torch.save_model(model, str(tmp_path / "whole"))
    loaded = safetensors.torch.load_file(tmp_path / "whole")
    assert all(torch.equal(loaded[name], before[name]) for name in before)
    accelerate = pytest.importorskip("accelerate")
    assert accelerate.utils.other.clean_state_dict_for_safetensors(model.state_dict()).keys() == before.keys()

    buffer = io.BytesIO()
    torch.save(model.model.layers[0].self_attn.k_proj.state_dict(), buffer)
    assert buffer.tell() < 64 * 32 * 4 + 3000, "the others' rows must not come along"
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    restored = make_model("Qwen2", seed=9, num_hidden_layers=2)
    restored.load_state_dict(torch.load(buffer))
    assert torch.equal(logits_of(restored), logits_of(model))


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_plain_and_independent(how: str, installed: bool) -> None:
    model = make_model("Llama")
    fused = fuse(model)
    with fused.installed() if installed else contextlib.nullcontext():
        if how == "deepcopy":
            copied = copy.deepcopy(model)
        else:
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            copied = torch.load(buffer, weights_only=False)
    expected = logits_of(model)
    assert {type(module) for module in copied.modules()} == {type(module) for module in model.modules()}
    assert torch.equal(logits_of(copied), expected)
    again = fuse(copied)  # parameters that lie together already, as after loading, can be fused
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(logits_of(model), expected) and fused.intact() and again.intact()


def test_unpicked_weights_are_left_alone() -> None:
    tied = make_model("Llama", tie_word_embeddings=True)
    pointers = tied.lm_head.weight.data_ptr(), tied.model.embed_tokens.weight.data_ptr()
    fuse(tied)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert (tied.lm_head.weight.data_ptr(), tied.model.embed_tokens.weight.data_ptr()) == pointers

    def attention(change: Callable[[Any], Any]) -> list[list[str]]:
        model = make_model("Llama")
        kept = change(model.model.layers[1].self_attn)
        found = names(model)
        del kept
        assert found[-1] == GATE_UP and names(model, 2) == [QKV, GATE_UP]
        return found[:-1]

    def tie(a: Any) -> None:
        a.v_proj.weight = a.k_proj.weight

    def share(a: Any) -> None:
        a.v_proj.weight.data = a.k_proj.weight.data

    def alternative(a: Any) -> None:
        chosen = nn.ModuleDict({"on": a.q_proj})
        a.q_proj = nn.Sequential()
        a.q_proj.chosen = chosen
        a.q_proj.forward = lambda x: chosen["on"](x)

    assert attention(lambda a: None) == [QKV]
    assert attention(tie) == []
    assert attention(share) == []  # q alone is no group
    assert attention(alternative) == [["k_proj", "v_proj"]]
    assert attention(lambda a: a.q_proj.weight.detach()) == [["k_proj", "v_proj"]]  # which somebody may write through
    assert attention(lambda a: a.q_proj.register_forward_hook(lambda *_: None)) == [["k_proj", "v_proj"]]
    assert attention(lambda a: a.k_proj.register_full_backward_hook(lambda *_: None)) == [["q_proj", "v_proj"]]
    assert attention(lambda a: setattr(a.q_proj, "forward", a.q_proj.forward)) == [["k_proj", "v_proj"]]
    assert attention(lambda a: nn.utils.parametrizations.weight_norm(a.q_proj)) == [["k_proj", "v_proj"]]
    assert attention(lambda a: setattr(a.q_proj, "bias", nn.Parameter(torch.ones(64)))) == [["k_proj", "v_proj"]]
    assert attention(lambda a: setattr(a.o_proj, "extra", a.q_proj)) == [["k_proj", "v_proj"]]
    assert attention(lambda a: setattr(a.q_proj, "__class__", type("Quantised", (nn.Linear,), {}))) == [
        ["k_proj", "v_proj"]
    ]
    assert attention(lambda a: a.q_proj.weight.share_memory_()) == [["k_proj", "v_proj"]]


class Block(nn.Module):
    """Linear layers that read one tensor, but not in the plain way."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.twice = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.b(input=x) + self.twice(x) + self.twice(x)
        y = y + sum(expert(x) for expert in self.experts[:2])
        x.add_(1)
        return y + self.c(x)


def test_only_the_very_same_input_counts() -> None:
    block = Block()
    assert find_groups(block, lambda: block(torch.ones(2, 8))) == []


def test_calls_that_differ_from_the_dry_forward() -> None:
    """Other order, other inputs, members left out: each layer's own product, as ever."""
    block = Block()
    x, other = torch.randn(4, 8), torch.randn(4, 8)

    def run() -> None:
        thread = threading.Thread(target=block.b, args=(x,))  # no part of this forward
        thread.start()
        thread.join()
        for linear in (block.a, block.b, block.c):
            linear(x)

    groups = find_groups(block, run)
    assert [len(group) for group in groups] == [3]
    fused = FusedLinears(groups)
    plain = {name: getattr(block, name) for name in "abc"}
    with fused.installed(), torch.no_grad():
        for calls in ([("c", x), ("b", x), ("a", x)], [("a", x), ("b", other), ("c", x)], [("a", x)], [("b", x)]):
            for name, value in calls:
                torch.testing.assert_close(getattr(block, name)(value), plain[name](value))
        assert fused._products[0].held is not None
        for name in "abc":
            getattr(block, name)(x)
        assert fused._products[0].held is None, "the last member takes the product with it"
        block.a(x)
    assert fused._products[0].held is None, "nothing is held outside of the context"


def test_intact() -> None:
    def after(change: Callable[[Any], Any]) -> bool:
        model = make_model("Qwen2", num_hidden_layers=2)
        fused = fuse(model)
        assert fused.intact()
        change(model)
        return fused.intact()

    def q_proj(model: Any) -> Any:
        return model.model.layers[1].self_attn.q_proj

    assert after(lambda m: m.to("cpu"))
    assert after(lambda m: m.train().requires_grad_(False))
    assert after(lambda m: m.load_state_dict(make_model("Qwen2", seed=4, num_hidden_layers=2).state_dict()))
    assert not after(lambda m: m.to(torch.float64))
    assert not after(
        lambda m: m.load_state_dict(make_model("Qwen2", seed=4, num_hidden_layers=2).state_dict(), assign=True)
    )
    assert not after(lambda m: setattr(q_proj(m), "weight", nn.Parameter(torch.ones(64, 64))))
    assert not after(lambda m: setattr(q_proj(m), "bias", None))
    assert not after(lambda m: setattr(q_proj(m).bias, "data", torch.ones(64)))
    assert not after(lambda m: setattr(m.model.layers[1].self_attn, "q_proj", nn.Linear(64, 64)))
    assert not after(lambda m: nn.utils.parametrizations.weight_norm(q_proj(m)))
    assert not after(lambda m: m.share_memory())


def test_intact_while_installed() -> None:
    """Another thread may ask while a step is under way."""
    fused = fuse(make_model("Llama"))
    with fused.installed():
        assert fused.intact()


def test_release() -> None:
    model = make_model("Qwen2")
    expected, size = logits_of(model), storage_bytes(model)
    identities = [id(parameter) for parameter in model.parameters()]
    fused = fuse(model)
    replaced = model.model.layers[0].self_attn.k_proj.weight
    replaced.data = replaced.data.clone()
    pointer = replaced.data_ptr()
    fused.release()
    assert storage_bytes(model) == size and replaced.data_ptr() == pointer
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert not fused.intact()
    fused.release()
    with fused.installed():
        assert torch.equal(logits_of(model), expected)
    again = fuse(model)
    with again.installed():
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-4)


def test_fusing_again_without_release() -> None:
    """An engine that was dropped leaves the weights as they lie; the next one takes them from there."""
    model = make_model("Llama")
    expected, size = logits_of(model), storage_bytes(model)
    fused = fuse(model)
    again = fuse(model)
    assert not fused.intact() and again.intact()
    del fused
    assert storage_bytes(model) == size
    with again.installed():
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-4)


def test_exceptions_restore_the_modules() -> None:
    model = make_model("Llama")
    fused = fuse(model)
    modules = list(model.modules())

    def fail(*_: Any) -> None:
        raise RuntimeError("midway")

    handle = model.model.layers[1].self_attn.v_proj.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="midway"), fused.installed():
        assert list(map(id, model.modules())) != list(map(id, modules))
        logits_of(model)
    handle.remove()
    assert list(map(id, model.modules())) == list(map(id, modules))
    assert all(product.held is None for product in fused._products)
    with fused.installed():
        logits_of(model)


def test_stand_ins_are_the_layers_to_whoever_looks() -> None:
    model = make_model("Qwen2")
    fused = fuse(model)
    linear = model.model.layers[0].self_attn.q_proj
    with fused.installed():
        stand_in = model.model.layers[0].self_attn.q_proj
        assert stand_in is not linear
        assert stand_in.weight is linear.weight and stand_in.bias is linear.bias
        assert (stand_in.in_features, stand_in.out_features) == (linear.in_features, linear.out_features)
        assert repr(stand_in).endswith(repr(linear).removeprefix("Linear"))
        model.train()
        stand_in.register_forward_hook(lambda module, args, output: output * 0)
    assert linear.training
    assert not linear(torch.ones(1, 64)).any(), "a hook that is registered midway stays"


def test_generation_in_inference_mode_leaves_parameters_trainable() -> None:
    model = make_model("Llama")
    expected = logits_of(model)
    with torch.inference_mode():
        fused = fuse(model)
        with fused.installed():
            found = model(IDS, use_cache=False).logits
    torch.testing.assert_close(found.clone(), expected, rtol=1e-5, atol=1e-4)
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with torch.inference_mode():
        fused.release()
    assert not any(parameter.is_inference() for parameter in model.parameters())


def test_other_threads() -> None:
    """Training and plain forwards beside fused ones: everybody gets their own numbers."""
    model = make_model("Llama", num_hidden_layers=2)
    others = make_prompts([9, 9, 9], seed=5)
    fused, errors = fuse(model), []
    expected = {grad: [] for grad in (False, True)}
    for prompt in others:
        for grad in expected:
            with torch.set_grad_enabled(grad):
                expected[grad].append(model(torch.tensor(prompt)[None], use_cache=False).logits)

    def work(index: int, grad: bool) -> None:
        ids = torch.tensor(others[index])[None]
        for _ in range(30):
            with torch.set_grad_enabled(grad), fused.installed() if not index else contextlib.nullcontext():
                found = model(ids, use_cache=False).logits
            if not torch.allclose(found, expected[grad][index], rtol=1e-5, atol=1e-4):
                errors.append((index, grad))

    threads = [threading.Thread(target=work, args=(i, grad)) for i, grad in ((0, False), (1, False), (2, True))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Cohere", "lora"])
def test_identical_layers_compile_once(family: str) -> None:
    torch._dynamo.reset()
    model = lora_model() if family == "lora" else make_model(family, num_hidden_layers=4)
    lm = model.get_base_model() if family == "lora" else model
    prompts = [torch.tensor(prompt)[None] for prompt in make_prompts([9, 5, 17])]
    with torch.no_grad():
        expected = [model(ids, use_cache=False).logits for ids in prompts]
    fused = fuse(lm)
    graphs: list[torch.fx.GraphModule] = []

    weights: list[torch.Size] = []

    def backend(graph: torch.fx.GraphModule, _: list[Any]) -> Any:
        graphs.append(graph)
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        weights.extend(node.meta["example_value"].shape for node in inputs if "product" in node.name)
        return graph.forward

    for layer in lm.model.layers:
        layer.compile(backend=backend, dynamic=True, fullgraph=True)
    with torch.no_grad(), fused.installed():
        for ids, logits in zip(prompts, expected, strict=True):
            torch.testing.assert_close(model(ids, use_cache=False).logits, logits, rtol=1e-5, atol=1e-4)
    assert len(graphs) == 1
    assert all(product.held is None for product in fused._products)
    assert weights and all(type(size) is int for shape in weights for size in shape), "constants, not symbols"
    splits = [node for node in graphs[0].graph.nodes if node.target == "split"]
    assert [node.args[1] for node in splits] == sizes_of(fused)[: len(splits)]
    torch._dynamo.reset()
