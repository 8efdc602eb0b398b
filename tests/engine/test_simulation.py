"""The real engine over a fake executor: many requests, small pools, threads, failures. No model, no tensors."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from simulator import PagedExecutor, Simulation, check_nothing_left, host_cost, make_engine

import hf_paged
from hf_paged.engine.batch import Batch
from hf_paged.engine.engine import Engine
from hf_paged.engine.executor import StepResult
from hf_paged.outputs import RequestOutput
from hf_paged.sampling.logprobs import TokenLogprobs
from hf_paged.sampling_params import SamplingParams

ROOT = Path(hf_paged.__file__).parent


# ---- many requests -------------------------------------------------------------------------------------


def test_a_hundred_thousand_requests() -> None:
    engine = make_engine(num_pages=600)
    done = Simulation(engine, 100_000).run()
    print(f"\n{done.finished} requests, {done.steps} steps, {done.preemptions} preemptions, {done.seconds:.1f} s")
    assert done.finished == 100_000
    check_nothing_left(engine)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_million_requests() -> None:
    engine = make_engine(num_pages=600)
    done = Simulation(engine, 1_000_000, wave=2000, seed=1).run()
    print(f"\n{done.finished} requests, {done.steps} steps, {done.preemptions} preemptions, {done.seconds:.1f} s")
    assert done.finished == 1_000_000
    check_nothing_left(engine)


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("page_size", [1, 3, 8])
def test_tokens_follow_from_the_right_pages(page_size: int, lookahead: bool) -> None:
    """A pool that is too small for all, so that samples are copied, preempted, evicted, and found again."""
    engine = make_engine(
        num_pages=-(-96 // page_size),
        page_size=page_size,
        max_num_seqs=12,
        max_num_batched_tokens=30,
        max_model_len=32,
        paged=True,
        lookahead=lookahead,
    )
    done = Simulation(engine, 1500, wave=60, seed=page_size).run()
    assert done.finished == 1500
    assert done.preemptions > 0
    assert engine.scheduler.stats.prefix_hits > 0
    check_nothing_left(engine)


def test_host_cost_runs() -> None:
    cost = host_cost(num_seqs=8, context=32, steps=16)
    assert 0 < cost.total_ms <= cost.worst_ms


# ---- many callers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lookahead", [False, True])
def test_threads_share_steps(lookahead: bool) -> None:
    """Threads that run, leave early and abort; each gets its own tokens."""
    engine = make_engine(
        num_pages=24, max_num_seqs=6, max_num_batched_tokens=16, max_model_len=32, paged=True, lookahead=lookahead
    )
    wrong: list[object] = []

    def caller(number: int) -> None:
        try:
            for turn in range(12):
                prompts = [[1 + (number + i * 7) % 40] * (1 + i) for i in range(3)]
                params = SamplingParams(n=1 + turn % 3, max_tokens=6, seed=0)
                requests = [engine.intake.request(prompt, params) for prompt in prompts]
                last: dict[str, RequestOutput] = {}
                for output in engine.run(requests):
                    last[output.request_id] = output
                    if turn % 4 == 3:
                        break  # aborts the others
                else:
                    for request in requests:
                        for completion in last[request.request_id].outputs:
                            expected = engine.executor.expected(request.prompt_token_ids, completion.index, 6)
                            if completion.token_ids != expected:
                                wrong.append((number, turn, completion))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=caller, args=(i,), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)
    check_nothing_left(engine)


# ---- failures ------------------------------------------------------------------------------------------


def drain(engine: Engine, most: int = 100) -> list[RequestOutput]:
    outputs: list[RequestOutput] = []
    for _ in range(most):
        if not engine.has_unfinished():
            return outputs
        outputs += engine.step()
    raise AssertionError(f"not finished after {most} steps more")


def start(lookahead: bool = False, micro_batches: int = 1) -> Engine:
    """A small engine with samples, a twin and too few pages."""
    engine = make_engine(
        num_pages=7,
        page_size=2,
        max_num_seqs=4,
        max_num_batched_tokens=6,
        max_model_len=16,
        paged=True,
        lookahead=lookahead,
        micro_batches=micro_batches,
    )
    for name, prompt, n in (("a", [3, 4, 5], 1), ("b", [7, 8, 9], 3), ("c", [3, 4, 5], 1)):
        engine.add_request(prompt, SamplingParams(n=n, max_tokens=5, seed=0, ignore_eos=True), request_id=name)
    return engine


def check_finished(engine: Engine, outputs: list[RequestOutput]) -> None:
    last = {output.request_id: output for output in outputs}
    assert sorted(last) == ["a", "b", "c"]
    for output in last.values():
        assert output.finished
        for completion in output.outputs:
            expected = without_eos(engine, output.prompt_token_ids, completion.index)
            assert completion.token_ids == expected
    check_nothing_left(engine)


def without_eos(engine: Engine, prompt: list[int], index: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < 5:
        tokens += engine.executor.expected(prompt + tokens, index, 5 - len(tokens))
    return tokens


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("computed", [False, True])
def test_every_step_may_fail(computed: bool, lookahead: bool) -> None:
    """A forward that fails at any step leaves everything to be done again, and the tokens are the same."""
    for failing in range(40):
        engine, calls = start(lookahead), 0
        execute = engine.executor.execute

        def flaky(batch: Batch, execute: Callable = execute, failing: int = failing) -> StepResult:
            nonlocal calls
            calls += 1
            if calls == failing + 1:
                if computed:
                    execute(batch)
                raise RuntimeError("out of memory")
            return execute(batch)

        engine.executor.execute = flaky
        outputs: list[RequestOutput] = []
        for _ in range(200):
            if not engine.has_unfinished():
                break
            try:
                outputs += engine.step()
            except RuntimeError:
                continue
        check_finished(engine, outputs)
        if calls <= failing:
            return
    raise AssertionError("more steps than expected")


class Interrupt(KeyboardInterrupt):
    """Ctrl-C, at a chosen line."""


class Interrupter:
    """Raises in the `target`-th line that `Engine._step`, or what it calls in the engine and the cache, executes.

    `lines` are the lines executed up to there: the phase of the step, the file and the line's number.
    """

    FILES = frozenset(
        str(ROOT / name)
        for name in (
            "engine/engine.py",
            "engine/loop.py",
            "engine/scheduler.py",
            "engine/output.py",
            "cache/pages.py",
            "cache/prefix.py",
        )
    )

    OUTER = (Engine._step.__code__, Engine._launch.__code__, Engine._land.__code__)

    def __init__(self, target: int | None = None) -> None:
        self.target = target
        self.lines: list[tuple[str, str, int]] = []
        self._phase = ""

    def __enter__(self) -> Interrupter:
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    @property
    def done(self) -> bool:
        return self.target is not None and len(self.lines) > self.target

    def _call(self, frame: FrameType, event: str, arg: object) -> Callable | None:
        if frame.f_code.co_filename not in self.FILES or self.done:
            return None
        if frame.f_back is not None and frame.f_back.f_code in self.OUTER:
            self._phase = frame.f_code.co_name
        return self._line

    def _line(self, frame: FrameType, event: str, arg: object) -> Callable:
        # Left out: outputs on their way to the caller may be lost; and Python looks for no signals on some lines around
        # the lock's `with`, where a trace function could raise.
        if frame.f_code.co_name in ("step", "drive", "has_unfinished", "_take_turn"):
            return self._line
        if frame.f_code in self.OUTER:
            self._phase = frame.f_code.co_name
        if event == "line" and not self.done:
            self.lines.append((self._phase, Path(frame.f_code.co_filename).name, frame.f_lineno))
            if self.done:
                raise Interrupt
        return self._line


def run_interrupted(interrupter: Interrupter, lookahead: bool) -> tuple[Engine, list[RequestOutput]]:
    engine, outputs = start(lookahead), []
    with suppress(Interrupt), interrupter:
        while engine.has_unfinished():
            outputs += engine.step()
    return engine, outputs


def other_threads_can_take(lock: Any) -> bool:
    taken: list[bool] = []

    def take() -> None:
        taken.append(lock.acquire(blocking=False))
        if taken[0]:
            lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return taken[0]


@pytest.mark.parametrize(
    "phase",
    [
        "_step",
        "_read_inbox",
        "_launch",
        "_land",
        "schedule",
        "advance",
        "_append",
        "_report",
        "_count",
    ],
)
@pytest.mark.parametrize("lookahead", [False, True])
def test_ctrl_c_at_any_line_of_a_step(phase: str, lookahead: bool) -> None:
    """Wherever it comes, all requests still finish, with the right tokens and no page lost."""
    whole = Interrupter()
    run_interrupted(whole, lookahead)
    places: dict[tuple[str, int], list[int]] = {}
    for place, (where, file, number) in enumerate(whole.lines):
        if where == phase:
            places.setdefault((file, number), []).append(place)
    assert places
    failures = []
    for (file, number), found in places.items():
        for place in {found[0], found[len(found) // 2], found[-1]}:
            interrupter = Interrupter(place)
            engine, outputs = run_interrupted(interrupter, lookahead)
            assert interrupter.done
            try:
                assert engine._turn._working is None
                assert other_threads_can_take(engine._turn.lock), "the turn is still taken"
                check_finished(engine, outputs + drain(engine) + engine.step())
            except Exception as error:
                failures.append(f"{file}:{number}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    assert not failures, "\n".join(dict.fromkeys(failures))


# ---- log-probabilities of prompts ----------------------------------------------------------------------


class LogprobExecutor(PagedExecutor):
    """Reports for each prompt token its own id as log-probability."""

    def execute(self, batch: Batch) -> StepResult:
        chunks = [
            (chunk, chunk.sequence.request.sampling.prompt_logprobs is not None and not chunk.sequence.num_generated)
            for chunk in batch.chunks
        ]
        result = super().execute(batch)
        if any(wanted for _, wanted in chunks):
            result.prompt_logprobs = [
                [
                    TokenLogprobs([token], [float(token)], 1)
                    for token in chunk.sequence.tokens[chunk.start + 1 : chunk.start + chunk.length + 1]
                ]
                if wanted
                else []
                for chunk, wanted in chunks
            ]
        return result


def test_prompt_logprobs_survive_a_second_prefill() -> None:
    """The third sample has no slot at first: its prompt is computed again, beside another request's."""
    engine = make_engine(max_num_seqs=2, max_num_batched_tokens=32)
    engine.executor = LogprobExecutor(4096, 4, 2, 64)
    params = SamplingParams(max_tokens=2, prompt_logprobs=0, ignore_eos=True, seed=0)
    engine.add_request([3, 4, 5, 6], params.clone(n=3), request_id="a")
    engine.add_request([7, 8, 9], params, request_id="b")
    found = {output.request_id: output.prompt_logprobs for output in drain(engine)}
    assert [list(entry) for entry in found["b"][1:]] == [[8], [9]]
    assert [list(entry) for entry in found["a"][1:]] == [[4], [5], [6]]


def test_outputs_of_a_failed_step_are_not_left_behind() -> None:
    engine = make_engine()
    engine.add_request([3], SamplingParams(max_tokens=1, seed=0), request_id="a")

    def observer(record: object) -> None:
        raise RuntimeError("from a caller's observer")

    engine.observers.append(observer)
    with pytest.raises(RuntimeError):
        engine.step()
    engine.observers.clear()
    assert [output.request_id for output in drain(engine)] == ["a"]
