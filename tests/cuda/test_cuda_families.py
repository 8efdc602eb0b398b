"""Greedy output on a GPU is transformers' own, token for token in float32, whatever the options."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from gpu_models import (
    NEW,
    PROMPTS,
    answers,
    assert_idle,
    captured,
    greedy,
    make,
    needs_flashinfer,
    needs_gpu,
    padded,
    stock_answers,
    wrap,
)

import hf_paged

pytestmark = needs_gpu

DENSE = ["Llama", "Qwen3", "Gemma2"]
EXPERTS = ["GptOss", "Mixtral", "Qwen3Moe"]
"""What transformers does for experts in float32 may wait for the device, and then no graph can be captured."""

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "triton": {"attention_backend": "triton"},
    "torch": {"attention_backend": "torch"},
    "uncompiled": {"compile": "off"},
    "no graphs": {"cuda_graphs": False},
    "not fused": {"fuse_linear": False},
    "synchronous": {"async_scheduling": False},
    "no prefix cache": {"enable_prefix_caching": False},
    "small pool": {"num_pages": 9, "max_num_seqs": 4, "max_num_batched_tokens": 24},
    "plain": {
        "attention_backend": "torch",
        "compile": "off",
        "cuda_graphs": False,
        "fuse_linear": False,
        "async_scheduling": False,
    },
}


COMPILED = {"default", "torch", "no graphs", "not fused", "small pool"}
"""Where Llama's layers are compiled too; other families' are by default. Compiling all in every way takes minutes."""


@dataclass
class Case:
    """A family's model, not wrapped, and what it says to PROMPTS."""

    family: str
    model: Any
    expected: list[list[int]]


@pytest.fixture(scope="module", params=DENSE + EXPERTS)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    model = make(request.param)
    yield Case(request.param, model, stock_answers(model))
    torch._dynamo.reset()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, logger="hf_paged")
    return caplog


def warnings_of(said: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in said.records if record.name.startswith("hf_paged")]


def test_outputs_are_worth_comparing(case: Case) -> None:
    assert len({tuple(tokens) for tokens in case.expected}) == len(PROMPTS)
    assert sum(len(set(tokens)) for tokens in case.expected) > 5 * len(PROMPTS)


@pytest.mark.parametrize("name", list(OPTIONS))
def test_greedy_equals_stock(name: str, case: Case, said: pytest.LogCaptureFixture) -> None:
    if case.family in EXPERTS and name in ("triton", "uncompiled", "not fused", "synchronous", "no prefix cache"):
        pytest.skip("dense families are enough for these")
    options = OPTIONS[name]
    if name not in COMPILED or (case.family != "Llama" and name != "default"):
        options = {"compile": "off"} | options
    model = wrap(case.model, **options)
    try:
        for _ in range(2):  # the second time from the prefix cache
            assert answers(model.generate_many(PROMPTS, greedy())) == case.expected
        assert_idle(model)
        executor, stats = model.engine.executor, model.engine.scheduler.stats
        told = warnings_of(said)
        if name == "small pool":
            assert stats.num_preemptions > 0
        if name == "no prefix cache":
            assert stats.prefix_hits == 0
        graphs = options.get("cuda_graphs", True) and options.get("attention_backend") != "torch"
        if case.family in DENSE:
            assert told == []
            assert bool(captured(model)) == graphs
            assert (executor._runner.compiled is not None) == (options.get("compile") != "off")
            assert (executor._fused is not None) == options.get("fuse_linear", True)
        else:
            failed = [line for line in told if "cannot be captured" in line]
            assert len(failed) == (graphs and not captured(model)), "one reason, where there are no graphs"
            assert all("captured" in line or "uncompiled" in line for line in told)
            assert len(told) <= 2
    finally:
        hf_paged.unwrap(model)


@needs_flashinfer
def test_flashinfer_leaves_float32_to_triton(case: Case) -> None:
    if case.family not in ("Llama", "GptOss"):
        pytest.skip("a dense family and one with sinks are enough")
    model = wrap(case.model, attention_backend="flashinfer", compile="off")
    try:
        assert answers(model.generate_many(PROMPTS, greedy())) == case.expected
    finally:
        hf_paged.unwrap(model)


def test_generate_on_a_padded_batch(case: Case) -> None:
    """Rows end at different steps, so that the batch shrinks while steps are launched ahead."""
    batch = padded(PROMPTS)
    tokens = {token: sum(token in row for row in case.expected) for row in case.expected for token in row[4:]}
    eos = next(token for token, rows in sorted(tokens.items()) if 0 < rows < len(PROMPTS))
    options = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": eos}
    expected = case.model.generate(**batch, **options)
    model = wrap(case.model, compile="off")
    try:
        assert torch.equal(model.generate(**batch, **options), expected)
        assert model.engine.stats.generation_tokens > 0, "it went through the stock loop"
        assert_idle(model)
    finally:
        hf_paged.unwrap(model)
