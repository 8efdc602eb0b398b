"""One step of lookahead: launched before the last step's tokens are known, and nobody can tell from the results."""

from __future__ import annotations

import copy
import logging
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models.families import VOCAB, left_pad, make_model, make_prompts, stock_greedy
from models.tiny_tokenizer import make_tokenizer
from simulator import Simulation, check_nothing_left, make_engine
from test_scheduler import Arrival, Driver, aborts, arrivals, failures, many, next_token, schedulers, simple, steps
from test_simulation import check_finished, start
from transformers import LogitsProcessor, LogitsProcessorList

import hf_paged
from hf_paged import RequestOutput, RequestOutputKind, SamplingParams
from hf_paged.engine.batch import Batch
from hf_paged.engine.engine import Engine
from hf_paged.engine.executor import StepResult
from hf_paged.engine.request import Sequence
from hf_paged.engine.scheduler import Scheduler

OPTIONS = {"page_size": 8, "num_pages": 128, "max_num_seqs": 16}
PROMPTS = make_prompts([1, 5, 9, 17, 24])
TOKENIZER = make_tokenizer()


def greedy(max_tokens: int = 12, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **({"ignore_eos": True} | options))


def seeded(max_tokens: int = 12, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **({"seed": 5, "temperature": 1.3, "ignore_eos": True} | options))


@pytest.fixture(scope="module")
def stock() -> Any:
    return make_model("Llama")


def wrap(stock: Any, ahead: bool = True, **options: Any) -> Any:
    return hf_paged.wrap(copy.deepcopy(stock), **OPTIONS | options, tokenizer=TOKENIZER, async_scheduling=ahead)


@pytest.fixture
def model(stock: Any) -> Any:
    return wrap(stock)


@pytest.fixture(scope="module")
def expected(stock: Any) -> list[list[int]]:
    """What greedy search says to PROMPTS, 24 tokens each."""
    return [stock_greedy(stock, prompt, 24) for prompt in PROMPTS]


def assert_landed(engine: Engine) -> None:
    """Nothing is left of any request: not in the queues, not in the pool, not in the air."""
    check_nothing_left(engine)
    assert not engine._held
    assert engine._flight is None


@dataclass
class Watch:
    """What an engine launches."""

    batches: list[Batch] = field(default_factory=list)
    ahead: list[int] = field(default_factory=list)
    """Per launch, how many of its decodes went on from a token that was not known."""

    @classmethod
    def over(cls, engine: Engine) -> Watch:
        watch, launch = cls(), engine.executor.launch

        def watched(batch: Batch) -> Callable[[], StepResult]:
            watch.batches.append(batch)
            watch.ahead.append(sum(sequence.num_pending for sequence in batch.decodes))
            return launch(batch)

        engine.executor.launch = watched  # type: ignore[method-assign]
        return watch


def drain(engine: Engine, most: int = 300) -> dict[str, RequestOutput]:
    last: dict[str, RequestOutput] = {}
    for _ in range(most):
        if not engine.has_unfinished():
            return last
        last |= {output.request_id: output for output in engine.step()}
    raise AssertionError(f"not finished after {most} steps")


def told(output: RequestOutput) -> tuple[Any, ...]:
    """All that a caller sees of an output, but for times."""
    completions = [
        (c.index, c.token_ids, c.text, c.finish_reason, c.stop_reason, _values(c.logprobs)) for c in output.outputs
    ]
    error = None if output.error is None else (type(output.error), str(output.error))
    return completions, _values(output.prompt_logprobs), output.num_cached_tokens, error, output.finished


def _values(logprobs: Any) -> Any:
    if logprobs is None:
        return None
    return [
        None if entry is None else [(token, round(found.logprob, 4), found.rank) for token, found in entry.items()]
        for entry in logprobs
    ]


# ---- the same results ----------------------------------------------------------------------------------


def no_worse(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    return logits + 0.5 * torch.arange(VOCAB) / VOCAB


MIXED = [greedy(9), seeded(12, n=3), greedy(5, logprobs=0), seeded(20, top_k=9, top_p=0.9, seed=3), greedy(1)]
HOST: dict[str, dict[str, Any]] = {
    "penalties": {"presence_penalty": 0.7, "frequency_penalty": 0.3, "repetition_penalty": 1.3},
    "a processor": {"logits_processors": [no_worse]},
    "prompt_logprobs": {"prompt_logprobs": 2},
    "logprobs": {"logprobs": 2},
    "min_tokens": {"min_tokens": 6},
    "a bias": {"logit_bias": {7: 3.0}},
    "allowed ids": {"allowed_token_ids": list(range(20, 60))},
}
"""What only the host can sample."""

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "greedy": (greedy(), {}),
    "seeded": (seeded(top_p=0.9), {}),
    "samples that fork": (seeded(n=4), {}),
    "more samples than slots": (seeded(n=5), {"max_num_seqs": 3}),
    "one token": (greedy(1), {}),
    "one token of many samples": (seeded(1, n=5), {"max_num_seqs": 3}),
    "two tokens": (greedy(2), {}),
    "two tokens of many samples": (seeded(2, n=5), {"max_num_seqs": 3}),
    "one slot": (MIXED, {"max_num_seqs": 1}),
    "log-probabilities of the sampled": (seeded(logprobs=0), {}),
    "lengths that differ": (MIXED, {}),
    "chunks": (MIXED, {"max_num_batched_tokens": 5, "max_num_seqs": 4}),
    "preemption": (MIXED, {"num_pages": 7, "max_num_seqs": 4}),
    "preemption, chunks, no cache": (
        MIXED,
        {"num_pages": 7, "max_num_seqs": 4, "max_num_batched_tokens": 6, "enable_prefix_caching": False},
    ),
    "up to the model's length": (greedy(None), {"max_model_len": 30}),
    "processed log-probabilities": (seeded(logprobs=0, top_k=5), {"logprobs_mode": "processed_logprobs"}),
    **{f"beside {name}": ([*MIXED[:3], greedy(7, **options), MIXED[3]], {}) for name, options in HOST.items()},
    **{f"only {name}": (greedy(7, **options), {}) for name, options in HOST.items()},
}


