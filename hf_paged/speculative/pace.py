"""Pace: whether speculating is faster just now, found by doing both.

A verification costs more than a decode step, the host drafts while the device waits, and what it brings depends on the
text. None of that is known beforehand, so tokens per second are measured both ways, apart for each size of batch (by
powers of two); a size not seen before begins as its neighbour goes on. The way that was slower is tried again for a few
steps after ever longer times, as long as such trials have not cost more than a small share of all time.
"""

from __future__ import annotations

from collections import deque
from statistics import median

FIRST = 8
"""Steps before the other way is tried for the first time."""
TRIAL = 4
"""Steps of a trial."""
SHORTEST, LONGEST = 32, 2048
"""Steps between two trials."""
SHARE = 0.01
"""Of all time, what trials may have lost before another one begins."""
BETTER = 1.05
"""How much faster a way must be to take over."""


class Pace:
    """Measures and decides.

    Args:
        optimistic: up to so many sequences it begins with speculating, beyond with plain steps, unless it has seen
            batches of another size.
    """

    def __init__(self, optimistic: int = 32) -> None:
        self._optimistic = optimistic
        self._races: dict[int, _Race] = {}

    def speculates(self, num_seqs: int) -> bool:
        """Whether the next step of so many sequences is to verify drafts."""
        return self._race(num_seqs).way

    def landed(self, num_seqs: int, speculated: bool, tokens: int, seconds: float) -> None:
        """What a step brought, from the landing of the one before it to its own."""
        race = self._race(num_seqs)
        if race.way == speculated:  # else it was launched before the change
            race.landed(tokens, seconds)

    def _race(self, num_seqs: int) -> _Race:
        size = max(num_seqs - 1, 0).bit_length()
        if size not in self._races:
            known = min(self._races, key=lambda other: (abs(other - size), -other), default=None)
            first = num_seqs <= self._optimistic if known is None else self._races[known].faster
            self._races[size] = _Race(first)
        return self._races[size]


class Steady(Pace):
    """Measures nothing: small batches speculate and large ones do not. For engines that must decide alike in several
    processes, whose clocks differ."""

    def speculates(self, num_seqs: int) -> bool:
        return num_seqs <= self._optimistic

    def landed(self, num_seqs: int, speculated: bool, tokens: int, seconds: float) -> None:
        pass


class _Race:
    """Of the two ways, at one size of batch."""

    def __init__(self, first: bool) -> None:
        self.faster, self._in_trial = first, 0
        self._left = self._wait = FIRST
        self._seconds = self._lost = 0.0
        self._steps: dict[bool, deque[tuple[int, float]]] = {way: deque(maxlen=FIRST) for way in (True, False)}

    @property
    def way(self) -> bool:
        return self.faster != bool(self._in_trial)

    def landed(self, tokens: int, seconds: float) -> None:
        self._steps[self.way].append((tokens, seconds))
        self._seconds += seconds
        if self._in_trial:
            self._in_trial -= 1
            if not self._in_trial:
                self._compare()
            return
        self._left -= 1
        if self._left <= 0 and self._lost <= SHARE * self._seconds:
            self._in_trial = TRIAL
            self._steps[not self.faster].clear()

    def _compare(self) -> None:
        known, tried = self._rate(self.faster), self._rate(not self.faster)
        if tried > BETTER * known:
            self.faster, self._wait = not self.faster, SHORTEST
        else:
            steps = self._steps[not self.faster]
            self._lost += max(0.0, sum(seconds - tokens / known for tokens, seconds in steps))
            self._wait = min(max(SHORTEST, 4 * self._wait), LONGEST)
        self._left = self._wait

    def _rate(self, way: bool) -> float:
        """Tokens per second. The median of the steps' times, since some compile or capture something."""
        steps = self._steps[way]
        return max(sum(t for t, _ in steps), 1) / max(len(steps) * median(s for _, s in steps), 1e-9)
