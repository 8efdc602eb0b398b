"""Pace against costs that are made up: it finds the faster way, and looking for it costs little."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_paged.speculative.pace import FIRST, TRIAL, Pace


def drive(pace: Pace, steps: int, num_seqs: int, plain_s: float, speculating_s: float, length: float) -> list[bool]:
    """Which way each step went, where a speculating one brings `length` tokens per sequence."""
    ways = []
    for _ in range(steps):
        way = pace.speculates(num_seqs)
        ways.append(way)
        tokens = round(num_seqs * length) if way else num_seqs
        pace.landed(num_seqs, way, tokens, speculating_s if way else plain_s)
    return ways


@pytest.mark.parametrize("num_seqs", [1, 8, 64])
def test_it_finds_what_is_faster(num_seqs: int) -> None:
    worth = drive(Pace(), 500, num_seqs, plain_s=0.01, speculating_s=0.013, length=3.0)
    assert sum(worth[100:]) / 400 > 0.95
    worthless = drive(Pace(), 500, num_seqs, plain_s=0.01, speculating_s=0.013, length=1.0)
    assert sum(worthless[100:]) / 400 < 0.05


def test_few_sequences_begin_with_drafts_and_many_without() -> None:
    assert Pace(optimistic=32).speculates(32)
    assert not Pace(optimistic=32).speculates(64)


def test_a_new_size_begins_as_its_neighbour_goes_on() -> None:
    pace = Pace()
    assert pace.speculates(16)
    drive(pace, 300, 64, 0.01, 0.05, 1.0)
    assert not pace.speculates(32), "batches shrink: the larger neighbour counts"
    assert pace.speculates(16), "known already"
    pace = Pace(optimistic=0)
    drive(pace, 300, 64, 0.01, 0.011, 4.0)
    assert pace.speculates(32) and pace.speculates(128)


def test_sizes_learn_apart() -> None:
    pace = Pace()
    drive(pace, 300, 64, 0.01, 0.05, 1.0)
    drive(pace, 300, 2, 0.01, 0.011, 4.0)
    assert not pace.speculates(64) and not pace.speculates(50)
    assert pace.speculates(2)


def test_a_text_that_changes_is_noticed() -> None:
    pace = Pace()
    drive(pace, 200, 8, 0.01, 0.012, 1.0)
    assert not pace.speculates(8)
    ways = drive(pace, 1500, 8, 0.01, 0.012, 3.5)
    assert sum(ways[-500:]) > 450


def test_steps_that_capture_something_do_not_count() -> None:
    """One step of a trial that takes a second says nothing of the others."""
    pace = Pace(optimistic=0)
    for _ in range(FIRST):
        pace.landed(4, False, 4, 0.01)
    assert pace.speculates(4)
    for step in range(TRIAL):
        pace.landed(4, True, 14, 1.0 if step == 0 else 0.012)
    assert pace.speculates(4)


@settings(max_examples=100, deadline=None)
@given(
    speculating=st.floats(1.0, 20.0), length=st.floats(1.0, 6.0), num_seqs=st.integers(33, 300),
    steps=st.integers(2000, 6000),
)  # fmt: skip
def test_looking_costs_little(speculating: float, length: float, num_seqs: int, steps: int) -> None:
    """Of the time that the better way alone would take, over thousands of steps of a large batch."""
    ways = drive(Pace(), steps, num_seqs, plain_s=1.0, speculating_s=speculating, length=length)
    tokens = sum(round(num_seqs * length) if way else num_seqs for way in ways)
    seconds = sum(speculating if way else 1.0 for way in ways)
    plain_rate, drafted_rate = num_seqs, round(num_seqs * length) / speculating
    assert tokens / seconds > 0.93 * max(plain_rate, drafted_rate)
