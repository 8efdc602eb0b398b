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


class DraftRow(Sequence):
    """A sequence as if the first tokens of its draft had been sampled, to whoever computes or samples: one decode row
    of a verification.

    Args:
        origin: with all its tokens known.
        draft: tokens that may come after `origin.tokens`; not copied, and those that a device draws are filled in when
            they are known.
        count: how many of them this row has for its own. 0 or less is a row of one of the origin's own tokens, counted
            from its last one.
    """

    __slots__ = ("_num_tokens", "_origin", "count", "draft")

    def __init__(self, origin: Sequence, draft: list[int], count: int) -> None:
        self._origin, self.draft, self.count = origin, draft, count
        self.request, self.index, self.slot, self.num_prompt = (
            origin.request,
            origin.index,
            origin.slot,
            origin.num_prompt,
        )
        self.num_computed, self.num_pending = origin.num_computed + count, 0
        self._num_tokens = len(origin.tokens) + count

    @property
    def origin(self) -> Sequence:
        return self._origin

    @property
    def ahead(self) -> list[int]:
        return self.draft[: max(self.count, 0)]

    @property
    def last_token(self) -> int:
        return self.draft[self.count - 1] if self.count > 0 else self._origin.tokens[self.count - 1]

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    @property
    def num_generated(self) -> int:
        return self._num_tokens - self.num_prompt

    @property
    def tokens(self) -> list[int]:  # type: ignore[override]  # made only where somebody looks
        return self._origin.tokens[: self._num_tokens - max(self.count, 0)] + self.ahead


@dataclass(slots=True)
class Batch:
    """One step's work. Rows are packed: one per decoding sequence, in order, then the chunks' tokens."""

    decodes: list[Sequence] = field(default_factory=list)
    """Each computes its last token and samples the next. Behind a sequence with a draft come its `DraftRow`s, one per
    drafted token."""
    drafts: dict[Sequence, list[int]] = field(default_factory=dict)
    """What is verified of which sequences, in the order of `decodes`. A token of -1 is one that the device draws."""
    chunks: list[Chunk] = field(default_factory=list)
    page_writes: list[tuple[int, int, int]] = field(default_factory=list)
    """Changes to the block table since the last step: (slot, index in the row, page)."""
    copies: list[tuple[int, int]] = field(default_factory=list)
    """Copy-on-write: (from page, to page), to be copied before the step writes anything."""
    preempted: list[Sequence] = field(default_factory=list)
    """Those that went back to the queue to make room for it."""

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(chunk.length for chunk in self.chunks)

    def __bool__(self) -> bool:
        return bool(self.decodes or self.chunks)

    def sampled(self) -> list[Sequence]:
        """The sequences that get a token from this step, and the rows that verify drafts, in the order of their logits
        rows."""
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
