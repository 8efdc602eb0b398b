"""wrap() changes a model's generation and nothing else; and what changes the model is noticed."""

from __future__ import annotations

import copy
import gc
import io
import json
import os
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models.families import left_pad, make_model, make_prompts, stock_greedy
from models.tiny_tokenizer import make_tokenizer

import hf_paged
from hf_paged import EngineConfig, PagedGenerationMixin, SamplingParams

OPTIONS = {"page_size": 8, "num_pages": 64, "max_num_seqs": 8}
PROMPT = make_prompts([21])[0]
NEW = 12
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)


@pytest.fixture
def stock() -> Any:
    return make_model("Llama")


@pytest.fixture
def model() -> Any:
    return hf_paged.wrap(make_model("Llama"), **OPTIONS)


def many(model: Any, prompt: list[int] = PROMPT) -> list[int]:
    return model.generate_many([prompt], GREEDY)[0].outputs[0].token_ids


def has_engine(model: Any) -> bool:
    return model.__dict__["_hf_paged"]._engine is not None


# ---- what wrapping is ----------------------------------------------------------------------------------------


def test_the_same_object_of_its_own_class_and_ours(stock: Any) -> None:
    before, pointers = type(stock), [p.data_ptr() for p in stock.parameters()]
    names, keys = list(dict(stock.named_modules())), list(stock.state_dict())
    wrapped = hf_paged.wrap(stock, **OPTIONS)
    assert wrapped is stock
    assert isinstance(wrapped, before)
    assert isinstance(wrapped, transformers.LlamaForCausalLM)
    assert isinstance(wrapped, PagedGenerationMixin)
    assert type(wrapped).__name__ == "LlamaForCausalLM"
    many(wrapped)
    assert [p.data_ptr() for p in wrapped.parameters()] == pointers
    assert list(dict(wrapped.named_modules())) == names
    assert list(wrapped.state_dict()) == keys


def test_wrapping_makes_no_engine(model: Any) -> None:
    assert not has_engine(model)
    many(model)
    assert has_engine(model)


def test_unwrap_restores_everything(stock: Any) -> None:
    kind, contents = type(stock), dict(stock.__dict__)
    wrapped = hf_paged.wrap(stock, **OPTIONS)
    many(wrapped)
    wrapped.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=2)
    assert hf_paged.unwrap(wrapped) is stock
    assert type(stock) is kind
    assert stock.__dict__.keys() == contents.keys()
    assert all(stock.__dict__[name] is contents[name] for name in contents)
    assert not hasattr(stock, "generate_many")


def test_unwrap_frees_the_pool(model: Any) -> None:
    many(model)
    storage = weakref.ref(model.engine.executor.storage)
    hf_paged.unwrap(model)
    gc.collect()
    assert storage() is None


def test_a_dropped_model_frees_the_pool() -> None:
    model = hf_paged.wrap(make_model("Llama"), **OPTIONS)
    many(model)
    storage, parameter = weakref.ref(model.engine.executor.storage), weakref.ref(next(model.parameters()))
    del model
    gc.collect()
    assert storage() is None
    assert parameter() is None


def test_unwrap_leaves_a_stock_model_alone(stock: Any) -> None:
    kind, contents = type(stock), set(stock.__dict__)
    assert hf_paged.unwrap(stock) is stock
    assert type(stock) is kind
    assert set(stock.__dict__) == contents


def test_wrapping_twice(stock: Any) -> None:
    tokenizer = make_tokenizer()
    once = hf_paged.wrap(stock, page_size=8, num_pages=64, tokenizer=tokenizer)
    kind = type(once)
    many(once)
    twice = hf_paged.wrap(once, num_pages=32)
    assert twice is once
    assert type(twice) is kind
    assert twice.engine.scheduler.num_pages == 32
    assert twice.engine.scheduler.page_size == 8, "what was not named again stays"
    assert twice.engine.intake.tokenizer is tokenizer
    assert type(hf_paged.unwrap(twice)) is transformers.LlamaForCausalLM


def test_wrap_unwrap_wrap(stock: Any) -> None:
    expected = stock_greedy(stock, PROMPT, NEW)
    for _ in range(3):
        hf_paged.wrap(stock, **OPTIONS)
        assert many(stock) == expected
        hf_paged.unwrap(stock)
        assert stock_greedy(stock, PROMPT, NEW) == expected