@pytest.mark.parametrize("name", list(CASES))
def test_results_are_those_of_the_synchronous_engine(name: str, stock: Any) -> None:
    params, options = CASES[name]
    results, watches = [], []
    for ahead in (False, True):
        model = wrap(stock, ahead, **options)
        watches.append(Watch.over(model.engine))
        # The second time from the prefix cache, as far as that reaches.
        results.append([told(output) for _ in range(2) for output in model.generate_many(PROMPTS, params)])
        if name.startswith("preemption"):
            assert model.engine.scheduler.stats.num_preemptions > 0
        assert_landed(model.engine)
    assert results[0] == results[1]
    assert not any(watches[0].ahead)
    held = name.startswith(("only", "processed", "one token"))
    assert any(watches[1].ahead) != held, "nothing was launched ahead" if not held else "launched without its token"


@pytest.mark.parametrize("family", ["Gemma2", "GptOss", "Qwen3Moe", "Mistral"])
def test_other_families(family: str) -> None:
    stock = make_model(family)
    prompts = make_prompts([1, 9, 30])
    model = hf_paged.wrap(copy.deepcopy(stock), page_size=8, num_pages=14, max_num_seqs=4, async_scheduling=True)
    found = [output.outputs[0].token_ids for output in model.generate_many(prompts, greedy(20))]
    assert found == [stock_greedy(stock, prompt, 20) for prompt in prompts]
    assert_landed(model.engine)


