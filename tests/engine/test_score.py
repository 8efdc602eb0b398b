"""score: log-probabilities of given completions equal those of the stock forward, however they are computed."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from lookahead import OPTIONS, TOKENIZER, assert_landed, greedy
from many_threads import in_threads
from models.families import VOCAB, make_model, make_prompts
from torch import Tensor

import hf_paged
from hf_paged import SamplingParams, state
from hf_paged.sampling.logprobs import chosen_logprobs

PROMPTS = make_prompts([1, 5, 8, 17, 24, 31, 32])
COMPLETIONS = make_prompts([7, 1, 16, 3, 40, 9, 25], seed=2)


@pytest.fixture(scope="module")
def stock() -> Any:
    return make_model("Llama")


def wrap(stock: Any, ahead: bool = False, **options: Any) -> Any:
    return hf_paged.wrap(copy.deepcopy(stock), **OPTIONS | options, tokenizer=TOKENIZER, async_scheduling=ahead)


@pytest.fixture(params=[False, True], ids=["synchronous", "lookahead"])
def model(request: pytest.FixtureRequest, stock: Any) -> Any:
    return wrap(stock, request.param)


def reference(stock: Any, prompt: list[int], completion: list[int], temperature: float = 1.0) -> Tensor:
    """float32 `[len(completion)]`: by the model's own forward."""
    with torch.no_grad():
        logits = stock(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
    return torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def assert_scores(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert one.device.type == "cpu"
        assert one.shape == other.shape
        assert torch.allclose(one, other, atol=1e-4)


# ---- right --------------------------------------------------------------------------------------------------


ENGINES: dict[str, dict[str, Any]] = {
    "room": {},
    "chunks": {"max_num_batched_tokens": 7, "max_num_seqs": 3},
    "chunks of one token": {"max_num_batched_tokens": 1, "max_num_seqs": 1},
    "a small pool": {"num_pages": 9, "max_num_seqs": 4},
    "a small pool, chunks": {"num_pages": 9, "max_num_seqs": 4, "max_num_batched_tokens": 11},
    "no prefix cache": {"enable_prefix_caching": False, "max_num_batched_tokens": 13, "max_num_seqs": 5},
    "pages of one token": {"page_size": 1, "num_pages": 300},
}


@pytest.mark.parametrize("rows", [None, 5, 1])
@pytest.mark.parametrize("name", list(ENGINES))
@pytest.mark.parametrize("ahead", [False, True])
def test_scores_are_the_stock_forwards(
    ahead: bool, name: str, rows: int | None, stock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for a few rows of logits per step too; twice, the second time from the cache."""
    if rows is not None:
        monkeypatch.setattr(state, "PROMPT_LOGITS_BYTES", rows * VOCAB * 4)
    model = wrap(stock, ahead, **ENGINES[name])
    expected = [reference(stock, *pair, 0.7) for pair in zip(PROMPTS, COMPLETIONS, strict=True)]
    for _ in range(2):
        assert_scores(model.score(PROMPTS, COMPLETIONS, temperature=0.7), expected)
    assert_landed(model.engine)
    assert model.engine.stats.generation_tokens == 0, "nothing is sampled"


@pytest.mark.parametrize("ahead", [False, True])
def test_preempted_while_it_is_scored(ahead: bool, stock: Any) -> None:
    """By one that came before and grows into its pages."""
    model = wrap(stock, ahead, num_pages=14, max_num_batched_tokens=32)
    engine = model.engine
    engine.scheduler.max_prompt_logits = 2
    prompt, completion = PROMPTS[5], COMPLETIONS[4]
    request = engine.intake.scored_request(prompt, completion, 1.0)
    engine.add_request(PROMPTS[4], greedy(40))
    engine.step()
    engine.submit([request])
    known = [0]
    while engine.has_unfinished():
        engine.step()
        known.append(len(request.scores))
    assert request.metrics.num_preemptions > 0
    assert known != sorted(known), "some of it was computed again"
    assert_scores([torch.tensor(request.scores)], [reference(stock, prompt, completion)])
    assert_landed(engine)


@pytest.mark.parametrize("family", ["Gemma2", "GptOss", "Qwen3Moe", "DeepseekV3"])
def test_other_families(family: str) -> None:
    stock = make_model(family)
    model = hf_paged.wrap(copy.deepcopy(stock), page_size=8, num_pages=64, max_num_seqs=4, max_num_batched_tokens=19)
    expected = [reference(stock, *pair) for pair in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert_scores(model.score(PROMPTS, COMPLETIONS), expected)


def test_they_are_what_sampling_reports(model: Any) -> None:
    """What trainers compare: at the temperature of the draw, and 0 counts as 1."""
    for temperature in (1.3, 0.0):
        params = SamplingParams(
            n=2, seed=3, temperature=temperature, max_tokens=11, logprobs=0, logprobs_mode="scaled_logprobs"
        )
        outputs = model.generate_many(PROMPTS, params)
        scores = model.score(
            PROMPTS, [[c.token_ids for c in output.outputs] for output in outputs], temperature=temperature
        )
        reported = [
            torch.tensor([entry[token].logprob for entry, token in zip(c.logprobs, c.token_ids, strict=True)])
            for output in outputs
            for c in output.outputs
        ]
        assert_scores(scores, reported)


def test_beside_requests_that_generate(model: Any, stock: Any) -> None:
    """In other threads: neither notices the others."""
    alone = [o.outputs[0].token_ids for o in model.generate_many(PROMPTS, greedy(24))]
    expected = [reference(stock, *pair) for pair in zip(PROMPTS, COMPLETIONS, strict=True)]
    for _ in range(2):
        scores, outputs, again = in_threads(
            lambda: model.score(PROMPTS, COMPLETIONS),
            lambda: model.generate_many(PROMPTS, greedy(24, prompt_logprobs=1)),
            lambda: model.score(PROMPTS[::-1], COMPLETIONS[::-1]),
        )
        assert_scores(scores, expected)
        assert_scores(again, expected[::-1])
        assert [output.outputs[0].token_ids for output in outputs] == alone
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            found = [entry[t].logprob for t, entry in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
            assert_scores([torch.tensor(found)], [reference(stock, prompt[:1], prompt[1:])])
    assert_landed(model.engine)


# ---- shared prompts, bounded memory -------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [False, True])
def test_a_shared_prompt_is_computed_once(ahead: bool, stock: Any) -> None:
    """Up to its last full page, though all completions arrive together."""
    model = wrap(stock, ahead)
    prompt, completions = PROMPTS[6], make_prompts([6] * 12, seed=5)
    scores = model.score([prompt], [completions])
    assert_scores(scores, [reference(stock, prompt, completion) for completion in completions])
    shared = 24  # of 32 tokens: the last one's logits are wanted, so its page is each one's own
    assert model.engine.stats.prompt_tokens == shared + 12 * (32 - shared + 5)


def test_few_rows_of_logits_per_step(stock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "PROMPT_LOGITS_BYTES", 6 * VOCAB * 4)
    model = wrap(stock)
    runner = model.engine.executor._runner
    forward, rows = runner.forward, []

    def watched(*args: Any) -> Tensor:
        logits = forward(*args)
        rows.append(len(logits))
        return logits

    monkeypatch.setattr(runner, "forward", watched)
    model.score(PROMPTS, COMPLETIONS)
    assert max(rows) == 6
    assert sum(rows) == sum(map(len, COMPLETIONS))
    assert len(rows) < 25, "steps must be filled"
    rows.clear()
    model.generate_many(PROMPTS[4:], greedy(1, prompt_logprobs=0))
    assert max(rows) <= 6 + 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chosen_logprobs_in_slices(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = (4 * torch.randn(9, 30, generator=torch.Generator().manual_seed(0))).to(dtype)
    logits[2, 5] = -torch.inf
    rows, tokens = torch.tensor([8, 0, 2, 2, 5]), torch.tensor([1, 29, 5, 6, 0])
    heat = torch.tensor([1.0, 0.5, 1.0, 2.0, 1.7])
    exact = torch.log_softmax(logits[rows].double() / heat[:, None], -1).gather(1, tokens[:, None])[:, 0]
    for size in (1, 60, 10**6):
        monkeypatch.setattr("hf_paged.sampling.logprobs.SLICE", size)
        found = chosen_logprobs(logits, rows, tokens, heat)
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), exact, atol=1e-5)


# ---- what it takes ------------------------------------------------------------------------------------------


def test_forms_of_prompts_and_completions(model: Any, stock: Any) -> None:
    one, two = COMPLETIONS[0], COMPLETIONS[3]
    text = TOKENIZER.decode(COMPLETIONS[5], skip_special_tokens=True)
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    start = TOKENIZER("a text")["input_ids"]
    prompts: list[Any] = [PROMPTS[2], torch.tensor(PROMPTS[2]), "a text", {"prompt_token_ids": PROMPTS[3]}, PROMPTS[1]]
    completions: list[Any] = [one, [np.array(one), torch.tensor(two)], text, [text, two, []], torch.tensor(one)]
    expected = [
        reference(stock, PROMPTS[2], one),
        reference(stock, PROMPTS[2], one),
        reference(stock, PROMPTS[2], two),
        reference(stock, start, ids),
        reference(stock, PROMPTS[3], ids),
        reference(stock, PROMPTS[3], two),
        torch.empty(0),
        reference(stock, PROMPTS[1], one),
    ]
    assert_scores(model.score(prompts, completions), expected)
    assert_scores(model.score("a text", text), expected[3:4])
    assert_scores(model.score("a text", [text, text]), [expected[3]] * 2)
    assert_scores(model.score(PROMPTS[:2], [[], ""]), [torch.empty(0)] * 2)
    assert model.score([], []) == []


BAD: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
    (PROMPTS[:2], COMPLETIONS[:3], {}, ValueError, "3 completions for 2 prompts"),
    (PROMPTS[:2], "text", {}, ValueError, "1 completions for 2 prompts"),
    ([1, 2, 3], [4, 5, 6], {}, TypeError, "put it in a list"),
    ([[]], [[1]], {}, ValueError, "prompt 0, completion 0: the prompt is empty"),
    ([[1], [1]], [[1], [[5], [VOCAB]]], {}, ValueError, f"prompt 1, completion 1: token id {VOCAB} in the completion"),
    ([[VOCAB]], [[1]], {}, ValueError, f"token id {VOCAB} in the prompt"),
    ([[1]], [7], {}, TypeError, "prompt 0: completions must be"),
    ([[1]], [[{"role": "assistant", "content": "x"}]], {}, TypeError, "completion 0: a completion must be"),
    ([[1]], [[["a", "b"]]], {}, TypeError, "a completion must be"),
    ([[1] * 300], [[1] * 300], {}, ValueError, "300 and 300 tokens.*512"),
    ([[1]], [[1]], {"temperature": -1.0}, ValueError, "temperature"),
    ([[1]], [[1]], {"temperature": "hot"}, TypeError, "temperature"),
]


@pytest.mark.parametrize(("prompts", "completions", "options", "error", "message"), BAD)
def test_bad_input_is_refused_before_any_work(
    prompts: Any, completions: Any, options: dict[str, Any], error: type[Exception], message: str, stock: Any
) -> None:
    model = wrap(stock)
    with pytest.raises(error, match=message):
        model.score(prompts, completions, **options)
    assert model.engine.stats.steps == 0
    assert not model.engine.has_unfinished()


def test_a_pair_larger_than_the_pool_is_refused(stock: Any) -> None:
    with pytest.raises(ValueError, match=r"prompt 1, completion 0.*whole pool"):
        wrap(stock, num_pages=4).score([[1], [1] * 30], [[1], [1] * 30])


# ---- how it ends otherwise ----------------------------------------------------------------------------------


def test_logits_that_are_not_finite_are_an_error(stock: Any) -> None:
    """The token 9 poisons whatever follows it; the others' pages are wiped and computed again."""
    broken = copy.deepcopy(stock)
    broken.model.embed_tokens.weight.data[9] = torch.nan
    model = wrap(broken)
    clean = [[token for token in prompt if token != 9] for prompt in PROMPTS]
    given = [[token for token in completion if token != 9] for completion in COMPLETIONS]
    expected = [reference(stock, *pair) for pair in zip(clean, given, strict=True)]
    with pytest.raises(RuntimeError, match="not finite"):
        model.score([*clean, [5, 9, 6]], [*given, [7, 8]])
    assert_landed(model.engine)
    assert_scores(model.score(clean, given), expected)


def test_interrupted_anywhere_it_leaves_nothing(model: Any, stock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = model.engine
    expected = [reference(stock, *pair) for pair in zip(PROMPTS, COMPLETIONS, strict=True)]
    for owner, name in ((engine.executor, "launch"), (engine, "_score"), (engine.scheduler, "finish")):
        with monkeypatch.context() as patch:

            def interrupt(*args: Any) -> None:
                raise KeyboardInterrupt

            patch.setattr(owner, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                model.score(PROMPTS, COMPLETIONS)
        while engine.has_unfinished():
            engine.step()
        assert_scores(model.score(PROMPTS, COMPLETIONS), expected)
    assert_landed(engine)


def test_aborted_from_elsewhere_is_an_error(model: Any) -> None:
    model.engine.observers.append(lambda record: model.engine.abort(list(model.engine._requests)))
    model.engine.scheduler.max_prompt_logits = 50
    with pytest.raises(RuntimeError, match="aborted"):
        model.score([[5]], make_prompts([300], seed=4))
    assert_landed(model.engine)


def test_scores_are_of_the_weights_as_they_are(model: Any, stock: Any) -> None:
    model.score(PROMPTS, COMPLETIONS)
    after = copy.deepcopy(stock)
    for each in (model, after):
        each.model.layers[1].mlp.down_proj.weight.data.mul_(1.7)
    expected = [reference(after, *pair) for pair in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert_scores(model.score(PROMPTS, COMPLETIONS), expected)


@pytest.mark.parametrize("when", range(4))
def test_paused_or_computed_again_in_the_middle(when: int, stock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "PROMPT_LOGITS_BYTES", 20 * VOCAB * 4)
    model = wrap(stock, True)
    engine = model.engine
    requests = [engine.intake.scored_request(p, c, 1.0) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    engine.submit(requests)
    for _ in range(when):
        engine.step()
    engine.pause()
    engine.weights_updated(kv="recompute")
    engine.resume()
    while engine.has_unfinished():
        engine.step()
    expected = [reference(stock, *pair) for pair in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert_scores([torch.tensor(request.scores) for request in requests], expected)
    assert_landed(engine)


def test_a_row_with_infinity_has_no_log_probabilities() -> None:
    logits = torch.tensor([[0.0, torch.inf, 1.0], [0.0, 0.0, -torch.inf]])
    rows, tokens = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 2])
    found = chosen_logprobs(logits, rows, tokens, torch.ones(4))
    assert found[:2].isnan().all()
    assert found[2:].tolist() == [pytest.approx(-0.6931472), -torch.inf]
