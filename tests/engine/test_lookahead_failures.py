"""Failures with a step in the air: of a request, of the model, of memory, and Ctrl-C."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lookahead import PROMPTS, Watch, assert_landed, drain, greedy, seeded, wrap
from models.families import VOCAB, make_prompts, stock_greedy
from test_simulation import check_finished, start

from hf_paged import RequestOutput
from hf_paged.engine.batch import Batch
from hf_paged.engine.engine import Engine
from hf_paged.engine.executor import StepResult

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
        engine._flights.append(engine._launch())  # on its way, and not seen
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
    assert not engine._flights
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
            flights.append(engine._flights[0] if engine._flights else None)
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
                assert not engine._flights
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
