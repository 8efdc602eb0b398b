"""Attention over pages by the project's own Triton kernels: one appends and decodes, one appends prefill's rows, one
prefills."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_paged.attention.backend import AttentionBatch, DecodeBuffers, LayerSpec, Layout, MixedBuffers
from hf_paged.attention.shared import SharedPlan, can_share
from hf_paged.kernels.shared_ranges import SharedRanges
from hf_paged.kernels.triton.append import append_kv
from hf_paged.kernels.triton.paged_decode import paged_decode
from hf_paged.kernels.triton.paged_prefill import make_tiles, paged_prefill, rows_per_tile
from hf_paged.model.buffers import PackedBuffer


@dataclass(frozen=True, slots=True)
class TritonPlan:
    """A step's numbers on the device."""

    num_decodes: int
    decode_rows: Tensor
    """int64 [B]: where each decode row's key and value go, in a pool seen as `[pages * page, ...]`."""
    prefill_rows: Tensor
    """int64 [T - B]: where the other rows' go."""
    slots: Tensor
    """int32 [B]: 0, 1, ..., the decode rows' rows of `decode_pages`."""
    lengths: Tensor
    """int32 [B]."""
    decode_pages: Tensor
    """int32 [B, most pages]."""
    span_pages: Tensor
    """int32 [spans, most pages]."""
    tiles: dict[int, Tensor]
    """By rows per tile: int32 [tiles, 4], of all spans."""
    shared: SharedRanges | None
    dependent: bool


class TritonBackend:
    """See the module's docstring. Needs a CUDA device, of compute capability 8.9 for float8 pools.

    Tests can run it on a CPU in Triton's interpreter (TRITON_INTERPRET=1), though not in bfloat16, whose products that
    gets wrong.
    """

    layout: Layout = "NHD"
    shares = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def plan(self, batch: AttentionBatch, layers: list[LayerSpec]) -> TritonPlan:
        heights = sorted({tile_rows(layer) for layer in layers}) if batch.spans else []
        spans = [(span.row, span.length, span.context) for span in batch.spans]
        span_pages = np.zeros((len(spans), max((len(span.pages) for span in batch.spans), default=0)), dtype=np.int32)
        for row, span in enumerate(batch.spans):
            span_pages[row, : len(span.pages)] = span.pages
        count, rows = batch.num_decodes, batch.write_pages * batch.page_size + batch.write_offsets
        plan = batch.shared
        of_plan = [] if plan is None else [plan.items, _count(plan), plan.rows, plan.lengths, plan.num_parts]
        decode_rows, prefill_rows, slots, lengths, decode_pages, pages, *rest = upload(
            [
                rows[:count],
                rows[count:],
                np.arange(count, dtype=np.int32),
                batch.decode_lengths.astype(np.int32),
                batch.decode_pages,
                span_pages,
                *of_plan,
                *(make_tiles(spans, height) for height in heights),
            ],
            self.device,
        )
        shared = None
        if plan is not None:
            most = int(plan.num_parts.max())
            shared = SharedRanges(*rest[: len(of_plan)], max_parts=most, tile_rows=plan.tile_rows)
        by_height = dict(zip(heights, rest[len(of_plan) :], strict=True))
        tables = slots, lengths, decode_pages, pages
        return TritonPlan(count, decode_rows, prefill_rows, *tables, by_height, shared, batch.dependent)

    def run(
        self,
        plan: TritonPlan,
        layer: LayerSpec,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_pool: Tensor,
        value_pool: Tensor,
        sinks: Tensor | None,
    ) -> Tensor:
        out = query.new_empty(query.shape[0], layer.num_heads, layer.value_dim)
        pools, options, count = (key_pool, value_pool), layer_options(layer, sinks), plan.num_decodes
        if plan.tiles:
            scales = {"key_scale": layer.key_scale, "value_scale": layer.value_scale}
            append_kv(key[count:], value[count:], *pools, plan.prefill_rows, **scales)
        if count:
            own = _own_keys(layer, key[:count], value[:count], *pools, plan.decode_rows, plan.dependent)
            paged_decode(
                query[:count], *pools, plan.decode_pages, plan.slots, plan.lengths, **options, out=out[:count], **own,
                shared=plan.shared if can_share(layer) else None,
            )  # fmt: skip
        if plan.tiles:
            rows = tile_rows(layer)
            paged_prefill(query, *pools, plan.span_pages, plan.tiles[rows], rows=rows, **options, out=out)
        return out

    def capture_decode(self, buffers: DecodeBuffers, layers: list[LayerSpec]) -> TritonCapturedDecode:
        return TritonCapturedDecode(buffers)

    def capture_mixed(self, buffers: MixedBuffers, layers: list[LayerSpec]) -> TritonCapturedMixed:
        return TritonCapturedMixed(buffers, layers, self.device)


