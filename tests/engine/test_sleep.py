"""An engine that gives its memory back, with and without lookahead."""

from __future__ import annotations

import copy
import time
import weakref
from typing import Any

import pytest
import torch
from lookahead import PROMPTS, assert_landed, drain, greedy, wrap
from models.families import make_model, stock_greedy

import hf_paged

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


def test_out_of_memory_while_waking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training has the memory: who asked is told, and everything else goes on, now and when there is memory again."""
    model = hf_paged.wrap(make_model("Llama"), page_size=8, num_pages=64)
    greedy = hf_paged.SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    expected = model.generate_many([[1, 2, 3]], greedy)[0].outputs[0].token_ids
    engine, executor = model.engine, model.engine.executor
    engine.sleep()

    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(executor, "wake_up", full)
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                model.generate_many([[1, 2, 3]], greedy)
            assert not engine.has_unfinished()
            engine.sleep()
            engine.weights_updated()
            engine.abort("nobody")
    assert model.generate_many([[1, 2, 3]], greedy)[0].outputs[0].token_ids == expected
    engine.sleep()
    with monkeypatch.context() as patch:
        patch.setattr(executor, "wake_up", full)
        with pytest.raises(torch.OutOfMemoryError):
            model.generate_many([[1, 2, 3]], greedy)
        hf_paged.unwrap(model)
    assert type(model).__mro__[0].__module__.startswith("transformers") and "_hf_paged" not in model.__dict__
