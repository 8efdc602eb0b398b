"""Adapters by request against PEFT's own model, token by token."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from lora.adapters import GREEDY, NEW, OPTIONS, SMALL, Stock, assert_idle, save_adapters, tokens
from models.families import make_model, make_prompts, stock_greedy

import hf_paged

PROMPTS = make_prompts([3, 9, 17, 5, 12, 30, 8, 21])
MIX = ["a", None, "b", "a", "b", None, "b", "a"]


@pytest.fixture(scope="module", params=["Llama", "Qwen3"])
def case(request: Any, tmp_path_factory: Any) -> Any:
    family = request.param
    adapters = save_adapters(tmp_path_factory.mktemp("adapters"), family)
    return family, adapters, Stock(make_model(family, **SMALL), adapters)


def test_a_batch_of_several_adapters(case: Any) -> None:
    family, adapters, stock = case
    expected = [stock.greedy(prompt, name) for prompt, name in zip(PROMPTS, MIX, strict=True)]
    plain = [stock.greedy(prompt, None) for prompt in PROMPTS]
    assert all((e != p) == (n is not None) for e, p, n in zip(expected, plain, MIX, strict=True)), "they must matter"
    model = hf_paged.wrap(make_model(family, **SMALL), **OPTIONS)
    outputs = model.generate_many(PROMPTS, GREEDY, lora_request=[adapters.get(name) for name in MIX])
    assert tokens(outputs) == expected
    assert [o.lora_request and o.lora_request.lora_name for o in outputs] == MIX
    assert_idle(model)


def test_logprobs_and_scores(case: Any) -> None:
    family, adapters, stock = case
    model = hf_paged.wrap(make_model(family, **SMALL), **OPTIONS)
    names = ["a", "b", None]
    prompts = PROMPTS[:3]
    requests = [adapters.get(name) for name in names]
    sampling = GREEDY.clone(logprobs=0, prompt_logprobs=0)
    outputs = model.generate_many(prompts, sampling, lora_request=requests)
    scores = model.score(prompts, [o.outputs[0].token_ids for o in outputs], lora_request=requests)
    for name, prompt, output, score in zip(names, prompts, outputs, scores, strict=True):
        new = output.outputs[0].token_ids
        rows = stock.logprobs(prompt + new, name)
        expected = rows[range(len(prompt) - 1, len(prompt) + NEW - 1), new]
        torch.testing.assert_close(torch.tensor(output.outputs[0].token_logprobs), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(score, expected, atol=1e-4, rtol=1e-4)
        told = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
        own = rows[range(len(prompt) - 1), prompt[1:]]
        torch.testing.assert_close(torch.tensor(told), own, atol=1e-4, rtol=1e-4)
    assert_idle(model)


@pytest.mark.parametrize("max_loras", [1, 2, 3])
def test_more_adapters_than_slots(case: Any, max_loras: int) -> None:
    """Those that do not fit wait, and slots are written again and again."""
    family, adapters, stock = case
    model = hf_paged.wrap(make_model(family, **SMALL), **OPTIONS | {"max_loras": max_loras, "max_num_seqs": 3})
    names = ["a", "b", "c", None, "c", "a", None, "b"]
    expected = [stock.greedy(prompt, name) for prompt, name in zip(PROMPTS, names, strict=True)]
    for _ in range(2):
        found = model.generate_many(PROMPTS, GREEDY, lora_request=[adapters.get(name) for name in names])
        assert tokens(found) == expected
    assert_idle(model)


def test_adapters_never_share_pages(case: Any) -> None:
    family, adapters, stock = case
    model = hf_paged.wrap(make_model(family, **SMALL), **OPTIONS)
    prompt = PROMPTS[5]
    for name in ["a", None, "b", "c", "a", None, "b"]:
        output = model.generate_many([prompt], GREEDY, lora_request=adapters.get(name))[0]
        assert output.outputs[0].token_ids == stock.greedy(prompt, name)
        again = model.generate_many([prompt], GREEDY, lora_request=adapters.get(name))[0]
        assert again.outputs[0].token_ids == output.outputs[0].token_ids
        assert again.num_cached_tokens == 28, "one adapter's pages are its own to find again"
    # Prompts that arrive together do not wait for each other's pages either.
    names = ["a", "b", None, "a"]
    outputs = model.generate_many([PROMPTS[7]] * 4, GREEDY, lora_request=[adapters.get(name) for name in names])
    assert tokens(outputs) == [stock.greedy(PROMPTS[7], name) for name in names]


@pytest.mark.parametrize(
    "options",
    [
        {"num_pages": 12},
        {"max_num_batched_tokens": 8},
        {"async_scheduling": True},
        {"fuse_linear": True},
        {"enable_prefix_caching": False},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}},
        {"speculative_config": {"method": "suffix", "num_speculative_tokens": 3}},
    ],
    ids=["preemption", "small chunks", "lookahead", "fused layers", "no prefix cache", "ngram", "suffix"],
)
def test_whatever_else_is_on(case: Any, options: dict[str, Any]) -> None:
    family, adapters, stock = case
    model = hf_paged.wrap(make_model(family, **SMALL), **OPTIONS | options)
    expected = [stock.greedy(prompt, name) for prompt, name in zip(PROMPTS, MIX, strict=True)]
    for _ in range(2):
        outputs = model.generate_many(PROMPTS, GREEDY, lora_request=[adapters.get(name) for name in MIX])
        assert tokens(outputs) == expected
    if "num_pages" in options:
        assert model.engine.scheduler.stats.num_preemptions
    assert_idle(model)


def test_a_draft_model_knows_no_adapters_and_changes_no_token(case: Any) -> None:
    family, adapters, stock = case
    drafting = {"method": "draft_model", "model": make_model(family, **SMALL), "num_speculative_tokens": 3}
    model = hf_paged.wrap(make_model(family, **SMALL), **OPTIONS, speculative_config=drafting)
    expected = [stock.greedy(prompt, name) for prompt, name in zip(PROMPTS, MIX, strict=True)]
    outputs = model.generate_many(PROMPTS, GREEDY, lora_request=[adapters.get(name) for name in MIX])
    assert tokens(outputs) == expected


@pytest.mark.slow
def test_compiled_layers(case: Any) -> None:
    family, adapters, stock = case
    model = hf_paged.wrap(make_model(family, **SMALL), **OPTIONS, compile="layers", fuse_linear=True)
    expected = [stock.greedy(prompt, name) for prompt, name in zip(PROMPTS, MIX, strict=True)]
    plain = [stock.greedy(prompt, None) for prompt in PROMPTS]
    outputs = model.generate_many(PROMPTS, GREEDY, lora_request=[adapters.get(name) for name in MIX])
    assert tokens(outputs) == expected
    assert tokens(model.generate_many(PROMPTS, GREEDY)) == plain
    assert model.engine.executor._runner.compiled is not None, "compiling failed"


def test_samples_and_streams(case: Any) -> None:
    """n samples share the prompt's pages and the adapter; a seed means what it means alone."""
    family, adapters, _ = case
    model = hf_paged.wrap(make_model(family, **SMALL), **OPTIONS)
    sampling = hf_paged.SamplingParams(n=3, seed=5, max_tokens=NEW, ignore_eos=True)
    alone = [model.generate_many([PROMPTS[2]], sampling, lora_request=adapters[name])[0] for name in "ab"]
    beside = model.generate_many([PROMPTS[2]] * 3, sampling, lora_request=[adapters["a"], adapters["b"], None])
    told = [[sample.token_ids for sample in output.outputs] for output in [*alone, *beside]]
    assert told[:2] == told[2:4] and told[0] != told[1] != told[4]


