"""Decode steps as CUDA graphs: the whole step, from token ids to sampled tokens or to logits, is one launch.

A graph is captured for each of a ladder of batch sizes when it is first needed; a batch runs in the smallest graph that
holds it, its other rows being padding. Decode is bound by memory, so padding costs little, and a sparse ladder keeps
captures few. All graphs share one memory pool and one set of input and output buffers.
"""

from __future__ import annotations

import bisect
import logging
import time
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_paged.attention.backend import CapturableBackend, CapturedDecode, DecodeBuffers
from hf_paged.attention.shared import SharedLimits, SharedPlan
from hf_paged.engine.request import Sequence
from hf_paged.kernels.shared_ranges import ITEM_FIELDS, SharedRanges
from hf_paged.model.buffers import PackedBuffer
from hf_paged.model.capture import Captured, CaptureFailed, CudaRecorder, Recorder
from hf_paged.model.runner import ModelRunner, first_line
from hf_paged.sampling.device import (
    Landing,
    Undrawn,
    fill_parameters,
    parameter_fields,
    record,
    result_fields,
    sampling_rows,
    token_sampler,
)
from hf_paged.sampling.fused import SamplingRows, SlotParams

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
"""Batch sizes to capture; beyond the last, steps run without a graph."""


WRITES_PER_ROW = 2
"""Room for changes of the block table in a step; more of them go up on their own. A decode step changes one entry in
`page_size` per row on average."""


class Kind(NamedTuple):
    """Of decode steps: each has a graph of its own."""

    size: int
    shares: bool
    """With a plan of what rows share."""
    dependent: bool
    """With rows that read what others write."""
    adapted: bool
    """With rows that have adapters."""
    draws: bool = True
    """Tokens are drawn in it; else it ends with logits."""


