"""The scheduler under random arrivals: budgets, pages, slots, order and, by a shadow cache, what pages hold."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_paged.engine.request import Request, Sequence
from hf_paged.engine.scheduler import Batch, Scheduler
from hf_paged.sampling_params import SamplingParams

VOCAB = 3
FAILURES = ("execute", "advance", "append")
"""Where in a step a failure can come: before the batch is computed, after it, or while tokens are handed out."""


def next_token(sequence: Sequence) -> int:
    """A function of the sequence's tokens and its index; samples of one prompt often agree for a while."""
    return (sequence.tokens[0] + len(sequence.tokens) // 2 + sequence.index // 2) % VOCAB


@dataclass(frozen=True)
class Arrival:
    """A request to come."""

    prompt: tuple[int, ...]
    lengths: tuple[int, ...]
    """Tokens that each sample generates; the longest is the request's max_tokens."""
    priority: int = 0
    prompt_logprobs: bool = False
    adapter: int = 0
    """Its generation; 0 is none."""

    def request(self, name: str) -> Request:
        sampling = SamplingParams(
            n=len(self.lengths),
            max_tokens=max(self.lengths),
            priority=self.priority,
            prompt_logprobs=0 if self.prompt_logprobs else None,
        )
        adapter: Any = SimpleNamespace(generation=self.adapter) if self.adapter else None
        return Request(name, list(self.prompt), sampling, adapter=adapter)


def held(sequence: Sequence, position: int) -> tuple[int, ...]:
    """What keys and values of a position depend on: the tokens up to it, and the adapter."""
    return (sequence.request.adapter_generation, *sequence.tokens[: position + 1])


@dataclass
class Driver:
    """Drives a scheduler with made-up tokens and checks every step.

    `shadow` stands for the KV cache. The entry of (page, offset) is what keys and values there would depend on.
    """

    scheduler: Scheduler
    arrivals: dict[str, Arrival] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    table: dict[tuple[int, int], int] = field(default_factory=dict)
    shadow: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    steps: int = 0
    refused: int = 0

    # ---- what a caller does ----------------------------------------------------------------------------

    def add(self, arrival: Arrival) -> None:
        request = arrival.request(f"r{len(self.requests) + self.refused}")
        written = len(arrival.prompt) + request.max_tokens - 1
        if -(-written // self.scheduler.page_size) > self.scheduler.num_pages:
            with pytest.raises(ValueError, match="whole pool"):
                self.scheduler.check(request)
            self.refused += 1
            return
        self.scheduler.check(request)
        self.scheduler.add(request)
        self.arrivals[request.request_id] = arrival
        self.requests.append(request)

    def abort(self, request: Request) -> None:
        for sequence in request.sequences:
            self.scheduler.finish(sequence, "abort")
        self.check_books()

    def recover(self) -> None:
        tokens = self.tokens()
        self.scheduler.recover(self.requests)
        assert not self.scheduler.running
        assert self.tokens() == tokens
        self.check_books()

    def step(self, failure: str | None = None, failure_place: int = 0) -> None:
        """One step; with `failure`, it fails there and recovers, after `failure_place` sequences got their token."""
        self.steps += 1
        scheduler = self.scheduler
        before, tokens, preemptions = list(scheduler.running), self.tokens(), scheduler.stats.num_preemptions
        batch = scheduler.schedule()
        for slot, index, page in batch.page_writes:
            self.table[slot, index] = page
        assert bool(batch) == scheduler.has_unfinished(), "a step must do something while anything is left to do"
        assert self.tokens() == tokens, "scheduling must not touch tokens"
        self.check_batch(batch)
        self.check_admission(before, batch, preempted=scheduler.stats.num_preemptions > preemptions)
        self.check_books()
        contents = {pair: self.contents(pair[0]) for pair in batch.copies}
        for (_, target), content in contents.items():
            self.shadow.update({(target, offset): entry for offset, entry in content.items()})
        self.check_shadow()
        if failure == "execute":
            return self.recover()
        for sequence, start, length in self.work(batch):
            for position in range(start, start + length):
                index, offset = divmod(position, scheduler.page_size)
                page = self.table[sequence.slot, index]
                self.shadow[page, offset] = held(sequence, position)
        scheduler.advance(batch)
        self.check_books()
        self.check_shadow()
        if failure == "advance":
            return self.recover()
        for place, sequence in enumerate(batch.sampled()):
            if failure == "append" and place == failure_place:
                return self.recover()
            scheduler.append(sequence, next_token(sequence))
            if sequence.num_generated == self.length(sequence):
                scheduler.finish(sequence, "length")
        self.check_books()
        return None

    def drain(self, most: int) -> None:
        """Steps until nothing is left, and checks the end."""
        for _ in range(most):
            if not self.scheduler.has_unfinished():
                break
            self.step()
        assert not self.scheduler.has_unfinished(), f"not finished after {most} steps more"
        self.check_end()

    # ---- what must hold --------------------------------------------------------------------------------

    def sequences(self) -> list[Sequence]:
        return [sequence for request in self.requests for sequence in request.sequences]

    def waiting(self) -> list[Sequence]:
        """The sequences that should be in the queue: of a request whose prompt is not computed, only the first."""
        return [s for s in self.sequences() if not s.finished and s.slot < 0 and (s.request.forked or s.index == 0)]

    def length(self, sequence: Sequence) -> int:
        return self.arrivals[sequence.request.request_id].lengths[sequence.index]

    def tokens(self) -> list[list[int]]:
        return [list(sequence.tokens) for sequence in self.sequences()]

    def contents(self, page: int) -> dict[int, tuple[int, ...]]:
        places = range(self.scheduler.page_size)
        return {offset: self.shadow[page, offset] for offset in places if (page, offset) in self.shadow}

    @staticmethod
    def work(batch: Batch) -> list[tuple[Sequence, int, int]]:
        """(sequence, first position, positions) that the batch computes."""
        work = [(sequence, sequence.num_computed, 1) for sequence in batch.decodes]
        return work + [(chunk.sequence, chunk.start, chunk.length) for chunk in batch.chunks]

    def check_batch(self, batch: Batch) -> None:
        scheduler, size = self.scheduler, self.scheduler.page_size
        assert batch.num_tokens <= scheduler.max_num_batched_tokens
        work = self.work(batch)
        assert Counter(id(s) for s, _, _ in work) == Counter(id(s) for s in scheduler.running), (
            "all that run, once each"
        )
        writers: dict[int, Sequence] = {}
        for sequence, start, length in work:
            assert length >= 1
            assert start == sequence.num_computed
            assert start + length <= len(sequence.tokens)
            assert len(sequence.pages) == -(-(start + length) // size), "no page before it is needed"
            for index in range(start // size, len(sequence.pages)):
                page = sequence.pages[index]
                assert scheduler.pool.refs(page) == 1, f"{sequence.order} writes page {page}, which others see"
                assert writers.setdefault(page, sequence) is sequence
        for sequence in batch.decodes:
            assert sequence.num_computed == len(sequence.tokens) - 1
        for chunk in batch.chunks:
            sequence, expected = chunk.sequence, []
            if chunk.start + chunk.length == len(sequence.tokens):
                expected = [sequence] if sequence.request.forked else sequence.request.sequences
            assert chunk.samples == expected
        for sequence in scheduler.running:
            row = [self.table.get((sequence.slot, index)) for index in range(len(sequence.pages))]
            assert row == sequence.pages, "the executor's block table differs"
        assert len({target for _, target in batch.copies}) == len(batch.copies)

    def check_admission(self, before: list[Sequence], batch: Batch, *, preempted: bool) -> None:
        """First come, first served within a priority, and no admission in a step that had to preempt.

        Only those may be overtaken whose next page of prompt another sequence computes in this very step, and those
        with adapters while as many others run as may.
        """
        old = {id(sequence) for sequence in before}
        admitted = [sequence for sequence in self.scheduler.running if id(sequence) not in old]
        if preempted:
            assert not admitted
        last = max((s.order for s in admitted), default=(-99, 0, 0))
        for sequence in self.waiting():
            held_back = sequence.request.adapter_generation and len(self.adapters()) == self.scheduler.max_adapters
            assert last < sequence.order or held_back or self.computed_by_another(sequence, batch)

    def adapters(self) -> set[int]:
        """Of the sequences that run."""
        return {sequence.request.adapter_generation for sequence in self.scheduler.running} - {0}

    def computed_by_another(self, sequence: Sequence, batch: Batch) -> bool:
        scheduler, size = self.scheduler, self.scheduler.page_size
        if not scheduler.enable_prefix_caching or sequence.logits_from is not None:
            return False  # who wants its prompt's log-probabilities, until it has a token of its own
        most = (len(sequence.tokens) - 1) // size
        adapter = sequence.request.adapter_generation
        end = (len(scheduler.tree.match(sequence.tokens, most, adapter)) + 1) * size
        begins = sequence.tokens[:end]
        return end <= most * size and any(
            chunk.start < end
            and chunk.sequence.tokens[:end] == begins
            and chunk.sequence.request.adapter_generation == adapter
            for chunk in batch.chunks
        )

    def check_books(self) -> None:
        """Every reference, user, slot and place in the queue is accounted for."""
        scheduler = self.scheduler
        pool, tree = scheduler.pool, scheduler.tree
        running = scheduler.running
        assert [s.order for s in running] == sorted(s.order for s in running)
        assert {id(s) for s in running} == {id(s) for s in self.sequences() if s.slot >= 0}
        assert not any(s.finished for s in running)
        assert len(self.adapters()) <= scheduler.max_adapters
        assert not any(s.pages or s.path for s in self.sequences() if s.slot < 0), "pages held by one who does not run"
        slots = [s.slot for s in running]
        assert sorted(slots + scheduler._slots) == list(range(scheduler.max_num_seqs))
        assert scheduler._reserved_slots == sum(s.request.reserved for s in running)
        assert 0 <= scheduler._reserved_slots <= len(scheduler._slots)
        queued = [s for _, s in scheduler._waiting if not s.finished]
        assert Counter(map(id, queued)) == Counter(id(s) for s in self.waiting()), "queued once each"
        assert scheduler.num_waiting == len(queued)

        nodes, stack = [], list(tree._root.children.values())
        while stack:
            nodes.append(stack.pop())
            stack.extend(nodes[-1].children.values())
        refs = Counter(page for sequence in running for page in sequence.pages)
        refs.update(node.page for node in nodes)
        assert [pool.refs(page) for page in range(pool.num_pages)] == [refs[p] for p in range(pool.num_pages)]
        assert sorted(pool._free) == [page for page in range(pool.num_pages) if not refs[page]]
        users = Counter(id(node) for sequence in running for node in sequence.path)
        for node in nodes:
            assert node.users == users[id(node)]
        idle = sum(not node.users for node in nodes)
        assert (tree.num_pages, tree.num_evictable) == (len(nodes), idle)
        assert scheduler.num_available_pages == pool.num_free + idle

    def check_shadow(self) -> None:
        """Every computed position of every running sequence finds its own keys and values."""
        size = self.scheduler.page_size
        for sequence in self.scheduler.running:
            for position in range(sequence.num_computed):
                found = self.shadow.get((sequence.pages[position // size], position % size))
                assert found == held(sequence, position), (
                    f"position {position} of sequence {sequence.order} holds the keys of {found}"
                )

    def check_end(self) -> None:
        scheduler = self.scheduler
        for sequence in self.sequences():
            assert sequence.finished
            expected = Sequence(sequence.request, sequence.index, list(sequence.request.prompt_token_ids), 0)
            while len(expected.tokens) < len(sequence.tokens):
                expected.tokens.append(next_token(expected))
            assert sequence.tokens == expected.tokens
            if sequence.finish_reason == "length":
                assert sequence.num_generated == self.length(sequence)
        self.check_books()
        assert scheduler.num_active_pages == 0
        assert scheduler.pool.num_used == scheduler.tree.num_pages
        assert scheduler.enable_prefix_caching or scheduler.pool.num_used == 0
        scheduler.tree.clear()
        assert scheduler.pool.num_free == scheduler.num_pages


# ---- random runs ---------------------------------------------------------------------------------------

STEMS = ((0, 1, 1, 0, 1, 0, 0, 1, 0, 1, 1, 1, 0, 0), (1, 0, 0, 1, 1, 0, 1, 1, 0, 0, 0, 1, 0, 1))
prompts = st.builds(
    lambda stem, length, tail: STEMS[stem][:length] + tuple(tail),
    st.integers(0, 1),
    st.integers(1, 14),
    st.lists(st.integers(0, 1), max_size=4),
)
lengths = st.one_of(
    st.lists(st.integers(1, 10), min_size=1, max_size=1), st.lists(st.integers(1, 10), min_size=1, max_size=5)
).map(tuple)


def arrivals(priorities: st.SearchStrategy[int]) -> st.SearchStrategy[Arrival]:
    adapters = st.sampled_from((0, 0, 0, 1, 2, 3))
    return st.builds(Arrival, prompts, lengths, priorities, st.sampled_from((False, False, False, True)), adapters)


@st.composite
def schedulers(draw: st.DrawFn) -> Scheduler:
    slots = draw(st.integers(1, 6))
    return Scheduler(
        num_pages=draw(st.integers(1, 30)),
        page_size=draw(st.integers(1, 5)),
        max_num_seqs=slots,
        max_num_batched_tokens=slots + draw(st.integers(0, 20)),
        enable_prefix_caching=draw(st.sampled_from((True, True, True, False))),
        max_adapters=draw(st.integers(1, 3)),
    )


steps = st.integers(1, 4).map(lambda count: ("step", count))
failures = st.tuples(st.sampled_from(FAILURES), st.integers(0, 3)).map(lambda where: ("fail", where))
aborts = st.integers(0, 20).map(lambda which: ("abort", which))
simple = st.sampled_from([("recover", None), ("flush", None)])
many = settings(deadline=None, max_examples=250, suppress_health_check=list(HealthCheck))


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
    """Tokens that must be computed when nothing is shared and nothing is computed twice."""
    return sum(len(a.prompt) + length for a in driver.arrivals.values() for length in a.lengths)


@many
@given(schedulers(), st.data())
def test_everyone_finishes_in_order_and_in_their_own_pages(scheduler: Scheduler, data: st.DataObject) -> None:
    """Equal priorities: besides all checks of a step, the number of steps is bounded (nobody starves)."""
    adds = arrivals(st.just(0)).map(lambda arrival: ("add", arrival))
    events = data.draw(st.lists(st.one_of(adds, adds, steps), max_size=20))
    driver = Driver(scheduler)
    play(driver, events)
    # The oldest sequence is computed by at least one token a step, and nobody takes its pages.
    driver.drain(work_of(driver))


@many
@given(schedulers(), st.data())
def test_whatever_happens_everyone_finishes(scheduler: Scheduler, data: st.DataObject) -> None:
    """The same with priorities, aborts, flushes, and failures in the middle of steps."""
    adds = arrivals(st.integers(-1, 1)).map(lambda arrival: ("add", arrival))
    events = data.draw(st.lists(st.one_of(adds, adds, steps, steps, failures, aborts, simple), max_size=30))
    driver = Driver(scheduler)
    play(driver, events)
    driver.drain(work_of(driver) * 2 + 10)


# ---- single cases --------------------------------------------------------------------------------------


def make(**changes: int | bool) -> Driver:
    options = {"num_pages": 32, "page_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 32}
    return Driver(Scheduler(**(options | changes)))  # type: ignore[arg-type]


def test_budget_smaller_than_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        make(max_num_seqs=8, max_num_batched_tokens=7)


def test_empty_schedule() -> None:
    driver = make()
    driver.step()
    assert driver.scheduler.stats.peak_pages == 0


def test_samples_share_a_prompt_and_copy_its_last_page() -> None:
    driver = make()
    driver.add(Arrival(prompt=(0, 1, 0, 1, 1), lengths=(4, 4, 4)))
    driver.step()
    assert [s.pages for s in driver.scheduler.running] == [[0, 1]] * 3
    driver.step()
    assert driver.scheduler.pool.num_used == 4, "the last to write needs no copy"
    pages = [s.pages for s in driver.scheduler.running]
    assert [p[0] for p in pages] == [0, 0, 0]
    assert len({p[1] for p in pages}) == 3, "one page to write in for each"
    driver.drain(10)


def test_second_request_computes_only_what_is_not_cached() -> None:
    driver = make()
    driver.add(Arrival(prompt=(0, 1, 0, 1, 1, 0), lengths=(1,)))
    driver.step()
    driver.add(Arrival(prompt=(0, 1, 0, 1, 0), lengths=(1,)))
    batch = driver.scheduler.schedule()
    assert [(chunk.start, chunk.length) for chunk in batch.chunks] == [(4, 1)]
    driver.recover()
    driver.drain(5)
    assert driver.requests[1].num_cached_tokens == 4


def test_whole_prompt_in_the_cache_still_computes_a_token() -> None:
    driver = make()
    for _ in range(2):
        driver.add(Arrival(prompt=(0, 1, 0, 1), lengths=(1,)))
    driver.step()
    driver.add(Arrival(prompt=(0, 1, 0, 1), lengths=(1,)))
    batch = driver.scheduler.schedule()
    assert driver.scheduler.tree.num_pages == 1
    assert [(chunk.start, chunk.length) for chunk in batch.chunks] == [(0, 4)]
    driver.recover()
    driver.drain(10)


def test_preemption_takes_the_youngest_and_keeps_its_tokens() -> None:
    driver = make(num_pages=4, page_size=2, max_num_seqs=2)
    driver.add(Arrival(prompt=(0,), lengths=(6,)))
    driver.add(Arrival(prompt=(1,), lengths=(6,)))
    driver.drain(30)
    old, young = driver.requests
    assert old.metrics.num_preemptions == 0
    assert young.metrics.num_preemptions >= 1


def test_higher_priority_goes_first() -> None:
    driver = make(max_num_seqs=1)
    for priority in (1, 0, -1):
        driver.add(Arrival(prompt=(0, 1), lengths=(1,), priority=priority))
    order = []
    while driver.scheduler.has_unfinished():
        driver.step()
        order += [r.priority for r in driver.requests if r.finished and r.priority not in order]
    assert order == [-1, 0, 1]


def test_more_samples_than_slots() -> None:
    driver = make(max_num_seqs=2)
    driver.add(Arrival(prompt=(0, 1, 0, 1, 1), lengths=(3, 1, 5, 2, 4)))
    driver.drain(40)
    assert all(s.finish_reason == "length" for s in driver.sequences())


def test_newcomers_wait_while_slots_are_kept_for_samples() -> None:
    driver = make(max_num_seqs=3, max_num_batched_tokens=4)
    driver.add(Arrival(prompt=(0, 1, 0, 1, 1, 0, 0, 1), lengths=(2, 2, 2)))
    driver.add(Arrival(prompt=(1,), lengths=(1,)))
    driver.step()
    assert [s.order[1] for s in driver.scheduler.running] == [0], "the others' slots are taken in advance"
    driver.drain(20)


def test_prompts_that_arrive_together_compute_their_beginning_once() -> None:
    driver = make(max_num_batched_tokens=64)
    for tail in (0, 1, 0):
        driver.add(Arrival(prompt=(0, 1, 0, 1, tail, tail), lengths=(2,)))
    driver.add(Arrival(prompt=(1, 1, 0, 1, 0), lengths=(2,)))
    driver.step()
    assert [s.order[1] for s in driver.scheduler.running] == [0, 3]
    driver.drain(10)
    assert [request.num_cached_tokens for request in driver.requests] == [0, 4, 4, 0]


def test_flushed_pages_are_not_found_again() -> None:
    driver = make()
    driver.add(Arrival(prompt=(0, 1, 0, 1, 1, 0, 0, 1), lengths=(5,)))
    driver.step()
    assert driver.scheduler.flush_prefix_cache() == 2
    for _ in range(4):
        driver.step()
    assert driver.scheduler.tree.num_pages == 0, "computed in part before the flush: must not be cached"
    driver.drain(5)


# ---- adapters ------------------------------------------------------------------------------------------


def test_an_adapter_is_not_starved_by_those_that_run() -> None:
    """Requests of a running adapter keep coming; one of another adapter gets its turn all the same."""
    scheduler = Scheduler(num_pages=64, page_size=4, max_num_seqs=4, max_num_batched_tokens=32)
    driver = Driver(scheduler)
    driver.add(Arrival((0, 1, 0), (6,), adapter=1))
    driver.step()
    driver.add(Arrival((0, 1, 0), (6,), adapter=2))
    other = driver.requests[-1]
    overtaking = []
    for _ in range(30):
        driver.add(Arrival((0, 1, 0), (6,), adapter=1))
        driver.step()
        if not other.sequences[0].slot < 0:
            break
        overtaking += [r for r in driver.requests[2:] if r.sequences[0].slot >= 0 and r not in overtaking]
    assert other.sequences[0].slot >= 0, "it never ran"
    assert 0 < len(overtaking) <= scheduler.max_num_seqs, "some go before it, not all"
    driver.drain(500)


def test_the_model_alone_takes_no_adapters_place() -> None:
    scheduler = Scheduler(num_pages=64, page_size=4, max_num_seqs=4, max_num_batched_tokens=32)
    driver = Driver(scheduler)
    for adapter in (1, 2, 0, 2, 0):
        driver.add(Arrival((0, 1, 0), (6,), adapter=adapter))
    driver.step()
    running = [sequence.request.adapter_generation for sequence in scheduler.running]
    assert running == [1, 0, 0]
    driver.drain(100)