def test_options_and_their_errors(stock: Any) -> None:
    with pytest.raises(TypeError, match="num_pages"):
        hf_paged.wrap(stock, num_page=3)
    with pytest.raises(ValueError, match="page_size"):
        hf_paged.wrap(stock, page_size=24)
    assert type(stock) is transformers.LlamaForCausalLM
    assert "_hf_paged" not in stock.__dict__
    config = EngineConfig(page_size=16, num_pages=9)
    engine = hf_paged.wrap(stock, config, num_pages=11).engine
    assert (engine.scheduler.page_size, engine.scheduler.num_pages) == (16, 11)


def test_a_max_model_len_beyond_the_models_own(stock: Any) -> None:
    hf_paged.wrap(stock, **OPTIONS, max_model_len=1000)
    with pytest.raises(ValueError, match=r"1000.*512"):
        many(stock)


def test_a_class_of_ones_own() -> None:
    class MyModel(PagedGenerationMixin, transformers.LlamaForCausalLM):
        pass

    stock = make_model("Llama")
    mine = MyModel(stock.config).eval()
    mine.load_state_dict(stock.state_dict())
    mine.generation_config = copy.deepcopy(stock.generation_config)
    expected = stock_greedy(stock, PROMPT, NEW)
    mine_config = EngineConfig(num_pages=64, page_size=8)
    hf_paged.wrap(mine, mine_config)
    assert type(mine) is MyModel
    assert many(mine) == expected
    assert stock_greedy(mine, PROMPT, NEW) == expected
    assert mine.engine.stats.generation_tokens == 2 * NEW
    copied = copy.deepcopy(mine)
    assert type(copied) is MyModel
    assert many(copied) == expected
    assert type(hf_paged.unwrap(mine)) is MyModel
    assert many(mine) == expected, "its class pages without wrap too"


# ---- saving, copying, moving -------------------------------------------------------------------------------


def test_save_pretrained(model: Any, stock: Any, tmp_path: Path) -> None:
    many(model)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert "hf_paged" not in (tmp_path / "config.json").read_text()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is transformers.LlamaForCausalLM
    assert stock_greedy(loaded, PROMPT, NEW) == stock_greedy(stock, PROMPT, NEW)
    assert many(model) == stock_greedy(stock, PROMPT, NEW), "saving must not disturb it"


def test_from_pretrained_of_the_wrapped_class(model: Any, tmp_path: Path) -> None:
    """`type(model).from_pretrained`, as a trainer does to load its best checkpoint."""
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert stock_greedy(again, PROMPT, 4) == stock_greedy(model, PROMPT, 4)


@pytest.mark.parametrize("used", [False, True])
def test_deepcopy_is_independent(used: bool, model: Any) -> None:
    if used:
        many(model)
    twin = copy.deepcopy(model)
    assert type(twin) is type(model)
    assert not has_engine(twin)
    expected = many(model)
    assert many(twin) == expected
    assert twin.engine is not model.engine
    with torch.no_grad():
        twin.model.embed_tokens.weight.mul_(-1.0)
    assert many(twin) != expected
    assert many(model) == expected
    assert type(hf_paged.unwrap(twin)) is transformers.LlamaForCausalLM
    assert isinstance(model, PagedGenerationMixin)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_pickle(how: str, model: Any) -> None:
    expected = many(model)
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert isinstance(twin, PagedGenerationMixin)
    assert many(twin) == expected
    assert twin.engine.scheduler.page_size == 8, "the configuration travels along"


def test_state_dict_goes_both_ways(model: Any, stock: Any) -> None:
    many(model)
    other = make_model("Llama", seed=5)
    expected = stock_greedy(other, PROMPT, NEW)
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file))
    assert many(model) == expected
    stock.load_state_dict(model.state_dict())
    assert stock_greedy(stock, PROMPT, NEW) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_to_another_dtype_and_back(dtype: torch.dtype, model: Any, stock: Any) -> None:
    expected = many(model)
    model.to(dtype)
    stock.to(dtype)
    found = many(model)
    assert model.engine.executor.storage.keys[0].dtype == dtype
    if dtype == torch.float64:
        assert found == stock_greedy(stock, PROMPT, NEW)
    model.to(torch.float32)
    if dtype == torch.float64:
        assert many(model) == expected
    assert stock_greedy(model, PROMPT, 3) == many(model)[:3]
    assert model.engine.executor.storage.keys[0].dtype == torch.float32


