"""A paused engine: nothing is computed, nothing is lost, who waits waits quietly, and nobody waits for himself."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lookahead import PROMPTS, Watch, assert_landed, drain, greedy, seeded, told, wrap
from many_threads import in_threads
from models.families import left_pad, stock_greedy
from simulator import FakeExecutor, make_engine

from hf_paged import RequestOutputKind


@pytest.fixture(params=[False, True], ids=["synchronous", "lookahead"])
def model(request: pytest.FixtureRequest, stock: Any) -> Any:
    return wrap(stock, request.param)


def change(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1.7)


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


# ---- in one thread -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", range(6))
def test_a_pause_changes_no_result(when: int, model: Any) -> None:
    params = [greedy(9), seeded(9, n=3), greedy(1), seeded(9, presence_penalty=0.5, logprobs=1), greedy(5)]
    expected = [told(output) for output in model.generate_many(PROMPTS, params)]
    engine = model.engine
    engine.reset_prefix_cache()
    names = [engine.add_request(prompt, p) for prompt, p in zip(PROMPTS, params, strict=True)]
    last: dict[str, Any] = {}
    for _ in range(when):
        last |= {output.request_id: output for output in engine.step()}
    engine.pause()
    watch = Watch.over(engine)
    pages = [sequence.pages[:] for sequence in engine.scheduler.running]
    last |= {output.request_id: output for output in engine.step()}  # what has landed with the pause
    for _ in range(3):
        assert engine.step() == []
        assert not engine.drive()
    assert not watch.batches
    assert not engine._flights
    assert [sequence.pages for sequence in engine.scheduler.running] == pages
    engine.resume()
    last |= drain(engine)
    assert [told(last[name]) for name in names] == expected
    assert engine.scheduler.stats.num_preemptions == 0
    assert_landed(engine)


def test_the_step_in_the_air_lands_and_is_delivered(stock: Any) -> None:
    model = wrap(stock)
    engine = model.engine
    engine.add_request(PROMPTS[1], greedy(9))
    first = engine.step()
    assert engine._flights
    engine.pause()
    (output,) = engine.step()
    assert len(output.outputs[0].token_ids) == len(first[0].outputs[0].token_ids) + 1
    engine.resume()
    drain(engine)


def test_paused_says_so_and_pauses_do_not_nest(model: Any) -> None:
    engine = model.engine
    assert not engine.paused
    engine.resume()
    for _ in range(2):
        engine.pause()
        assert engine.paused
    engine.resume()
    assert not engine.paused
    assert len(model.generate_many(PROMPTS, greedy(3))) == len(PROMPTS)


def test_requests_are_accepted_and_wait(model: Any, expected: list[list[int]]) -> None:
    engine = model.engine
    engine.pause()
    names = [engine.add_request(prompt, greedy(24)) for prompt in PROMPTS]
    with pytest.raises(ValueError, match="in use"):
        engine.add_request(PROMPTS[0], greedy(), request_id=names[0])
    assert engine.step() == []
    assert engine.scheduler.num_waiting == len(PROMPTS)
    assert engine.has_unfinished()
    engine.resume()
    assert engine.weight_version == 0
    last = drain(engine)
    assert [last[name].outputs[0].token_ids for name in names] == expected


def test_aborts_give_back_what_there_is(model: Any, expected: list[list[int]]) -> None:
    engine = model.engine
    kind = RequestOutputKind.FINAL_ONLY
    names = [engine.add_request(prompt, greedy(24, output_kind=kind)) for prompt in PROMPTS]
    for _ in range(5):
        assert engine.step() == []
    engine.pause()
    waiting = engine.add_request(PROMPTS[0], greedy(24))
    engine.abort([*names[:2], waiting])
    found = {output.request_id: output.outputs[0] for output in engine.step()}
    assert {completion.finish_reason for completion in found.values()} == {"abort"}
    assert found[waiting].token_ids == []
    for name, full in zip(names[:2], expected, strict=False):
        assert found[name].token_ids == full[: len(found[name].token_ids)]
        assert len(found[name].token_ids) >= 5
    assert engine.paused
    engine.resume()
    last = drain(engine)
    assert [last[name].outputs[0].token_ids for name in names[2:]] == expected[2:]
    assert_landed(engine)


def test_who_paused_cannot_wait_for_himself(model: Any) -> None:
    """An error before anything is queued, and not for ever."""
    engine = model.engine
    engine.pause()
    batch = left_pad(PROMPTS[:2])
    calls: list[Callable[[], Any]] = [
        lambda: model.generate_many(PROMPTS, greedy()),
        lambda: next(model.stream(PROMPTS[0], greedy())),
        lambda: model.generate(**batch, do_sample=False, max_new_tokens=3),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"paused the engine.*engine\.resume\(\)"):
            call()
        assert not engine.has_unfinished()
    engine.resume()
    for call in calls:
        call()
    assert_landed(engine)


def test_pausing_while_one_reads_is_an_error_that_aborts(model: Any) -> None:
    outputs = model.engine.run([model.engine.intake.request(PROMPTS[0], greedy(24))])
    next(outputs)
    model.engine.pause()
    with pytest.raises(RuntimeError, match="would wait for itself"):
        for _ in outputs:
            pass
    assert not model.engine.has_unfinished()
    model.engine.resume()
    assert_landed(model.engine)


# ---- weights and memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["noticed", "told", "recompute", "idle"])
def test_weights_that_change_in_a_pause_are_a_new_version(how: str, model: Any, stock: Any) -> None:
    """`resume` looks for itself; what was told of is not counted twice."""
    after = copy.deepcopy(stock)
    change(after)
    engine = model.engine
    model.generate_many(PROMPTS, greedy(3))
    names = [engine.add_request(prompt, greedy(12)) for prompt in PROMPTS if how != "idle"]
    for _ in range(4):
        engine.step()
    engine.pause()
    change(model)
    if how in ("told", "recompute"):
        engine.weights_updated(kv="recompute" if how == "recompute" else "keep")
    engine.resume()
    if how == "idle":
        names = [engine.add_request(prompt, greedy(12)) for prompt in PROMPTS]
    last = drain(engine)
    assert engine.weight_version == 1
    for name, prompt in zip(names, PROMPTS, strict=True):
        completion = last[name].outputs[0]
        assert completion.weight_versions == sorted(completion.weight_versions)
        assert completion.weight_versions[-1] == 1
        old = completion.weight_versions.count(0)
        if how in ("recompute", "idle"):
            ids = completion.token_ids
            assert ids[old:] == stock_greedy(after, prompt + ids[:old], 12 - old)
    assert [o.outputs[0].token_ids for o in model.generate_many(PROMPTS, greedy(9))] == [
        stock_greedy(after, prompt, 9) for prompt in PROMPTS
    ], "nothing that the old weights computed may be cached"


def test_sleep_in_a_pause(model: Any, expected: list[list[int]]) -> None:
    """The pool's memory is given back, and the requests go on from their tokens."""
    engine = model.engine
    names = [engine.add_request(prompt, greedy(24)) for prompt in PROMPTS]
    for _ in range(5):
        engine.step()
    engine.pause()
    engine.sleep()
    assert engine.executor.storage is None
    names.append(engine.add_request(PROMPTS[2], greedy(24)))
    engine.step()
    assert engine.executor.storage is None, "a request alone must not take the memory"
    engine.resume()
    assert engine.executor.storage is not None
    last = drain(engine)
    assert [last[name].outputs[0].token_ids for name in names] == [*expected, expected[2]]
    assert engine.weight_version == 0
    assert_landed(engine)


