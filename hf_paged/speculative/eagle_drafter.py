"""Drafting with an EAGLE-3 head: its keys and values lie in pages of the same numbers as the target's.

The pair of position p is the target's hidden state there and token p + 1; its key and value stand where the target's of
position p do. They do not depend on the head's attention, so pairs whose token is known are written without it, prompts
included, and only the last pair of a sequence runs through the layer, as the first step of its draft.

What was cached by others, or computed when nobody looked, leaves gaps or a neighbour's token in these pages. That makes
drafts worse and nothing else: the target verifies them.

A draft is a chain. A tree would need a verification whose rows do not all see each other (attention with a mask
per row), positions that several rows share, and pages where the accepted branch is moved together afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_paged.attention.backend import LayerSpec
from hf_paged.attention.select import choose_backend
from hf_paged.cache.storage import KVStorage
from hf_paged.config import EngineConfig
from hf_paged.engine.batch import Batch, Chunk, DraftRow
from hf_paged.engine.request import Sequence
from hf_paged.model.compile import decoder_layers
from hf_paged.model.hidden import HiddenStates
from hf_paged.model.inputs import InputBuilder
from hf_paged.model.introspect import ModelLayout
from hf_paged.sampling.fused import SlotParams
from hf_paged.sampling.sampler import Sampler
from hf_paged.speculative.draft_model import UNKNOWN
from hf_paged.speculative.eagle import Eagle3Head
from hf_paged.speculative.in_step import InStepDrafter, asks_for


@dataclass(frozen=True, slots=True)
class _Rows:
    """Fused hidden states of a sequence at positions `[start, start + len)`, whose pairs were not computed yet."""

    start: int
    hidden: Tensor
    """`[len, H]`."""

    @property
    def end(self) -> int:
        return self.start + len(self.hidden)

    def then(self, start: int, hidden: Tensor) -> _Rows:
        """These and the ones that come after them; the new ones alone where they do not begin at the end of these."""
        return _Rows(self.start, torch.cat([self.hidden, hidden])) if self.end == start else _Rows(start, hidden)


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Of one sequence, what the head may compute: tokens `[start + 1, start + 1 + len)` go with `hidden`."""

    sequence: Sequence
    start: int
    hidden: Tensor
    """`[len, H]`."""


