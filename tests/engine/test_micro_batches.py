"""The scheduler with several micro-batches in flight, against itself with one step at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lookahead import assert_landed, drain
from simulator import Simulation, check_nothing_left, make_engine
from test_lookahead_failures import out_of_memory
from test_lookahead_scheduler import AheadDriver, play, twin_of, work_of
from test_scheduler import Arrival, Driver, aborts, arrivals, failures, many, schedulers, simple, steps
from test_simulation import check_finished, start

from hf_paged.engine.batch import Batch
from hf_paged.engine.executor import StepResult
from hf_paged.engine.request import Sequence
from hf_paged.engine.scheduler import Scheduler
from hf_paged.outputs import RequestOutput
from hf_paged.sampling_params import SamplingParams


@dataclass
class MicroBatchDriver(AheadDriver):
    """As many steps in flight as there are micro-batches."""

    skipped: Counter[Sequence] = field(default_factory=Counter)
    """How many launches in a row left out a sequence that could have gone on."""
    most_skipped: int = 0
    sizes: list[int] = field(default_factory=list)
    """Decodes of each step."""
    num_running: int = 0
    """Before the step was scheduled, which may preempt some."""

    def __post_init__(self) -> None:
        self.most_in_flight = self.scheduler.micro_batches - 1

    def step(self, failure: str | None = None, failure_place: int = 0) -> None:
        assert len(self.flights) <= self.scheduler.micro_batches - 1
        self.num_running = len(self.scheduler.running)
        super().step(failure, failure_place)

    def check_batch(self, batch: Batch) -> None:
        scheduler, size = self.scheduler, self.scheduler.page_size
        assert batch.num_tokens <= scheduler.max_num_batched_tokens
        work = self.work(batch)
        scheduled = {sequence for sequence, _, _ in work}
        assert len(scheduled) == len(work), "once each"
        assert scheduled <= set(scheduler.running)
        flying = {sequence for flight in self.flights for sequence in flight.sampled()}
        assert not any(sequence.num_pending or sequence in flying for sequence in scheduled), "in one step at a time"
        assert len(batch.decodes) <= -(-self.num_running // scheduler.micro_batches)
        free = [sequence for sequence in scheduler.running if not sequence.num_pending]
        left_out = [sequence for sequence in free if sequence not in scheduled]
        self.skipped = Counter({sequence: self.skipped[sequence] + 1 for sequence in left_out})
        self.most_skipped = max([self.most_skipped, *self.skipped.values()])
        self.sizes.append(len(batch.decodes))
        writers: dict[int, Sequence] = {}
        for sequence, begin, length in work:
            assert length >= 1 and begin == sequence.num_computed and begin + length <= len(sequence.tokens)
            assert len(sequence.pages) == -(-(begin + length) // size), "no page before it is needed"
            for index in range(begin // size, len(sequence.pages)):
                page = sequence.pages[index]
                assert scheduler.pool.refs(page) == 1, f"{sequence.order} writes page {page}, which others see"
                assert writers.setdefault(page, sequence) is sequence
        assert all(sequence.num_computed == len(sequence.tokens) - 1 for sequence in batch.decodes)
        for chunk in batch.chunks:
            sequence, expected = chunk.sequence, []
            if chunk.start + chunk.length == len(sequence.tokens):
                expected = [sequence] if sequence.request.forked else sequence.request.sequences
            assert chunk.samples == expected
        for sequence in scheduler.running:
            row = [self.table.get((sequence.slot, index)) for index in range(len(sequence.pages))]
            assert row == sequence.pages, "the executor's block table differs"
        assert len({target for _, target in batch.copies}) == len(batch.copies)


def in_micro_batches(scheduler: Scheduler, count: int) -> MicroBatchDriver:
    scheduler.micro_batches = count
    return MicroBatchDriver(scheduler)


@many
@given(schedulers(), st.integers(2, 4), st.data())
def test_everyone_gets_the_same_tokens(scheduler: Scheduler, count: int, data: st.DataObject) -> None:
    adds = arrivals(st.just(0)).map(lambda arrival: ("add", arrival))
    events = data.draw(st.lists(st.one_of(adds, adds, steps), max_size=20))
    spread, plain = in_micro_batches(twin_of(scheduler), count), Driver(scheduler)
    for driver in (spread, plain):
        play(driver, events)
        driver.drain(count * (2 * work_of(driver) + 2))
    assert spread.tokens() == plain.tokens()
    assert spread.refused == plain.refused


@many
@given(schedulers(), st.integers(2, 4), st.data())
def test_whatever_happens_everyone_finishes(scheduler: Scheduler, count: int, data: st.DataObject) -> None:
    """With priorities, aborts, flushes, and failures while several steps are in flight."""
    adds = arrivals(st.integers(-1, 1)).map(lambda arrival: ("add", arrival))
    events = data.draw(st.lists(st.one_of(adds, adds, steps, steps, failures, aborts, simple), max_size=30))
    driver = in_micro_batches(scheduler, count)
    play(driver, events)
    driver.drain(count * (work_of(driver) * 3 + 12))


@pytest.mark.parametrize("count", [2, 3])
def test_nobody_is_left_out_for_long(count: int) -> None:
    """Those in front have priority in every step, and new ones come all the time: whoever is behind gets its turn."""
    driver = in_micro_batches(Scheduler(num_pages=400, page_size=4, max_num_seqs=12, max_num_batched_tokens=40), count)
    for _ in range(5):
        driver.add(Arrival(prompt=(0, 1, 0), lengths=(40,), priority=1))
    for place in range(80):
        driver.add(Arrival(prompt=(1, 0), lengths=(1 + place % 7,), priority=place % 2))
        for _ in range(count):
            driver.step()
    driver.drain(2000)
    assert driver.most_skipped <= count


@pytest.mark.parametrize("count", [2, 3])
def test_decodes_are_spread_evenly(count: int) -> None:
    driver = in_micro_batches(Scheduler(num_pages=64, page_size=4, max_num_seqs=12, max_num_batched_tokens=40), count)
    for _ in range(7):
        driver.add(Arrival(prompt=(0, 1, 0), lengths=(30,)))
    driver.drain(500)
    steady = driver.sizes[4 * count : 8 * count]
    assert max(steady) - min(steady) <= count - 1 and sum(steady) == 4 * 7


# ---- the engine ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("page_size", [1, 3, 8])
def test_tokens_follow_from_the_right_pages(page_size: int, count: int) -> None:
    engine = make_engine(
        num_pages=-(-96 // page_size),
        page_size=page_size,
        max_num_seqs=12,
        max_num_batched_tokens=30,
        max_model_len=32,
        paged=True,
        lookahead=True,
        micro_batches=count,
    )
    done = Simulation(engine, 1000, wave=60, seed=page_size).run()
    assert done.finished == 1000
    assert done.preemptions > 0
    check_nothing_left(engine)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("fails", ["out of memory", "out of memory, late", "fails"])
def test_every_launch_may_fail(fails: str, count: int) -> None:
    """With other steps in flight, which may end requests that the step landing has news of."""
    for failing in range(1, 60):
        engine = start(lookahead=True, micro_batches=count)
        if fails == "fails":
            made, launch = [0], engine.executor.launch

            def flaky(
                batch: Batch, made: list[int] = made, launch: Callable = launch, failing: int = failing
            ) -> Callable[[], StepResult]:
                made[0] += 1
                if made[0] == failing:
                    raise ZeroDivisionError
                return launch(batch)

            engine.executor.launch = flaky  # type: ignore[method-assign]
        else:
            made = out_of_memory(engine, {failing}, late=fails.endswith("late"))
        outputs: list[RequestOutput] = []
        for _ in range(200):
            with suppress(ZeroDivisionError):
                outputs += engine.step()
        check_finished(engine, outputs)
        assert_landed(engine)
        if made[0] < failing:
            return
    raise AssertionError("more steps than expected")


def test_steps_that_land_for_lack_of_memory_may_end_a_request() -> None:
    """Two of its samples have landed, and are not told of yet, when the launch that follows has the third one land."""
    for failing in range(1, 40):
        engine = make_engine(
            num_pages=64, page_size=2, max_num_seqs=4, max_num_batched_tokens=12, lookahead=True, micro_batches=2
        )
        sampling = SamplingParams(max_tokens=3, seed=0, ignore_eos=True)
        for prompt, n in (([7, 8, 9], 3), ([3, 4, 5], 1), ([5, 5], 1), ([6, 6], 1)):
            engine.add_request(prompt, sampling.clone(n=n))
        made = out_of_memory(engine, {failing}, late=False)
        last = drain(engine)
        assert len(last) == 4 and all(output.finished for output in last.values())
        assert_landed(engine)
        if made[0] < failing:
            return
    raise AssertionError("more steps than expected")