def test_resized_embeddings(model: Any, stock: Any) -> None:
    """A vocabulary that grows after the engine was made."""
    many(model)
    for each in (model, stock):
        torch.manual_seed(3)
        each.resize_token_embeddings(200, mean_resizing=False)
    prompt = [5, 199, 180, 7]
    assert many(model, prompt) == stock_greedy(stock, prompt, NEW)
    assert stock_greedy(model, prompt, NEW) == stock_greedy(stock, prompt, NEW)


def test_replaced_layers(model: Any, stock: Any) -> None:
    """A module exchanged after the engine was made: it is the new one that attends."""
    many(model)
    other = make_model("Llama", seed=9)
    for each in (model, stock):
        each.model.layers[1] = copy.deepcopy(other.model.layers[1])
    gc.collect()
    assert many(model) == stock_greedy(stock, PROMPT, NEW)


def test_fewer_layers(model: Any, stock: Any) -> None:
    many(model)
    for each in (model, stock):
        del each.model.layers[2]
        each.config.num_hidden_layers = 2
    assert many(model) == stock_greedy(stock, PROMPT, NEW)


# ---- training ------------------------------------------------------------------------------------------------


def flags(model: Any) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_training_flags_are_restored(mode: str, model: Any) -> None:
    model.train(mode != "eval")
    if mode == "mixed":
        model.model.layers[0].eval()
        model.model.layers[2].mlp.eval()
    before = flags(model)
    many(model)
    model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=2)
    assert flags(model) == before


def test_generation_in_train_mode_has_no_dropout() -> None:
    stock = make_model("Llama", attention_dropout=0.5)
    expected = stock_greedy(stock, PROMPT, NEW)
    model = hf_paged.wrap(stock, **OPTIONS).train()
    assert many(model) == expected
    assert stock_greedy(model, PROMPT, NEW) == expected


def loss_and_grads(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(**batch, labels=labels).loss
    loss.backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return loss.detach(), grads


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "GptOss", "Mistral"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_training_after_generation_is_unchanged(family: str, checkpointing: bool) -> None:
    twin = make_model(family).train()
    model = hf_paged.wrap(copy.deepcopy(twin), **OPTIONS)
    if checkpointing:
        for each in (twin, model):
            each.gradient_checkpointing_enable()
    batch = left_pad(make_prompts([9, 30]))
    for _ in range(2):
        many(model)
        model.generate(**batch, do_sample=False, max_new_tokens=3)
        expected, found = loss_and_grads(twin, batch), loss_and_grads(model, batch)
        assert torch.equal(found[0], expected[0])
        assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])


def test_gradient_checkpointing_while_generating_warns_nothing(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    model.train()
    model.gradient_checkpointing_enable()
    expected = stock_greedy(make_model("Llama"), PROMPT, NEW)
    assert many(model) == expected
    assert stock_greedy(model, PROMPT, NEW) == expected
    assert model.is_gradient_checkpointing


# ---- changed weights -----------------------------------------------------------------------------------------


def adamw(**options: Any) -> Callable[[Any], None]:
    def step(model: Any) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, **options)
        batch = left_pad(make_prompts([9, 30]))
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def data_write(model: Any) -> None:
    model.model.layers[0].self_attn.k_proj.weight.data.mul_(-1.0)


def tiny_data_write(model: Any) -> None:
    """One number of the first layer, through `.data`: no version counter moves."""
    model.model.layers[0].input_layernorm.weight.data[0] = 9.0


def copy_in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.copy_(make_model("Llama", seed=4).lm_head.weight[:32, :64])


def load_state_dict(model: Any) -> None:
    model.load_state_dict(make_model("Llama", seed=4).state_dict())


def load_by_assignment(model: Any) -> None:
    model.load_state_dict(make_model("Llama", seed=4).state_dict(), assign=True)


def new_parameter(model: Any) -> None:
    layer = model.model.layers[0].self_attn.k_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * -1.0)


def swapped_rows(model: Any) -> None:
    """The same numbers in other places."""
    weight = model.model.layers[0].self_attn.k_proj.weight.data
    weight.copy_(weight.flip(0).clone())


