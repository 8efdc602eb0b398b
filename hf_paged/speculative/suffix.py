"""SuffixDrafter: a sequence goes on as other samples of its prompt did, now or in earlier calls, or itself before."""

from __future__ import annotations

import math
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from hf_paged.engine.request import Request, Sequence
from hf_paged.speculative.automaton import ROOT, SuffixAutomaton
from hf_paged.speculative.history import RolloutHistory


@dataclass(eq=False, slots=True)
class _Group:
    """What unfinished sequences of one prompt share."""

    automaton: SuffixAutomaton
    after_prompt: int
    """The automaton's state after the prompt."""
    num_followed: int = 0
    """Sequences that have a place in it."""


@dataclass(eq=False, slots=True)
class _Place:
    """How far a sequence has been followed."""

    group: _Group
    state: int
    num_tokens: int


class SuffixDrafter:
    """Suffix decoding (arXiv 2411.04975) per prompt, as it suits training by reinforcement (DAS, arXiv 2511.13841; SRT,
    arXiv 2601.09083).

    All unfinished sequences of a prompt, whatever requests they belong to, write into one suffix automaton as their
    tokens become known, so that each sees the others' at once. It begins with the prompt and the rollouts of earlier
    calls. What is proposed for a sequence is what most often came after its longest suffix that occurs there, token by
    token.

    Finished rollouts are kept as plain tokens. The automaton takes a hundred times the memory, 400 bytes per token,
    and goes with the last unfinished sequence. The next one is made of the latest rollouts alone, since older weights
    wrote the others; among these, counting newer ones more changes nothing that can be measured.

    Names and defaults are vLLM's, less their prefix `suffix_decoding_`, where vLLM has the option.

    Args:
        max_tree_depth: tokens of the longest suffix that is told apart.
        max_cached_requests: prompts whose rollouts are kept; the least recently used is dropped first.
        max_spec_factor: tokens proposed per token of the suffix found, at most.
        min_token_prob: a proposal ends before its estimated probability, the product of the frequencies of its
            tokens, falls below this.
        max_cached_tokens: tokens kept of all prompts and their rollouts, 4 bytes each.
        max_cached_rollouts: rollouts kept per prompt, the latest.

    Raises:
        TypeError, ValueError: an option that makes no sense; the message names it.
    """

    name = "suffix"

    def __init__(
        self,
        max_tree_depth: int = 24,
        max_cached_requests: int = 10000,
        max_spec_factor: float = 1.0,
        min_token_prob: float = 0.1,
        *,
        max_cached_tokens: int = 1 << 26,
        max_cached_rollouts: int = 32,
    ) -> None:
        _check("max_tree_depth", max_tree_depth, int, 1)
        _check("max_cached_requests", max_cached_requests, int, 0)
        _check("max_spec_factor", max_spec_factor, float, 0)
        _check("min_token_prob", min_token_prob, float, 0, 1)
        _check("max_cached_tokens", max_cached_tokens, int, 0)
        _check("max_cached_rollouts", max_cached_rollouts, int, 1)
        self._max_depth = max_tree_depth
        self._max_spec_factor = max_spec_factor
        self._min_token_prob = min_token_prob
        self._history = RolloutHistory(max_cached_requests, max_cached_tokens, max_cached_rollouts)
        self._keys: WeakKeyDictionary[Request, bytes] = WeakKeyDictionary()
        self._groups: dict[bytes, _Group] = {}
        self._places: dict[Sequence, _Place] = {}

    def propose(self, sequences: list[Sequence], room: list[int]) -> list[list[int]]:
        """See `Drafter`."""
        places = self._follow(sequences)
        factor, least = self._max_spec_factor, self._min_token_prob
        return [
            place.group.automaton.draft(place.state, most, factor, least)
            for place, most in zip(places, room, strict=True)
        ]

    def finish(self, sequence: Sequence) -> None:
        """See `Drafter`. Its tokens stay, for its siblings and for later calls."""
        key = self._key(sequence.request)
        if sequence.num_generated:
            self._history.add(key, sequence.generated)
        if key in self._groups:
            self._follow([sequence])
            group = self._places.pop(sequence).group
            group.num_followed -= 1
            if not group.num_followed:
                del self._groups[key]

    def clear(self) -> None:
        """See `Drafter`."""
        self._forget_unfinished()
        self._history.clear()

    def _follow(self, sequences: list[Sequence]) -> list[_Place]:
        """Writes down the tokens that are new, and returns where the sequences are then."""
        try:
            return [self._follow_one(sequence) for sequence in sequences]
        except BaseException:  # an automaton may be half changed; the next call makes all of them anew
            self._forget_unfinished()
            raise

    def _follow_one(self, sequence: Sequence) -> _Place:
        place = self._places.get(sequence)
        if place is None:
            place = self._begin(sequence)
        tokens = sequence.tokens
        num_tokens = len(tokens)
        if num_tokens > place.num_tokens:
            place.state = place.group.automaton.advance(place.state, tokens[place.num_tokens :])
            place.num_tokens = num_tokens
        return place

    def _forget_unfinished(self) -> None:
        self._places.clear()
        self._groups.clear()

    def _begin(self, sequence: Sequence) -> _Place:
        key = self._key(sequence.request)
        group = self._groups.get(key)
        if group is None:
            automaton = SuffixAutomaton(self._max_depth)
            after_prompt = automaton.advance(ROOT, sequence.request.prompt_token_ids)
            for rollout in self._history.use(key):
                automaton.advance(after_prompt, rollout)
            group = self._groups[key] = _Group(automaton, after_prompt)
        group.num_followed += 1
        place = self._places[sequence] = _Place(group, group.after_prompt, sequence.num_prompt)
        return place

    def _key(self, request: Request) -> bytes:
        key = self._keys.get(request)
        if key is None:
            # With an adapter it goes on otherwise; no token is negative.
            adapter = [] if request.adapter is None else [-1 - request.adapter.request.lora_int_id % (1 << 31)]
            key = self._keys[request] = RolloutHistory.key(request.prompt_token_ids + adapter)
        return key


def _check(option: str, value: float, kind: type, least: float, most: float = math.inf) -> None:
    if not isinstance(value, int if kind is int else int | float) or isinstance(value, bool):
        raise TypeError(f"{option} must be {'an int' if kind is int else 'a number'}, got {value!r}")
    if not least <= value <= most or math.isinf(value):
        bounds = f"at least {least}" + ("" if math.isinf(most) else f" and at most {most}")
        raise ValueError(f"{option} must be {bounds}, got {value}")
