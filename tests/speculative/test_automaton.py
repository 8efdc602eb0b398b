"""SuffixAutomaton against brute force over the texts themselves."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from hf_paged.speculative.automaton import ROOT, SuffixAutomaton

Texts = list[list[int]]

steps = st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 2), min_size=1, max_size=4)), max_size=25)
"""(which of four texts, the tokens that it grows by)"""


def followers(texts: Texts, context: list[int]) -> list[int]:
    """What has come after a context, in any of the texts."""
    size = len(context)
    return [text[i] for text in texts for i in range(size, len(text)) if text[i - size : i] == context]


def longest_followed(texts: Texts, text: list[int], max_depth: int) -> list[int]:
    """The longest suffix of a text, up to `max_depth`, that something has come after."""
    for size in range(min(max_depth, len(text)), 0, -1):
        if followers(texts, text[-size:]):
            return text[-size:]
    return []


def grown(growth: list[tuple[int, list[int]]], max_depth: int) -> tuple[SuffixAutomaton, Texts, list[int]]:
    automaton = SuffixAutomaton(max_depth)
    texts: Texts = [[] for _ in range(4)]
    states = [ROOT] * 4
    for which, tokens in growth:
        texts[which] += tokens
        states[which] = automaton.advance(states[which], tokens)
    return automaton, texts, states


@given(steps, st.integers(1, 6))
def test_drafts_are_as_long_as_the_longest_suffix_that_was_followed(
    growth: list[tuple[int, list[int]]], max_depth: int
) -> None:
    automaton, texts, states = grown(growth, max_depth)
    for text, state in zip(texts, states, strict=True):
        context = longest_followed(texts, text, max_depth)
        draft = automaton.draft(state, 8, max_spec_factor=1.0, min_token_prob=0.0)
        at_end = not followers(texts, (context + draft)[-max_depth:])
        assert len(draft) == min(8, len(context)) or (len(draft) < len(context) and at_end)


@given(steps, st.integers(1, 6))
def test_every_drafted_token_has_come_after_the_longest_suffix(
    growth: list[tuple[int, list[int]]], max_depth: int
) -> None:
    automaton, texts, states = grown(growth, max_depth)
    for text, state in zip(texts, states, strict=True):
        context = longest_followed(texts, text, max_depth)
        draft = automaton.draft(state, 8, max_spec_factor=8.0, min_token_prob=0.0)
        assert bool(draft) == bool(context)
        for token in draft:
            assert token in followers(texts, context)
            context = (context + [token])[-max_depth:]


@given(steps, st.integers(1, 6))
def test_it_holds_two_states_per_token_at_most(growth: list[tuple[int, list[int]]], max_depth: int) -> None:
    automaton, texts, _ = grown(growth, max_depth)
    assert automaton.num_states <= 1 + 2 * sum(map(len, texts))


@given(steps, st.integers(1, 6))
def test_no_walk_along_links_is_longer_than_the_depth(growth: list[tuple[int, list[int]]], max_depth: int) -> None:
    automaton, _, _ = grown(growth, max_depth)
    assert max(automaton._lengths) <= max_depth
    for state in range(1, automaton.num_states):
        assert automaton._lengths[automaton._links[state]] < automaton._lengths[state]


@given(steps, st.integers(1, 6))
def test_totals_are_sums_and_the_likeliest_has_the_highest_count(
    growth: list[tuple[int, list[int]]], max_depth: int
) -> None:
    automaton, _, _ = grown(growth, max_depth)
    for row, total, token in zip(automaton._edges, automaton._totals, automaton._likeliest, strict=True):
        counts = {token: edge >> 32 for token, edge in row.items()}
        assert total == sum(counts.values())
        assert not row if token < 0 else counts[token] == max(counts.values())


@given(steps, st.integers(1, 6))
def test_tokens_may_come_one_by_one_or_many_at_once(growth: list[tuple[int, list[int]]], max_depth: int) -> None:
    at_once, _, states = grown(growth, max_depth)
    one_by_one, _, others = grown([(which, [token]) for which, tokens in growth for token in tokens], max_depth)
    assert at_once.num_states == one_by_one.num_states
    for a, b in zip(states, others, strict=True):
        assert at_once.draft(a, 8, 8.0, 0.1) == one_by_one.draft(b, 8, 8.0, 0.1)


def test_the_most_frequent_token_is_drafted_and_the_latest_of_equals() -> None:
    automaton = SuffixAutomaton(4)
    for last in (7, 8, 8, 9):
        automaton.advance(ROOT, [1, 2, last])
    state = automaton.advance(ROOT, [1, 2])
    assert automaton.draft(state, 1, 1.0, 0.0) == [8]
    automaton.advance(state, [9])
    assert automaton.draft(state, 1, 1.0, 0.0) == [9]


def test_a_draft_ends_before_it_becomes_improbable() -> None:
    automaton = SuffixAutomaton(4)
    for tail in ([3, 4, 5], [3, 4, 5], [3, 4, 6], [3, 7, 8], [9, 9, 9]):  # 4/5 * 3/4 * 2/3 = 2/5
        automaton.advance(ROOT, [1, 2, *tail])
    state = automaton.advance(ROOT, [1, 2])
    drafts = [automaton.draft(state, 8, 8.0, least) for least in (0.85, 0.75, 0.55, 0.35)]
    assert drafts == [[], [3], [3, 4], [3, 4, 5]]


def test_repeating_what_is_known_adds_nothing() -> None:
    tokens = [random.Random(0).randrange(50) for _ in range(300)]
    automaton = SuffixAutomaton(8)
    automaton.advance(ROOT, tokens)
    automaton.advance(ROOT, tokens[100:])  # after the first eight tokens of it, all contexts are known
    before = automaton.num_states
    for end in (150, 200, 300):
        automaton.advance(ROOT, tokens[100:end])
    assert automaton.num_states == before


def test_a_loop_costs_as_many_states_as_its_contexts() -> None:
    automaton = SuffixAutomaton(8)
    state = automaton.advance(ROOT, [1, 2, 3] * 10)
    before = automaton.num_states
    state = automaton.advance(state, [1, 2, 3] * 1000)
    assert automaton.num_states == before
    assert automaton.draft(state, 7, 1.0, 0.5) == [1, 2, 3, 1, 2, 3, 1]
