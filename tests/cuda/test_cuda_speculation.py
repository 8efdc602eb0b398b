"""Speculation on a GPU: verification in CUDA graphs, a draft model's draws left on the device, steps ahead between."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from gpu_models import PROMPTS, assert_idle, captured, make, needs_gpu, wrap
from models.families import VOCAB
from speculative.drafters import Alternating, Always, Constant, Random
from speculative.test_eagle import make_head

import hf_paged
from hf_paged import SamplingParams
from hf_paged.speculative.drafter import Drafter
from hf_paged.speculative.pace import Pace

pytestmark = needs_gpu

SAMPLING = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True),
    "sampled": SamplingParams(n=3, temperature=1.0, top_p=0.95, seed=5, max_tokens=24, ignore_eos=True, logprobs=0),
    "penalised": SamplingParams(
        n=2, temperature=0.9, repetition_penalty=1.3, frequency_penalty=0.3, seed=7, max_tokens=16, logprobs=2
    ),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "graphs": {"compile": "off"},
    "compiled": {"compile": "layers"},
    "no graphs": {"cuda_graphs": False, "compile": "off"},
    "small pool": {"compile": "off", "num_pages": 24, "max_num_batched_tokens": 24},
}


def tokens_of(outputs: list[Any]) -> list[Any]:
    return [[c.token_ids for c in output.outputs] for output in outputs]


def speculating(model: Any, kind: str, pace: Pace, options: dict[str, Any]) -> Any:
    config: dict[str, Any] = {"method": "ngram", "num_speculative_tokens": 4}
    if kind in ("same", "smaller"):
        drafting = copy.deepcopy(model) if kind == "same" else make("Llama", num_hidden_layers=1)
        config |= {"method": "draft_model", "model": drafting}
    if kind == "ngram":
        config |= {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
    wrapped = wrap(copy.deepcopy(model), speculative_config=config, **options)
    speculator = wrapped.engine.speculator
    speculator.pace = pace
    hostile: dict[str, Drafter] = {"random": Random(VOCAB), "constant": Constant(9)}
    if kind in hostile:
        speculator._drafters[wrapped.engine.intake.speculation] = hostile[kind]
    return wrapped


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    model = wrap(make(), compile="off")
    found = {name: tokens_of(model.generate_many(PROMPTS, params)) for name, params in SAMPLING.items()}
    hf_paged.unwrap(model)
    return found


@pytest.mark.parametrize("alternating", [False, True], ids=["every step", "now and then"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["ngram", "random", "constant", "same", "smaller"])
def test_tokens_are_what_they_are_without(expected: dict[str, Any], kind: str, options: str, alternating: bool) -> None:
    if options == "compiled" and kind not in ("ngram", "same"):
        pytest.skip("compiling takes long, and two drafters show it")
    model = speculating(make(), kind, Alternating() if alternating else Always(), OPTIONS[options])
    for name, params in SAMPLING.items():
        assert tokens_of(model.generate_many(PROMPTS, params)) == expected[name], name
    engine = model.engine
    stats = engine.speculator.stats
    assert sum(s.num_drafts for s in stats.values()) > 5
    if "graphs" in options and OPTIONS[options].get("cuda_graphs", True):
        assert captured(model)
    if kind == "same" and not alternating:
        engine.speculator.stats.clear()
        model.generate_many(PROMPTS, SAMPLING["sampled"])
        assert stats["draft_model"].acceptance_rate > 0.99
        assert (engine.executor.drafter._graphs is not None) == OPTIONS[options].get("cuda_graphs", True)
    assert_idle(model)
    hf_paged.unwrap(model)


def test_a_draft_model_sleeps_along(expected: dict[str, Any]) -> None:
    model = speculating(make(), "same", Always(), OPTIONS["graphs"])
    for _ in range(2):
        assert tokens_of(model.generate_many(PROMPTS, SAMPLING["sampled"])) == expected["sampled"]
        before = torch.cuda.mem_get_info()[0]
        model.engine.sleep()
        assert torch.cuda.mem_get_info()[0] >= before
    model.engine.wake_up()
    hf_paged.unwrap(model)


def test_many_drafts_are_in_flight_before_anything_is_read(expected: dict[str, Any]) -> None:
    """The host's buffers of a chain of draws must not be written again while the device still reads them."""
    config = {"method": "draft_model", "model": make(), "num_speculative_tokens": 12}
    model = wrap(make(), speculative_config=config, compile="off")
    model.engine.speculator.pace = Always()
    for _ in range(3):
        assert tokens_of(model.generate_many(PROMPTS, SAMPLING["greedy"])) == expected["greedy"]
    assert model.engine.speculator.stats["draft_model"].acceptance_rate > 0.99
    hf_paged.unwrap(model)


@pytest.mark.parametrize("options", ["graphs", "no graphs", "small pool", "compiled"])
def test_an_eagle3_head(options: str) -> None:
    """Hidden states are read where graphs, compiled layers and plain forwards leave them."""
    target = make("Llama", num_hidden_layers=6)
    plain = wrap(copy.deepcopy(target), compile="off")
    expected = {name: tokens_of(plain.generate_many(PROMPTS, params)) for name, params in SAMPLING.items()}
    hf_paged.unwrap(plain)
    head = make_head()
    config = {"method": "eagle3", "model": head, "num_speculative_tokens": 3}
    model = wrap(target, speculative_config=config, **OPTIONS[options])
    accepted = []
    for pace in (Always(), Alternating()):
        model.engine.speculator.pace = pace
        for name, params in SAMPLING.items():
            assert tokens_of(model.generate_many(PROMPTS, params)) == expected[name], name
        stats = model.engine.speculator.stats["eagle3"]
        accepted.append(stats.num_accepted_tokens)
        assert stats.num_drafts > 20
    assert accepted[-1] > 0
    assert_idle(model)
    hf_paged.unwrap(model)