class DecodeGraphs:
    """Captures and replays decode steps of one runner.

    Args:
        backend: whose attention is captured.
        max_num_seqs, max_pages: the block table's shape.
        max_rows: the most of a step.
        in_flight: steps that may be launched before the first of them must have ended.
        page_size: tokens per page.
        recorder: makes the graphs.
        draws: whether tokens are drawn of what a forward returns.
        exact: as in `token_sampler`.
    """

    def __init__(
        self,
        runner: ModelRunner,
        backend: CapturableBackend,
        max_num_seqs: int,
        max_pages: int,
        page_size: int,
        max_rows: int,
        in_flight: int = 2,
        recorder: Recorder | None = None,
        draws: bool = True,
        exact: bool = False,
    ) -> None:
        from hf_paged.kernels.triton.prepare import prepare_decode, write_block_table

        self._prepare, self._write_table = prepare_decode, write_block_table
        self._draws, self._sample = draws, token_sampler(exact)
        self._runner, self._backend, self.page_size = runner, backend, page_size
        self._device = device = runner.layout.device
        self.sizes = [size for size in SIZES if size < max_rows] + [min(max_rows, SIZES[-1])]
        rows = self.sizes[-1]
        self.spare_slot = max_num_seqs
        """A row of the block table that nobody has: padding's, all page 0."""
        self.block_table = torch.zeros(max_num_seqs + 1, max_pages, dtype=torch.int32, device=device)
        int32 = dict.fromkeys(("token_ids", "sources", "slots", "lengths", "last_page_lengths"), (torch.int32, rows))
        fields = {
            **int32,
            "page_indptr": (torch.int32, rows + 1),
            "writes": (torch.int32, 3 * WRITES_PER_ROW * rows),
            "num_writes": (torch.int32, 1),
        }
        self.in_flight = in_flight
        self._inputs = PackedBuffer({**fields, **parameter_fields(rows)}, device, in_flight)
        self.outputs = PackedBuffer(result_fields(rows), device, in_flight)
        self._input_ids, self._positions, self._write_rows = (
            torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(3)
        )
        self._page_indices = torch.zeros(rows * max_pages, dtype=torch.int32, device=device)
        self._group = max(layer.num_heads // layer.num_kv_heads for layer in runner.layout.layers)
        limits = SharedLimits.of(rows, self._group)
        shared_fields = {
            "items": (torch.int32, ITEM_FIELDS * limits.max_items),
            "num_items": (torch.int32, 1),
            "rows": (torch.int32, limits.max_rows),
            "lengths": (torch.int32, rows),
            "num_parts": (torch.int32, rows),
        }
        self._shared = PackedBuffer(shared_fields, device)
        self._shared_plan: SharedPlan | None = None
        """The one that the device has."""
        self._half_shared = False
        """Whether an interrupt left it with neither."""
        self._logits: Tensor | None = None
        """`[rows, V]`, where steps leave them that do not draw."""
        self._captured: dict[Kind, Captured[CapturedDecode]] = {}
        self._given_up: set[tuple[int, bool]] = set()
        """Sizes, with draws or without: logits to leave need memory of their own."""
        self.recorder = recorder or CudaRecorder(device)

    @property
    def tokens(self) -> Tensor:
        """int64 `[rows]`, what the last replay sampled; the next one may read its tokens from here."""
        return self.outputs.device["tokens"]

    def holds(self, count: int, dependent: bool = False, draws: bool = True) -> bool:
        """Whether there is a size for so many rows."""
        return 0 < count <= self.sizes[-1] and (self._size(count, dependent), draws) not in self._given_up

    def give_up(self, count: int, dependent: bool = False, draws: bool = True) -> None:
        """So many rows will run without a graph."""
        self._given_up.add((self._size(count, dependent), draws))

    # ---- replay --------------------------------------------------------------------------------------------

    def write_pages(self, writes: np.ndarray) -> None:
        """Enters changes of the block table: int64 [W, 3] (slot, place in the row, page), a place at most once."""
        packed = np.append(writes.astype(np.int32).ravel(), np.int32(len(writes)))
        host = torch.from_numpy(packed)
        device = (host.pin_memory() if self._device.type == "cuda" else host).to(self._device, non_blocking=True)
        self._write_table(device[:-1], device[-1:], self.block_table)

    def prepare(
        self,
        count: int,
        shares: bool = False,
        dependent: bool = False,
        adapted: bool = False,
        draws: bool = True,
    ) -> None:
        """Captures the graph for so many rows, if that has not been done.

        Args:
            shares: the one for steps with a plan of what rows share.
            dependent: the one for steps with rows that read what others write.
            adapted: the one for steps with rows that have adapters.
            draws: the one that draws tokens; else the one that ends with logits.

        Raises:
            CaptureFailed: see there.
            torch.OutOfMemoryError: there is no room for it.
        """
        kind = Kind(self._size(count, dependent), shares, dependent, adapted, draws)
        if kind not in self._captured:
            self._captured[kind] = self._capture(kind)

    def launch(
        self,
        sequences: list[Sequence],
        sources: np.ndarray | None,
        params: SlotParams,
        writes: np.ndarray | None,
        shared: SharedPlan | None = None,
        dependent: bool = False,
        adapted: bool = False,
        draws: bool = True,
    ) -> None:
        """Enqueues one step of decodes, whose graph was prepared; `land` or `undrawn` comes next.

        Args:
            sources: as in `StepInputs`, referring to `tokens`.
            writes: changes of the block table that come before the step, as in `write_pages`.
            shared: what the rows share.
            dependent: whether rows read what others write.
            adapted: whether rows have adapters.
            draws: whether tokens are drawn.
        """
        size = self._size(len(sequences), dependent)
        captured = self._captured[Kind(size, shared is not None, dependent, adapted, draws)]
        arrays = self._inputs.next()
        self._fill(arrays, sequences, sources, size)
        fill_parameters(arrays, sequences, params)
        for name in ("temperature", "wants_logprob"):  # padding is greedy: the cheapest
            arrays[name][len(sequences) : size] = 0
        arrays["logprob_scale"][len(sequences) : size] = 1
        if writes is not None and 3 * len(writes) > len(arrays["writes"]):
            self.write_pages(writes)
            writes = None
        arrays["num_writes"][0] = 0 if writes is None else len(writes)
        if writes is not None:
            arrays["writes"][: writes.size] = writes.ravel()
        self._inputs.upload()
        if shared is not None:
            self.share(shared, arrays["slots"])
        captured.attention.plan(arrays["page_indptr"][: size + 1], arrays["last_page_lengths"][:size])
        captured.replay()

    def land(self) -> Landing:
        """The tokens of the step just launched; they are overwritten `in_flight` landings later."""
        host = self.outputs.next()
        self.outputs.download()
        return Landing(host, record(), self.tokens)

    def undrawn(self, count: int, parameters: PackedBuffer | None = None) -> Undrawn:
        """Of the step just launched, which drew no tokens: they are drawn before another one is launched.

        Args:
            count: rows that are sampled.
            parameters: what holds theirs, if they are not the decode steps' own.
        """
        assert self._logits is not None
        rows = sampling_rows((parameters or self._inputs).device, count)
        return Undrawn(self._logits[:count], rows, self.outputs, self._sample)

    # ---- shared prefixes -----------------------------------------------------------------------------------

    def share(self, plan: SharedPlan | None, slots: np.ndarray) -> None:
        """Enqueues what the next step's rows share.

        Args:
            plan: None is nothing.
            slots: of the step's rows.
        """
        if plan is self._shared_plan and not self._half_shared:
            return
        self._half_shared = True
        arrays = self._shared.next()
        count = 0
        if plan is not None:
            count = len(plan.lengths)
            items = arrays["items"][: plan.items.size].reshape(plan.items.shape)
            items[:] = plan.items
            items[:, -1] = slots[plan.items[:, -1]]
            arrays["rows"][: len(plan.rows)] = plan.rows
            arrays["lengths"][:count], arrays["num_parts"][:count] = plan.lengths, plan.num_parts
        arrays["num_items"][0] = 0 if plan is None else len(plan.items)
        arrays["lengths"][count:] = arrays["num_parts"][count:] = 0
        self._shared.upload()
        self._shared_plan, self._half_shared = plan, False

    def takes(self, plan: SharedPlan, rows: int) -> bool:
        """Whether what was captured for so many rows has room for a plan."""
        return int(plan.num_parts.max()) <= SharedLimits.of(rows, self._group).max_parts

    def shared_ranges(self, rows: int) -> SharedRanges:
        """What `share` fills, for a step of so many rows."""
        shared, limits = self._shared.device, SharedLimits.of(rows, self._group)
        return SharedRanges(
            shared["items"][: ITEM_FIELDS * limits.max_items].view(-1, ITEM_FIELDS),
            shared["num_items"],
            shared["rows"],
            shared["lengths"][:rows],
            shared["num_parts"][:rows],
            max_parts=limits.max_parts,
            tile_rows=limits.tile_rows,
        )

    # ---- details -------------------------------------------------------------------------------------------

    def _size(self, count: int, dependent: bool) -> int:
        """Of dependent rows there may be any number in any step: fewer sizes for them are captured sooner."""
        if dependent:
            count = min(max(8, 1 << (count - 1).bit_length()), self.sizes[-1])
        return self.sizes[bisect.bisect_left(self.sizes, count)]

    def _fill(
        self,
        arrays: dict[str, np.ndarray],
        sequences: list[Sequence],
        sources: np.ndarray | None,
        size: int,
    ) -> None:
        """Everything but the sampling parameters."""
        count = len(sequences)
        slots, lengths, tokens = arrays["slots"], arrays["lengths"], arrays["token_ids"]
        slots[:count] = [sequence.slot for sequence in sequences]
        lengths[:count] = [sequence.num_computed + 1 for sequence in sequences]
        tokens[:count] = [sequence.last_token for sequence in sequences]
        arrays["sources"][:count] = -1 if sources is None else sources
        arrays["sources"][count:size] = -2
        slots[count:size], lengths[count:size], tokens[count:size] = self.spare_slot, 1, 0
        pages = -(-lengths[:size] // self.page_size)
        arrays["last_page_lengths"][:size] = lengths[:size] - (pages - 1) * self.page_size
        arrays["page_indptr"][0] = 0
        np.cumsum(pages, out=arrays["page_indptr"][1 : size + 1])

    # ---- capture -------------------------------------------------------------------------------------------

    def _capture(self, kind: Kind) -> Captured[CapturedDecode]:
        start, size = time.monotonic(), kind.size
        buffers = self._buffers(kind)
        arrays = self._inputs.next()
        self._fill(arrays, [], None, size)
        arrays["num_writes"][0] = 0
        self._inputs.upload()
        self.share(None, arrays["slots"])
        tokens = self.tokens.clone()
        try:
            attention = self._backend.capture_decode(buffers, self._runner.layout.layers)
            attention.plan(arrays["page_indptr"][: size + 1], arrays["last_page_lengths"][:size])
            try:
                self._step(kind, buffers, attention)  # compiles what is not compiled yet; padding writes nothing
            finally:
                self.tokens.copy_(tokens)  # the next step may wait for them
            replay = self.recorder.record(lambda: self._step(kind, buffers, attention))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise CaptureFailed(first_line(error)) from error
        logger.debug("captured a decode step of %d in %.3f s", size, time.monotonic() - start)
        return Captured(replay, attention)

    def _buffers(self, kind: Kind) -> DecodeBuffers:
        device, size = self._inputs.device, kind.size
        return DecodeBuffers(
            page_size=self.page_size,
            slots=device["slots"][:size],
            lengths=device["lengths"][:size],
            write_rows=self._write_rows[:size],
            block_table=self.block_table,
            page_indptr=device["page_indptr"][: size + 1],
            page_indices=self._page_indices,
            last_page_lengths=device["last_page_lengths"][:size],
            shared=self.shared_ranges(size) if kind.shares else None,
            dependent=kind.dependent,
        )

    def _step(self, kind: Kind, buffers: DecodeBuffers, attention: CapturedDecode) -> None:
        size = kind.size
        device, results = self._inputs.device, self.outputs.device
        self._write_table(device["writes"], device["num_writes"], self.block_table)
        self._prepare(
            device["token_ids"][:size],
            device["sources"][:size],
            results["tokens"],
            buffers.slots,
            buffers.lengths,
            buffers.page_indptr,
            self.block_table,
            self.page_size,
            input_ids=self._input_ids[:size],
            positions=self._positions[:size],
            write_rows=buffers.write_rows,
            page_indices=self._page_indices,
        )
        ids, positions = self._input_ids[:size], self._positions[:size]
        logits = self._runner.compute(ids, positions, attention.run, adapted=kind.adapted)
        self.finish(logits, sampling_rows(device, size), draws=kind.draws)

    def finish(self, logits: Tensor, rows: SamplingRows, *, draws: bool) -> None:
        """What a captured step ends with, one with prefill too: tokens, or logits left where `undrawn` finds them;
        nothing where there are no logits."""
        if not self._draws:
            return
        if draws:
            self._sample(logits, rows, **{name: result[: len(logits)] for name, result in self.outputs.device.items()})
            return
        if self._logits is None:
            self._logits = logits.new_empty(self.sizes[-1], logits.shape[1])
        self._logits[: len(logits)] = logits
