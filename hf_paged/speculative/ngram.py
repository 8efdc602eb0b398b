"""NgramDrafter: a sequence that repeats itself goes on as it did before (prompt lookup decoding)."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_paged.engine.request import Sequence

AT_ONCE = 4096
"""Tokens of prompts that are indexed in a step, at most: about a millisecond. A sequence is drafted for once all of its
own are."""


@dataclass(slots=True)
class _Index:
    """Where each n-gram of a sequence was last followed by something."""

    num_tokens: int = 0
    """The n-grams that end before this token are in `places`."""
    places: dict[tuple[int, ...], int] = field(default_factory=dict)
    """n-gram -> the place of the token that came after it."""


class NgramDrafter:
    """Proposes what came after the latest earlier occurrence of the longest n-gram at the sequence's end.

    What came after the earliest one is accepted a little less often.

    A sequence's n-grams are indexed as its tokens come, so that a step costs what its new tokens cost, however long the
    sequence is. The index holds at most prompt_lookup_max - prompt_lookup_min + 1 entries per token, and goes with the
    sequence. Names and defaults are vLLM's.

    Args:
        prompt_lookup_max: tokens of the longest n-gram that is looked for. None: prompt_lookup_min, or 5.
        prompt_lookup_min: tokens of the shortest one. None: prompt_lookup_max, or 5.

    Raises:
        TypeError, ValueError: not integers with 1 <= prompt_lookup_min <= prompt_lookup_max.
    """

    name = "ngram"

    def __init__(self, prompt_lookup_max: int | None = None, prompt_lookup_min: int | None = None) -> None:
        longest = next((n for n in (prompt_lookup_max, prompt_lookup_min) if n is not None), 5)
        shortest = longest if prompt_lookup_min is None else prompt_lookup_min
        for option, n in (("prompt_lookup_max", longest), ("prompt_lookup_min", shortest)):
            if not isinstance(n, int) or isinstance(n, bool):
                raise TypeError(f"{option} must be an int, got {n!r}")
            if n < 1:
                raise ValueError(f"{option} must be at least 1, got {n}")
        if shortest > longest:
            raise ValueError(f"prompt_lookup_min ({shortest}) must not exceed prompt_lookup_max ({longest})")
        self._sizes = range(longest, shortest - 1, -1)
        self._indices: dict[Sequence, _Index] = {}

    def propose(self, sequences: list[Sequence], room: list[int]) -> list[list[int]]:
        """See `Drafter`."""
        drafts, left = [], AT_ONCE
        for sequence, most in zip(sequences, room, strict=True):
            index = self._indices.setdefault(sequence, _Index())
            end = len(sequence.tokens)
            if end - index.num_tokens > 1:
                end = min(end, index.num_tokens + left)
                left -= end - index.num_tokens
            self._extend(index, sequence.tokens, end)
            drafts.append(self._continuation(index, sequence.tokens, most) if end == len(sequence.tokens) else [])
        return drafts

    def finish(self, sequence: Sequence) -> None:
        """See `Drafter`."""
        self._indices.pop(sequence, None)

    def clear(self) -> None:
        """See `Drafter`."""
        self._indices.clear()

    def _extend(self, index: _Index, tokens: list[int], end: int) -> None:
        """Indexes the tokens before `end`."""
        places = index.places
        for size in self._sizes:
            first = max(index.num_tokens, size)
            if end - first == 1:
                places[tuple(tokens[first - size : first])] = first
            elif end > first:  # of a whole prompt, without a loop of the interpreter's
                columns = (tokens[first - size + i : end - size + i] for i in range(size))
                places.update(zip(zip(*columns, strict=True), range(first, end), strict=True))
        index.num_tokens = end

    def _continuation(self, index: _Index, tokens: list[int], room: int) -> list[int]:
        end, places = len(tokens), index.places
        for size in self._sizes:
            came_next = places.get(tuple(tokens[end - size :])) if size < end else None
            if came_next is not None:
                found = tokens[came_next : came_next + room]
                while 0 < len(found) < room:  # the n-gram overlaps what follows it: a loop, which may well go on
                    found += found[: room - len(found)]
                return found
        return []
