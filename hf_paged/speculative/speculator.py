"""Speculator: what is drafted in a step, for which sequences, and how much."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from hf_paged.engine.request import Request, Sequence
from hf_paged.speculative.config import SpeculativeConfig
from hf_paged.speculative.drafter import Drafter
from hf_paged.speculative.ngram import NgramDrafter
from hf_paged.speculative.pace import Pace, Steady
from hf_paged.speculative.suffix import SuffixDrafter

FIRST_RATE = 0.7
"""What acceptance is taken for before any is seen."""
NEWEST = 0.2
"""Weight of the newest verification in a sequence's acceptance rate."""
LIKELY = 0.2
"""Where rows are scarce, drafted tokens that are less likely to be accepted get none."""
FREE = ("ngram", "suffix")
"""Methods whose longer drafts cost nothing."""


@dataclass(slots=True)
class DraftStats:
    """Totals of one method."""

    num_drafts: int = 0
    """Verifications."""
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)
    """By place in the draft."""

    @property
    def acceptance_rate(self) -> float:
        """Of drafted tokens."""
        return self.num_accepted_tokens / max(self.num_draft_tokens, 1)

    @property
    def acceptance_length(self) -> float:
        """Tokens that a verification brings on average, the one that is sampled after the accepted ones included."""
        return 1 + self.num_accepted_tokens / max(self.num_drafts, 1)

    def count(self, drafted: int, accepted: int) -> None:
        self.num_drafts += 1
        self.num_draft_tokens += drafted
        self.num_accepted_tokens += accepted
        places = self.num_accepted_tokens_per_pos
        places.extend([0] * (drafted - len(places)))
        for place in range(accepted):
            places[place] += 1


class Speculator:
    """Asks drafters, between a step's landing and the next one's launch.

    Args:
        max_rows: of a step; verifications get what decodes leave of them.
        drafters: those that cannot be made out of a configuration alone.
        steady: decide by the batch alone, not by what was measured.
    """

    def __init__(
        self,
        max_rows: int = 64,
        drafters: dict[SpeculativeConfig, Drafter] | None = None,
        steady: bool = False,
    ) -> None:
        self.max_rows = max_rows
        self.pace = (Steady if steady else Pace)(max_rows // 16)
        self.stats: dict[str, DraftStats] = {}
        """By method."""
        self._drafters: dict[SpeculativeConfig, Drafter] = dict(drafters or {})
        self._requests: set[str] = set()
        """Unfinished ones that want drafts."""
        self._rates: dict[Sequence, float] = {}
        """Acceptance rates of running sequences."""

    def begin(self, request: Request) -> None:
        if request.speculation is not None:
            self._requests.add(request.request_id)

    def end(self, request: Request) -> None:
        """The request is finished."""
        if request.speculation is None:
            return
        self._requests.discard(request.request_id)
        drafter = self._drafter(request.speculation)
        for sequence in request.sequences:
            self._rates.pop(sequence, None)
            drafter.finish(sequence)

    def clear(self) -> None:
        """Forgets what was learnt from texts."""
        for drafter in self._drafters.values():
            drafter.clear()

    def wants(self, num_seqs: int) -> bool:
        """Whether a step of so many running sequences is better drafted for, so that all tokens must be known before
        it is launched."""
        return bool(self._requests) and num_seqs < self.max_rows and self.pace.speculates(num_seqs)

    def propose(self, running: list[Sequence]) -> dict[Sequence, list[int]]:
        """Drafts for those of the running sequences that decode; all their tokens are known."""
        if not self.wants(len(running)):
            return {}
        groups: dict[SpeculativeConfig, list[Sequence]] = {}
        for sequence in running:
            request = sequence.request
            if request.speculation is None or not request.forked or request.scored is not None:
                continue
            if len(sequence.tokens) - sequence.num_computed == 1 and not sequence.num_pending:
                groups.setdefault(request.speculation, []).append(sequence)
        rows = self.max_rows - len(running)
        drafts: dict[Sequence, list[int]] = {}
        for config, sequences in groups.items():
            room = self._room(sequences, config, rows)
            found = self._drafter(config).propose(sequences, room)
            drafts |= {sequence: draft for sequence, draft in zip(sequences, found, strict=True) if draft}
            rows -= sum(map(len, found))
        return drafts

    def verified(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        config = sequence.request.speculation
        assert config is not None
        self.stats.setdefault(config.method, DraftStats()).count(drafted, accepted)
        seen = min(drafted, accepted + 1)  # what comes after the first rejected token tells nothing
        rate = self._rates.get(sequence, FIRST_RATE)
        self._rates[sequence] = rate + NEWEST * (accepted / seen - rate)

    def _drafter(self, config: SpeculativeConfig) -> Drafter:
        if config not in self._drafters:
            made: Any = {"ngram": NgramDrafter, "suffix": SuffixDrafter}[config.method]
            self._drafters[config] = made(**dict(config.options))
        return self._drafters[config]

    def _room(self, sequences: list[Sequence], config: SpeculativeConfig, rows: int) -> list[int]:
        """How much to draft for each: all that is asked for, or where rows are scarce, or drafting is not free, no
        tokens that are unlikely to be accepted, and sequences whose drafts are good first."""
        most = config.num_speculative_tokens
        if rows >= most * len(sequences) and config.method in FREE:
            return [most] * len(sequences)
        rates = [self._rates.get(sequence, FIRST_RATE) for sequence in sequences]
        room = [0] * len(sequences)
        for place in sorted(range(len(sequences)), key=rates.__getitem__, reverse=True):
            rate = min(max(rates[place], LIKELY), 0.99)
            room[place] = min(most, rows, int(math.log(LIKELY) / math.log(rate)))
            rows -= room[place]
        return room
