"""Scheduling and verification of drafts over a simulated model: whatever is drafted, tokens are what they are without,
and no page, slot or request is left behind."""

from __future__ import annotations

from typing import Any

import pytest
from engine.simulator import EOS, VOCAB, Simulation, check_nothing_left, make_engine
from hypothesis import given, settings
from hypothesis import strategies as st
from speculative.drafters import CONFIG, Alternating, Constant, Oracle, Random, speculator_of

from hf_paged.engine.batch import DraftRow
from hf_paged.engine.engine import Engine
from hf_paged.engine.request import Sequence
from hf_paged.engine.scheduler import Scheduler
from hf_paged.sampling_params import SamplingParams
from hf_paged.speculative.drafter import Drafter
from hf_paged.speculative.pace import Pace

HOSTILE = ["random", "constant", "end of sequence", "right", "often right"]


def engine_with(kind: str, *, pace: Pace | None = None, max_rows: int = 64, **options: Any) -> Engine:
    known: dict[Sequence, list[int]] = {}

    def future(sequence: Sequence) -> list[int]:
        if sequence not in known:
            request = sequence.request
            known[sequence] = engine.executor.expected(  # type: ignore[attr-defined]
                request.prompt_token_ids, sequence.index, request.max_tokens
            )
        return known[sequence]

    drafters: dict[str, Drafter] = {
        "random": Random(VOCAB),
        "constant": Constant(7),
        "end of sequence": Constant(EOS),
        "right": Oracle(future, VOCAB, accuracy=1.0),
        "often right": Oracle(future, VOCAB, accuracy=0.7),
    }
    speculator = speculator_of(drafters[kind], pace=pace, max_rows=max_rows)
    options = {"max_model_len": 32, "paged": True, "speculation": CONFIG} | options
    engine = make_engine(speculator=speculator, **options)
    return engine


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("kind", HOSTILE)
def test_tokens_are_what_they_are_without(kind: str, lookahead: bool) -> None:
    """A pool too small for all, so that samples are copied, preempted, evicted and found again with drafts on."""
    engine = engine_with(
        kind, num_pages=32, page_size=3, max_num_seqs=12, max_num_batched_tokens=30, lookahead=lookahead
    )
    done = Simulation(engine, 600, wave=60, seed=1).run()
    assert done.finished == 600
    assert done.preemptions > 0 or "right" in kind
    stats = engine.speculator.stats["ngram"]
    assert stats.num_drafts > 100
    if kind == "right":
        assert stats.num_accepted_tokens == stats.num_draft_tokens
    if kind == "often right":
        assert 0.3 < stats.acceptance_rate < 0.7
    check_nothing_left(engine)
    assert not engine.speculator._requests and not engine.speculator._rates


@pytest.mark.parametrize("kind", ["right", "random"])
def test_going_back_and_forth(kind: str) -> None:
    """Steps without drafts, or before which none are wanted, look ahead as ever."""
    engine = engine_with(kind, pace=Alternating(), num_pages=64, page_size=4, max_num_seqs=16, lookahead=True)
    launches: list[tuple[bool, bool]] = []
    launch = engine.executor.launch

    def watched(batch: Any) -> Any:
        launches.append((bool(batch.drafts), any(row.num_pending for row in batch.decodes)))
        return launch(batch)

    engine.executor.launch = watched  # type: ignore[method-assign]
    assert Simulation(engine, 1000, wave=12, seed=2).run().finished == 1000
    assert {(True, False), (False, True)} <= set(launches)
    assert (True, True) not in launches
    check_nothing_left(engine)


def test_steps_saved() -> None:
    """With every draft of four tokens right, 17 tokens take a step of prefill, three that bring five, and one."""
    engine = engine_with("right", num_pages=64)
    prompt = next(p for p in ([a, b] for a in range(1, 40) for b in range(1, 40)) if _long(engine, p, 17))
    engine.add_request(prompt, SamplingParams(max_tokens=17, seed=0))
    steps = 0
    while engine.has_unfinished():
        engine.step()
        steps += 1
    assert steps == 5
    assert engine.speculator.stats["ngram"].num_accepted_tokens_per_pos == [3, 3, 3, 3]


def test_rows_are_scarce() -> None:
    """Drafts get the rows that decodes leave; with as many decodes as rows there are no drafts."""
    engine = engine_with("right", num_pages=200, max_rows=8, max_num_seqs=16)
    rows: list[tuple[int, int]] = []
    launch = engine.executor.launch

    def watched(batch: Any) -> Any:
        rows.append((len(engine.scheduler.running), len(batch.decodes)))
        return launch(batch)

    engine.executor.launch = watched  # type: ignore[method-assign]
    for first in range(1, 12):
        engine.add_request([first, 3, 9], SamplingParams(max_tokens=4 + 2 * first, seed=0))
    while engine.has_unfinished():
        engine.step()
    assert all(count <= max(running, 8) for running, count in rows)
    assert any(count == running >= 8 for running, count in rows)
    assert any(count == 8 > running > 1 for running, count in rows)