class TritonCapturedDecode:
    """Decode attention over one set of buffers. The kernels read all they need from these on the device."""

    def __init__(self, buffers: DecodeBuffers) -> None:
        self._buffers = buffers

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
        tables, options = (buffers.block_table, buffers.slots, buffers.lengths), layer_options(layer, sinks)
        own = _own_keys(layer, key, value, key_pool, value_pool, buffers.write_rows, buffers.dependent)
        shared = buffers.shared if can_share(layer) else None
        return paged_decode(query, key_pool, value_pool, *tables, **options, **own, shared=shared)


class SpanTiles:
    """The tiles of a step's spans, at fixed addresses, with room for as many as a step may have."""

    def __init__(self, buffers: MixedBuffers, layers: list[LayerSpec], device: torch.device) -> None:
        rows = len(buffers.write_rows)
        self.room = {height: rows // height + buffers.max_spans for height in sorted(set(map(tile_rows, layers)))}
        """Tiles, by rows per tile."""
        self._packed = PackedBuffer(
            {str(height): (torch.int32, 4 * room) for height, room in self.room.items()}, device
        )

    def fill(self, spans: list[tuple[int, int, int]], slots: list[int]) -> None:
        """Enqueues a step's; arguments as in `CapturedMixed.plan`."""
        arrays = self._packed.next()
        for height in self.room:
            tiles = make_tiles(spans, height)
            tiles[:, 3] = np.array(slots, dtype=np.int32)[tiles[:, 3]]
            room = arrays[str(height)]
            room[: tiles.size], room[tiles.size :] = tiles.ravel(), 0  # a tile of no rows does nothing
        self._packed.upload()

    def of(self, height: int) -> Tensor:
        """int32 `[room, 4]` on the device."""
        return self._packed.device[str(height)].view(-1, 4)


class TritonCapturedMixed:
    """Attention of steps with prefill over one set of buffers."""

    def __init__(self, buffers: MixedBuffers, layers: list[LayerSpec], device: torch.device) -> None:
        self._buffers = buffers
        self._tiles = SpanTiles(buffers, layers, device)

    def plan(self, spans: list[tuple[int, int, int]], slots: list[int]) -> None:
        self._tiles.fill(spans, slots)

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
        buffers, pools, options = self._buffers, (key_pool, value_pool), layer_options(layer, sinks)
        out = query.new_zeros(query.shape[0], layer.num_heads, layer.value_dim)
        scales = {"key_scale": layer.key_scale, "value_scale": layer.value_scale}
        append_kv(key, value, *pools, buffers.write_rows, **scales)
        count, rows = len(buffers.slots), tile_rows(layer)
        paged_decode(
            query[:count], *pools, buffers.block_table, buffers.slots, buffers.lengths, **options, out=out[:count],
            shared=buffers.shared if can_share(layer) else None,
        )  # fmt: skip
        tiles = self._tiles.of(rows)
        return paged_prefill(query, *pools, buffers.block_table, tiles, rows=rows, **options, out=out)


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays on the device, by one copy which the host does not wait for.

    Each begins at a multiple of 16 bytes: Triton compiles a kernel anew for pointers that do not.
    """
    dtypes = [torch.from_numpy(array[:0]).dtype for array in arrays]
    ends = np.cumsum([-(-array.nbytes // 16) * 16 for array in arrays]).tolist()
    begins = [0, *ends[:-1]]
    packed = torch.empty(ends[-1], dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
    for begin, array in zip(begins, arrays, strict=True):
        packed.numpy()[begin : begin + array.nbytes].view(array.dtype)[:] = array.ravel()
    packed = packed.to(device, non_blocking=True)
    return [
        packed[begin : begin + array.nbytes].view(dtype).view(array.shape)
        for begin, array, dtype in zip(begins, arrays, dtypes, strict=True)
    ]


def _own_keys(
    layer: LayerSpec, key: Tensor, value: Tensor, key_pool: Tensor, value_pool: Tensor, rows: Tensor, dependent: bool
) -> dict[str, Tensor]:
    """What `paged_decode` is told of the rows' own keys and values: it writes them by the way, unless other rows are to
    read them. Then they are written here."""
    if not dependent:
        return {"new_key": key, "new_value": value, "write_rows": rows}
    append_kv(key, value, key_pool, value_pool, rows, key_scale=layer.key_scale, value_scale=layer.value_scale)
    return {}


def _count(plan: SharedPlan) -> np.ndarray:
    return np.array([len(plan.items)], dtype=np.int32)


def tile_rows(layer: LayerSpec) -> int:
    return rows_per_tile(layer.num_heads // layer.num_kv_heads)


def layer_options(layer: LayerSpec, sinks: Tensor | None) -> dict[str, Any]:
    """What both attention kernels are told of a layer."""
    return {
        "scaling": layer.scaling,
        "window": layer.window,
        "softcap": layer.softcap,
        "sinks": sinks,
        "key_scale": layer.key_scale,
        "value_scale": layer.value_scale,
    }