def test_what_the_device_lost_is_computed_again() -> None:
    """Graphs that are made anew in a pause know no pages."""

    class Moved(FakeExecutor):
        def prepare(self) -> bool:
            return True

    engine = make_engine(lookahead=True)
    engine.executor = Moved(lookahead=True)
    name = engine.add_request([1, 2, 3, 4, 5], greedy(9))
    for _ in range(3):
        engine.step()
    computed = engine.stats.prompt_tokens
    engine.pause()
    engine.resume()
    last = drain(engine)[name].outputs[0].token_ids
    assert len(last) == 9
    assert engine.stats.prompt_tokens > computed + 5
    assert_landed(engine)


# ---- with other threads ------------------------------------------------------------------------------------


def test_threads_wait_for_the_resume_of_another(model: Any, expected: list[list[int]]) -> None:
    """Those that were in the middle, and those that came meanwhile; without turning the processor."""
    engine = model.engine
    results: list[Any] = []
    paused = threading.Event()

    def look(record: Any) -> None:
        if record.step == 6:
            engine.pause()  # from within a step: nobody's own pause
            paused.set()

    engine.observers.append(look)

    def late() -> Any:
        assert paused.wait(30)
        return model.generate_many(PROMPTS, greedy(24))

    def control() -> None:
        assert paused.wait(30)
        wait_for(lambda: len(engine._ids) == 3 * len(PROMPTS))
        wait_for(lambda: engine.paused)
        time.sleep(0.05)
        steps, before = engine.stats.steps, time.process_time()
        time.sleep(0.5)
        results.append((engine.stats.steps - steps, time.process_time() - before))
        engine.resume()

    calls = [lambda: model.generate_many(PROMPTS, greedy(24)), lambda: model.generate_many(PROMPTS, greedy(24)), late]
    *outputs, failed = in_threads(*calls, control)
    assert failed is None
    for found in outputs:
        assert [output.outputs[0].token_ids for output in found] == expected
    steps, cpu = results[0]
    assert steps == 0
    assert cpu < 0.25, "waiting burns the processor"
    assert_landed(engine)


