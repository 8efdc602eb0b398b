"""NgramDrafter against a search through the whole sequence."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_paged.engine.request import Request, Sequence
from hf_paged.sampling_params import SamplingParams
from hf_paged.speculative.ngram import NgramDrafter


def sequence(prompt: list[int]) -> Sequence:
    return Request("r", prompt, SamplingParams()).sequences[0]


def naive(tokens: list[int], longest: int, shortest: int, room: int) -> list[int]:
    for size in range(longest, shortest - 1, -1):
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == tokens[len(tokens) - size :]:
                loop = tokens[start + size :]
                return [loop[i % len(loop)] for i in range(room)]
    return []


growths = st.lists(
    st.tuples(st.integers(0, 2), st.lists(st.integers(0, 2), min_size=1, max_size=4), st.integers(0, 6), st.booleans()),
    min_size=1,
    max_size=25,
)
"""(which of three sequences, the tokens that it grows by, room, whether the drafter is asked)"""


@given(growths, st.integers(1, 4), st.integers(0, 3))
def test_it_proposes_what_followed_the_latest_of_the_longest(growth: Any, shortest: int, more: int) -> None:
    drafter = NgramDrafter(shortest + more, shortest)
    sequences = [sequence([0]), sequence([1, 2, 1]), sequence([2, 2, 0, 1, 0, 1])]
    for which, tokens, room, asked in growth:
        sequences[which].tokens += tokens
        if asked:
            asking = sequences[which:] + sequences[:which]
            wanted = [naive(s.tokens, shortest + more, shortest, room + i) for i, s in enumerate(asking)]
            assert drafter.propose(asking, [room, room + 1, room + 2]) == wanted


def test_a_loop_is_proposed_to_go_on() -> None:
    assert NgramDrafter(2, 2).propose([sequence([5, 1, 2, 1, 2])], [5]) == [[1, 2, 1, 2, 1]]


class Counting(list[int]):
    """Tokens that count how many of them are read."""

    read = 0

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        self.read += len(found) if isinstance(place, slice) else 1
        return found


def test_a_step_costs_the_same_in_a_long_sequence() -> None:
    costs = []
    for length in (100, 10_000):
        drafter, asked = NgramDrafter(4, 2), sequence([i % 50 for i in range(length)])
        for _ in range(3):  # until its prompt is indexed
            drafter.propose([asked], [3])
        asked.tokens = Counting(asked.tokens)
        asked.tokens += [7]
        drafter.propose([asked], [3])
        costs.append(asked.tokens.read)
    assert costs[0] == costs[1] > 0


def test_the_index_goes_with_the_sequence() -> None:
    drafter, asked = NgramDrafter(3, 2), sequence(list(range(100)))
    drafter.propose([asked], [3])
    (index,) = drafter._indices.values()
    assert len(index.places) <= 2 * len(asked.tokens)
    drafter.finish(asked)
    assert not drafter._indices
    drafter.finish(asked)  # one that was never asked about is fine
    drafter.propose([asked], [3])
    drafter.clear()
    assert not drafter._indices


@pytest.mark.parametrize(
    ("given", "sizes"), [({}, (5, 5)), ({"prompt_lookup_max": 3}, (3, 3)), ({"prompt_lookup_min": 2}, (2, 2))]
)
def test_defaults_are_vllms(given: dict[str, int], sizes: tuple[int, int]) -> None:
    longest, shortest = sizes
    tokens = [1, 2, 3, 4, 5, 6, 7, 8]
    for size in range(1, 7):
        proposed = NgramDrafter(**given).propose([sequence([*tokens[:size], 9, 0, *tokens[:size]])], [1])
        assert bool(proposed[0]) == (size >= shortest), size
    assert longest == shortest


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompt_lookup_max": 0}, ValueError, "prompt_lookup_max must be at least 1, got 0"),
        ({"prompt_lookup_max": 3, "prompt_lookup_min": 0}, ValueError, "prompt_lookup_min must be at least 1"),
        ({"prompt_lookup_max": 2, "prompt_lookup_min": 3}, ValueError, r"prompt_lookup_min \(3\) must not exceed"),
        ({"prompt_lookup_max": 2.0}, TypeError, r"prompt_lookup_max must be an int, got 2.0"),
        ({"prompt_lookup_min": True}, TypeError, "must be an int, got True"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        NgramDrafter(**options)


def test_many_prompts_are_indexed_little_by_little() -> None:
    """No step waits for all of them, and each is drafted for in the end, as if it had been alone."""
    words = list(range(100)) * 15
    sequences = [sequence([offset, *words]) for offset in range(10)]
    drafter, done = NgramDrafter(), []
    for _ in range(5):
        drafts = drafter.propose(sequences, [3] * len(sequences))
        done.append(sum(map(bool, drafts)))
    assert done[0] == 2 and done == sorted(done) and done[-1] == 10
    assert drafts == [[0, 1, 2]] * 10
