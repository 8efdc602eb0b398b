"""A smaller model as drafter: its keys and values lie in pages of the same numbers as the target's, so that whatever
the scheduler does with these (sharing, copies, caching, preemption) is done to both.

A sequence's draft is drawn token by token, by the request's own temperature and filters, with the noise that the target
draws with at the same positions: where the two models agree, so do their draws. On a GPU the target's rows take the
drafted tokens where the draws left them, and the host learns of them when the step lands.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_paged.attention.select import choose_backend
from hf_paged.cache.storage import KVStorage
from hf_paged.config import EngineConfig
from hf_paged.engine.batch import Batch, Chunk, DraftRow
from hf_paged.engine.defaults import token_budget
from hf_paged.engine.request import Sequence
from hf_paged.model.capture import CaptureFailed
from hf_paged.model.compile import CompiledLayers, decoder_layers
from hf_paged.model.fuse import FusedLinears, find_groups
from hf_paged.model.graphs import DecodeGraphs
from hf_paged.model.inputs import InputBuilder
from hf_paged.model.introspect import ModelLayout, causal_lm, dry_forward, inspect_model
from hf_paged.model.linear import LeanLinears
from hf_paged.model.runner import ModelRunner, first_line
from hf_paged.model.selfcheck import check_model
from hf_paged.model.weights import WeightWatch
from hf_paged.sampling.fused import SlotParams
from hf_paged.sampling.sampler import Sampler
from hf_paged.speculative.in_step import InStepDrafter, asks_for

logger = logging.getLogger(__name__)

FEW = 4
"""Tokens of a sequence that may come before its draft as rows of the same step; more are computed apart."""
UNKNOWN = -1
"""A drafted token that only the device knows."""


def load_draft_model(model: Any, target: ModelLayout, dtype: torch.dtype) -> nn.Module:
    """The draft model on the target's device, in eval mode.

    Args:
        model: a causal LM of transformers, or the name or path of one; that is loaded in `dtype`.

    Raises:
        FileNotFoundError: there is none by that name.
        ValueError: its vocabulary is not the target's.
        UnsupportedModelError: it cannot be paged.
    """
    if isinstance(model, str | Path):
        from transformers import AutoModelForCausalLM

        try:
            model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        except OSError as error:
            raise FileNotFoundError(
                f"no draft model can be loaded from {str(model)!r} ({first_line(error)})"
            ) from error
    if not isinstance(model, nn.Module):
        raise TypeError(f"the draft model must be a causal LM of transformers, or a path to one; got {model!r}")
    drafting = model.to(target.device).eval()
    size = causal_lm(drafting).config.get_text_config().vocab_size
    if size != target.vocab_size:
        raise ValueError(
            f"the draft model {type(drafting).__name__} has a vocabulary of {size} tokens and the target's is of "
            f"{target.vocab_size}: a draft model must share the target's vocabulary"
        )
    return drafting


class DraftModel(InStepDrafter):
    """Drafts for the decode rows of a step, just before the target computes them.

    Args:
        model: on the target's device.
        config: the engine's.
        num_tokens: the most that a draft has.
    """

    name = "draft_model"

    def __init__(self, model: nn.Module, config: EngineConfig, num_tokens: int) -> None:
        self._lm, self._most = causal_lm(model), num_tokens
        self.layout = layout = inspect_model(model)
        self.layers = layout.layers
        on_gpu = layout.device.type == "cuda"
        self.dtype = layout.kv_dtype
        self._max_rows = config.max_num_batched_tokens or token_budget(layout.device)
        self._backend = choose_backend(config.attention_backend, layout.device, self.dtype, self.dtype, layout.layers)
        self._fused: FusedLinears | None = None
        if config.fuse_linear or (config.fuse_linear is None and on_gpu):
            groups = find_groups(self._lm, lambda: dry_forward(self._lm))
            self._fused = FusedLinears(groups) if groups else None
        self._lean = LeanLinears(self._lm) if on_gpu else None
        self._compiled: CompiledLayers | None = None
        check_model(model, layout, self._backend, fused=self._fused, lean=self._lean)
        if config.compile == "layers" or (config.compile is None and on_gpu):
            self._compiled = CompiledLayers(decoder_layers(self._lm, layout.modules))
        self._captures = on_gpu and config.cuda_graphs and hasattr(self._backend, "capture_decode")
        self._watch = WeightWatch(self._lm)
        self._graphs: DecodeGraphs | None = None
        self._seen: dict[Sequence, tuple[int, list[int]]] = {}
        """Of sequences that were prefilled or drafted for: tokens whose keys and values are in the draft's pages, and
        the draft whose tokens come after them there. What is wrong here makes drafts worse and nothing else."""

    # ---- as a drafter: how much, not what ----------------------------------------------------------------------

    def propose(self, sequences: list[Sequence], room: list[int]) -> list[list[int]]:
        longest = self.layout.max_model_len
        rooms = [min(count, longest - len(s.tokens)) for s, count in zip(sequences, room, strict=True)]
        return [[UNKNOWN] * max(count, 0) for count in rooms]

    def finish(self, sequence: Sequence) -> None:
        self._seen.pop(sequence, None)

    def clear(self) -> None:
        self._seen.clear()

    # ---- pages and graphs --------------------------------------------------------------------------------------

    def allocate(self, num_pages: int, inputs: InputBuilder) -> KVStorage:
        storage = KVStorage(
            self.layout.layers,
            num_pages,
            inputs.page_size,
            dtype=self.dtype,
            device=self.layout.device,
            layout=self._backend.layout,
            remappable=True,
        )
        self._runner = ModelRunner(
            self._lm,
            self.layout,
            self._backend,
            storage,
            fused=self._fused,
            lean=self._lean,
            compiled=self._compiled,
        )
        self._inputs = inputs.sharing_its_table()
        self._seen.clear()
        return storage

    def make_graphs(self, max_num_seqs: int, max_rows: int) -> None:
        self._graphs = None
        if self._captures:
            shape = max_num_seqs, self._inputs.block_table.shape[1], self._inputs.page_size, max_rows
            backend: Any = self._backend
            self._graphs = DecodeGraphs(self._runner, backend, *shape, in_flight=self._most + 2)

    def signs(self) -> tuple[Any, ...]:
        return self._watch.signs()

    def drop(self) -> None:
        self._graphs = None
        self._seen.clear()
        self._runner.close()

    def close(self) -> None:
        if self._fused is not None:
            self._watch.forget()
            self._fused.release()

    # ---- steps -------------------------------------------------------------------------------------------------

    def before(self, batch: Batch, writes: np.ndarray | None) -> None:
        if writes is not None and self._graphs is not None:
            self._graphs.write_pages(writes)
        if batch.chunks:
            self.prefill(batch.chunks)

    def prefill(self, chunks: list[Chunk]) -> None:
        """Computes keys and values of the same pieces of prompts that the target computes in this step."""
        longest, pieces = self.layout.max_model_len, []
        for chunk in chunks:
            length = min(chunk.length, longest - chunk.start)
            if length > 0:
                pieces.append(Chunk(chunk.sequence, chunk.start, length, []))
                if asks_for(self.name, chunk.sequence):  # nobody says when others are finished
                    self._seen[chunk.sequence] = chunk.start + length, []
        if pieces:
            inputs = self._inputs.build(Batch(chunks=pieces))
            # One row, as not every model's forward can do without any.
            self._runner.forward(replace(inputs, logit_rows=np.zeros(1, dtype=np.int64)))

    def draft(self, drafts: dict[Sequence, list[int]], params: SlotParams | None, sampler: Sampler) -> Tensor | None:
        self._catch_up(drafts)
        steps = range(max(map(len, drafts.values())))
        rows = [[_row(s, draft, j) for s, draft in drafts.items() if len(draft) > j] for j in steps]
        missing: list[Sequence] = [
            DraftRow(sequence, [], place - len(sequence.tokens) + 1)
            for sequence in drafts
            for place in range(self._known_of(sequence), len(sequence.tokens) - 1)
        ]
        for sequence, draft in drafts.items():
            self._seen[sequence] = len(sequence.tokens), draft
        if self._graphs is not None and params is not None:
            graphs, first = self._graphs, len(rows[0]) + len(missing)
            if self._prepared(first, bool(missing)) and all(self._prepared(len(now)) for now in rows[1:]):
                return self._draw_on_device(graphs, rows, missing, params)
        for j, now in enumerate(rows):
            inputs = self._inputs.build(Batch(decodes=now + missing if not j else now))
            if missing and not j:
                inputs = replace(inputs, attention=replace(inputs.attention, dependent=True))
            tokens = sampler.draft(self._runner.forward(inputs)[: len(now)], now)
            for row, token in zip(now, tokens, strict=True):
                drafts[row.origin][j] = token
        return None

    def _known_of(self, sequence: Sequence) -> int:
        """How many tokens, but for the last, have their keys and values in the draft's pages."""
        tokens = sequence.tokens
        known, draft = self._seen.get(sequence, (sequence.num_prompt, []))  # siblings share the prompt's pages
        for token in draft[:-1]:  # the last one was drawn, not computed
            if known >= len(tokens) or tokens[known] != token:
                break
            known += 1
        return min(known, len(tokens) - 1)

    def _catch_up(self, drafts: dict[Sequence, list[int]]) -> None:
        """Computes what plain decode steps left out, where it is much; no more at once than a step has."""
        pieces: list[Chunk] = []
        room = self._max_rows
        for sequence in drafts:
            start, end = self._known_of(sequence), len(sequence.tokens) - 1
            if end - start <= FEW:
                continue
            while start < end:
                piece = Chunk(sequence, start, min(end - start, room), [])
                pieces.append(piece)
                start, room = start + piece.length, room - piece.length
                if not room:
                    self.prefill(pieces)
                    pieces, room = [], self._max_rows
        self.prefill(pieces)

    def _prepared(self, count: int, dependent: bool = False) -> bool:
        if self._graphs is None or not self._graphs.holds(count, dependent):
            return False
        try:
            self._graphs.prepare(count, dependent=dependent)
        except torch.OutOfMemoryError:
            self._graphs.give_up(count, dependent)
            return False
        except CaptureFailed as error:
            logger.warning("the draft model runs without CUDA graphs: it cannot be captured (%s)", error)
            self._captures, self._graphs = False, None
            return False
        return True

    def _draw_on_device(
        self, graphs: DecodeGraphs, rows: list[list[Sequence]], missing: list[Sequence], params: SlotParams
    ) -> Tensor:
        drawn: list[Tensor] = []
        starts: list[int] = []
        places: dict[Sequence, int] = {}
        for j, now in enumerate(rows):
            sources = np.array([places[row.origin] for row in now], dtype=np.int64) if j else None
            if j:
                graphs.launch(now, sources, params, None)
            else:
                graphs.launch(now + missing, sources, params, None, dependent=bool(missing))
            places = {row.origin: place for place, row in enumerate(now)}
            starts.append(sum(map(len, drawn)))
            drawn.append(graphs.tokens[: len(now)].clone())
        order = [starts[j] + place for j, place in _by_sequence(rows)]
        return torch.cat(drawn)[self._runner.upload(np.array(order, dtype=np.int64))]


def _row(sequence: Sequence, draft: list[int], place: int) -> Sequence:
    return DraftRow(sequence, draft, place) if place else sequence


def _by_sequence(rows: list[list[Sequence]]) -> list[tuple[int, int]]:
    """(step, place in it) of every drafted token, sequence by sequence in the order of the first step."""
    places = [{row.origin: place for place, row in enumerate(now)} for now in rows]
    return [(j, found[first.origin]) for first in rows[0] for j, found in enumerate(places) if first.origin in found]