# ---- a model that others use meanwhile -------------------------------------------------------------------------------


def test_outside_of_steps_the_model_is_the_models_own(case: Any) -> None:
    family, adapters, stock = case
    model = hf_paged.wrap(make_model(family, **SMALL), **OPTIONS)
    before = {name: id(module) for name, module in model.named_modules()}
    ids = torch.tensor([PROMPTS[2]])
    with torch.no_grad():
        expected = model(ids).logits
    model.generate_many(PROMPTS, GREEDY, lora_request=adapters["a"])
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert not [name for name in model.state_dict() if "lora" in name]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    hf_paged.unwrap(model)
    assert stock.greedy(PROMPTS[2], None) == stock_greedy(model, PROMPTS[2], NEW)


def test_another_threads_forward_has_no_adapters(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    family, adapters, _ = case
    model = hf_paged.wrap(make_model(family, **SMALL), **OPTIONS)
    ids, found = torch.tensor([PROMPTS[2]]), []
    with torch.no_grad():
        expected = model(ids).logits
    layers = model.engine.executor.adapters.layers
    installed = layers.installed

    @contextmanager
    def meanwhile() -> Any:
        def other() -> None:
            with torch.no_grad():
                found.append(model(ids).logits)

        with installed():
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            yield

    monkeypatch.setattr(layers, "installed", meanwhile)
    model.generate_many(PROMPTS[:2], GREEDY.clone(max_tokens=2), lora_request=adapters["b"])
    assert found and all(torch.equal(logits, expected) for logits in found)


def test_hooks_see_a_layer_once_with_its_adapter(case: Any) -> None:
    family, adapters, _ = case
    model = hf_paged.wrap(make_model(family, **SMALL), **OPTIONS)
    model.engine  # noqa: B018 - made now: it tries the model out
    seen: list[int] = []
    handle = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: seen.append(1))
    try:
        model.generate_many([PROMPTS[0]], GREEDY.clone(max_tokens=4), lora_request=adapters["a"])
    finally:
        handle.remove()
    assert len(seen) == 4