def test_nobody_is_preempted_for_a_draft() -> None:
    """Of four sequences with a token per page, the first one's draft leaves a page for each of the others."""
    scheduler = Scheduler(num_pages=13, page_size=1, max_num_seqs=4, max_num_batched_tokens=64)
    engine = make_engine(max_model_len=32)
    sequences = []
    for first in (3, 13, 23, 33):
        request = engine.intake.request([first, first + 1], SamplingParams(max_tokens=9, seed=0))
        scheduler.add(request)
        sequences += request.sequences
    scheduler.advance(scheduler.schedule())
    for sequence in sequences:
        scheduler.append(sequence, 5)
    batch = scheduler.schedule({sequences[0]: [7, 7, 7, 7]})
    assert [row.origin for row in batch.decodes] == [sequences[0]] * 2 + sequences[1:]
    assert scheduler.stats.num_preemptions == 0


def test_an_interrupted_end_is_told_once() -> None:
    engine = engine_with("right", num_pages=64)
    name = engine.add_request([5, 6], SamplingParams(max_tokens=6, seed=0))
    end, ends = engine.speculator.end, []

    def interrupted(request: Any) -> None:
        end(request)
        ends.append(request)
        if len(ends) == 1:
            raise KeyboardInterrupt

    engine.speculator.end = interrupted  # type: ignore[method-assign]
    told = []
    with pytest.raises(KeyboardInterrupt):
        while engine.has_unfinished():
            told += engine.step()
    while engine.has_unfinished():
        told += engine.step()
    assert [output.request_id for output in told if output.finished] == [name]
    check_nothing_left(engine)


def test_records_name_a_sequence_once() -> None:
    engine = engine_with("right", num_pages=64)
    records: list[Any] = []
    engine.observers.append(records.append)
    engine.add_request([5, 6], SamplingParams(n=2, max_tokens=8, seed=0))
    while engine.has_unfinished():
        engine.step()
    assert engine.speculator.stats["ngram"].num_drafts > 0
    assert all(len(record.decodes) == len(set(record.decodes)) for record in records)


def test_a_draft_row_looks_like_the_sequence_it_may_become() -> None:
    engine = make_engine()
    request = engine.intake.request([5, 6, 7], SamplingParams(max_tokens=9, seed=3))
    sequence = request.sequences[0]
    sequence.tokens += [8, 9]
    sequence.num_computed, sequence.slot = 4, 2
    row = DraftRow(sequence, [11, 12, 13], 2)
    assert row.tokens == [5, 6, 7, 8, 9, 11, 12] and row.generated == [8, 9, 11, 12]
    assert (row.num_tokens, row.num_generated, row.num_computed, row.last_token) == (7, 4, 6, 12)
    assert (row.origin, row.ahead, row.slot, row.index, row.request) == (sequence, [11, 12], 2, 0, request)
    assert (sequence.origin, sequence.ahead, sequence.last_token) == (sequence, [], 9)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(HOSTILE),
    page_size=st.integers(1, 6),
    pages=st.integers(12, 40),
    num_seqs=st.integers(1, 6),
    budget=st.integers(6, 24),
    lookahead=st.booleans(),
    alternating=st.booleans(),
    actions=st.lists(
        st.tuples(
            st.sampled_from(["add", "step", "step", "step", "abort", "flush", "recompute", "fail"]), st.integers(0, 99)
        ),
        max_size=60,
    ),
)
def test_anything_may_happen_between_steps(
    kind: str,
    page_size: int,
    pages: int,
    num_seqs: int,
    budget: int,
    lookahead: bool,
    alternating: bool,
    actions: list[tuple[str, int]],
) -> None:
    engine = engine_with(
        kind,
        pace=Alternating() if alternating else None,
        num_pages=max(pages, -(-32 // page_size)),
        page_size=page_size,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=budget,
        lookahead=lookahead,
    )
    asked: dict[str, tuple[list[int], SamplingParams]] = {}
    finished = {}

    def step() -> None:
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output

    for action, number in actions:
        if action == "add":
            prompt = [1 + (number * k) % (VOCAB - 1) for k in range(1, 2 + number % 9)]
            params = SamplingParams(n=1 + number % 3, max_tokens=1 + number % 12, seed=number)
            asked[engine.add_request(prompt, params)] = prompt, params
        elif action == "step":
            step()
        elif action == "abort" and asked:
            engine.abort(list(asked)[number % len(asked)])
        elif action == "flush":
            engine.weights_updated()
        elif action == "recompute":
            engine.weights_updated(kv="recompute")
        elif action == "fail":
            launch = engine.executor.launch

            def failing(batch: Any) -> Any:
                raise RuntimeError("once")

            engine.executor.launch = failing  # type: ignore[method-assign]
            try:
                step()
            except RuntimeError:
                pass
            finally:
                engine.executor.launch = launch  # type: ignore[method-assign]
    while engine.has_unfinished():
        step()
    assert finished.keys() == asked.keys()
    for name, output in finished.items():
        prompt, params = asked[name]
        for completion in output.outputs:
            expected = engine.executor.expected(prompt, completion.index, params.max_tokens)  # type: ignore[attr-defined]
            if completion.finish_reason == "abort":
                assert completion.token_ids == expected[: len(completion.token_ids)]
            else:
                assert completion.token_ids == expected
    check_nothing_left(engine)


def _long(engine: Engine, prompt: list[int], length: int) -> bool:
    return len(engine.executor.expected(prompt, 0, length)) == length  # type: ignore[attr-defined]
