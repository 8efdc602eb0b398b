"""A scheduled batch as arrays: packed token ids, positions, pages. numpy only; its cost does not grow with the
context."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass

import numpy as np

from hf_paged.attention.backend import AttentionBatch, PrefillSpan
from hf_paged.attention.shared import SharedPlan
from hf_paged.engine.batch import Batch, DraftRow
from hf_paged.engine.request import Sequence


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One packed forward of T rows."""

    token_ids: np.ndarray
    """int64 [T]; 0 where the token is not known yet."""
    positions: np.ndarray
    """int64 [T]."""
    attention: AttentionBatch
    logit_rows: np.ndarray
    """int64 [R]: the rows whose logits are wanted."""
    sample_rows: list[int]
    """Per sampled sequence of the batch, its row among the R; samples of one prompt share a row at first."""
    prompt_rows: list[tuple[int, int]]
    """Per chunk of the batch, the half-open range among the R of its rows from `Sequence.logits_from` on; empty where
    there are none."""
    sources: np.ndarray | None = None
    """int64 [B]: per decode row, the place of its token among those that the step before sampled, or that were drafted
    on the device for this one; -1 where the token is in `token_ids`. None when all are."""


class InputBuilder:
    """Keeps the block table of the running sequences and turns batches into arrays.

    The table's rows are the scheduler's slots; a step changes only the entries named in `Batch.page_writes`.
    """

    def __init__(self, page_size: int, max_num_seqs: int, max_pages: int) -> None:
        self.page_size = page_size
        self.block_table = np.zeros((max_num_seqs, max_pages), dtype=np.int32)
        self._places: dict[Sequence, int] = {}
        """Of the sequences that the last batch samples for."""

    def sharing_its_table(self) -> InputBuilder:
        """Another one, over the same block table."""
        other = copy.copy(self)
        other._places = {}
        return other

    def write_pages(self, batch: Batch) -> np.ndarray | None:
        """Applies the batch's page writes to the table. Returns them, int64 [W, 3], if there are any, the last one of
        each place."""
        if not batch.page_writes:
            return None
        writes = np.array(
            list({(slot, index): (slot, index, page) for slot, index, page in batch.page_writes}.values())
        )
        self.block_table[writes[:, 0], writes[:, 1]] = writes[:, 2]
        return writes

    def sources(self, batch: Batch) -> np.ndarray | None:
        """As in `StepInputs`; call it once per batch, in the order of launch."""
        places, pending = self._places, any(sequence.num_pending for sequence in batch.decodes)
        self._places = {sequence: place for place, sequence in enumerate(batch.sampled())}
        if any(draft[0] < 0 for draft in batch.drafts.values()):
            drawn = itertools.count()
            unknown = (isinstance(row, DraftRow) and row.last_token < 0 for row in batch.decodes)
            return np.array([next(drawn) if row else -1 for row in unknown], dtype=np.int64)
        if not pending:
            return None
        return np.array([places[s] if s.num_pending else -1 for s in batch.decodes], dtype=np.int64)

    def build(self, batch: Batch, shared: SharedPlan | None = None) -> StepInputs:
        """Packs a batch's rows, decodes first. Its page writes are in the table already.

        Args:
            shared: what the decodes share.
        """
        size = self.page_size
        decodes, chunks = batch.decodes, batch.chunks
        count = len(decodes)
        token_ids = [0 if sequence.num_pending else max(sequence.last_token, 0) for sequence in decodes]
        starts = np.array([sequence.num_computed for sequence in decodes], dtype=np.int64)
        slots_of_decodes = np.array([sequence.slot for sequence in decodes], dtype=np.int64)

        positions, slots_of_rows = [starts], [slots_of_decodes]
        spans: list[PrefillSpan] = []
        logit_rows, sample_rows = list(range(count)), list(range(count))
        prompt_rows: list[tuple[int, int]] = []
        row = count
        for chunk in chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.length
            token_ids.extend(sequence.tokens[chunk.start : end])
            positions.append(np.arange(chunk.start, end))
            slots_of_rows.append(np.full(chunk.length, sequence.slot))
            pages = self.block_table[sequence.slot, : -(-end // size)]
            spans.append(PrefillSpan(row=row, length=chunk.length, context=chunk.start, pages=pages))
            first, logits_from = len(logit_rows), sequence.logits_from
            if logits_from is not None:
                logit_rows.extend(range(row + max(logits_from - chunk.start, 0), row + chunk.length))
            prompt_rows.append((first, len(logit_rows)))
            if logits_from is None and chunk.samples:
                logit_rows.append(row + chunk.length - 1)
            if chunk.samples:
                sample_rows.extend([len(logit_rows) - 1] * len(chunk.samples))
            row += chunk.length

        position = np.concatenate(positions)
        slot = np.concatenate(slots_of_rows)
        longest = int(starts.max()) // size + 1 if count else 0
        return StepInputs(
            token_ids=np.array(token_ids, dtype=np.int64),
            positions=position,
            attention=AttentionBatch(
                page_size=size,
                decode_lengths=starts + 1,
                decode_pages=self.block_table[slots_of_decodes, :longest],
                spans=spans,
                write_pages=self.block_table[slot, position // size].astype(np.int64),
                write_offsets=position % size,
                shared=shared,
                dependent=bool(batch.drafts),
            ),
            logit_rows=np.array(logit_rows, dtype=np.int64),
            sample_rows=sample_rows,
            prompt_rows=prompt_rows,
            sources=self.sources(batch),
        )
