"""Speculation on real (tiny) models: the same tokens, log-probabilities and scores, seed by seed, as without."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from engine.simulator import check_nothing_left
from models.families import FAMILIES, VOCAB, make_model, make_prompts
from speculative.drafters import Alternating, Always, Constant, Oracle, Random
from transformers import LogitsProcessorList

import hf_paged
from hf_paged import SamplingParams
from hf_paged.engine.request import Sequence
from hf_paged.speculative.config import SpeculativeConfig
from hf_paged.speculative.drafter import Drafter
from hf_paged.speculative.pace import Pace

PROMPTS = make_prompts([3, 12, 21, 7])
OPTIONS = {"page_size": 4, "num_pages": 128, "max_num_seqs": 8}
K = 4

SAMPLING = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=20),
    "sampled": SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=20),
    "filtered": SamplingParams(n=2, temperature=0.8, top_p=0.9, top_k=40, min_p=0.01, seed=6, max_tokens=20,
        logprobs=0),
    "penalised": SamplingParams(
        n=2, temperature=0.9, repetition_penalty=1.3, frequency_penalty=0.3, presence_penalty=0.2, seed=7,
        max_tokens=20, logprobs=3, logprobs_mode="processed_logprobs",
    ),
    "constrained": SamplingParams(
        temperature=1.0, seed=8, max_tokens=20, min_tokens=10, logit_bias={5: 2.0, 9: -3.0},
        allowed_token_ids=list(range(2, 150)), prompt_logprobs=1, logprobs=2,
    ),
    "stopped": SamplingParams(temperature=1.0, seed=9, max_tokens=30, stop_token_ids=[11, 12, 13, 14, 15, 16, 17, 18]),
    "processed": SamplingParams(
        temperature=1.0, seed=10, max_tokens=12, logits_processors=[lambda ids, logits: logits.roll(len(ids) % 3)]
    ),
}  # fmt: skip


def told(outputs: list[Any]) -> tuple[list[Any], list[float]]:
    """All that is said of requests, log-probabilities apart, which rounding may touch."""
    values: list[float] = []

    def entries(logprobs: Any) -> Any:
        for entry in logprobs or ():
            values.extend(value.logprob for value in (entry or {}).values())
        return logprobs and [entry and list(entry) for entry in logprobs]

    said = [
        (
            entries(output.prompt_logprobs),
            [(c.token_ids, c.finish_reason, c.stop_reason, entries(c.logprobs)) for c in output.outputs],
        )
        for output in outputs
    ]
    return said, values


def assert_same(outputs: list[Any], expected: tuple[list[Any], list[float]]) -> None:
    said, values = told(outputs)
    assert said == expected[0]
    assert values == pytest.approx(expected[1], abs=1e-4)


def speculating(lm: Any, drafter: Drafter | None = None, method: str = "ngram", **config: Any) -> Any:
    """A wrapped copy whose every step drafts; by another drafter than the configuration says, if one is given."""
    given = {"method": method, "num_speculative_tokens": K} | config
    model = hf_paged.wrap(copy.deepcopy(lm), **OPTIONS, speculative_config=given)
    speculator = model.engine.speculator
    speculator.pace = Always()
    if drafter is not None:
        speculator._drafters[model.engine.intake.speculation] = drafter
    return model


def plain(model: Any) -> Any:
    return hf_paged.wrap(copy.deepcopy(model), **OPTIONS)


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_model("Llama")


@pytest.fixture(scope="module")
def expected(llama: Any) -> dict[str, Any]:
    model = plain(llama)
    return {name: told(model.generate_many(PROMPTS, params)) for name, params in SAMPLING.items()}


def oracle(expected: Any) -> Oracle:
    futures = {
        (tuple(prompt), index): completion[0]
        for prompt, (_, completions) in zip(PROMPTS, expected[0], strict=True)
        for index, completion in enumerate(completions)
    }

    def future(sequence: Sequence) -> list[int]:
        return futures[tuple(sequence.request.prompt_token_ids), sequence.index]

    return Oracle(future, VOCAB, accuracy=0.7)


@pytest.mark.parametrize("how", SAMPLING)
@pytest.mark.parametrize("kind", ["ngram", "suffix", "draft_model", "oracle", "random", "constant"])
def test_everything_told_is_the_same(llama: Any, expected: dict[str, Any], kind: str, how: str) -> None:
    drafter = {"oracle": oracle(expected[how]), "random": Random(VOCAB), "constant": Constant(11)}.get(kind)
    method = kind if kind in ("ngram", "suffix", "draft_model") else "ngram"
    config: dict[str, Any] = {"model": make_model("Llama", num_hidden_layers=1)} if kind == "draft_model" else {}
    model = speculating(llama, drafter, method, **config)
    assert_same(model.generate_many(PROMPTS, SAMPLING[how]), expected[how])
    if kind not in ("ngram", "suffix"):
        assert model.engine.speculator.stats[method].num_drafts > 10
    if kind == "oracle":
        assert model.engine.speculator.stats[method].acceptance_length > 2
    check_nothing_left(model.engine)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_greedy_is_stock_in_every_family(family: str) -> None:
    model = make_model(family)
    expected = [stock(model, prompt, 14) for prompt in PROMPTS]
    futures = {tuple(prompt): tokens for prompt, tokens in zip(PROMPTS, expected, strict=True)}
    drafter = Oracle(lambda s: futures[tuple(s.request.prompt_token_ids)], VOCAB, accuracy=0.7)
    wrapped = speculating(model, drafter)
    outputs = wrapped.generate_many(PROMPTS, SamplingParams(temperature=0.0, max_tokens=14))
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert wrapped.engine.speculator.stats["ngram"].num_accepted_tokens > 5


def stock(model: Any, prompt: list[int], new: int) -> list[int]:
    ids = torch.tensor([prompt])
    return model.generate(ids, max_new_tokens=new, do_sample=False)[0, len(prompt) :].tolist()


def test_a_draft_model_like_the_target_is_always_right(llama: Any) -> None:
    model = speculating(llama, method="draft_model", model=copy.deepcopy(llama), num_speculative_tokens=3)
    for name in ("greedy", "sampled", "filtered"):
        model.generate_many(PROMPTS, SAMPLING[name])
    stats = model.engine.speculator.stats["draft_model"]
    assert stats.num_accepted_tokens == stats.num_draft_tokens > 100


@pytest.mark.parametrize("pages", [14, 20])
def test_a_draft_model_in_a_pool_that_is_too_small(llama: Any, pages: int) -> None:
    """Preemption, chunked prefill, forks and cached prefixes; plain steps in between, which the draft model misses."""
    sampling = SamplingParams(n=3, temperature=1.0, seed=2, max_tokens=16)
    options = {"page_size": 4, "num_pages": pages, "max_num_seqs": 6, "max_num_batched_tokens": 9}
    expected = told(hf_paged.wrap(copy.deepcopy(llama), **options).generate_many(PROMPTS, sampling))
    config = {"method": "draft_model", "model": copy.deepcopy(llama), "num_speculative_tokens": 3}
    model = hf_paged.wrap(copy.deepcopy(llama), **options, speculative_config=config)
    model.engine.speculator.pace = Alternating()
    for _ in range(2):
        assert_same(model.generate_many(PROMPTS, sampling), expected)
    stats = model.engine.speculator.stats["draft_model"]
    assert model.engine.scheduler.stats.num_preemptions > 0
    assert stats.acceptance_rate > 0.8  # what it missed it caught up with, but for what was cached meanwhile
    check_nothing_left(model.engine)


def test_a_draft_model_keeps_nothing_of_others(llama: Any) -> None:
    """Of requests that are scored, or drafted for otherwise: nobody tells it when these are finished."""
    model = speculating(llama, method="draft_model", model=make_model("Llama", num_hidden_layers=1))
    model.score([[5, 6, 7]], [[8, 9, 10]])
    model.generate(torch.tensor([PROMPTS[1]]), max_new_tokens=3, prompt_lookup_num_tokens=2)
    model.generate_many(PROMPTS, SAMPLING["sampled"])
    assert model.engine.speculator.stats["draft_model"].num_drafts > 0
    assert not model.engine.executor.drafter._seen


def test_a_draft_model_catches_up_in_pieces(llama: Any) -> None:
    """After many plain steps of many sequences: no forward has more rows than a step."""
    config = {"method": "draft_model", "model": copy.deepcopy(llama), "num_speculative_tokens": 3}
    options = OPTIONS | {"max_num_batched_tokens": 16}
    model = hf_paged.wrap(copy.deepcopy(llama), **options, speculative_config=config)
    speculator, runner = model.engine.speculator, model.engine.executor.drafter._runner
    speculator.pace, rows = Pace(), []
    speculator.pace.speculates = lambda _: model.engine.stats.steps > 25  # type: ignore[method-assign]
    forward = runner.forward
    runner.forward = lambda inputs: rows.append(len(inputs.token_ids)) or forward(inputs)
    model.generate_many(PROMPTS, SamplingParams(temperature=1.0, seed=3, max_tokens=40, ignore_eos=True))
    assert sum(rows) > 4 * 15 + sum(map(len, PROMPTS)) and max(rows) <= 16
    stats = speculator.stats["draft_model"]
    assert stats.num_accepted_tokens == stats.num_draft_tokens > 10


def test_the_draft_models_pages_count(llama: Any) -> None:
    """Of another dtype than the target's."""
    size = 1 << 20
    target = copy.deepcopy(llama).bfloat16()
    config = {"method": "draft_model", "model": copy.deepcopy(llama).float()}
    model = hf_paged.wrap(target, page_size=4, kv_cache_memory_bytes=size, speculative_config=config)
    pools = [pool for storage in model.engine.executor._pools() for pool in (*storage.keys, *storage.values)]
    taken = sum(pool.numel() * pool.element_size() for pool in pools)
    assert 0.9 * size < taken <= size


