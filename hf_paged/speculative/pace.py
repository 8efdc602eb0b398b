"""Pace: whether speculating is faster just now, found by doing both.

A verification costs more than a decode step, the host drafts while the device waits, and what it brings depends on the
text. None of that is known beforehand, so tokens per second are measured both ways, apart for each size of batch (by
powers of two), and the slower way is tried again after ever longer times.
"""

from __future__ import annotations

from collections import deque
from statistics import median

FIRST_TRIAL, TRIAL = 8, 4
"""Steps that a way is tried for, at first and later."""
SHORTEST, LONGEST = 32, 2048
"""Steps between two trials of the slower way."""
BETTER = 1.02
"""How much faster a way must be to take over."""


class Pace:
    """Measures and decides."""

    def __init__(self) -> None:
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
        size = num_seqs.bit_length()
        if size not in self._races:
            self._races[size] = _Race()
        return self._races[size]


class _Race:
    """Of the two ways, at one size of batch."""

    def __init__(self) -> None:
        self._faster, self._trying = True, False
        self._left, self._wait, self._trial = FIRST_TRIAL, SHORTEST // 4, FIRST_TRIAL
        self._steps: dict[bool, deque[tuple[int, float]]] = {way: deque(maxlen=FIRST_TRIAL) for way in (True, False)}

    @property
    def way(self) -> bool:
        return self._faster != self._trying

    def landed(self, tokens: int, seconds: float) -> None:
        self._steps[self.way].append((tokens, seconds))
        self._left -= 1
        if self._left:
            return
        if not self._trying:
            self._trying, self._left, self._trial = True, self._trial, TRIAL
            self._steps[self.way].clear()
            return
        if self._rate(not self._faster) > BETTER * self._rate(self._faster):
            self._faster, self._wait = not self._faster, SHORTEST
        else:
            self._wait = min(4 * self._wait, LONGEST)
        self._trying, self._left = False, self._wait

    def _rate(self, way: bool) -> float:
        """Tokens per second. The median of the steps' times, since some compile or capture something."""
        steps = self._steps[way]
        return sum(tokens for tokens, _ in steps) / max(len(steps) * median(s for _, s in steps), 1e-9)
