"""How an engine is run, and what came of it: shared by all engines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Settings:
    """How engines are run."""

    repeats: int = 1
    """Timed runs, of which the best counts."""
    time_limit: float | None = None
    """Seconds that an engine's timed runs may take together."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of `EngineConfig`, for ours."""
    generate_batch: int = 16
    """Sequences that stock `generate` gets at once."""
    cb_greedy: bool = False
    """Run transformers' continuous batching greedily, whatever the workload's temperature."""


@dataclass
class EngineRun:
    """One engine's time on one workload."""

    engine: str
    """Its name among the `ENGINES`."""
    seconds: float | None = None
    """Of the best run; None when there is none, and `note` says why."""
    all_seconds: list[float] = field(default_factory=list)
    kv_bytes: int | None = None
    """Most bytes of keys and values held at once, where it can be told."""
    start_s: float | None = None
    """From wrapping the model to the first token of its first generation, a prompt of 8 tokens; for ours."""
    steps: int | None = None
    decode_steps: int | None = None
    """Steps without any part of a prompt."""
    outputs: list[list[int]] = field(default_factory=list)
    """Token ids per prompt and sample, prompts in order, to compare engines by."""
    note: str = ""


class TimeLimitError(Exception):
    """An engine took longer than it may."""


class Deadline:
    """Raises once a time limit is over.

    Args:
        seconds: from now; None is no limit.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._start = time.perf_counter()

    def left(self) -> float | None:
        """Seconds until it is over; None without a limit."""
        return None if self._seconds is None else self._seconds - (time.perf_counter() - self._start)

    def check(self) -> None:
        """
        Raises:
            TimeLimitError: it is over.
        """
        left = self.left()
        if left is not None and left <= 0:
            raise TimeLimitError(f"did not finish in {self._seconds:g} s")


def best_of(settings: Settings, once: Callable[[float | None], tuple[float, list[list[int]]]]) -> dict[str, Any]:
    """Times a workload some times, as long as the time limit allows.

    Args:
        once: runs the workload, and returns the seconds it took and the token ids per prompt and sample. It gets the
            seconds that are left, and raises TimeLimitError when they are over.

    Returns:
        the fields `seconds`, `all_seconds` and `outputs` of an `EngineRun`.

    Raises:
        TimeLimitError: not even the first run ended in time.
    """
    seconds, outputs = once(settings.time_limit)
    times = [seconds]
    while len(times) < settings.repeats:
        left = None if settings.time_limit is None else settings.time_limit - sum(times)
        if left is not None and left < min(times):
            break
        try:
            seconds, outputs = once(left)
        except TimeLimitError:
            break
        times.append(seconds)
    return {"seconds": min(times), "all_seconds": times, "outputs": outputs}


def check_names(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """
    Raises:
        ValueError: a name that is not known; the message lists those that are.
    """
    known = list(known)
    for name in given:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}: choose from {', '.join(known)}")
