"""Batch: what one step computes, as the scheduler decided it. Plain Python, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_paged.engine.request import Sequence


@dataclass(slots=True)
class Chunk:
    """A piece of prefill: tokens `[start, start + length)` of a sequence."""

    sequence: Sequence
    start: int
    length: int
    samples: list[Sequence]
    """Whose next token is sampled from the last row: nobody's (more of the prompt is to come, or it is only scored),
    the sequence's own, or that of all n samples of a request whose prompt is now done."""


@dataclass(slots=True)
class Batch:
    """One step's work. Rows are packed: one per decoding sequence, in order, then the chunks' tokens."""

    decodes: list[Sequence] = field(default_factory=list)
    """Each computes its last token and samples the next."""
    chunks: list[Chunk] = field(default_factory=list)
    page_writes: list[tuple[int, int, int]] = field(default_factory=list)
    """Changes to the block table since the last step: (slot, index in the row, page)."""
    copies: list[tuple[int, int]] = field(default_factory=list)
    """Copy-on-write: (from page, to page), to be copied before the step writes anything."""

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(chunk.length for chunk in self.chunks)

    def __bool__(self) -> bool:
        return bool(self.decodes or self.chunks)

    def sampled(self) -> list[Sequence]:
        """The sequences that get a token from this step, in the order of their logits rows."""
        return self.decodes + [sequence for chunk in self.chunks for sequence in chunk.samples]


@dataclass(slots=True)
class SchedulerStats:
    """Totals since the scheduler was made."""

    prefix_queries: int = 0
    """Prompt tokens looked up in the prefix tree."""
    prefix_hits: int = 0
    """Prompt tokens found there."""
    num_preemptions: int = 0
    peak_pages: int = 0
    """The most pages held by running sequences at once (cached pages that nobody uses are not counted)."""