def test_a_draft_model_sleeps_along(llama: Any, expected: dict[str, Any]) -> None:
    model = speculating(llama, method="draft_model", model=copy.deepcopy(llama))
    for _ in range(2):
        assert_same(model.generate_many(PROMPTS, SAMPLING["sampled"]), expected["sampled"])
        model.engine.sleep()
    model.engine.wake_up()
    hf_paged.unwrap(model)


def test_a_draft_model_with_a_shorter_length_stops_drafting(llama: Any, expected: dict[str, Any]) -> None:
    short = make_model("Llama", max_position_embeddings=16)
    model = speculating(llama, method="draft_model", model=short)
    assert_same(model.generate_many(PROMPTS, SAMPLING["greedy"]), expected["greedy"])


def test_another_vocabulary_is_refused(llama: Any) -> None:
    model = hf_paged.wrap(
        copy.deepcopy(llama), speculative_config={"method": "draft_model", "model": make_model("Llama", vocab_size=99)}
    )
    with pytest.raises(ValueError, match=r"vocabulary of 99 tokens and the target's is of 160"):
        model.generate_many(PROMPTS, SAMPLING["greedy"])


@pytest.mark.parametrize("kind", ["constant", "draft_model"])
@pytest.mark.parametrize("how", [{}, {"top_p": 0.7}, {"frequency_penalty": 1.5, "repetition_penalty": 1.2}], ids=str)
def test_the_distribution_is_the_targets(llama: Any, kind: str, how: dict[str, float]) -> None:
    """Thousands of draws of three tokens, with other seeds: chi-square over the second and the third."""
    config: dict[str, Any] = {"model": make_model("Llama", num_hidden_layers=1)} if kind == "draft_model" else {}
    drafter = Constant(11) if kind == "constant" else None
    method = kind if kind == "draft_model" else "ngram"
    models = plain(llama), speculating(llama, drafter, method, **config)
    counts = []
    for seed, model in enumerate(models):
        params = SamplingParams(n=1500, temperature=0.7, max_tokens=3, ignore_eos=True, seed=100 + seed, **how)
        completions = model.generate_many([PROMPTS[1]], params)[0].outputs
        counts.append([tuple(c.token_ids) for c in completions])
    for place in (1, 2):
        assert two_sample_p(*([row[place] for row in rows] for rows in counts)) > 1e-4


