"""Several replicas, each a real process, behind one engine."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jobs
import pytest
import replica_jobs
from families import make_prompts
from many_threads import in_threads

from hf_paged import SamplingParams
from hf_paged.distributed.errors import ReplicaFailed, ReplicaLost
from hf_paged.distributed.replicas import start, watch
from hf_paged.distributed.replicated import ReplicatedEngine
from hf_paged.llm.replicas import ReplicatedModel
from hf_paged.sampling_params import RequestOutputKind

TIMEOUT_S = 6.0
PROMPTS = make_prompts([5, 23, 70, 11, 3, 40, 17, 9, 30, 30, 4, 12, 25, 6], seed=4)
GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True, logprobs=2)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.9, max_tokens=8, ignore_eos=True, seed=7, n=2)
UNSEEDED = SamplingParams(temperature=1.2, max_tokens=8, n=3)


@pytest.fixture(scope="module")
def alone() -> Any:
    return replica_jobs.build()[0]


@pytest.fixture(scope="module")
def replicated() -> Iterator[Any]:
    model = ReplicatedModel(ReplicatedEngine(start(replica_jobs.build, 2, timeout_s=120), 3, TIMEOUT_S))
    yield model
    model.stop()


def tokens(outputs: Any) -> list[list[list[int]]]:
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


def answers(engine: Any, work: Any) -> list[Any]:
    return [answer for _, answer in engine.call(work)]


def test_as_in_one_process(replicated: Any, alone: Any) -> None:
    """Greedy, with seeds, and without: these come from one generator, in the order of the requests."""
    for sampling in (GREEDY, SAMPLED, UNSEEDED, UNSEEDED):
        ours, theirs = (model.generate_many(PROMPTS, sampling) for model in (replicated, alone))
        assert tokens(ours) == tokens(theirs)
        assert [output.prompt_token_ids for output in ours] == PROMPTS
        assert [output.request_id for output in ours] == [output.request_id for output in theirs]
    for mine, other in zip(
        replicated.generate_many(PROMPTS, GREEDY), alone.generate_many(PROMPTS, GREEDY), strict=True
    ):
        assert mine.outputs[0].token_logprobs == pytest.approx(other.outputs[0].token_logprobs, abs=1e-4)
    assert answers(replicated.engine, replica_jobs.pages) == [0, 0]


def test_work_is_shared(replicated: Any) -> None:
    before = [handle.state.stats.generation_tokens for handle in replicated.engine.handles]
    replicated.generate_many(PROMPTS * 3, GREEDY)
    own = [h.state.stats.generation_tokens - b for h, b in zip(replicated.engine.handles, before, strict=True)]
    assert sum(own) == len(PROMPTS) * 30
    assert min(own) > sum(own) / 4


def test_prefixes_are_found_again(replicated: Any) -> None:
    engine = replicated.engine
    engine.reset_prefix_cache()
    assert answers(engine, replica_jobs.cached) == [0, 0]
    one, other = make_prompts([64, 64], seed=9)
    replicated.generate_many([one, other], GREEDY)
    again = replicated.generate_many([other + [9], one + [9]], GREEDY)
    assert [output.num_cached_tokens for output in again] == [64, 64]


def test_threads(replicated: Any, alone: Any) -> None:
    expected = tokens(alone.generate_many(PROMPTS, GREEDY))
    calls = [lambda p=prompt: tokens(replicated.generate_many([p], GREEDY))[0] for prompt in PROMPTS]
    assert in_threads(*calls) == expected


def test_a_loop_of_ones_own(replicated: Any) -> None:
    engine = replicated.engine
    ids = [engine.add_request(prompt, GREEDY) for prompt in PROMPTS[:3]]
    with pytest.raises(ValueError, match="in use already"):
        engine.add_request(PROMPTS[0], GREEDY, request_id=ids[0])
    found = []
    while engine.has_unfinished():
        found += engine.step()
    assert {output.request_id for output in found if output.finished} == set(ids)
    assert len(found) > 3, "outputs come as they grow"


def test_refusals(replicated: Any) -> None:
    for prompt, told in (([], "empty"), ([1, 5000], "vocabulary"), ([3] * 600, "length")):
        with pytest.raises(ValueError, match=told):
            replicated.generate_many([prompt], SamplingParams(max_tokens=40, ignore_eos=True))
    with pytest.raises(ValueError, match="picklable"):
        replicated.generate_many([[1, 2]], SamplingParams(logits_processors=[lambda ids, scores: scores]))
    assert not replicated.engine.has_unfinished()


def test_processors_travel(replicated: Any) -> None:
    banned, failed = (
        SamplingParams(temperature=0.0, max_tokens=6, logits_processors=[processor])
        for processor in (jobs.ban_even, jobs.fail)
    )
    one, other = replicated.generate_many(PROMPTS[:2], [banned, failed])
    assert one.outputs[0].token_ids and all(token % 2 for token in one.outputs[0].token_ids)
    assert other.outputs[0].finish_reason == "error" and isinstance(other.error, jobs.Broken)


def test_calls(replicated: Any) -> None:
    engine = replicated.engine
    pids = engine.call(replica_jobs.pid)
    assert [number for number, _ in pids] == [0, 1]
    assert len({os.getpid(), *(pid for _, pid in pids)}) == 3
    with pytest.raises(jobs.Broken):
        engine.call(jobs.fail)
    with pytest.raises(Exception, match="unpicklable"):
        engine.call(replica_jobs.unpicklable)
    with pytest.raises(TimeoutError, match=r"replica 0 has not answered within 0\.1 s"):
        engine.call(functools.partial(_sleep, 1.0), 0.1)
    assert answers(engine, replica_jobs.pages) == [0, 0]


def _sleep(seconds: float, worker: Any) -> None:
    time.sleep(seconds)


def test_pausing_and_sleeping(replicated: Any, alone: Any) -> None:
    engine = replicated.engine
    expected = tokens(alone.generate_many(PROMPTS, GREEDY))
    with pytest.raises(ValueError, match="level"):
        engine.sleep(2)
    engine.sleep()
    engine.wake_up()
    engine.pause()
    with pytest.raises(RuntimeError, match="resume"):
        replicated.generate_many(PROMPTS, GREEDY)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(tokens(replicated.generate_many(PROMPTS, GREEDY))))
    thread.start()
    thread.join(1.0)
    assert not found and engine.has_unfinished()
    engine.resume()
    thread.join(60)
    assert found == expected


@pytest.fixture
def slowly(replicated: Any) -> Iterator[Any]:
    """Replicas with time to do something to them."""
    replicated.engine.call(replica_jobs.slow_down)
    yield replicated
    if not all(handle.lost for handle in replicated.engine.handles):
        replicated.engine.call(replica_jobs.hurry)


def test_abort(slowly: Any) -> None:
    engine = slowly.engine
    ids = [engine.add_request(prompt, GREEDY.clone(max_tokens=300)) for prompt in [[place] for place in range(30)]]
    engine.step()
    engine.abort(ids)
    assert engine.num_unfinished == 0
    last = {output.request_id: output for output in _all(engine) if output.finished}
    assert set(last) == set(ids)
    assert {output.outputs[0].finish_reason for output in last.values()} == {"abort"}
    assert answers(engine, replica_jobs.pages) == [0, 0]


def _all(engine: Any) -> list[Any]:
    found = []
    while engine.has_unfinished():
        found += engine.step()
    return found


def test_interrupt(slowly: Any) -> None:
    jobs.hear_interrupts()
    threading.Timer(0.5, jobs.interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        slowly.generate_many(PROMPTS, GREEDY.clone(max_tokens=200))
    assert not slowly.engine.has_unfinished()
    assert answers(slowly.engine, replica_jobs.pages) == [0, 0]


def test_a_step_that_fails(replicated: Any, alone: Any) -> None:
    """Ends what its replica has, and nothing else."""
    engine = replicated.engine
    engine.handles[1].call(replica_jobs.fail_next_step, False).result(10)
    outputs = replicated.generate_many(PROMPTS, GREEDY)
    expected = tokens(alone.generate_many(PROMPTS, GREEDY))
    failed = [output for output in outputs if output.error is not None]
    assert failed
    for output, theirs in zip(outputs, expected, strict=True):
        if output.error is None:
            assert [sample.token_ids for sample in output.outputs] == theirs
        else:
            assert isinstance(output.error, ReplicaFailed) and "replica 1: Broken" in str(output.error)
            assert output.outputs[0].finish_reason == "error"
    assert tokens(replicated.generate_many(PROMPTS, GREEDY)) == expected
    assert answers(engine, replica_jobs.pages) == [0, 0]


def test_a_replica_that_hangs_and_one_that_is_killed(slowly: Any, alone: Any) -> None:
    """The last test of these replicas. What one has not finished is computed by the other; a stream that was being read
    ends with an error, and so does everything when nobody is left."""
    engine, long = slowly.engine, GREEDY.clone(max_tokens=30)
    expected = tokens(alone.generate_many(PROMPTS, long))
    first, second = engine.handles
    began = time.monotonic()
    first.call(replica_jobs.hang_in_next_step, False).result(10)
    assert tokens(slowly.generate_many(PROMPTS, long)) == expected
    assert time.monotonic() - began < 4 * TIMEOUT_S
    assert first.lost is not None and "replica 0" in str(first.lost) and "hangs" in str(first.lost)

    stream = engine.run([engine.intake.request(PROMPTS[0], long.clone(output_kind=RequestOutputKind.DELTA))])
    assert next(stream).outputs[0].token_ids
    os.kill(second.pid, signal.SIGKILL)
    *_, last = stream
    assert isinstance(last.error, ReplicaLost) and "replica 1 ended by signal 9" in str(last.error)
    assert last.outputs[0].finish_reason == "error"
    assert "no replica is left" in engine.lost()
    with pytest.raises(ReplicaLost, match="no replica is left"):
        slowly.generate_many(PROMPTS, GREEDY)


def test_one_that_does_not_start() -> None:
    with pytest.raises(jobs.Broken, match="no model today"):
        start(replica_jobs.build_nothing, 1)
    with pytest.raises(ReplicaLost, match="replica 0 ended with exit code 3"):
        start(replica_jobs.build_and_die, 2)


class Silent:
    """A replica that says nothing."""

    number, lost, called = 0, None, False
    heard_s = moved_s = 0.0

    def kill(self, error: Exception) -> None:
        self.lost = error


def test_watching(monkeypatch: pytest.MonkeyPatch) -> None:
    handle: Any = Silent()
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    handle.heard_s = 95.0
    watch([handle], 10.0)
    assert handle.lost is None and handle.moved_s == 100.0, "nothing to do"
    handle.moved_s = 80.0
    handle.called = True
    watch([handle], 10.0, lambda handle: True)
    assert handle.lost is None, "a call may take long"
    handle.called, handle.moved_s = False, 80.0
    watch([handle], 10.0, lambda handle: True)
    assert "no step for 10 s" in str(handle.lost)
    handle.lost, handle.heard_s = None, 80.0
    watch([handle], 10.0)
    assert "not heard of for 10 s" in str(handle.lost)