def test_generate_is_transformers_own(stock: Any, model: Any) -> None:
    """Also with an end-of-sequence id that ends rows at different steps, and with processors of transformers."""
    batch = left_pad(PROMPTS[1:])
    free = stock.generate(**batch, do_sample=False, max_new_tokens=20)[:, batch["input_ids"].shape[1] :]
    options: list[dict[str, Any]] = [{}, {"eos_token_id": int(free[1, 6])}, {"repetition_penalty": 1.4}]

    class Forbid(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores.index_fill(1, input_ids[0, -1:] % 7, -torch.inf)

    for more in options:
        more = {"do_sample": False, "max_new_tokens": 20} | more
        assert torch.equal(model.generate(**batch, **more), stock.generate(**batch, **more))
    one = left_pad(PROMPTS[2:3])
    own = {"logits_processor": LogitsProcessorList([Forbid()]), "do_sample": False, "max_new_tokens": 9}
    assert torch.equal(model.generate(**one, **own), stock.generate(**one, **own))
    assert_landed(model.engine)


def test_simulated_traffic_with_samples_and_a_small_pool() -> None:
    engine = make_engine(
        num_pages=20, max_num_seqs=7, max_num_batched_tokens=12, max_model_len=32, paged=True, lookahead=True
    )
    watch = Watch.over(engine)
    done = Simulation(engine, 400, wave=30, seed=11).run()
    assert done.preemptions > 0
    assert sum(watch.ahead) > len(watch.ahead)
    assert_landed(engine)


# ---- the end of a sequence is seen one step late -------------------------------------------------------


def first_new(tokens: list[int], begin: int) -> int:
    """The first place from `begin` on whose token was not there before."""
    return next(i for i in range(begin, len(tokens)) if tokens[i] not in tokens[:i])


@pytest.mark.parametrize("how", ["id", "end of sequence", "text", "text that is kept"])
@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_nothing_after_a_stop_is_reported(
    how: str, kind: RequestOutputKind, stock: Any, expected: list[list[int]]
) -> None:
    """Beside a request that goes on, so that the step after the stop is really in the air when it is seen."""
    free = expected[3]
    text = TOKENIZER.decode(free, skip_special_tokens=True)
    at = first_new(free, 6)
    stop = next(text[i : i + 3] for i in range(8, 20) if text.find(text[i : i + 3]) == i)
    model = wrap(stock)
    options: dict[str, Any] = {"stop_token_ids": [free[at]]}
    if how == "end of sequence":
        model.generation_config.eos_token_id = free[at]
        options = {"ignore_eos": False}
    elif how != "id":
        options = {"stop": stop, "include_stop_str_in_output": how.endswith("kept")}
    engine = model.engine
    watch = Watch.over(engine)
    mine = engine.add_request(PROMPTS[3], greedy(24, output_kind=kind, **options))
    other = engine.add_request(PROMPTS[2], greedy(24, output_kind=RequestOutputKind.FINAL_ONLY))
    outputs: list[RequestOutput] = []
    while engine.has_unfinished():
        outputs += engine.step()
    assert outputs[-1].request_id == other
    assert outputs[-1].outputs[0].token_ids == expected[2]
    own = [output for output in outputs if output.request_id == mine]
    assert [output.finished for output in own] == [False] * (len(own) - 1) + [True]
    end = own[-1].outputs[0]
    assert end.finish_reason == "stop"
    joined = [token for output in own for c in output.outputs for token in c.token_ids]
    tokens = joined if kind is RequestOutputKind.DELTA else end.token_ids
    shown = "".join(c.text for output in own for c in output.outputs)
    shown = shown if kind is RequestOutputKind.DELTA else end.text
    if how in ("id", "end of sequence"):
        assert tokens == free[: at + 1]
        assert shown == TOKENIZER.decode(free[:at], skip_special_tokens=True)
    else:
        assert shown == text[: text.find(stop) + len(stop) * how.endswith("kept")]
        assert tokens == free[: len(tokens)]
        assert stop not in TOKENIZER.decode(tokens[:-1], skip_special_tokens=True)
        assert stop in TOKENIZER.decode(tokens, skip_special_tokens=True)
    late = [batch for batch in watch.batches if any(s.request.request_id == mine for s in batch.decodes)]
    assert len(late) == len(tokens), "one step more than needed was computed for it, and no more"
    thrown_away = 1
    assert engine.stats.generation_tokens == sum(len(batch.sampled()) for batch in watch.batches) - thrown_away
    assert_landed(engine)


def test_the_last_step_is_not_computed_where_its_end_is_known(model: Any) -> None:
    """max_tokens is seen coming: nothing is launched for a sequence whose last token is in the air."""
    watch = Watch.over(model.engine)
    model.generate_many(PROMPTS, [greedy(n) for n in (1, 2, 3, 7, 7)])
    assert sum(len(batch.sampled()) for batch in watch.batches) == 1 + 2 + 3 + 7 + 7


def test_a_request_comes_while_a_wasted_row_is_in_the_air(stock: Any, expected: list[list[int]]) -> None:
    """It takes over the slot and the pages that the row still writes to."""
    for at in range(2, 10):
        stop = first_new(expected[4], at)
        model = wrap(stock, num_pages=10, max_num_seqs=2)
        engine = model.engine
        short = engine.add_request(PROMPTS[4], greedy(24, stop_token_ids=[expected[4][stop]]))
        long = engine.add_request(PROMPTS[1], greedy(24))
        last: dict[str, RequestOutput] = {}
        while short not in last or not last[short].finished:
            last |= {output.request_id: output for output in engine.step()}
        assert engine._flight is not None
        assert any(s.finished for s in engine._flight.batch.decodes), "no wasted row"
        late = engine.add_request(PROMPTS[3], greedy(20))
        last |= drain(engine)
        assert last[short].outputs[0].token_ids == expected[4][: stop + 1]
        assert last[long].outputs[0].token_ids == expected[1]
        assert last[late].outputs[0].token_ids == expected[3][:20]
        assert_landed(engine)


def test_the_prefix_cache_holds_what_the_synchronous_one_holds(stock: Any) -> None:
    """A second turn of a chat finds the first one's answer, and so does the same prompt again."""
    found = []
    for ahead in (False, True):
        model, cached = wrap(stock, ahead), list[list[int]]()
        prompts = [list(prompt) for prompt in PROMPTS]
        for _ in range(3):
            outputs = model.generate_many(prompts, greedy(13))
            cached.append([output.num_cached_tokens for output in outputs])
            prompts = [p + o.outputs[0].token_ids + [7, 8] for p, o in zip(prompts, outputs, strict=True)]
        found.append(cached)
        assert_landed(model.engine)
    assert found[0] == found[1]
    # All but the last token of a turn was computed; of that, whole pages are found.
    assert found[0][1] == [(len(prompt) + 12) // 8 * 8 for prompt in PROMPTS]


def test_prompts_that_arrive_in_the_middle_find_pages_that_are_full(stock: Any, expected: list[list[int]]) -> None:
    model = wrap(stock)
    engine = model.engine
    engine.add_request(PROMPTS[4], greedy(24), request_id="first")
    for _ in range(4):
        engine.step()
    engine.add_request(PROMPTS[4], greedy(24), request_id="second")
    last = drain(engine)
    assert last["second"].num_cached_tokens == 16, "24 tokens are three pages, and the last token is always computed"
    assert [last[name].outputs[0].token_ids for name in ("first", "second")] == [expected[4]] * 2
    assert_landed(engine)


# ---- aborts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", range(6))
@pytest.mark.parametrize("pages", [128, 9])
def test_an_abort_in_mid_flight(when: int, pages: int, stock: Any, expected: list[list[int]]) -> None:
    engine = wrap(stock, num_pages=pages, max_num_seqs=4).engine
    ids = [engine.add_request(prompt, greedy(20)) for prompt in PROMPTS]
    outputs = [output for _ in range(when) for output in engine.step()]
    engine.abort(ids[1])
    late = engine.add_request(PROMPTS[0], seeded(9, n=2))
    last = {output.request_id: output for output in outputs} | drain(engine)
    gone = last[ids[1]].outputs[0]
    assert gone.finish_reason == "abort"
    assert len(gone.token_ids) == when
    assert gone.token_ids == expected[1][:when]
    for place in (0, 2, 3, 4):
        assert last[ids[place]].outputs[0].token_ids == expected[place][:20]
    alone = wrap(stock, ahead=False).generate_many([PROMPTS[0]], seeded(9, n=2))[0]
    assert [c.token_ids for c in last[late].outputs] == [c.token_ids for c in alone.outputs]
    assert_landed(engine)


@pytest.mark.parametrize("when", [1, 2, 5])
def test_everything_is_aborted_in_mid_flight(when: int, model: Any, expected: list[list[int]]) -> None:
    """Nothing stays in the air, where it would hold on to the device's memory and be counted as work later."""
    engine = model.engine
    ids = [engine.add_request(prompt, greedy(20)) for prompt in PROMPTS]
    for _ in range(when):
        engine.step()
    engine.abort(ids)
    engine.step()
    assert_landed(engine)
    outputs = model.generate_many(PROMPTS, greedy(20))
    assert [output.outputs[0].token_ids for output in outputs] == [tokens[:20] for tokens in expected]
    assert_landed(engine)


def test_an_iterator_is_closed_early(model: Any, expected: list[list[int]]) -> None:
    engine = model.engine
    for taken in range(1, 5):
        running = engine.run([engine.intake.request(prompt, greedy(20)) for prompt in PROMPTS])
        for _ in range(taken):
            next(running)
        running.close()
        assert_landed(engine)
    stream = model.stream("tea for two", greedy(100))
    next(stream)
    stream.close()
    assert_landed(engine)
    outputs = model.generate_many(PROMPTS, greedy(20))
    assert [output.outputs[0].token_ids for output in outputs] == [tokens[:20] for tokens in expected]


# ---- requests that need the host -----------------------------------------------------------------------


@pytest.mark.parametrize("name", list(HOST))
def test_a_request_that_needs_the_host_suspends_lookahead(name: str, stock: Any) -> None:
    """It comes while others run ahead; when it is done they run ahead again. All as without lookahead."""
    results = []
    for ahead in (False, True):
        engine = wrap(stock, ahead).engine
        watch = Watch.over(engine)
        ids = [engine.add_request(prompt, seeded(24, n=2)) for prompt in PROMPTS[:2]]
        last: dict[str, RequestOutput] = {}
        for _ in range(4):
            last |= {output.request_id: output for output in engine.step()}
        before = len(watch.ahead)
        ids.append(engine.add_request(PROMPTS[3], greedy(7, **HOST[name])))
        while ids[2] not in last or not last[ids[2]].finished:
            last |= {output.request_id: output for output in engine.step()}
        between = len(watch.ahead)
        last |= drain(engine)
        assert not any(watch.ahead[before:between])
        assert any(watch.ahead[:before]) == any(watch.ahead[between:]) == ahead
        results.append([told(last[i]) for i in ids])
        assert_landed(engine)
    assert results[0] == results[1]


@pytest.mark.parametrize("end", ["length", "abort", "error"])
def test_lookahead_begins_when_the_last_that_needs_the_host_is_gone(
    end: str, stock: Any, expected: list[list[int]]
) -> None:
    def fails(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        if end == "error" and len(ids) == 4:
            raise ValueError("the processor's own fault")
        return logits

    engine = wrap(stock).engine
    watch = Watch.over(engine)
    host = [engine.add_request(PROMPTS[i], greedy(6 + i, logits_processors=[fails])) for i in (0, 1)]
    engine.step()
    ids = [engine.add_request(PROMPTS[i], greedy(24)) for i in (2, 3)]
    last: dict[str, RequestOutput] = {}
    for step in range(40):
        if end == "abort" and step == 3:
            engine.abort(host)
        held = bool(engine._held)
        assert held == any(request_id in engine._requests for request_id in host)
        last |= {output.request_id: output for output in engine.step()}
        if held:
            assert not any(watch.ahead)
    assert any(watch.ahead)
    assert not engine.has_unfinished()
    assert [last[i].outputs[0].token_ids for i in ids] == expected[2:4]
    assert {last[i].outputs[0].finish_reason for i in host} == {end}
    assert_landed(engine)


# ---- failures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("late", [False, True])
def test_a_processors_fault_is_its_requests_own(n: int, late: bool, stock: Any, expected: list[list[int]]) -> None:
    def fails(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(ids) >= 3:
            raise ZeroDivisionError("the processor's own fault")
        return logits

    engine = wrap(stock).engine
    ids = [engine.add_request(PROMPTS[i], greedy(20)) for i in (0, 1, 4)]
    last: dict[str, RequestOutput] = {}
    for _ in range(3 * late):
        last |= {output.request_id: output for output in engine.step()}
    bad = engine.add_request(PROMPTS[2], greedy(20, n=n, logits_processors=[fails]))
    last |= drain(engine)
    assert isinstance(last[bad].error, ZeroDivisionError)
    assert {c.finish_reason for c in last[bad].outputs} == {"error"}
    assert last[bad].outputs[0].token_ids == expected[2][:3]
    assert [last[i].outputs[0].token_ids for i in ids] == [expected[i][:20] for i in (0, 1, 4)]
    assert_landed(engine)


def told_apart(expected: list[list[int]], place: int) -> list[int]:
    """Places in an answer whose token stands nowhere before it, nor in any other prompt or answer."""
    others = {token for i, tokens in enumerate(expected) if i != place for token in tokens + PROMPTS[i]}
    mine = expected[place]
    return [i for i, token in enumerate(mine) if token not in others | set(PROMPTS[place] + mine[:i])]


@pytest.mark.parametrize("n", [1, 3])
def test_nan_logits_end_their_request_alone(n: int, model: Any, expected: list[list[int]]) -> None:
    """The embedding of a token that it generates is NaN, so its second step from there on is computed in vain."""
    place = next(i for i in range(5) if told_apart(expected, i))
    at = told_apart(expected, place)[0]
    engine = model.engine
    weight, bad = model.model.embed_tokens.weight, expected[place][at]
    kept = weight.data[bad].clone()
    weight.data[bad] = torch.nan
    watch = Watch.over(engine)
    ids = [engine.add_request(prompt, greedy(24, n=n if i == place else 1)) for i, prompt in enumerate(PROMPTS)]
    last: dict[str, RequestOutput] = {}
    while ids[place] not in last or not last[ids[place]].finished:
        last |= {output.request_id: output for output in engine.step()}
    storage = engine.executor.storage
    assert all(bool(torch.isfinite(pool).all()) for pool in (*storage.keys, *storage.values)), "pages were not wiped"
    last |= drain(engine)
    assert any(watch.ahead)
    for i, request_id in enumerate(ids):
        if i != place:
            assert last[request_id].error is None
            assert last[request_id].outputs[0].token_ids == expected[i]
    failed = last[ids[place]]
    assert failed.request_id in str(failed.error)
    assert "nan" in str(failed.error).lower()
    assert [c.finish_reason for c in failed.outputs] == ["error"] * n
    assert failed.outputs[0].token_ids == expected[place][: at + 1]
    assert_landed(engine)
    weight.data[bad] = kept
    assert [o.outputs[0].token_ids for o in model.generate_many(PROMPTS, greedy(24))] == expected


@pytest.mark.parametrize("pages", [4, 5])
def test_nan_in_the_air_when_its_sequence_is_preempted(pages: int, stock: Any) -> None:
    """The younger of two runs into NaN. Its pages have a new owner before anybody knows what is in them."""
    ran = 0
    for lengths in [(6, 1), (6, 2), (7, 1), (7, 2), (7, 3), (8, 4)]:
        prompts = make_prompts(list(lengths), seed=10 * lengths[0] + lengths[1])
        elder, younger = (stock_greedy(stock, prompt, 10) for prompt in prompts)
        for at, bad in enumerate(younger[:4]):
            if bad in elder + prompts[0] + prompts[1] + younger[:at] or -(-(lengths[0] + 9) // 4) > pages:
                continue
            model = wrap(stock, page_size=4, num_pages=pages, max_num_seqs=4, enable_prefix_caching=False)
            assert model.engine is not None  # made, and found fit, while the weights are good
            model.model.embed_tokens.weight.data[bad] = torch.nan
            mine, failed = model.generate_many(prompts, greedy(10))
            assert mine.error is None
            assert mine.outputs[0].token_ids == elder
            assert failed.error is not None
            assert failed.outputs[0].token_ids == younger[: at + 1]
            assert_landed(model.engine)
            ran += 1
    assert ran > 5


def test_nan_in_the_air_when_its_request_is_aborted(stock: Any, expected: list[list[int]]) -> None:
    """Nobody looks at its logits any more; who gets its pages must not be hurt by what is left there."""
    model = wrap(stock, num_pages=6, max_num_seqs=2, enable_prefix_caching=False)
    engine = model.engine
    bad = next(i for i in range(3, VOCAB) if not any(i in ids for ids in (*PROMPTS, *expected)))
    model.model.embed_tokens.weight.data[bad] = torch.nan
    for length in (1, 9, 25):
        gone = engine.add_request([bad] * length, greedy(8))
        mine = engine.add_request(PROMPTS[1], greedy(24))
        engine.abort(gone)
        assert drain(engine)[mine].outputs[0].token_ids == expected[1]
        gone = engine.add_request(PROMPTS[3][:length] + [bad], greedy(8))
        engine.executor.looks_ahead = lambda request: True
        engine._read_inbox()
        engine._flight = engine._launch()  # on its way, and not seen
        engine.abort(gone)
        engine.step()
        mine = engine.add_request(PROMPTS[1], greedy(24))
        assert drain(engine)[mine].outputs[0].token_ids == expected[1]
    assert_landed(engine)


def fail_at(
    monkeypatch: pytest.MonkeyPatch, target: Any, name: str, calls: set[int], error: BaseException
) -> list[int]:
    """These calls of a method, counted from 1, raise. Returns the calls so far."""
    original, made = getattr(target, name), [0]

    def flaky(*args: Any, **kwargs: Any) -> Any:
        made[0] += 1
        if made[0] in calls:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, flaky)
    return made


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("call", [1, 2, 3, 6])
def test_interrupted_with_a_step_in_the_air(
    call: int, error: type[BaseException], model: Any, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = model.engine
    other = engine.add_request(PROMPTS[0], greedy(20))  # somebody else's, which must survive
    engine.step()
    with monkeypatch.context() as patch:
        fail_at(patch, engine.executor._runner, "forward", {call}, error("now"))
        with pytest.raises(error, match="now"):
            model.generate_many(PROMPTS, [greedy(12), seeded(9, n=3), *[greedy(12)] * 3])
    assert engine._flight is None
    assert drain(engine)[other].outputs[0].token_ids == expected[0][:20]
    assert_landed(engine)
    assert [o.outputs[0].token_ids for o in model.generate_many(PROMPTS, greedy(24))] == expected


# ---- out of memory -------------------------------------------------------------------------------------


def out_of_memory(engine: Engine, calls: set[int], late: bool) -> list[int]:
    """These launches fail; with `late`, after the step has been computed. Returns the number of launches so far."""
    launch, made = engine.executor.launch, [0]

    def flaky(batch: Batch) -> Callable[[], StepResult]:
        made[0] += 1
        if made[0] in calls:
            if late:
                launch(batch)
            raise torch.OutOfMemoryError("out of memory")
        return launch(batch)

    engine.executor.launch = flaky  # type: ignore[method-assign]
    return made


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_out_of_memory_halves_the_batch_and_goes_on(lookahead: bool, late: bool) -> None:
    """At whatever step, with one in the air or none, nobody notices but by the time it takes."""
    in_the_air = 0
    for failing in range(1, 60):
        engine = start(lookahead)
        made = out_of_memory(engine, {failing}, late)
        shrink, flights = engine._shrink, []

        def watched(engine: Engine = engine, shrink: Any = shrink, flights: list = flights) -> None:
            flights.append(engine._flight)
            known = [sequence.num_generated for sequence in flights[-1].batch.sampled()] if flights[-1] else []
            shrink()
            if flights[-1]:  # what was on its way has landed
                landed = [sequence.num_generated for sequence in flights[-1].batch.sampled()]
                assert landed == [count + 1 for count in known]

        engine._shrink = watched  # type: ignore[method-assign]
        outputs: list[RequestOutput] = []
        for _ in range(200):
            if engine.has_unfinished():
                outputs += engine.step()
        check_finished(engine, outputs)
        assert_landed(engine)
        if made[0] < failing:
            assert engine.scheduler.max_num_batched_tokens == 6
            assert in_the_air > 0 or not lookahead
            return
        assert engine.scheduler.max_num_batched_tokens == 3
        assert engine.scheduler.max_num_seqs == 3
        assert len(flights) == 1
        in_the_air += flights[0] is not None
    raise AssertionError("more steps than expected")


@pytest.mark.parametrize("lookahead", [False, True])
def test_out_of_memory_twice_in_a_row_is_raised(lookahead: bool) -> None:
    for failing in range(1, 60):
        engine = start(lookahead)
        made = out_of_memory(engine, {failing, failing + 1}, late=False)
        outputs: list[RequestOutput] = []
        raised = 0
        for _ in range(200):
            if not engine.has_unfinished():
                break
            try:
                outputs += engine.step()
            except torch.OutOfMemoryError:
                raised += 1
                assert engine._flight is None
        check_finished(engine, outputs + engine.step())
        assert_landed(engine)
        if made[0] < failing:
            return
        assert raised == (made[0] > failing)
    raise AssertionError("more steps than expected")


def test_out_of_memory_again_and_again_comes_down_to_single_tokens() -> None:
    engine = start(lookahead=True)
    out_of_memory(engine, {2, 5, 8, 11}, late=False)
    outputs: list[RequestOutput] = []
    for _ in range(400):
        if engine.has_unfinished():
            outputs += engine.step()
    check_finished(engine, outputs)
    assert (engine.scheduler.max_num_batched_tokens, engine.scheduler.max_num_seqs) == (1, 1)


@pytest.mark.parametrize("call", [1, 2, 3, 5])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_model_that_runs_out_of_memory(
    call: int,
    ahead: bool,
    stock: Any,
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = wrap(stock, ahead, max_num_batched_tokens=40)
    engine = model.engine
    caplog.set_level(logging.WARNING, logger="hf_paged")
    with monkeypatch.context() as patch:
        fail_at(patch, engine.executor._runner, "forward", {call}, torch.OutOfMemoryError("CUDA out of memory"))
        outputs = model.generate_many(PROMPTS, [greedy(24), greedy(24), seeded(9, n=2), greedy(24), greedy(24)])
    for place in (0, 1, 3, 4):
        assert outputs[place].outputs[0].token_ids == expected[place]
    again = wrap(stock, ahead=False).generate_many([PROMPTS[2]], seeded(9, n=2))[0]
    assert [c.token_ids for c in outputs[2].outputs] == [c.token_ids for c in again.outputs]
    assert engine.scheduler.max_num_batched_tokens == 20
    said = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    assert len(said) == 1
    assert "20 tokens" in said[0]
    assert_landed(engine)

    with monkeypatch.context() as patch:
        fail_at(patch, engine.executor._runner, "forward", {call, call + 1}, torch.OutOfMemoryError("again"))
        with pytest.raises(torch.OutOfMemoryError, match="again"):
            model.generate_many(PROMPTS, greedy(12))
    assert_landed(engine)
    assert [o.outputs[0].token_ids for o in model.generate_many(PROMPTS, greedy(24))] == expected
    assert engine.scheduler.max_num_batched_tokens == 40, "an idle engine goes back to what was configured"
    assert_landed(engine)


# ---- sleep ---------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["synchronous", "lookahead"])
def sleeper(request: pytest.FixtureRequest, stock: Any) -> Any:
    return wrap(stock, request.param)


def test_sleep_gives_the_memory_back_and_forgets_prefixes(sleeper: Any, expected: list[list[int]]) -> None:
    engine = sleeper.engine
    for _ in range(2):
        assert [o.outputs[0].token_ids for o in sleeper.generate_many(PROMPTS, greedy(24))] == expected
        assert sleeper.generate_many(PROMPTS[4:], greedy(2))[0].num_cached_tokens == 16
        storage = engine.executor.storage
        pools = [weakref.ref(pool) for pool in (*storage.keys, *storage.values)]
        pointers = [pool.untyped_storage()._weak_ref() for pool in (*storage.keys, *storage.values)]
        del storage
        engine.sleep()
        assert [pool() for pool in pools] == [None] * len(pools)
        assert all(torch.UntypedStorage._new_with_weak_ptr(pointer) is None for pointer in pointers)
        for pointer in pointers:
            torch.UntypedStorage._free_weak_ref(pointer)
        assert engine.scheduler.tree.num_pages == 0
        output = sleeper.generate_many(PROMPTS[4:], greedy(24))[0]
        assert output.num_cached_tokens == 0
        assert output.outputs[0].token_ids == expected[4]
    assert_landed(engine)


@pytest.mark.parametrize("when", [0, 1, 3])
def test_sleep_refuses_while_requests_are_unfinished(when: int, sleeper: Any, expected: list[list[int]]) -> None:
    engine = sleeper.engine
    ids = [engine.add_request(prompt, greedy(24)) for prompt in PROMPTS]
    for _ in range(when):
        engine.step()
    with pytest.raises(RuntimeError, match="5 requests are unfinished"):
        engine.sleep()
    last = drain(engine)
    assert [last[i].outputs[0].token_ids for i in ids] == expected
    engine.sleep()
    assert engine.executor.storage is None


def test_sleep_after_an_abort_in_mid_flight(sleeper: Any, expected: list[list[int]]) -> None:
    engine = sleeper.engine
    ids = [engine.add_request(prompt, greedy(24)) for prompt in PROMPTS]
    for _ in range(3):
        engine.step()
    engine.abort(ids)
    pool = weakref.ref(engine.executor.storage.keys[0])
    engine.sleep()
    assert pool() is None
    engine.step()  # the aborted ones' last outputs
    assert_landed(engine)
    assert [o.outputs[0].token_ids for o in sleeper.generate_many(PROMPTS, greedy(24))] == expected


def test_sleeping_and_waking_more_than_once_is_harmless(sleeper: Any, expected: list[list[int]]) -> None:
    engine = sleeper.engine
    engine.wake_up()  # it never slept
    storage = engine.executor.storage
    engine.wake_up()
    assert engine.executor.storage is storage
    engine.sleep()
    engine.sleep()
    engine.wake_up()
    engine.wake_up()
    assert [o.outputs[0].token_ids for o in sleeper.generate_many(PROMPTS, greedy(24))] == expected


def test_a_sleeping_engine_notices_new_weights(sleeper: Any, stock: Any) -> None:
    sleeper.generate_many(PROMPTS, greedy(4))
    sleeper.engine.sleep()
    with torch.no_grad():
        sleeper.lm_head.weight.mul_(-1)
    twin = copy.deepcopy(stock)
    with torch.no_grad():
        twin.lm_head.weight.mul_(-1)
    found = [output.outputs[0].token_ids for output in sleeper.generate_many(PROMPTS, greedy(12))]
    assert found == [stock_greedy(twin, prompt, 12) for prompt in PROMPTS]


def test_other_levels_of_sleep_are_refused(sleeper: Any) -> None:
    with pytest.raises(ValueError, match="level must be 1"):
        sleeper.engine.sleep(level=2)
    assert sleeper.engine.executor.storage is not None


def test_warming_up_wakes(sleeper: Any) -> None:
    sleeper.engine.sleep()
    sleeper.engine.warm_up()
    assert sleeper.engine.executor.storage is not None


def test_unwrapping_a_sleeping_model(sleeper: Any, expected: list[list[int]]) -> None:
    sleeper.generate_many(PROMPTS, greedy(2))
    sleeper.engine.sleep()
    hf_paged.unwrap(sleeper)
    assert [stock_greedy(sleeper, prompt, 24) for prompt in PROMPTS] == expected


def test_waking_takes_no_time(sleeper: Any) -> None:
    sleeper.engine.sleep()
    begin = time.monotonic()
    sleeper.engine.wake_up()
    assert time.monotonic() - begin < 1.0


# ---- the scheduler one step ahead ----------------------------------------------------------------------


@dataclass
class AheadDriver(Driver):
    """Keeps one step in flight: schedules and launches the next one, then hands out the last one's tokens."""

    flight: Batch | None = None
    unknown: dict[Sequence, list[int]] = field(default_factory=lambda: defaultdict(list))
    """What steps in flight sample, for each sequence in order: the device's secret until they land."""
    ahead: int = 0

    def all_tokens(self, sequence: Sequence) -> list[int]:
        return sequence.tokens + self.unknown[sequence]

    def ends(self, sequence: Sequence) -> bool:
        """Whether its last token is in flight, as far as the scheduler can know."""
        return sequence.num_pending > 0 and len(self.all_tokens(sequence)) >= (
            sequence.num_prompt + sequence.request.max_tokens
        )

    def recover(self) -> None:
        self.flight = None
        self.unknown.clear()
        super().recover()
        assert not any(sequence.num_pending for sequence in self.sequences())

    def step(self, failure: str | None = None, failure_place: int = 0) -> None:
        self.steps += 1
        scheduler = self.scheduler
        for sequence in self.sequences():
            assert sequence.num_pending in (0, 1)
            assert sequence.finished or sequence.num_pending == len(self.unknown[sequence])
        before, tokens, preemptions = list(scheduler.running), self.tokens(), scheduler.stats.num_preemptions
        batch = scheduler.schedule()
        for slot, index, page in batch.page_writes:
            self.table[slot, index] = page
        assert batch or self.flight or not scheduler.has_unfinished(), "nothing is done, and something is left to do"
        assert self.tokens() == tokens
        self.check_batch(batch)
        self.check_admission(before, batch, preempted=scheduler.stats.num_preemptions > preemptions)
        self.check_books()
        contents = {pair: self.contents(pair[0]) for pair in batch.copies}
        for (_, target), content in contents.items():
            self.shadow.update({(target, offset): held for offset, held in content.items()})
        self.check_shadow()
        if failure == "execute":
            return self.recover()
        self.ahead += sum(sequence.num_pending for sequence in batch.decodes)
        for sequence, begin, length in self.work(batch):
            for position in range(begin, begin + length):
                index, offset = divmod(position, scheduler.page_size)
                held = tuple(self.all_tokens(sequence)[: position + 1])
                self.shadow[self.table[sequence.slot, index], offset] = held
        for sequence in batch.sampled():
            grown = Sequence(sequence.request, sequence.index, self.all_tokens(sequence), sequence.num_prompt)
            self.unknown[sequence].append(next_token(grown))
        scheduler.advance(batch)
        self.check_books()
        self.check_shadow()
        if failure == "advance":
            return self.recover()
        flight, self.flight = self.flight, batch if batch else None
        for place, sequence in enumerate(flight.sampled() if flight else []):
            if failure == "append" and place == failure_place:
                return self.recover()
            token = self.unknown[sequence].pop(0)
            if sequence.finished:
                continue
            scheduler.append(sequence, token)
            if sequence.num_generated == self.length(sequence):
                scheduler.finish(sequence, "length")
        self.check_books()
        return None

    def drain(self, most: int) -> None:
        for _ in range(most):
            if not self.scheduler.has_unfinished():
                break
            self.step()
        assert not self.scheduler.has_unfinished(), f"not finished after {most} steps more"
        if self.flight is not None:  # computed in vain
            self.step()
        assert self.flight is None
        self.check_end()
        assert not any(self.unknown.values())
        for sequence in self.sequences():
            # One that ended before its max_tokens has a token in a step computed in vain.
            wasted = sequence.finished and sequence.num_generated < sequence.request.max_tokens
            assert sequence.num_pending <= int(wasted)

    # ---- what must hold --------------------------------------------------------------------------------

    def check_batch(self, batch: Batch) -> None:
        scheduler, size = self.scheduler, self.scheduler.page_size
        assert batch.num_tokens <= scheduler.max_num_batched_tokens
        assert len(scheduler.running) <= scheduler.max_num_seqs
        work = self.work(batch)
        assert Counter(id(s) for s, _, _ in work) == Counter(id(s) for s in scheduler.running if not self.ends(s)), (
            "all that run, once each, but for those whose last token is on its way"
        )
        writers: dict[int, Sequence] = {}
        for sequence, begin, length in work:
            end = begin + length
            assert length >= 1
            assert begin == sequence.num_computed
            assert end <= len(self.all_tokens(sequence))
            assert len(sequence.pages) == -(-end // size), "no page before it is needed"
            for index in range(begin // size, len(sequence.pages)):
                page = sequence.pages[index]
                assert scheduler.pool.refs(page) == 1, f"{sequence.order} writes page {page}, which others see"
                assert writers.setdefault(page, sequence) is sequence
        for sequence in batch.decodes:
            assert sequence.num_computed == len(self.all_tokens(sequence)) - 1
        for chunk in batch.chunks:
            sequence, expected = chunk.sequence, []
            assert not sequence.num_pending, "prefill needs tokens that are known"
            if chunk.start + chunk.length == len(sequence.tokens):
                expected = [sequence] if sequence.request.forked else sequence.request.sequences
            assert chunk.samples == expected
        for sequence in scheduler.running:
            row = [self.table.get((sequence.slot, index)) for index in range(len(sequence.pages))]
            assert row == sequence.pages, "the executor's block table differs"
        assert len({target for _, target in batch.copies}) == len(batch.copies)

    def computed_by_another(self, sequence: Sequence, batch: Batch) -> bool:
        """Whoever waits for its own token may be overtaken too."""
        return sequence.num_pending > 0 or super().computed_by_another(sequence, batch)

    def check_shadow(self) -> None:
        size = self.scheduler.page_size
        for sequence in self.scheduler.running:
            tokens = self.all_tokens(sequence)
            for position in range(sequence.num_computed):
                held = self.shadow.get((sequence.pages[position // size], position % size))
                assert held == tuple(tokens[: position + 1]), (
                    f"position {position} of sequence {sequence.order} holds the keys of {held}"
                )


def twin_of(scheduler: Scheduler) -> Scheduler:
    names = ("num_pages", "page_size", "max_num_seqs", "max_num_batched_tokens", "enable_prefix_caching")
    return Scheduler(**{name: getattr(scheduler, name) for name in names})


def play(driver: Driver, events: list[tuple]) -> None:
    for what, value in events:
        if what == "add":
            driver.add(value)
        elif what == "step":
            for _ in range(value):
                driver.step()
        elif what == "fail":
            driver.step(*value)
        elif what == "abort" and driver.requests:
            driver.abort(driver.requests[value % len(driver.requests)])
        elif what == "recover":
            driver.recover()
        elif what == "flush":
            driver.scheduler.flush_prefix_cache()
            driver.check_books()


def work_of(driver: Driver) -> int:
    return sum(len(a.prompt) + length for a in driver.arrivals.values() for length in a.lengths)


@many
@given(schedulers(), st.data())
def test_one_step_ahead_everyone_gets_the_same_tokens(scheduler: Scheduler, data: st.DataObject) -> None:
    adds = arrivals(st.just(0)).map(lambda arrival: ("add", arrival))
    events = data.draw(st.lists(st.one_of(adds, adds, steps), max_size=20))
    ahead, plain = AheadDriver(twin_of(scheduler)), Driver(scheduler)
    for driver in (ahead, plain):
        play(driver, events)
        # A step may do nothing but land the last one: then the next does something.
        driver.drain(2 * work_of(driver) + 2)
    assert ahead.tokens() == plain.tokens()
    assert ahead.refused == plain.refused


@many
@given(schedulers(), st.data())
def test_one_step_ahead_whatever_happens_everyone_finishes(scheduler: Scheduler, data: st.DataObject) -> None:
    """With priorities, aborts, flushes, and failures while a step is in flight."""
    adds = arrivals(st.integers(-1, 1)).map(lambda arrival: ("add", arrival))
    events = data.draw(st.lists(st.one_of(adds, adds, steps, steps, failures, aborts, simple), max_size=30))
    driver = AheadDriver(scheduler)
    play(driver, events)
    driver.drain(work_of(driver) * 3 + 12)


def test_the_driver_does_run_ahead() -> None:
    driver = AheadDriver(Scheduler(num_pages=32, page_size=4, max_num_seqs=4, max_num_batched_tokens=32))
    driver.add(Arrival(prompt=(0, 1, 0, 1, 1), lengths=(7, 3, 7)))
    driver.add(Arrival(prompt=(1, 0), lengths=(8,)))
    driver.drain(40)
    assert driver.ahead == 6 + 3 + 6 + 7
