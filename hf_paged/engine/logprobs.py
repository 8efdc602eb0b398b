"""Log-probabilities of generated tokens as sequences keep them. Plain Python, no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One token's: `token_ids[0]` is the token itself, then the likeliest in order, if any were asked for."""

    token_ids: list[int]
    logprobs: list[float]
    """Natural logarithms."""
    rank: int
    """Of the token itself among the whole vocabulary; 1 is the likeliest."""


class LogprobHistory:
    """What is known of a sequence's generated tokens, one after the other.

    The usual case, a token's own log-probability and rank, is kept in flat lists of numbers: an object for each of some
    hundred thousand tokens would keep the garbage collector busier than the rest of the engine together.
    """

    __slots__ = ("likeliest", "ranks", "token_ids", "values")

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.values: list[float] = []
        """Natural logarithms."""
        self.ranks: list[int] = []
        self.likeliest: dict[int, TokenLogprobs] = {}
        """By place: whole entries, of tokens for which the likeliest were asked for too."""

    def __len__(self) -> int:
        return len(self.values)

    def add(self, token: int, value: float, rank: int) -> None:
        self.token_ids.append(token)
        self.values.append(value)
        self.ranks.append(rank)

    def append(self, entry: TokenLogprobs) -> None:
        if len(entry.token_ids) > 1:
            self.likeliest[len(self.values)] = entry
        self.add(entry.token_ids[0], entry.logprobs[0], entry.rank)

    def truncate(self, length: int) -> None:
        """Forgets all from there on."""
        for kept in (self.token_ids, self.values, self.ranks):
            del kept[length:]
        self.likeliest = {place: entry for place, entry in self.likeliest.items() if place < length}

    def since(self, start: int) -> LogprobHistory:
        """A copy of all from there on."""
        copy = LogprobHistory()
        copy.token_ids, copy.values, copy.ranks = self.token_ids[start:], self.values[start:], self.ranks[start:]
        copy.likeliest = {place - start: entry for place, entry in self.likeliest.items() if place >= start}
        return copy

    def entry(self, place: int) -> TokenLogprobs:
        known = self.likeliest.get(place)
        return known or TokenLogprobs([self.token_ids[place]], [self.values[place]], self.ranks[place])
