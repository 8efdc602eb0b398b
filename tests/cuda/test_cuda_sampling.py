"""Sampling on a GPU: log-probabilities in half precision, and seeds that mean the same whoever else is there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_models import (
    PROMPTS,
    answers,
    assert_idle,
    captured,
    differences,
    greedy,
    make,
    make_half,
    needs_flashinfer,
    needs_gpu,
    samples,
    wrap,
    wrap_for,
)
from models.families import VOCAB, make_prompts

import hf_paged
from hf_paged import SamplingParams

pytestmark = needs_gpu

HALF, EIGHT_BITS = 0.05, 0.2
"""Nats that log-probabilities may be off on average: by bfloat16's rounding, which differs between kernels, and by keys
and values of 4 significant bits. On a CPU the same model is off by 0.02 and 0.09; a lost page costs 1 and more."""

BACKENDS = ["triton", pytest.param("flashinfer", marks=needs_flashinfer)]


def sampled(**options: Any) -> SamplingParams:
    return SamplingParams(**{"seed": 3, "n": 2, "max_tokens": 24, "logprobs": 0, "ignore_eos": True} | options)


# ---- log-probabilities ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half() -> Any:
    return make_half(kv_heads=2)


@pytest.fixture(scope="module")
def one_head() -> Any:
    """Query heads per KV head decide which of FlashInfer's kernels decodes."""
    return make_half(kv_heads=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
@pytest.mark.parametrize("kv", ["auto", "fp8"])
@pytest.mark.parametrize("name", ["half", "one_head"])
def test_logprobs_are_those_of_the_models_own_forward(
    name: str, backend: str, graphs: bool, kv: str, request: pytest.FixtureRequest
) -> None:
    half = request.getfixturevalue(name)
    compile = "layers" if graphs and kv == "auto" else "off"
    model = wrap_for(backend, half, cuda_graphs=graphs, kv_cache_dtype=kv, compile=compile)
    try:
        outputs = model.generate_many(PROMPTS, sampled())
        assert bool(captured(model)) == graphs
        found, limit = differences(model, outputs), HALF if kv == "auto" else EIGHT_BITS
        assert float(found.mean()) < limit
        assert float(found.max()) < 10 * limit
        stored = {pool.dtype for pool in model.engine.executor.storage.keys}
        assert stored == {torch.bfloat16 if kv == "auto" else torch.float8_e4m3fn}
        assert_idle(model)
    finally:
        hf_paged.unwrap(model)


@pytest.mark.parametrize("options", [{"compile": "off"}, {"fuse_linear": False}, {"async_scheduling": False}])
def test_logprobs_whatever_the_options(options: dict[str, Any], half: Any) -> None:
    model = wrap(half, **options)
    try:
        assert float(differences(model, model.generate_many(PROMPTS, sampled())).mean()) < HALF
    finally:
        hf_paged.unwrap(model)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv", ["auto", "fp8"])
def test_samples_write_to_copies_of_a_shared_page(backend: str, kv: str, half: Any) -> None:
    """Prompts that end in the middle of a page, and more samples than slots: some compute the prompt again."""
    model = wrap_for(backend, half, kv_cache_dtype=kv, max_num_seqs=4, compile="off")
    try:
        copies: list[tuple[int, int]] = []
        copy_pages = model.engine.executor.storage.copy_pages
        model.engine.executor.storage.copy_pages = lambda pairs: (copies.extend(pairs), copy_pages(pairs))
        outputs = model.generate_many([PROMPTS[1], PROMPTS[3], PROMPTS[5]], sampled(n=6, max_tokens=12))
        assert len(copies) >= 9
        for output in outputs:
            assert len({tuple(completion.token_ids) for completion in output.outputs}) == 6
        assert float(differences(model, outputs).mean()) < (HALF if kv == "auto" else EIGHT_BITS)
        assert_idle(model)
    finally:
        hf_paged.unwrap(model)


def test_a_preempted_request_comes_back_to_the_same_logprobs(half: Any) -> None:
    model = wrap(half, num_pages=10, max_num_seqs=4, max_num_batched_tokens=24, compile="off")
    try:
        outputs = model.generate_many(PROMPTS, sampled(n=1))
        assert model.engine.scheduler.stats.num_preemptions > 0
        assert float(differences(model, outputs).mean()) < HALF
        assert_idle(model)
    finally:
        hf_paged.unwrap(model)


# ---- seeds ---------------------------------------------------------------------------------------------

MIX = [
    SamplingParams(temperature=0.8, seed=1, max_tokens=16, ignore_eos=True),
    SamplingParams(temperature=1.3, top_k=7, seed=2, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=0.9, top_p=0.8, seed=3, max_tokens=12, n=3, ignore_eos=True),
    SamplingParams(temperature=1.1, min_p=0.1, seed=4, max_tokens=18, logprobs=0, ignore_eos=True),
    SamplingParams(temperature=1.2, top_k=30, top_p=0.9, min_p=0.02, seed=5, max_tokens=14, ignore_eos=True),
    greedy(16),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return wrap(make(), max_num_seqs=16)


@pytest.fixture(scope="module")
def alone(model: Any) -> list[list[list[int]]]:
    """What each of MIX gives alone."""
    return [samples(model.generate_many([p], params))[0] for p, params in zip(PROMPTS, MIX, strict=True)]


def test_samples_differ(alone: list[list[list[int]]]) -> None:
    assert len({tuple(tokens) for each in alone for tokens in each}) == 8
    assert all(len(set(tokens)) > 4 for each in alone for tokens in each)


def test_seeded_samples_are_the_same_alone_and_in_a_crowd(model: Any, alone: list[list[list[int]]]) -> None:
    assert samples(model.generate_many(PROMPTS, MIX)) == alone
    assert captured(model), "graphs are not tested here"
    assert samples(model.generate_many(PROMPTS[::-1], MIX[::-1])) == alone[::-1]
    others = make_prompts([3, 44, 20, 9], seed=8)
    crowd = [SamplingParams(seed=20 + i, max_tokens=5 + 4 * i, ignore_eos=True) for i in range(4)]
    assert samples(model.generate_many([*others, *PROMPTS], [*crowd, *MIX]))[4:] == alone
    assert_idle(model)


@pytest.mark.parametrize("late", [0, 1, 5])
def test_a_neighbour_that_needs_the_host_changes_nothing(late: int, model: Any, alone: list[list[list[int]]]) -> None:
    """It takes the crowd off the graphs and off the device's sampler, for as long as it is there."""
    engine = model.engine
    ids = [engine.add_request(prompt, params) for prompt, params in zip(PROMPTS, MIX, strict=True)]
    last: dict[str, Any] = {}
    for _ in range(late):
        last |= {output.request_id: output for output in engine.step()}
    penalised = SamplingParams(presence_penalty=1.0, repetition_penalty=1.3, seed=9, max_tokens=7, ignore_eos=True)
    guest = engine.add_request(PROMPTS[4], penalised)
    while engine.has_unfinished():
        last |= {output.request_id: output for output in engine.step()}
    assert samples([last[i] for i in ids]) == alone
    again = model.generate_many([PROMPTS[4]], penalised)[0]
    assert last[guest].outputs[0].token_ids == again.outputs[0].token_ids
    assert_idle(model)


@pytest.mark.parametrize(
    "options",
    [
        {"cuda_graphs": False},
        {"async_scheduling": False},
        {"fuse_linear": False},
        {"max_num_seqs": 2},
        {"num_pages": 9, "max_num_seqs": 4, "max_num_batched_tokens": 20},
    ],
    ids=str,
)
def test_a_seed_means_the_same_whatever_the_options(
    options: dict[str, Any], model: Any, alone: list[list[list[int]]]
) -> None:
    other = wrap(make(), compile="off", **options)  # the model is compiled
    assert samples(other.generate_many(PROMPTS, MIX)) == alone
    assert_idle(other)


def test_eight_samples(model: Any) -> None:
    """The prompt is computed once, and the first samples of many are the samples of few."""
    before = model.engine.stats.prompt_tokens
    prompt = make_prompts([37], seed=5)[0]
    params = SamplingParams(temperature=1.0, seed=11, n=8, max_tokens=12, ignore_eos=True)
    many = model.generate_many([prompt], params)[0]
    assert model.engine.stats.prompt_tokens == before + len(prompt)
    assert [completion.index for completion in many.outputs] == list(range(8))
    assert len({tuple(completion.token_ids) for completion in many.outputs}) == 8
    few = model.generate_many([prompt], params.clone(n=3))[0]
    assert [c.token_ids for c in few.outputs] == [c.token_ids for c in many.outputs[:3]]
    assert_idle(model)


# ---- what only the host can do -------------------------------------------------------------------------


def test_likeliest_tokens_are_the_models_own(model: Any) -> None:
    outputs = model.generate_many(PROMPTS, sampled(n=1, logprobs=3, max_tokens=6))
    assert float(differences(model, outputs).max()) < 1e-3
    for output in outputs:
        entry = output.outputs[0].logprobs[2]
        ids = torch.tensor([output.prompt_token_ids + output.outputs[0].token_ids[:2]], device="cuda")
        with torch.no_grad():
            top = model(ids, use_cache=False).logits[0, -1].topk(3).indices.tolist()
        assert set(top) <= set(entry)


@pytest.mark.parametrize("budget", [None, 16])
def test_prompt_logprobs_beside_requests_that_decode(budget: int | None, model: Any) -> None:
    """In one chunk and in several, of which all but the last sample nothing for the request itself."""
    other = wrap(make(), max_num_batched_tokens=budget, compile="off")
    prompt = make_prompts([70], seed=6)[0]
    engine = other.engine
    beside = [engine.add_request(PROMPTS[i], greedy(20)) for i in (0, 1)]
    last: dict[str, Any] = {}
    for _ in range(3):
        last |= {output.request_id: output for output in engine.step()}
    mine = engine.add_request(prompt, greedy(3, prompt_logprobs=1))
    while engine.has_unfinished():
        last |= {output.request_id: output for output in engine.step()}
    with torch.no_grad():
        rows = torch.log_softmax(other(torch.tensor([prompt], device="cuda"), use_cache=False).logits[0], -1)
    entries = last[mine].prompt_logprobs
    assert len(entries) == len(prompt)
    assert entries[0] is None
    for place, token in enumerate(prompt[1:]):
        assert entries[place + 1][token].logprob == pytest.approx(float(rows[place, token]), abs=1e-3)
    alone = answers(model.generate_many(PROMPTS[:2], greedy(20)))
    assert [last[i].outputs[0].token_ids for i in beside] == alone
    assert_idle(other)


def test_processed_logprobs(model: Any) -> None:
    other = wrap(make(), logprobs_mode="processed_logprobs", compile="off")
    output = other.generate_many([PROMPTS[3]], sampled(n=1, temperature=2.0, top_k=4, max_tokens=6))[0]
    completion = output.outputs[0]
    ids = torch.tensor([PROMPTS[3] + completion.token_ids], device="cuda")
    with torch.no_grad():
        logits = other(ids, use_cache=False).logits[0, len(PROMPTS[3]) - 1 : -1] / 2.0
    kept = logits.masked_fill(logits < logits.topk(4).values[:, -1:], -torch.inf)
    for row, token, entry in zip(torch.log_softmax(kept, -1), completion.token_ids, completion.logprobs, strict=True):
        assert entry[token].logprob == pytest.approx(float(row[token]), abs=1e-3)


def test_scaled_logprobs_beside_raw_ones(model: Any) -> None:
    params = [sampled(n=1, temperature=0.6, top_k=9, max_tokens=8, logprobs_mode=m) for m in (None, "scaled_logprobs")]
    outputs = model.generate_many([PROMPTS[3]] * 2, params)
    assert answers(outputs)[0] == answers(outputs)[1]
    for output, heat in zip(outputs, (1.0, 0.6), strict=True):
        completion = output.outputs[0]
        ids = torch.tensor([PROMPTS[3] + completion.token_ids], device="cuda")
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, len(PROMPTS[3]) - 1 : -1].float() / heat
        rows = torch.log_softmax(logits, -1)
        for row, token, entry in zip(rows, completion.token_ids, completion.logprobs, strict=True):
            assert entry[token].logprob == pytest.approx(float(row[token]), abs=1e-3)


def test_a_processors_fault_is_its_requests_own(model: Any, alone: list[list[list[int]]]) -> None:
    def fails(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(ids) == 3:
            raise ZeroDivisionError("the processor's own fault")
        return logits

    outputs = model.generate_many([*PROMPTS, PROMPTS[0]], [*MIX, greedy(9, logits_processors=[fails])])
    assert samples(outputs[:-1]) == alone
    assert isinstance(outputs[-1].error, ZeroDivisionError)
    assert len(outputs[-1].outputs[0].token_ids) == 3
    assert_idle(model)


def test_tokens_beyond_the_vocabulary_never_come(model: Any) -> None:
    """Hot, so that every token comes sooner or later: rows of padding and of the tail included."""
    params = SamplingParams(temperature=50.0, seed=1, n=8, max_tokens=60, ignore_eos=True)
    tokens = [token for each in samples(model.generate_many(PROMPTS, params)) for one in each for token in one]
    assert set(tokens) <= set(range(VOCAB))
    assert len(set(tokens)) > 0.9 * VOCAB