def test_a_waiting_thread_gets_its_aborted_requests(model: Any) -> None:
    engine = model.engine
    engine.pause()
    waiting = threading.Event()

    def generate() -> Any:
        waiting.set()
        return model.generate_many(PROMPTS, greedy(24))

    def control() -> None:
        wait_for(lambda: engine.scheduler.num_waiting == len(PROMPTS))
        engine.abort(list(engine._requests))

    outputs, failed = in_threads(generate, control)
    assert failed is None
    assert [output.outputs[0].finish_reason for output in outputs] == ["abort"] * len(PROMPTS)
    assert engine.paused
    engine.resume()
    assert_landed(engine)


def test_an_interrupt_while_waiting_aborts(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = model.engine
    in_threads(engine.pause)

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.gate._changed, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.generate_many(PROMPTS, greedy(24))
    assert engine.paused
    assert not engine.has_unfinished()
    engine.resume()
    assert_landed(engine)


def test_closing_the_engine_frees_those_who_wait(model: Any) -> None:
    engine = model.engine
    engine.pause()

    def control() -> None:
        wait_for(lambda: engine.scheduler.num_waiting == len(PROMPTS))
        engine.close()

    outputs, failed = in_threads(lambda: model.generate_many(PROMPTS, greedy(24)), control)
    assert failed is None
    assert [output.outputs[0].finish_reason for output in outputs] == ["abort"] * len(PROMPTS)


def test_pauses_at_any_time_among_many_threads(model: Any, expected: list[list[int]]) -> None:
    engine = model.engine
    done = threading.Event()

    def control() -> int:
        pauses = 0
        while not done.is_set():
            engine.pause()
            steps = engine.stats.steps
            time.sleep(0.002)
            assert engine.stats.steps == steps
            engine.resume()
            pauses += 1
            time.sleep(0.004)
        return pauses

    def generate() -> Any:
        return [model.generate_many(PROMPTS, greedy(24)) for _ in range(3)]

    def both() -> Any:
        try:
            return in_threads(generate, generate)
        finally:
            done.set()

    pauses, results = in_threads(control, both)
    assert pauses > 3
    for found in results:
        for outputs in found:
            assert [output.outputs[0].token_ids for output in outputs] == expected
    assert torch.is_grad_enabled()
    assert_landed(engine)