def swapped_layers(model: Any) -> None:
    first, second = model.model.layers[0].mlp.up_proj.weight.data, model.model.layers[1].mlp.up_proj.weight.data
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)


def numpy_write(model: Any) -> None:
    model.model.layers[0].self_attn.k_proj.weight.detach().numpy()[:] *= -1.0


CHANGES: dict[str, Callable[[Any], None]] = {
    "AdamW foreach": adamw(foreach=True),
    "AdamW fused": adamw(fused=True),
    "AdamW plain": adamw(foreach=False),
    ".data": data_write,
    ".data, one number": tiny_data_write,
    "copy_": copy_in_place,
    "load_state_dict": load_state_dict,
    "load_state_dict(assign=True)": load_by_assignment,
    "new parameter": new_parameter,
    "swapped rows": swapped_rows,
    "swapped layers": swapped_layers,
    "numpy": numpy_write,
}


@pytest.mark.parametrize("how", list(CHANGES))
@pytest.mark.parametrize("call", [many, lambda model: stock_greedy(model, PROMPT, NEW)], ids=["many", "generate"])
def test_changed_weights_are_noticed(how: str, call: Callable[[Any], list[int]], model: Any, stock: Any) -> None:
    before = call(model)
    assert call(model) == before
    assert model.engine.scheduler.stats.prefix_hits > 0, "the second call must have used the cache"
    for each in (model, stock):
        CHANGES[how](each)
    expected = stock_greedy(stock, PROMPT, NEW)
    assert expected != before, "the change must matter"
    assert call(model) == expected


def test_weights_changed_between_steps(model: Any, stock: Any) -> None:
    """An optimizer step while requests run: what is computed from then on is not cached with what was before."""
    engine = model.engine
    engine.add_request(PROMPT, GREEDY)
    for _ in range(5):
        engine.step()
    CHANGES["AdamW fused"](model)
    CHANGES["AdamW fused"](stock)
    while engine.has_unfinished():
        engine.step()
    assert many(model) == stock_greedy(stock, PROMPT, NEW)


def test_unchanged_weights_keep_the_cache(model: Any) -> None:
    many(model)
    loss_and_grads(model, left_pad(make_prompts([9])))  # a forward and a backward change nothing
    model.train().eval()
    output = model.generate_many([PROMPT], GREEDY)[0]
    assert output.num_cached_tokens == 16


def test_without_prefix_caching_nothing_is_reused(stock: Any) -> None:
    model = hf_paged.wrap(stock, **OPTIONS, enable_prefix_caching=False)
    many(model)
    assert model.generate_many([PROMPT], GREEDY)[0].num_cached_tokens == 0


# ---- wrappers ------------------------------------------------------------------------------------------------


def lora(base: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


@pytest.fixture
def peft_pair() -> tuple[Any, Any]:
    """A stock PEFT model and its wrapped twin."""
    return lora(make_model("Llama")), hf_paged.wrap(lora(make_model("Llama")), **OPTIONS)


def test_lora(peft_pair: tuple[Any, Any]) -> None:
    twin, model = peft_pair
    assert isinstance(model, PagedGenerationMixin)
    expected = stock_greedy(twin, PROMPT, NEW)
    assert expected != stock_greedy(make_model("Llama"), PROMPT, NEW), "the adapter must matter"
    assert many(model) == expected
    before = model.engine.stats.generation_tokens
    assert stock_greedy(model, PROMPT, NEW) == expected
    assert model.engine.stats.generation_tokens == before + NEW


@pytest.mark.parametrize("first", ["adapter", "base"])
def test_lora_disabled_and_enabled_do_not_share_a_cache(first: str, peft_pair: tuple[Any, Any]) -> None:
    _, model = peft_pair
    with_adapter = stock_greedy(lora(make_model("Llama")), PROMPT, NEW)
    without = stock_greedy(make_model("Llama"), PROMPT, NEW)
    order = [True, False, True, False] if first == "adapter" else [False, True, False, True]
    for active in order:
        if active:
            assert many(model) == with_adapter
            assert stock_greedy(model, PROMPT, NEW) == with_adapter
        else:
            with model.disable_adapter():
                assert many(model) == without
                assert stock_greedy(model, PROMPT, NEW) == without


def test_lora_set_adapter(peft_pair: tuple[Any, Any]) -> None:
    twin, model = peft_pair
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    many(model)
    for each in (twin, model):
        torch.manual_seed(1)
        each.add_adapter("second", config)
        with torch.no_grad():
            for name, parameter in each.named_parameters():
                if "lora_B.second" in name:
                    parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()).view_as(parameter))
        each.set_adapter("second")
    expected = stock_greedy(twin, PROMPT, NEW)
    assert many(model) == expected
    for each in (twin, model):
        each.set_adapter("default")
    assert many(model) == stock_greedy(twin, PROMPT, NEW) != expected


