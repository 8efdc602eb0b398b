"""Weights that change, move or break between generations, with graphs, fused and compiled layers on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_models import (
    DEVICE,
    NEW,
    PROMPTS,
    answers,
    assert_idle,
    captured,
    differences,
    greedy,
    make,
    make_half,
    needs_gpu,
    stock_answers,
    twin_answers,
    wrap,
)
from models.families import VOCAB, make_prompts

import hf_paged
from hf_paged import SamplingParams
from hf_paged.integrations.trl.shadow import Shadow

pytestmark = needs_gpu

IDS = torch.tensor(make_prompts([12, 12], seed=3))


COMPILED = {"AdamW, fused", "load_state_dict, assigned", "all data cloned", "another parameter", "to half and back"}
"""The other cases run uncompiled, which is faster to set up."""


def used(compiled: bool) -> Any:
    """Wrapped, and used once: there are graphs, groups, cached prefixes (and compiled layers) to be wrong about."""
    model = wrap(make(), compile="layers" if compiled else "off")
    model.generate_many(PROMPTS, greedy())
    executor = model.engine.executor
    assert captured(model)
    assert executor._fused is not None
    assert (executor._runner.compiled is not None) == compiled
    return model


@pytest.fixture(scope="module")
def original() -> list[list[int]]:
    """What the model says before anything happens to it."""
    return stock_answers(make())


def train(model: Any, optimizer: Any, steps: int = 2) -> None:
    ids = IDS.to(DEVICE)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval()


# ---- new values ----------------------------------------------------------------------------------------


def _write_data(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.data.mul_(-1.0)
        layer.mlp.up_proj.weight.data.copy_(layer.mlp.up_proj.weight.data.flip(0))


def _write_head(model: Any) -> None:
    model.lm_head.weight.data.copy_(model.lm_head.weight.data.flip(0))


CHANGES: dict[str, Callable[[Any, int], object]] = {
    "AdamW, fused": lambda m, turn: train(m, torch.optim.AdamW(m.parameters(), lr=0.02, fused=True)),
    "AdamW": lambda m, turn: train(m, torch.optim.AdamW(m.parameters(), lr=0.02)),
    "SGD": lambda m, turn: train(m, torch.optim.SGD(m.parameters(), lr=0.2)),
    "a write through .data": lambda m, turn: _write_data(m),
    "a write to the head alone": lambda m, turn: _write_head(m),
    "load_state_dict": lambda m, turn: m.load_state_dict(make(seed=turn).state_dict()),
    "load_state_dict, assigned": lambda m, turn: m.load_state_dict(make(seed=turn).state_dict(), assign=True),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_new_values_are_seen(name: str, original: list[list[int]]) -> None:
    model, before = used(name in COMPILED), original
    for turn in (1, 2):  # the second change meets what the first one left
        CHANGES[name](model, turn)
        expected = twin_answers(model)
        outputs = model.generate_many(PROMPTS, greedy())
        assert answers(outputs) == expected
        assert not any(output.num_cached_tokens for output in outputs)
        assert captured(model)
        assert expected != before
        before = expected
    assert_idle(model)


def test_a_step_while_requests_run_goes_on() -> None:
    """What was cached before it is not found after it."""
    model = used(compiled=False)
    engine = model.engine
    for prompt in PROMPTS:
        engine.add_request(prompt, greedy())
    for _ in range(4):
        engine.step()
    train(model, torch.optim.SGD(model.parameters(), lr=0.2), steps=1)
    while engine.has_unfinished():
        engine.step()
    outputs = model.generate_many(PROMPTS, greedy())
    assert answers(outputs) == twin_answers(model)
    assert_idle(model)


# ---- new places ----------------------------------------------------------------------------------------


def _clone_all(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def _clone_one(model: Any) -> None:
    projection = model.model.layers[1].self_attn.q_proj
    projection.weight.data = projection.weight.data.clone()


def _new_parameter(model: Any) -> None:
    projection = model.model.layers[1].mlp.down_proj
    projection.weight = torch.nn.Parameter(projection.weight.detach().clone())


MOVES: dict[str, Callable[[Any], Any]] = {
    "all data cloned": _clone_all,
    "the data of one cloned": _clone_one,
    "another parameter": _new_parameter,
    "to float64 and back": lambda m: m.to(torch.float64).to(torch.float32),
    "to half and back": lambda m: m.half().float(),
    "to the CPU and back": lambda m: m.cpu().to(DEVICE),
}


@pytest.mark.parametrize("name", list(MOVES))
def test_weights_that_moved_are_found(name: str, original: list[list[int]]) -> None:
    """Their old memory is written over, so that who still reads it is found out."""
    model = used(name in COMPILED)
    old = {id(p): p.detach() for p in model.parameters()}
    MOVES[name](model)
    now = {p.data_ptr() for p in model.parameters()}
    for tensor in old.values():
        if tensor.data_ptr() not in now:
            tensor.fill_(torch.nan)
    del old
    expected = twin_answers(model)
    outputs = model.generate_many(PROMPTS, greedy())
    assert [output.error for output in outputs] == [None] * len(PROMPTS)
    assert answers(outputs) == expected
    if name != "to half and back":
        assert expected == original
    assert captured(model)
    _write_data(model)
    assert answers(model.generate_many(PROMPTS, greedy())) == twin_answers(model) != expected
    assert_idle(model)


def test_another_dtype_between_generations(original: list[list[int]]) -> None:
    wrapped = used(compiled=True).half()
    outputs = wrapped.generate_many(PROMPTS, SamplingParams(seed=1, max_tokens=8, logprobs=0, ignore_eos=True))
    assert wrapped.engine.executor.storage.keys[0].dtype is torch.float16
    assert float(differences(wrapped, outputs).mean()) < 0.1
    assert_idle(wrapped)
    wrapped.float()
    assert answers(wrapped.generate_many(PROMPTS, greedy())) == twin_answers(wrapped)
    wrapped.load_state_dict(make(seed=1).state_dict())
    assert answers(wrapped.generate_many(PROMPTS, greedy())) == twin_answers(wrapped) != original


# ---- training and unwrapping ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Llama", "GptOss"])
def test_gradients_between_generations_are_those_of_a_model_that_was_never_wrapped(family: str) -> None:
    model, twin, ids = wrap(make(family), compile="off"), make(family), IDS.to(DEVICE)
    for _ in range(2):
        model.generate_many(PROMPTS[:3], greedy(6))
        for each in (model, twin):
            each.train()
            each.zero_grad()
            each(input_ids=ids, labels=ids).loss.backward()
        assert model.training
        for (name, mine), (_, theirs) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
            assert theirs.grad.abs().sum() > 0, name
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert_idle(model)


def test_state_dict_and_parameters_stay_as_they_are() -> None:
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = [(name, id(parameter)) for name, parameter in model.named_parameters()]
    modules = [(name, type(module)) for name, module in model.named_modules()][1:]
    wrap(model)
    model.generate_many(PROMPTS, greedy(6))
    model.engine.warm_up()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [(name, id(parameter)) for name, parameter in model.named_parameters()] == parameters
    assert [(name, type(module)) for name, module in model.named_modules()][1:] == modules


def test_unwrapping_leaves_nothing_behind(original: list[list[int]]) -> None:
    model, twin = used(compiled=True), make()
    queries, keys = (getattr(model.model.layers[0].self_attn, name).weight for name in ("q_proj", "k_proj"))
    assert queries.data_ptr() + queries.nbytes == keys.data_ptr(), "nothing is fused, so nothing is tested here"
    shared = queries.data_ptr(), keys.data_ptr()
    assert hf_paged.unwrap(model) is model
    assert type(model) is type(twin)
    assert "_hf_paged" not in vars(model)
    assert queries.data_ptr() != shared[0], "still in the group's memory"
    assert keys.data_ptr() != shared[1]
    places = set()
    for name, parameter in model.named_parameters():
        storage = parameter.untyped_storage()
        assert storage.nbytes() == parameter.numel() * parameter.element_size(), name
        assert parameter.storage_offset() == 0, name
        places.add(storage.data_ptr())
    assert len(places) == sum(1 for _ in model.parameters())
    for module, own in zip(model.modules(), twin.modules(), strict=True):
        assert type(module) is type(own)
        assert set(vars(module)) == set(vars(own))
    ids = IDS.to(DEVICE)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, twin(ids).logits)
    assert stock_answers(model) == original
    wrap(model)
    assert answers(model.generate_many(PROMPTS, greedy())) == original


def test_copies_of_a_used_model(original: list[list[int]]) -> None:
    model = used(compiled=True)
    other = copy.deepcopy(model)
    _write_data(model)
    assert answers(other.generate_many(PROMPTS, greedy())) == original
    assert answers(model.generate_many(PROMPTS, greedy())) == twin_answers(model) != original


# ---- NaN -----------------------------------------------------------------------------------------------


def all_finite(model: Any) -> bool:
    storage = model.engine.executor.storage
    return all(bool(torch.isfinite(pool.float()).all()) for pool in (*storage.keys, *storage.values))


@pytest.mark.parametrize("options", [{}, {"cuda_graphs": False}, {"attention_backend": "torch"}], ids=str)
def test_nan_weights_end_every_request_by_name(options: dict[str, Any], original: list[list[int]]) -> None:
    model = wrap(make(), compile="off", **options)
    assert answers(model.generate_many(PROMPTS, greedy())) == original
    weight = model.model.layers[0].mlp.down_proj.weight
    kept = weight.data.clone()
    weight.data.fill_(torch.nan)
    outputs = model.generate_many(PROMPTS, SamplingParams(seed=1, max_tokens=NEW, ignore_eos=True))
    for output in outputs:
        assert output.outputs[0].finish_reason == "error"
        assert output.outputs[0].token_ids == []
        assert output.request_id in str(output.error)
    assert_idle(model)
    weight.data.copy_(kept)
    assert answers(model.generate_many(PROMPTS, greedy())) == original
    assert_idle(model)


@pytest.mark.parametrize("pages", [256, 9])
def test_nan_of_one_request_in_the_middle_of_decoding(pages: int, original: list[list[int]]) -> None:
    """A token that one request generates has an embedding that is NaN. Its neighbours go on, in its pages too."""
    model = wrap(make(), num_pages=pages, compile="off")
    assert answers(model.generate_many(PROMPTS, greedy())) == original
    others = [{t for j, row in enumerate(original) if j != i for t in row + PROMPTS[j]} for i in range(len(PROMPTS))]
    place, at = next(
        (i, k)
        for i, row in enumerate(original)
        for k in range(3, NEW - 4)
        if row[k] not in others[i] | set(PROMPTS[i] + row[:k])
    )
    row = model.model.embed_tokens.weight.data[original[place][at]]
    kept = row.clone()
    row.fill_(torch.nan)
    for _ in range(2):
        outputs = model.generate_many(PROMPTS, greedy())
        for i, output in enumerate(outputs):
            if i == place:
                assert output.request_id in str(output.error)
                assert output.outputs[0].token_ids == original[i][: at + 1]
            else:
                assert output.error is None
                assert output.outputs[0].token_ids == original[i]
        assert pages == 9 or all_finite(model), "pages were not wiped"
        assert_idle(model)
    row.copy_(kept)
    assert answers(model.generate_many(PROMPTS, greedy())) == original


def test_fp8_pages_are_wiped(original: list[list[int]]) -> None:
    model = wrap(make_half(), kv_cache_dtype="fp8", compile="off")
    bad = next(i for i in range(50, VOCAB) if not any(i in prompt for prompt in PROMPTS))
    sampling = SamplingParams(seed=2, max_tokens=6, logprobs=0, ignore_eos=True, top_k=1)
    model.generate_many(PROMPTS[:3], sampling)
    row = model.model.embed_tokens.weight.data[bad]
    kept = row.clone()
    row.fill_(torch.nan)
    failed = model.generate_many([*PROMPTS[:3], [5, bad, 6]], sampling)[-1]
    assert failed.request_id in str(failed.error)
    row.copy_(kept)
    outputs = model.generate_many([*PROMPTS[:3], [5, 9, 6]], sampling)
    assert [output.error for output in outputs] == [None] * 4
    assert float(differences(model, outputs).mean()) < 0.2
    assert_idle(model)


@pytest.mark.parametrize("compile", ["layers", "off"])
def test_float32_weights_with_half_precision_copies_under_autocast(compile: str) -> None:
    """As trainers generate: layers hand float32 activations to half-precision weights, and autocast is to cast them,
    in steps of one row (a kernel of its own) and of many."""
    model = make()
    assert model.dtype == torch.float32
    sampling = SamplingParams(seed=1, max_tokens=12, logprobs=0, ignore_eos=True)
    shadow = Shadow(torch.bfloat16)
    wrap(model, compile=compile)
    for prompts in (PROMPTS, PROMPTS[:1]):
        with torch.autocast("cuda", torch.bfloat16), shadow.cast(model):
            outputs = model.generate_many(prompts, sampling)
            assert captured(model)
        with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
            for output in outputs:
                ids, start = output.outputs[0].token_ids, len(output.prompt_token_ids)
                row = torch.tensor([output.prompt_token_ids + ids], device=DEVICE)
                logits = model(input_ids=row).logits[0, start - 1 : -1].float()
                expected = logits.log_softmax(-1).gather(1, row[0, start:, None])[:, 0]
                found = torch.tensor(output.outputs[0].token_logprobs, device=DEVICE)
                assert float((found - expected).abs().mean()) < 0.06
        assert_idle(model)
    hf_paged.unwrap(model)
