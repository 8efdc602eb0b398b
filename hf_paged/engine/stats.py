"""What an engine tells about its steps."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step did, for observers."""

    step: int
    start_s: float
    """`time.monotonic()` when it began."""
    duration_s: float
    decodes: list[tuple[str, int]]
    """(request id, sample index) of each decoding sequence."""
    chunks: list[tuple[str, int, int]]
    """(request id, sample index, tokens) of each piece of prefill."""
    num_waiting: int
    active_pages: int
    """Pages that running sequences hold."""
    cached_pages: int
    """Pages that only the prefix cache holds."""
    drafts: list[tuple[str, int, int, int]] = field(default_factory=list)
    """(request id, sample index, tokens drafted, tokens accepted) of each draft that was verified."""
    preempted: list[tuple[str, int]] = field(default_factory=list)
    """(request id, sample index) of those that went back to the queue when the step was scheduled."""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine has to do at one moment, and room for."""

    running: int
    """Sequences that hold pages."""
    waiting: int
    """Sequences that do not yet, or not at present."""
    active_pages: int
    """Pages that running sequences hold."""
    num_pages: int
    max_num_seqs: int


@dataclass(slots=True)
class EngineStats:
    """Totals since the engine was made."""

    steps: int = 0
    prompt_tokens: int = 0
    """Tokens of prefill computed (recomputed ones included)."""
    generation_tokens: int = 0
