"""Attention over pages in which a row's result depends on its own keys alone: one kernel for decodes and prefill.

A decode is a span of one row. Every tile of rows, whatever it holds, walks through the keys from the first on, in the
same blocks, and a row that has no share in a block is left as it was. So it is all one whether a row was computed in a
whole prompt, in a chunk, after a prefix that was cached, or as a decode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_paged.attention.backend import AttentionBatch, DecodeBuffers, LayerSpec, Layout, MixedBuffers
from hf_paged.attention.triton_backend import SpanTiles, layer_options, tile_rows, upload
from hf_paged.kernels.triton.append import append_kv
from hf_paged.kernels.triton.paged_prefill import make_tiles, paged_prefill


@dataclass(frozen=True, slots=True)
class ExactPlan:
    """A step's numbers on the device."""

    write_rows: Tensor
    """int64 [T]: where each row's key and value go, in a pool seen as `[pages * page, ...]`."""
    block_table: Tensor
    """int32 [sequences, most pages]: of the decodes, then of the spans."""
    tiles: dict[int, Tensor]
    """By rows per tile: int32 [tiles, 4]."""


class ExactTritonBackend:
    """See the module's docstring. Needs what `TritonBackend` does."""

    layout: Layout = "NHD"
    shares = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def plan(self, batch: AttentionBatch, layers: list[LayerSpec]) -> ExactPlan:
        count, heights = batch.num_decodes, sorted({tile_rows(layer) for layer in layers})
        spans = [(row, 1, int(length) - 1) for row, length in enumerate(batch.decode_lengths)]
        spans += [(span.row, span.length, span.context) for span in batch.spans]
        width = max([batch.decode_pages.shape[1], *(len(span.pages) for span in batch.spans)])
        table = np.zeros((len(spans), width), dtype=np.int32)
        table[:count, : batch.decode_pages.shape[1]] = batch.decode_pages
        for row, span in enumerate(batch.spans, count):
            table[row, : len(span.pages)] = span.pages
        rows = batch.write_pages * batch.page_size + batch.write_offsets
        write_rows, block_table, *tiles = upload(
            [rows, table, *(make_tiles(spans, height) for height in heights)], self.device
        )
        return ExactPlan(write_rows, block_table, dict(zip(heights, tiles, strict=True)))

    def run(
        self,
        plan: ExactPlan,
        layer: LayerSpec,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_pool: Tensor,
        value_pool: Tensor,
        sinks: Tensor | None,
    ) -> Tensor:
        append_kv(key, value, key_pool, value_pool, plan.write_rows)
        return attend_exactly(
            query, key_pool, value_pool, plan.block_table, plan.tiles[tile_rows(layer)],
            rows=tile_rows(layer), **layer_options(layer, sinks),
        )  # fmt: skip

    def capture_decode(self, buffers: DecodeBuffers, layers: list[LayerSpec]) -> ExactCapturedDecode:
        return ExactCapturedDecode(buffers, self.device)

    def capture_mixed(self, buffers: MixedBuffers, layers: list[LayerSpec]) -> ExactCapturedMixed:
        return ExactCapturedMixed(buffers, layers, self.device)


class ExactCapturedDecode:
    """Decode attention over one set of buffers, from which the device makes its tiles."""

    def __init__(self, buffers: DecodeBuffers, device: torch.device) -> None:
        self._buffers = buffers
        self._tiles = torch.zeros(len(buffers.slots), 4, dtype=torch.int32, device=device)

    def plan(self, page_indptr: np.ndarray, last_page_lengths: np.ndarray) -> None:
        pass

    def run(
        self,
        layer: LayerSpec,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_pool: Tensor,
        value_pool: Tensor,
        sinks: Tensor | None,
    ) -> Tensor:
        buffers = self._buffers
        if layer.index == 0:  # the step's first: one set of tiles serves all layers
            _fill_decode_tiles(self._tiles, buffers.lengths, buffers.slots)
        append_kv(key, value, key_pool, value_pool, buffers.write_rows)
        return attend_exactly(
            query, key_pool, value_pool, buffers.block_table, self._tiles,
            rows=tile_rows(layer), **layer_options(layer, sinks),
        )  # fmt: skip


class ExactCapturedMixed:
    """Attention of steps with prefill over one set of buffers."""

    def __init__(self, buffers: MixedBuffers, layers: list[LayerSpec], device: torch.device) -> None:
        self._buffers = buffers
        self._decodes = len(buffers.slots)
        self._spans = SpanTiles(buffers, layers, device)
        self._tiles = {
            height: torch.zeros(self._decodes + room, 4, dtype=torch.int32, device=device)
            for height, room in self._spans.room.items()
        }

    def plan(self, spans: list[tuple[int, int, int]], slots: list[int]) -> None:
        self._spans.fill(spans, slots)

    def run(
        self,
        layer: LayerSpec,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_pool: Tensor,
        value_pool: Tensor,
        sinks: Tensor | None,
    ) -> Tensor:
        buffers = self._buffers
        if layer.index == 0:
            for height, tiles in self._tiles.items():
                _fill_decode_tiles(tiles[: self._decodes], buffers.lengths, buffers.slots)
                tiles[self._decodes :] = self._spans.of(height)
        append_kv(key, value, key_pool, value_pool, buffers.write_rows)
        return attend_exactly(
            query, key_pool, value_pool, buffers.block_table, self._tiles[tile_rows(layer)],
            rows=tile_rows(layer), **layer_options(layer, sinks),
        )  # fmt: skip


def attend_exactly(
    query: Tensor, key_pool: Tensor, value_pool: Tensor, block_table: Tensor, tiles: Tensor, **options: Any
) -> Tensor:
    """`paged_prefill` of rows in any company, with zeros for rows that no tile names.

    Queries are laid out the same way for everybody, lest a kernel be compiled for one layout and not for another.
    """
    out = query.new_zeros(query.shape[0], query.shape[1], value_pool.shape[-1])
    query = query.contiguous()
    return paged_prefill(query, key_pool, value_pool, block_table, tiles, uniform=True, out=out, **options)


def _fill_decode_tiles(tiles: Tensor, lengths: Tensor, slots: Tensor) -> None:
    """Tiles of one row each, int32 `[N, 4]`; a length of 0 is no row."""
    tiles[:, 0] = torch.arange(len(tiles), dtype=torch.int32, device=tiles.device)
    tiles[:, 1] = (lengths > 0).to(torch.int32)
    tiles[:, 2] = (lengths - 1).clamp_(min=0)
    tiles[:, 3] = slots