def test_lora_merge_and_unmerge(peft_pair: tuple[Any, Any]) -> None:
    _, model = peft_pair
    expected = many(model)
    model.merge_adapter()
    assert many(model) == expected
    model.unmerge_adapter()
    assert many(model) == expected


def test_lora_on_a_model_that_is_wrapped_already() -> None:
    expected = stock_greedy(lora(make_model("Llama")), PROMPT, NEW)
    base = hf_paged.wrap(make_model("Llama"), **OPTIONS)
    without = many(base)
    model = lora(base)
    assert stock_greedy(model, PROMPT, NEW) == expected
    assert many(base) == expected, "the base model now has the adapter's layers in it"
    hf_paged.wrap(model)
    assert many(model) == expected
    with model.disable_adapter():
        assert many(model) == without


def test_lora_trains_after_generation(peft_pair: tuple[Any, Any]) -> None:
    twin, model = peft_pair
    batch = left_pad(make_prompts([9, 30]))
    many(model)
    results = []
    for each in (twin, model):
        each.train()
        loss = each(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in each.parameters() if p.requires_grad]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_lora_saves_and_unwraps(peft_pair: tuple[Any, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    twin, model = peft_pair
    kind, base_kind = type(twin), type(twin.get_base_model())
    many(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_model("Llama"), tmp_path).eval()
    assert stock_greedy(loaded, PROMPT, NEW) == many(model)
    hf_paged.unwrap(model)
    assert type(model) is kind
    assert type(model.get_base_model()) is base_kind
    assert stock_greedy(model, PROMPT, NEW) == stock_greedy(twin, PROMPT, NEW)


def test_lora_deepcopy(peft_pair: tuple[Any, Any]) -> None:
    _, model = peft_pair
    expected = many(model)
    twin = copy.deepcopy(model)
    assert many(twin) == expected
    with twin.disable_adapter():
        assert many(twin) != expected
        assert many(model) == expected


def test_torch_compile_wrapper() -> None:
    """Nothing is compiled: only generation is asked for, and the engine calls the module inside."""
    expected = stock_greedy(make_model("Llama"), PROMPT, NEW)

    def refuse(*_: Any) -> Any:
        raise AssertionError("it compiled")

    compiled = torch.compile(make_model("Llama"), backend=refuse)
    kind, inner = type(compiled), type(compiled._orig_mod)
    model = hf_paged.wrap(compiled, **OPTIONS)
    assert model is compiled
    assert isinstance(model, kind)
    assert many(model) == expected
    assert stock_greedy(model, PROMPT, NEW) == expected
    assert model.engine.stats.generation_tokens == 2 * NEW
    hf_paged.unwrap(model)
    assert type(model) is kind
    assert type(model._orig_mod) is inner


@pytest.fixture
def process_group() -> Iterator[None]:
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch is built without gloo")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp_wrapper(process_group: None) -> None:
    stock = make_model("Llama")
    expected = stock_greedy(stock, PROMPT, NEW)
    ddp = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(stock))
    model = hf_paged.wrap(ddp, **OPTIONS)
    assert isinstance(model, torch.nn.parallel.DistributedDataParallel)
    assert many(model) == expected
    assert stock_greedy(model, PROMPT, NEW) == expected
    assert stock_greedy(model.module, PROMPT, NEW) == expected
    assert model.engine is model.module.engine
    batch = left_pad(make_prompts([9, 30]))
    for each in (stock, model):
        each.train()
        each(**batch, labels=batch["input_ids"]).loss.backward()
    grads = zip(stock.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in grads)
    hf_paged.unwrap(model)
    assert type(model) is torch.nn.parallel.DistributedDataParallel
    assert type(model.module) is transformers.LlamaForCausalLM
