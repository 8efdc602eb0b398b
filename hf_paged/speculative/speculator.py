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
FORCED = "forced"
"""The method of drafts that a form leaves no choice about (jump-forward decoding; Zheng et al., "SGLang: Efficient
Execution of Structured Language Model Programs", arXiv 2312.07104). A text may be cut into tokens in several ways, so
these are verified like all others."""
ROWS_PER_JUMP = 8
"""Of those that cost little more than one, per running sequence, at least: with fewer, a step is so large that rows of
forced tokens, of which about half are accepted where JSON may have blanks, cost what they bring."""
WORTH = 0.25
"""Forced tokens per running sequence from which on that pays: the device waits for the host once."""
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
    """Asks drafters, between a step's landing and the next one's launch, and whether that is worth waiting for.

    Args:
        max_rows: of a step; verifications get what decodes leave of them.
        drafters: those that cannot be made out of a configuration alone.
        steady: decide by the batch alone, not by what was measured.
        jumps: draft what forms force.
    """

    def __init__(
        self,
        max_rows: int = 64,
        drafters: dict[SpeculativeConfig, Drafter] | None = None,
        steady: bool = False,
        jumps: bool = True,
    ) -> None:
        self.max_rows = max_rows
        self.pace = (Steady if steady else Pace)(max_rows // 16)
        self.stats: dict[str, DraftStats] = {}
        """By method."""
        self._drafters: dict[SpeculativeConfig, Drafter] = dict(drafters or {})
        self._requests: set[str] = set()
        """Unfinished ones that want drafts."""
        self._jumps = jumps
        self._forms: dict[str, float] = {}
        """Unfinished ones with a form, and how much of what it forces is accepted."""
        self._forced: set[Sequence] = set()
        """Whose last draft was forced."""
        self._rates: dict[Sequence, float] = {}
        """Acceptance rates of running sequences."""

    def begin(self, request: Request) -> None:
        if request.speculation is not None:
            self._requests.add(request.request_id)
        # A processor may remember what it was called for, and drafts may be rejected that nobody asked for.
        called = request.sampling.logits_processors or request.hooks is not None
        if request.form is not None and self._jumps and not called:
            self._forms[request.request_id] = FIRST_RATE

    def end(self, request: Request) -> None:
        """The request is finished."""
        self._forms.pop(request.request_id, None)
        self._forced.difference_update(request.sequences)
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

    def must_jump(self, running: list[Sequence]) -> bool:
        """Whether forms force so much, beyond the token that is on its way, that it is better drafted at once."""
        if not self._may_jump(running):
            return False
        forced = sum(
            max(len(self._forced_after(sequence)) - sequence.num_pending, 0)
            for sequence in running
            if sequence.num_computed + 1 >= len(sequence.tokens)
        )
        return forced >= max(WORTH * len(running), 1)

    def propose(self, running: list[Sequence]) -> dict[Sequence, list[int]]:
        """Drafts for those of the running sequences that decode; all their tokens are known."""
        jumps, wants = self._may_jump(running), self.wants(len(running))
        rows = self.max_rows - len(running)
        decoding = [sequence for sequence in running if _decodes(sequence)] if jumps or wants else []
        drafts = self._jump(decoding, rows) if jumps else {}
        self._forced = set(drafts)
        if not wants:
            return drafts
        rows -= sum(map(len, drafts.values()))
        groups: dict[SpeculativeConfig, list[Sequence]] = {}
        for sequence in decoding:
            if sequence.request.speculation is not None and sequence not in drafts:
                groups.setdefault(sequence.request.speculation, []).append(sequence)
        for config, sequences in groups.items():
            room = self._room(sequences, config, rows)
            found = self._drafter(config).propose(sequences, room)
            drafts |= {sequence: draft for sequence, draft in zip(sequences, found, strict=True) if draft}
            rows -= sum(map(len, found))
        return drafts

    def _may_jump(self, running: list[Sequence]) -> bool:
        return bool(self._forms) and ROWS_PER_JUMP * len(running) <= self.max_rows

    def _jump(self, decoding: list[Sequence], rows: int) -> dict[Sequence, list[int]]:
        """What forms force, where anything is."""
        drafts: dict[Sequence, list[int]] = {}
        for sequence in decoding:
            if forced := self._forced_after(sequence)[:rows]:
                drafts[sequence] = forced
                rows -= len(forced)
        return drafts

    def _forced_after(self, sequence: Sequence) -> list[int]:
        """Of a model that spells texts in other ways nothing is drafted."""
        state = sequence.form_state
        if state is None or self._forms.get(sequence.request.request_id, 0.0) < LIKELY:
            return []
        return state.forced(sequence)

    def verified(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        seen = min(drafted, accepted + 1)  # what comes after the first rejected token tells nothing
        request = sequence.request
        if sequence in self._forced:
            self.stats.setdefault(FORCED, DraftStats()).count(drafted, accepted)
            if (known := self._forms.get(request.request_id)) is not None:
                self._forms[request.request_id] = known + NEWEST * (accepted / seen - known)
            return
        config = request.speculation
        if config is None:
            return  # the request has ended meanwhile
        self.stats.setdefault(config.method, DraftStats()).count(drafted, accepted)
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


def _decodes(sequence: Sequence) -> bool:
    """Whether all its tokens are known, and all but the last computed."""
    request = sequence.request
    last = len(sequence.tokens) - sequence.num_computed == 1 and not sequence.num_pending
    return last and request.forked and request.scored is None
