"""The scheduler one step ahead, against itself without."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st
from test_scheduler import Arrival, Driver, aborts, arrivals, failures, many, next_token, schedulers, simple, steps

from hf_paged.engine.batch import Batch
from hf_paged.engine.request import Sequence
from hf_paged.engine.scheduler import Scheduler

# ---- the scheduler one step ahead ----------------------------------------------------------------------


@dataclass
class AheadDriver(Driver):
    """Keeps steps in flight: schedules and launches the next one, then hands out the tokens of one before it."""

    most_in_flight: int = 1
    """When a step has been handed out."""
    flights: deque[Batch] = field(default_factory=deque)
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
        self.flights.clear()
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
        assert batch or self.flights or not scheduler.has_unfinished(), "nothing is done, and something is left to do"
        assert self.tokens() == tokens
        if batch:  # else its changes of the block table come with the next one
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
        if batch:
            self.flights.append(batch)
        lands = len(self.flights) > self.most_in_flight or not batch
        flight = self.flights.popleft() if lands and self.flights else Batch()
        for place, sequence in enumerate(flight.sampled()):
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
        while self.flights:  # computed in vain
            self.step()
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
