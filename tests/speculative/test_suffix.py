"""SuffixDrafter: who learns from whom, what stays and what goes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hf_paged.engine.request import Request, Sequence
from hf_paged.sampling_params import SamplingParams
from hf_paged.speculative.automaton import SuffixAutomaton
from hf_paged.speculative.suffix import SuffixDrafter

PROMPTS = [[0, 1, 2], [1, 1]]
DEPTH = 4
ROLLOUTS = 3
tokens = st.lists(st.integers(0, 3), min_size=1, max_size=4)


def request(prompt: list[int], n: int = 1) -> Request:
    return Request("r", list(prompt), SamplingParams(n=n))


def grow(sequence: Sequence, *added: int) -> Sequence:
    sequence.tokens.extend(added)
    return sequence


class SuffixDrafterMachine(RuleBasedStateMachine):
    """Requests come, sequences grow and end, the drafter is asked about some of them; a naive model keeps whole
    texts."""

    @initialize()
    def make(self) -> None:
        self.drafter = SuffixDrafter(DEPTH, max_spec_factor=10.0, min_token_prob=0.0, max_cached_rollouts=ROLLOUTS)
        self.unfinished: list[Sequence] = []
        self.past: dict[int, list[list[int]]] = {0: [], 1: []}
        """Finished rollouts per prompt."""
        self.shared: dict[int, dict[Sequence | int, list[int]]] = {}
        """What the unfinished sequences of a prompt share: their texts as last seen, and finished ones."""

    def prompt_of(self, sequence: Sequence) -> int:
        return PROMPTS.index(sequence.request.prompt_token_ids)

    def see(self, sequence: Sequence) -> None:
        which = self.prompt_of(sequence)
        if which not in self.shared:
            old = [PROMPTS[which] + rollout for rollout in self.past[which][-ROLLOUTS:]]
            self.shared[which] = {-1: PROMPTS[which], **dict(enumerate(old))}
        self.shared[which][sequence] = list(sequence.tokens)

    @rule(which=st.integers(0, 1), n=st.integers(1, 3))
    def arrive(self, which: int, n: int) -> None:
        self.unfinished += request(PROMPTS[which], n).sequences

    @precondition(lambda self: self.unfinished)
    @rule(data=st.data(), added=tokens)
    def grow(self, data: st.DataObject, added: list[int]) -> None:
        grow(data.draw(st.sampled_from(self.unfinished)), *added)

    @precondition(lambda self: self.unfinished)
    @rule(data=st.data())
    def propose(self, data: st.DataObject) -> None:
        asked = data.draw(st.lists(st.sampled_from(self.unfinished), unique_by=id))
        room = [data.draw(st.integers(0, 5)) for _ in asked]
        for sequence in asked:
            self.see(sequence)
        for sequence, most, draft in zip(asked, room, self.drafter.propose(asked, room), strict=True):
            context = self.longest_match(sequence)
            assert len(draft) <= most
            assert bool(draft) == bool(context and most)
            for token in draft:
                assert token in self.followers(sequence, context)
                context = (context + [token])[-DEPTH:]

    @precondition(lambda self: self.unfinished)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.unfinished))
        self.unfinished.remove(sequence)
        which = self.prompt_of(sequence)
        if sequence.generated:
            self.past[which].append(sequence.generated)
        if which in self.shared:
            self.see(sequence)
            if not any(s in self.shared[which] for s in self.unfinished):
                del self.shared[which]
        self.drafter.finish(sequence)

    @rule()
    def clear(self) -> None:
        self.drafter.clear()
        self.past = {0: [], 1: []}
        self.shared = {}

    def followers(self, sequence: Sequence, context: list[int]) -> list[int]:
        size = len(context)
        texts = self.shared[self.prompt_of(sequence)].values()
        return [text[i] for text in texts for i in range(size, len(text)) if text[i - size : i] == context]

    def longest_match(self, sequence: Sequence) -> list[int]:
        for size in range(DEPTH, 0, -1):
            if size <= len(sequence.tokens) and self.followers(sequence, sequence.tokens[-size:]):
                return sequence.tokens[-size:]
        return []

    @invariant()
    def holds_only_what_is_unfinished(self) -> None:
        assert set(self.drafter._places) <= set(self.unfinished)
        assert len(self.drafter._groups) == len(self.shared)


TestSuffixDrafterMachine = SuffixDrafterMachine.TestCase
TestSuffixDrafterMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_siblings_see_each_other_in_the_same_step() -> None:
    first, second = request([1, 2], n=2).sequences
    grow(first, 3, 4, 5, 6)
    grow(second, 3)
    drafter = SuffixDrafter()
    assert drafter.propose([second, first], [8, 8]) == [[4, 5, 6], []]


def test_requests_of_one_prompt_share_what_they_learn_and_others_do_not() -> None:
    drafter = SuffixDrafter()
    drafter.propose([grow(request([1, 2]).sequences[0], 3, 4, 5)], [0])
    twin, stranger = grow(request([1, 2]).sequences[0], 3), grow(request([2, 2]).sequences[0], 3)
    assert drafter.propose([twin, stranger], [8, 8]) == [[4, 5], []]


def test_finished_rollouts_serve_later_calls() -> None:
    drafter = SuffixDrafter()
    old = grow(request([1, 2]).sequences[0], 3, 4, 5)
    drafter.propose([old], [4])
    drafter.finish(grow(old, 6))
    assert not drafter._groups and not drafter._places
    assert drafter.propose([grow(request([1, 2]).sequences[0], 3)], [8]) == [[4, 5, 6]]


def test_a_sequence_that_ends_unseen_serves_its_siblings() -> None:
    drafter = SuffixDrafter()
    first, second = request([1, 2], n=2).sequences
    drafter.propose([grow(first, 3)], [4])
    drafter.finish(grow(second, 3, 4, 5))
    assert drafter.propose([first], [8]) == [[4, 5]]


def test_the_least_recently_used_prompt_is_dropped() -> None:
    drafter = SuffixDrafter(max_cached_requests=2)
    for prompt in ([1], [2], [3]):
        drafter.finish(grow(request(prompt).sequences[0], 7, 8))
    asked = [grow(request(prompt).sequences[0], 7) for prompt in ([1], [2], [3])]
    assert drafter.propose(asked, [4, 4, 4]) == [[], [8], [8]]


def test_memory_is_bounded_by_tokens() -> None:
    drafter = SuffixDrafter(max_cached_tokens=10)
    for prompt in ([1], [2], [3]):
        drafter.finish(grow(request(prompt).sequences[0], 7, 8, 9))
    assert drafter._history.num_tokens == 8
    drafter = SuffixDrafter(max_cached_requests=0)
    drafter.finish(grow(request([1]).sequences[0], 7, 8, 9))
    assert drafter._history.num_tokens == 0


def test_drafts_are_no_longer_than_the_match_allows() -> None:
    drafter = SuffixDrafter(max_spec_factor=1.5, max_tree_depth=4)
    old = grow(request([0]).sequences[0], *range(1, 40))
    drafter.finish(old)
    asked = grow(request([0]).sequences[0], 20)
    lengths = []
    for token in (21, 22, 23, 24, 25):
        lengths += [len(draft) for draft in drafter.propose([asked], [9])]
        grow(asked, token)
    assert lengths == [1, 3, 4, 6, 6]


class Counting(list[int]):
    """Tokens that count how many of them are read."""

    read = 0

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        self.read += len(found) if isinstance(place, slice) else 1
        return found


def test_a_step_reads_only_what_is_new() -> None:
    drafter, asked = SuffixDrafter(), request([1]).sequences[0]
    drafter.propose([grow(asked, *range(5000))], [8])
    asked.tokens = Counting(asked.tokens)
    drafter.propose([grow(asked, 7, 8)], [8])
    assert asked.tokens.read == 2


def test_a_step_costs_the_same_after_a_long_loop() -> None:
    drafter, looping = SuffixDrafter(), request([1, 2, 3]).sequences[0]
    sizes = []
    for _ in range(5):
        grow(looping, *[1, 2, 3] * 200)
        drafter.propose([looping], [8])
        sizes.append(drafter._places[looping].group.automaton.num_states)
    assert sizes[0] == sizes[-1] < 100


def test_an_interrupt_leaves_the_history_and_a_drafter_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = SuffixDrafter()
    drafter.finish(grow(request([1, 2]).sequences[0], 3, 4, 5))
    asked = grow(request([1, 2]).sequences[0], 3)
    drafter.propose([asked], [4])

    advance = SuffixAutomaton.advance

    def interrupted(self: SuffixAutomaton, state: int, tokens: list[int]) -> int:
        advance(self, state, tokens)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SuffixAutomaton, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            drafter.propose([grow(asked, 9)], [4])
    assert not drafter._groups and not drafter._places
    again = grow(request([1, 2]).sequences[0], 3)
    assert drafter.propose([again], [4]) == [[4, 5]]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_tree_depth": 0}, ValueError, "max_tree_depth must be at least 1, got 0"),
        ({"max_tree_depth": 2.5}, TypeError, "max_tree_depth must be an int, got 2.5"),
        ({"max_cached_requests": -1}, ValueError, "max_cached_requests must be at least 0"),
        ({"max_spec_factor": -0.5}, ValueError, "max_spec_factor must be at least 0, got -0.5"),
        ({"max_spec_factor": float("nan")}, ValueError, "max_spec_factor must be at least 0, got nan"),
        ({"max_spec_factor": "1"}, TypeError, "max_spec_factor must be a number, got '1'"),
        ({"min_token_prob": 1.5}, ValueError, "min_token_prob must be at least 0 and at most 1, got 1.5"),
        ({"max_cached_tokens": -1}, ValueError, "max_cached_tokens must be at least 0"),
        ({"max_cached_rollouts": 0}, ValueError, "max_cached_rollouts must be at least 1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SuffixDrafter(**options)
