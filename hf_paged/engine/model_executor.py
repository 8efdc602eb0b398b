"""ModelExecutor: computes batches with a transformers model."""

from __future__ import annotations

import bisect
import itertools
import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from hf_paged.attention.shared import SharedPlan
from hf_paged.engine.batch import Batch
from hf_paged.engine.executor import StepResult
from hf_paged.engine.given_tokens import prompt_logprobs_of, scores_of
from hf_paged.engine.held_model import HeldModel
from hf_paged.engine.request import Request, Sequence
from hf_paged.model.capture import CaptureFailed
from hf_paged.model.graphs import DecodeGraphs
from hf_paged.model.inputs import StepInputs
from hf_paged.model.kv_scales import with_measured_scales
from hf_paged.model.mixed_graphs import Kind
from hf_paged.sampling.device import Draw, Drawn, Undrawn, split_when_landed

logger = logging.getLogger(__name__)


class ModelExecutor(HeldModel):
    """A transformers model, its page storage, and a sampler.

    On a GPU a step is only enqueued by `launch`: tokens are sampled on the device, where the next step finds them, and
    steps of decodes alone are CUDA graphs. What may be drawn can depend on tokens that the host does not know yet
    (structured output, bad_words, ...): then the forward is enqueued by `launch`, and masks and draw by `settle`, while
    the device computes it. Requests that need the host to sample (a penalty, a processor, ...) are sampled before
    `launch` returns.

    Args:
        speculation: may name a draft model or head.

    Raises:
        UnsupportedModelError: the model cannot be paged.
        ValueError: the memory for the pool does not hold a page, or max_model_len exceeds what the model can do.
    """

    def launch(self, batch: Batch) -> Callable[[], StepResult]:
        with self._in_order():
            return self._launch(batch)

    def settle(self) -> None:
        if self._waiting is not None:
            with self._in_order():
                self._enqueue(self._waiting)

    def _launch(self, batch: Batch) -> Callable[[], StepResult]:
        self._waiting = None  # else of a step that was given up
        if self._measures:
            self._measure_scales(batch)
        for pool in self._pools() if batch.copies else ():
            pool.copy_pages(batch.copies)
        writes = self._inputs.write_pages(batch)
        drafted = self._draft(batch, writes) if self.drafter is not None else None
        adapted = self.adapters is not None and self.adapters.place(batch)
        land = self._compute_batch(batch, writes, adapted)
        if self.drafter is not None:
            self.drafter.after(batch)
        return land if drafted is None else lambda: replace(land(), drafted=drafted())

    def _measure_scales(self, batch: Batch) -> None:
        """Scales keys and values by the first step's prompts, before any page holds something."""
        prompts = [chunk.sequence.tokens[: chunk.length] for chunk in batch.chunks if chunk.start == 0]
        self.layout = with_measured_scales(self._model, self.layout, prompts)
        scales = [scale for layer in self.layout.layers for scale in (layer.key_scale, layer.value_scale)]
        logger.info("keys and values are scaled by %g to %g", min(scales), max(scales))
        if self.storage is not None:  # else the last attempt was interrupted
            self._drop()
        self._allocate()
        self._measures = False

    def _draft(self, batch: Batch, writes: np.ndarray | None) -> Callable[[], list[list[int]]] | None:
        """Has the drafter do its part of a step, before the target does its own."""
        assert self.drafter is not None
        self.drafter.before(batch, writes)
        unknown = {sequence: draft for sequence, draft in batch.drafts.items() if draft[0] < 0}
        if not unknown:
            return None
        params = self._device_sampler.params if self._device_sampler is not None else None
        tokens = self.drafter.draft(unknown, params if _all_fused(batch.decodes) else None, self._sampler)
        if tokens is None:
            return None  # they are known
        self._previous = tokens
        return split_when_landed(tokens, list(map(len, unknown.values())))

    def _compute_batch(self, batch: Batch, writes: np.ndarray | None, adapted: bool) -> Callable[[], StepResult]:
        shared = None
        if self._sharing is not None and not batch.drafts:
            shared = self._sharing.plan(batch.decodes, self._inputs.block_table)
        if self._graphs is not None:
            count, dependent, draws = len(batch.decodes), bool(batch.drafts), _all_fused(batch.decodes)
            fits = not batch.chunks and self._graphs.holds(count, dependent, draws)
            if fits and self._prepare_graph(count, shared is not None, dependent, adapted, draws):
                return self._replay(self._graphs, batch, writes, shared, adapted)
            if writes is not None and self._graphs is not None:
                self._graphs.write_pages(writes)
        inputs = self._inputs.build(batch, shared)
        mixed_kind = self._mixed_kind(batch, inputs, adapted)
        if mixed_kind is not None:
            return self._replay_mixed(mixed_kind, batch, inputs)
        return self._compute(batch, inputs, adapted)

    def looks_ahead(self, request: Request) -> bool:
        return self._looks_ahead and (request.fused if self._device_sampler is None else request.device_drawn)

    def _prepare_graph(
        self, count: int, shares: bool, dependent: bool = False, adapted: bool = False, draws: bool = True
    ) -> bool:
        """Whether there is a graph of a kind for so many decodes."""
        assert self._graphs is not None
        try:
            self._graphs.prepare(count, shares, dependent, adapted, draws)
        except torch.OutOfMemoryError:
            logger.warning("no memory is left for a CUDA graph of %d sequences: such steps run without", count)
            self._graphs.give_up(count, dependent, draws)
            return False
        except CaptureFailed as error:
            logger.warning("decode runs without CUDA graphs: the model cannot be captured (%s)", error)
            self._captures, self._graphs, self._mixed = False, None, None
            return False
        return True

    def _replay(
        self,
        graphs: DecodeGraphs,
        batch: Batch,
        writes: np.ndarray | None,
        shared: SharedPlan | None,
        adapted: bool,
    ) -> Callable[[], StepResult]:
        sources = self._inputs.sources(batch)
        self._bring_tokens(graphs, sources)
        assert self._device_sampler is not None
        params, dependent, draws = self._device_sampler.params, bool(batch.drafts), _all_fused(batch.decodes)
        graphs.launch(batch.decodes, sources, params, writes, shared, dependent, adapted, draws)
        if not draws and self.draws:
            return self._draw(graphs.undrawn(len(batch.decodes)), batch.decodes)
        return self._landed(graphs, batch.decodes)

    def _landed(self, graphs: DecodeGraphs, sequences: list[Sequence]) -> Callable[[], StepResult]:
        """Of a graph that has drawn its tokens."""
        self._previous = graphs.tokens
        if not self.draws:
            return lambda: StepResult([])
        landing = graphs.land()
        return lambda: _result(landing.wait(sequences))

    def _draw(self, undrawn: Undrawn, sequences: list[Sequence]) -> Callable[[], StepResult]:
        """Draws of a step's logits: now, or when it is known what may be drawn."""
        if not all(sequence.request.device_drawn for sequence in sequences):
            return self._sample(undrawn.logits, sequences)
        draw = Draw(undrawn, sequences)
        self._waiting = draw
        if not draw.waits:
            self._enqueue(draw)

        def land() -> StepResult:
            if self._waiting is draw:
                self.settle()
            return _result(draw.wait())

        return land

    def _enqueue(self, draw: Draw) -> None:
        self._waiting = None
        self._previous = draw.enqueue()

    def _sample(self, logits: Tensor, sequences: list[Sequence]) -> Callable[[], StepResult]:
        """Samples with the host's help, before it returns."""
        sampled = self._sampler.sample(logits, sequences)
        self._previous = torch.tensor(sampled.tokens, dtype=torch.int64, device=self.layout.device)
        return lambda: StepResult(sampled.tokens, sampled.logprobs, sampled.errors)

    def _bring_tokens(self, graphs: DecodeGraphs, sources: np.ndarray | None) -> None:
        """After a step without a graph: its tokens go to where graphs look for them, and `sources` say where."""
        if sources is None or self._previous is graphs.tokens:
            return
        assert self._previous is not None
        pending = sources >= 0
        chosen = self._previous[self._runner.upload(sources[pending])]
        graphs.tokens[: len(chosen)] = chosen
        sources[pending] = np.arange(len(chosen))

    def _mixed_kind(self, batch: Batch, inputs: StepInputs, adapted: bool) -> Kind | None:
        """Which graph a step with prefill can run in, if any."""
        if self._mixed is None or not batch.chunks or any(first < end for first, end in inputs.prompt_rows):
            return None
        kind = self._mixed.kind(batch, inputs, adapted, draws=_all_fused(batch.sampled()))
        if kind is None:
            return None
        try:
            return kind if self._mixed.prepare(kind) else None
        except (torch.OutOfMemoryError, CaptureFailed) as error:
            logger.warning("steps with prefill run without CUDA graphs: one could not be captured (%s)", error)
            self._mixed = None
            return None

    def _replay_mixed(self, kind: Kind, batch: Batch, inputs: StepInputs) -> Callable[[], StepResult]:
        assert self._graphs is not None and self._mixed is not None and self._device_sampler is not None
        self._bring_tokens(self._graphs, inputs.sources)
        self._mixed.launch(kind, batch, inputs, self._device_sampler.params)
        if not kind.draws and self.draws:
            sequences = batch.sampled()
            return self._draw(self._mixed.undrawn(len(sequences)), sequences)
        return self._landed(self._graphs, batch.sampled())

    def _compute(self, batch: Batch, inputs: StepInputs, adapted: bool) -> Callable[[], StepResult]:
        logits = self._runner.forward(inputs, self._previous, adapted)
        if not self.draws:
            return lambda: StepResult([])
        sequences = batch.sampled()
        prompt_logprobs = prompt_logprobs_of(batch, inputs, logits)
        scores = scores_of(batch, inputs, logits, self._runner.upload, exact=self._config.exact)
        if inputs.sample_rows != list(range(len(logits))):
            logits = logits[self._runner.upload(np.array(inputs.sample_rows, dtype=np.int64))]
        if not sequences:
            return lambda: StepResult([], prompt_logprobs=prompt_logprobs, scores=scores())
        if self._device_sampler is not None:
            land = self._draw(self._device_sampler.stage(logits, sequences), sequences)
        else:
            land = self._sample(logits, sequences)
        return lambda: replace(land(), prompt_logprobs=prompt_logprobs, scores=scores())

    def warm_up(self) -> None:
        self.wake_up()
        if self._graphs is not None:
            with self._in_order():
                kinds = (False, True) if self._sharing is not None else (False,)
                adapted = (False, True) if self.adapters is not None else (False,)
                if self.adapters is not None:
                    self.adapters.clear_rows()  # the last step's may be more than a graph's
                sizes = self._graphs.sizes  # larger ones than of all sequences are for drafts
                needed = sizes[: bisect.bisect_left(sizes, self.max_num_seqs) + 1]
                for size, shares, adapts in itertools.product(needed, kinds, adapted):
                    if shares and size == 1:
                        continue  # one row shares nothing
                    if self._graphs is not None and self._graphs.holds(size):
                        self._prepare_graph(size, shares, adapted=adapts)


def _all_fused(sequences: list[Sequence]) -> bool:
    return all(sequence.request.fused for sequence in sequences)


def _result(drawn: Drawn) -> StepResult:
    return StepResult(drawn.tokens, errors=drawn.errors, drawn=drawn.logprobs)