class Eagle3Drafter(InStepDrafter):
    """Drafts for decoding sequences whose last computed position was seen by `after`.

    Args:
        head: moved to the target's device.
        lm, target: the target model and its layout.
        config: the engine's.

    Raises:
        ValueError: the head is another target's; the message says what differs.
    """

    name = "eagle3"

    def __init__(self, head: Eagle3Head, lm: nn.Module, target: ModelLayout, config: EngineConfig) -> None:
        _check(head, lm, target)
        self._head, self._target = head.to(target.device), target
        self._shared_embedding = lm.get_input_embeddings()  # type: ignore[operator]
        self.dtype = head.fc.weight.dtype
        layers = decoder_layers(lm, target.modules)
        self.hidden: HiddenStates = HiddenStates([layers[i] for i in head.aux_layers(len(layers))])
        own: Any = head.config
        self._layer = LayerSpec(
            index=0,
            num_heads=own.num_attention_heads,
            num_kv_heads=own.num_key_value_heads,
            key_dim=own.head_dim,
            value_dim=own.head_dim,
            scaling=own.head_dim**-0.5,
        )
        self.layers = [self._layer]
        self._backend = choose_backend(config.attention_backend, target.device, self.dtype, self.dtype, self.layers)
        self._graphs = target.device.type == "cuda" and config.cuda_graphs
        self._rows: dict[Sequence, _Rows] = {}
        """The newest ones of each sequence that decodes, or is being prefilled."""

    # ---- as a drafter: how much, not what ----------------------------------------------------------------------

    def propose(self, sequences: list[Sequence], room: list[int]) -> list[list[int]]:
        return [
            [UNKNOWN] * count if self._sees_the_end_of(sequence) else []
            for sequence, count in zip(sequences, room, strict=True)
        ]

    def finish(self, sequence: Sequence) -> None:
        self._rows.pop(sequence, None)

    def clear(self) -> None:
        self._rows.clear()

    def _sees_the_end_of(self, sequence: Sequence) -> bool:
        rows, last = self._rows.get(sequence), len(sequence.tokens) - 2
        return rows is not None and rows.start <= last < rows.end

    # ---- pages -------------------------------------------------------------------------------------------------

    def allocate(self, num_pages: int, inputs: InputBuilder) -> KVStorage:
        storage = KVStorage(
            self.layers,
            num_pages,
            inputs.page_size,
            dtype=self.dtype,
            device=self._target.device,
            layout=self._backend.layout,
            remappable=True,
        )
        self._keys, self._values = storage.keys[0], storage.values[0]
        self._inputs = inputs.sharing_its_table()
        self._rows.clear()
        return storage

    def make_graphs(self, max_num_seqs: int, max_rows: int) -> None:
        if self._graphs:
            size = self._head.target_hidden_size
            self.hidden.fix(max(max_num_seqs, max_rows), size, self._target.kv_dtype, self._target.device)

    def drop(self) -> None:
        self._rows.clear()
        del self._keys, self._values

    # ---- steps -------------------------------------------------------------------------------------------------

    def before(self, batch: Batch, writes: np.ndarray | None) -> None:
        """Writes what plain decode steps left, so that no more than a step or two of it is ever kept."""
        pairs = [
            self._known(row)
            for row in batch.decodes
            if row is row.origin and row in self._rows and row not in batch.drafts
        ]
        self._write([found for found in pairs if len(found.hidden)])

    def draft(self, drafts: dict[Sequence, list[int]], params: SlotParams | None, sampler: Sampler) -> Tensor | None:
        found = [self._known(sequence) for sequence in drafts]
        self._write([_Pairs(p.sequence, p.start, p.hidden[:-1]) for p in found if len(p.hidden) > 1])
        hidden = torch.cat([pairs.hidden[-1:] for pairs in found])
        running = list(drafts)
        for j in range(max(map(len, drafts.values()))):
            going_on = [place for place, sequence in enumerate(running) if len(drafts[sequence]) > j]
            if len(going_on) < len(running):
                hidden, running = hidden[self._upload(going_on)], [running[place] for place in going_on]
            tokens = [drafts[sequence][j - 1] if j else sequence.last_token for sequence in running]
            hidden, logits = self._step([DraftRow(s, drafts[s], j - 1) for s in running], tokens, hidden)
            drawn = sampler.draft(logits, [DraftRow(s, drafts[s], j) if j else s for s in running])
            for sequence, token in zip(running, drawn, strict=True):
                drafts[sequence][j] = token
        return None

    @torch.no_grad()
    def after(self, batch: Batch) -> None:
        with self._own_precision():
            fused = self._head.fuse(self.hidden.rows(batch.num_tokens))
        for place, row in enumerate(batch.decodes):
            if row is row.origin and asks_for(self.name, row):
                hidden = fused[place : place + 1 + len(batch.drafts.get(row, ()))]
                rows = self._rows.get(row)
                self._rows[row] = rows.then(row.num_computed, hidden) if rows else _Rows(row.num_computed, hidden)
        first, pairs = len(batch.decodes), []
        for chunk in batch.chunks:
            pairs.append(self._prefilled(chunk, fused[first : first + chunk.length]))
            first += chunk.length
        self._write([found for found in pairs if len(found.hidden)])

    def _prefilled(self, chunk: Chunk, hidden: Tensor) -> _Pairs:
        """What can be computed of a chunk; its last row waits for the token after it."""
        sequence = chunk.sequence
        rows = _Rows(chunk.start, hidden)
        if sequence in self._rows:
            rows = self._rows[sequence].then(chunk.start, hidden)
        if asks_for(self.name, sequence):
            for waiting in chunk.samples or [sequence]:
                self._rows[waiting] = _Rows(rows.end - 1, hidden[-1:].clone())  # not a view of the whole step's
        # At the end of what is known, the last one's token is yet to be sampled.
        return _Pairs(sequence, rows.start, rows.hidden[: len(sequence.tokens) - 1 - rows.start])

    def _known(self, sequence: Sequence) -> _Pairs:
        """Takes the rows whose tokens are known; those of tokens under way stay, those of rejected ones are gone."""
        rows, last = self._rows.pop(sequence), len(sequence.tokens) - 2
        if sequence.num_pending:
            self._rows[sequence] = _Rows(max(last + 1, rows.start), rows.hidden[max(last + 1 - rows.start, 0) :])
        return _Pairs(sequence, rows.start, rows.hidden[: max(last + 1 - rows.start, 0)])

    # ---- the head ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _write(self, found: list[_Pairs]) -> None:
        """Puts keys and values of pairs into their pages."""
        if not found:
            return
        size = self._inputs.page_size
        positions = np.concatenate([np.arange(p.start, p.start + len(p.hidden)) for p in found])
        slots = np.concatenate([np.full(len(p.hidden), p.sequence.slot) for p in found])
        tokens = [t for p in found for t in p.sequence.tokens[p.start + 1 : p.start + 1 + len(p.hidden)]]
        hidden = torch.cat([p.hidden for p in found])
        with self._own_precision():
            keys, values = self._head.keys_values(self._embed(tokens), hidden, self._upload(positions))
        pages = self._upload(self._inputs.block_table[slots, positions // size].astype(np.int64))
        offsets = self._upload(positions % size)
        for pool, rows in ((self._keys, keys), (self._values, values)):
            (pool.transpose(1, 2) if self._backend.layout == "HND" else pool)[pages, offsets] = rows

    @torch.no_grad()
    def _step(self, rows: list[DraftRow], tokens: list[int], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """One step of a draft: `rows` stand at the positions of `hidden` `[B, H]`, `tokens` come after them.

        Returns:
            the head's output `[B, H]`, and logits `[B, V]` over the target's vocabulary.
        """
        inputs = self._inputs.build(Batch(decodes=list(rows)))
        plan = self._backend.plan(inputs.attention, self.layers)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self._backend.run(plan, self._layer, query, key, value, self._keys, self._values, None)

        with self._own_precision():
            hidden = self._head(self._embed(tokens), hidden, self._upload(inputs.positions), attend)
            return hidden, self._head.target_logits(hidden)

    def _embed(self, tokens: list[int]) -> Tensor:
        embedding = self._head.embed_tokens or self._shared_embedding
        return functional.embedding(self._upload(tokens), embedding.weight).to(self.dtype)

    def _own_precision(self) -> torch.autocast:
        """The caller's autocast is for the target."""
        return torch.autocast(self._target.device.type, enabled=False)

    def _upload(self, values: list[int] | np.ndarray) -> Tensor:
        tensor = torch.as_tensor(values, dtype=torch.int64)
        if self._target.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._target.device, non_blocking=True)


def _check(head: Eagle3Head, lm: nn.Module, target: ModelLayout) -> None:
    size = lm.config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
    if head.target_hidden_size != size:
        raise ValueError(
            f"the EAGLE-3 head is for a target of hidden size {head.target_hidden_size}, and {type(lm).__name__} has "
            f"{size}: a head drafts for the model that it was trained on"
        )
    if head.config.vocab_size != target.vocab_size:
        raise ValueError(
            f"the EAGLE-3 head is for a vocabulary of {head.config.vocab_size} tokens, and {type(lm).__name__} has "
            f"{target.vocab_size}: a head drafts for the model that it was trained on"
        )
    if head.embed_tokens is None and head.config.hidden_size != size:
        raise ValueError(
            f"the EAGLE-3 head has no embed_tokens of its own and cannot share the target's: its hidden size is "
            f"{head.config.hidden_size}, theirs {size}"
        )
