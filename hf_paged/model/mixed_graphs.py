"""Steps with prefill as CUDA graphs, where these are so small that the host could not keep up otherwise.

Enqueueing a step kernel by kernel takes some 30 ms of the host's time, whatever the step. A device that is done sooner
waits: when a short prompt joins a large batch of decodes, or samples come and go one by one. So such steps are captured
too, for a ladder of token counts and of sampled rows. The first step of a kind runs without a graph; most kinds never
come again.
"""

from __future__ import annotations

import bisect
import logging
import time
from typing import NamedTuple

import numpy as np
import torch

from hf_paged.attention.backend import CapturedMixed, MixedBuffers, MixedCapturableBackend
from hf_paged.engine.batch import Batch
from hf_paged.model.buffers import PackedBuffer
from hf_paged.model.capture import Captured, CaptureFailed
from hf_paged.model.graphs import DecodeGraphs
from hf_paged.model.inputs import StepInputs
from hf_paged.model.runner import ModelRunner, first_line
from hf_paged.sampling.device import Undrawn, fill_parameters, parameter_fields, sampling_rows
from hf_paged.sampling.fused import SlotParams

logger = logging.getLogger(__name__)

SIZES = (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Tokens of a step."""
SAMPLED = (4, 16, 64, 256)
"""Rows that are sampled; the most that a decode graph holds come after these."""
SPARE_SPANS = 2
"""Chunks that sample nothing: the last one of a step, when the budget ends within it, and one more."""
ENOUGH_FLOPS = 15e12
"""About 30 ms of work: a step of more than that hides what it costs the host."""


class Kind(NamedTuple):
    """Of steps with prefill: each has a graph of its own."""

    tokens: int
    sampled: int
    """Rows that are sampled, at most."""
    adapted: bool
    """With rows that have adapters."""
    draws: bool = True
    """Tokens are drawn in it; else it ends with logits."""

    @property
    def decodes(self) -> int:
        """At most."""
        return min(self.tokens, self.sampled)


class MixedGraphs:
    """Captures and replays steps with prefill.

    Args:
        backend: whose attention is captured.
        decode: the decode graphs, whose block table, results and shared prefixes these graphs use too, so that the one
            can follow the other.
        num_params: the model's parameters, here or, where ranks compute together, on the rank with the most.
    """

    def __init__(
        self, runner: ModelRunner, backend: MixedCapturableBackend, decode: DecodeGraphs, num_params: int
    ) -> None:
        self._runner, self._backend, self._decode = runner, backend, decode
        enough = ENOUGH_FLOPS / (2 * num_params)
        self.sizes = [size for size in SIZES if size <= max(256, enough)]
        most = decode.sizes[-1]
        self._sampled = [count for count in SAMPLED if count < most] + [most]
        device, size = runner.layout.device, self.sizes[-1]
        fields = {
            "token_ids": (torch.int64, size),
            "positions": (torch.int64, size),
            "write_rows": (torch.int64, size),
            "sample_rows": (torch.int64, most),
            **dict.fromkeys(("sources", "slots", "lengths"), (torch.int32, most)),
        }
        self._inputs = PackedBuffer({**fields, **parameter_fields(most)}, device, decode.in_flight)
        self._input_ids = torch.zeros(size, dtype=torch.int64, device=device)
        self._seen: set[Kind] = set()
        self._captured: dict[Kind, Captured[CapturedMixed]] = {}

    def kind(self, batch: Batch, inputs: StepInputs, adapted: bool = False, draws: bool = True) -> Kind | None:
        """Which graph would do for a step, captured or not; None where none would.

        Args:
            adapted: whether rows have adapters.
            draws: whether tokens are drawn in it.
        """
        tokens, sampled = len(inputs.token_ids), len(inputs.sample_rows)
        silent = sum(not chunk.samples for chunk in batch.chunks)
        if tokens > self.sizes[-1] or not 0 < sampled <= self._sampled[-1] or silent > SPARE_SPANS:
            return None
        place = bisect.bisect_left(self._sampled, sampled)
        return Kind(self.sizes[bisect.bisect_left(self.sizes, tokens)], self._sampled[place], adapted, draws)

    def prepare(self, kind: Kind) -> bool:
        """Whether there is a graph of a kind; captures it when it is asked for the second time.

        Raises:
            CaptureFailed: see there.
            torch.OutOfMemoryError: there is no room for it.
        """
        if kind not in self._captured:
            if kind not in self._seen:
                self._seen.add(kind)
                return False
            self._captured[kind] = self._capture(kind)
        return True

    def launch(self, kind: Kind, batch: Batch, inputs: StepInputs, params: SlotParams) -> None:
        """Enqueues one step whose graph was prepared; the decode graphs' `land`, or `undrawn`, comes next.

        Args:
            inputs: whose `sources` refer to the decode graphs' `tokens`.
        """
        room = kind.sampled
        arrays = self._inputs.next()
        sampled = batch.sampled()
        self._fill(arrays, batch, inputs, kind)
        fill_parameters(arrays, sampled, params)
        for name in ("temperature", "wants_logprob"):  # padding is greedy: the cheapest
            arrays[name][len(sampled) : room] = 0
        self._inputs.upload()
        plan = inputs.attention.shared
        self._decode.share(plan if plan is not None and self._decode.takes(plan, room) else None, arrays["slots"])
        captured = self._captured[kind]
        spans = [(span.row, span.length, span.context) for span in inputs.attention.spans]
        captured.attention.plan(spans, [chunk.sequence.slot for chunk in batch.chunks])
        captured.replay()

    def undrawn(self, count: int) -> Undrawn:
        """As the decode graphs' own."""
        return self._decode.undrawn(count, self._inputs)

    def _fill(self, arrays: dict[str, np.ndarray], batch: Batch, inputs: StepInputs, kind: Kind) -> None:
        """Everything but the sampling parameters."""
        size, room = kind.tokens, kind.sampled
        tokens, decodes, attention = len(inputs.token_ids), len(batch.decodes), inputs.attention
        arrays["token_ids"][:tokens], arrays["token_ids"][tokens:size] = inputs.token_ids, 0
        arrays["positions"][:tokens], arrays["positions"][tokens:size] = inputs.positions, 0
        places = attention.write_pages * attention.page_size + attention.write_offsets
        arrays["write_rows"][:tokens], arrays["write_rows"][tokens:size] = places, -1
        arrays["sources"][:decodes] = -1 if inputs.sources is None else inputs.sources
        arrays["sources"][decodes:room] = -1
        arrays["slots"][:decodes] = [sequence.slot for sequence in batch.decodes]
        arrays["slots"][decodes:room] = self._decode.spare_slot
        arrays["lengths"][:decodes], arrays["lengths"][decodes:room] = attention.decode_lengths, 0
        rows = inputs.logit_rows[inputs.sample_rows]
        arrays["sample_rows"][: len(rows)], arrays["sample_rows"][len(rows) : room] = rows, 0

    def _capture(self, kind: Kind) -> Captured[CapturedMixed]:
        start = time.monotonic()
        size, room = kind.tokens, kind.sampled
        device, decodes = self._inputs.device, kind.decodes
        for name in ("token_ids", "positions", "lengths", "sample_rows"):
            device[name].zero_()
        for name in ("write_rows", "sources"):
            device[name].fill_(-1)
        self._decode.share(None, np.empty(0, dtype=np.int32))
        buffers = MixedBuffers(
            page_size=self._decode.page_size,
            slots=device["slots"][:decodes],
            lengths=device["lengths"][:decodes],
            write_rows=device["write_rows"][:size],
            block_table=self._decode.block_table,
            max_spans=room + SPARE_SPANS,
            shared=self._decode.shared_ranges(decodes),
        )
        tokens = self._decode.tokens.clone()
        try:
            attention = self._backend.capture_mixed(buffers, self._runner.layout.layers)
            attention.plan([], [])
            try:
                self._step(kind, attention)  # compiles what is not compiled yet; padding writes nothing
            finally:
                self._decode.tokens.copy_(tokens)  # the next step may wait for them
            replay = self._decode.recorder.record(lambda: self._step(kind, attention))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise CaptureFailed(first_line(error)) from error
        logger.debug("captured a step of %d tokens, %d sampled, in %.3f s", size, room, time.monotonic() - start)
        return Captured(replay, attention)

    def _step(self, kind: Kind, attention: CapturedMixed) -> None:
        size, room = kind.tokens, kind.sampled
        device, results = self._inputs.device, self._decode.outputs.device
        ids = self._input_ids[:size]
        ids.copy_(device["token_ids"][:size])
        known, sources = ids[: kind.decodes], device["sources"][: kind.decodes]
        # A token of -1 is one that could not be sampled; its sequence ends when that is seen.
        known.copy_(torch.where(sources < 0, known, results["tokens"][sources.clamp(min=0)].clamp(min=0)))
        positions, wanted = device["positions"][:size], device["sample_rows"][:room]
        logits = self._runner.compute(ids, positions, attention.run, wanted, kind.adapted)
        self._decode.finish(logits, sampling_rows(device, room), draws=kind.draws)