def two_sample_p(one: list[int], other: list[int]) -> float:
    """The chi-square test's p that two samples of the same size are of one distribution; rare tokens count as one."""
    a, b = (torch.bincount(torch.tensor(tokens), minlength=VOCAB).double() for tokens in (one, other))
    often = a + b >= 20
    a, b = (torch.cat([x[often], x[~often].sum()[None]]) for x in (a, b))
    statistic = ((a - b) ** 2 / (a + b).clamp(min=1)).sum()
    return float(torch.special.gammaincc(torch.tensor((len(a) - 1) / 2).double(), statistic / 2))


# ---- generate ----------------------------------------------------------------------------------------------


def test_prompt_lookup_in_generate(llama: Any, caplog: pytest.LogCaptureFixture) -> None:
    ids = torch.tensor([PROMPTS[2] + PROMPTS[2][:5]])
    expected = llama.generate(ids, max_new_tokens=20, do_sample=False)
    model = plain(llama)
    found = model.generate(ids, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=4)
    assert torch.equal(found, expected)
    assert "stock" not in caplog.text and "own loop" not in caplog.text
    assert model.engine.speculator.stats["ngram"].num_drafts > 0


def test_an_assistant_in_generate(llama: Any) -> None:
    """With scores: rows that are rejected leave none behind."""
    assistant = make_model("Llama", num_hidden_layers=1)
    ids = torch.tensor([PROMPTS[2]])
    options: dict[str, Any] = {
        "max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, "output_scores": True,
        "repetition_penalty": 1.2,
    }  # fmt: skip
    expected = llama.generate(ids, **options)
    model = plain(llama)
    found = model.generate(ids, assistant_model=assistant, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.scores) == len(expected.scores)
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(expected.scores), atol=1e-4, rtol=1e-4)
    assert model.engine.speculator.stats["draft_model"].num_drafts > 3
    engine = model.engine
    model.generate(ids, assistant_model=assistant, **options)
    assert model.engine is engine
    plain_again = model.generate(ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(plain_again, llama.generate(ids, max_new_tokens=20, do_sample=False))


def test_an_assistant_that_does_not_fit_leaves_no_trace(llama: Any) -> None:
    model = plain(llama)
    with pytest.raises(ValueError, match="vocabulary"):
        model._state().engine(model, SpeculativeConfig("draft_model", 3, make_model("Llama", vocab_size=99)))
    assert model.generate_many(PROMPTS, SAMPLING["greedy"])


def test_processors_see_the_drafted_tokens(llama: Any) -> None:
    """Of `generate`, with a processor of the caller's own, which is called with the row as it would be."""
    seen: list[list[int]] = []

    def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(ids[0].tolist())
        return scores

    ids = torch.tensor([PROMPTS[2]])
    model = plain(llama)
    found = model.generate(
        ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3,
        logits_processor=LogitsProcessorList([processor]),
    )[0].tolist()  # fmt: skip
    for length in range(len(PROMPTS[2]), len(found)):
        assert found[:length] in seen
