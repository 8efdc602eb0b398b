"""AttentionBackend: what a set of kernels must offer, and the plain data it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor

from hf_paged.attention.shared import SharedPlan
from hf_paged.kernels.shared_ranges import SharedRanges

Layout = Literal["NHD", "HND"]
"""Order of a pool's dimensions: `[pages, page, kv_heads, dim]` or `[pages, kv_heads, page, dim]`."""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """How one layer attends, as seen in a dry forward."""

    index: int
    """Its place among the attending layers: which pool is its."""
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    scaling: float
    window: int | None = None
    """Latest positions a row sees, its own included; None is all."""
    softcap: float | None = None
    sinks: bool = False
    """Whether a sink logit per head rides along with each call."""
    key_scale: float = 1.0
    value_scale: float = 1.0
    """With an FP8 pool: what a stored key or value is multiplied by to get the real one. 1 in other dtypes."""
    key_head_scales: tuple[float, ...] = ()
    value_head_scales: tuple[float, ...] = ()
    """The same per KV head, beside these, where heads have scales of their own. Powers of two. Backends are given rows
    that are scaled already, and do not look at them."""


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """The rows of one chunk of prefill in a packed batch."""

    row: int
    """Its first row."""
    length: int
    """Rows."""
    context: int
    """Tokens of the sequence before these rows, already in its pages."""
    pages: np.ndarray
    """int32, the pages that hold context and rows, in order."""


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """One packed step on the host: `num_decodes` rows that are one sequence's each, then the spans' rows."""

    page_size: int
    decode_lengths: np.ndarray
    """int64 [B]: tokens each decoding sequence has with this step's included."""
    decode_pages: np.ndarray
    """int32 [B, most pages]: their rows of the block table; entries past a sequence's last page are arbitrary."""
    spans: list[PrefillSpan]
    write_pages: np.ndarray
    """int64 [T]: the page each row's key and value go to."""
    write_offsets: np.ndarray
    """int64 [T]: the place in that page."""
    shared: SharedPlan | None = None
    """What decode rows share, for a backend that `shares`; items then name rows of `decode_pages`."""
    dependent: bool = False
    """Whether decode rows may read keys and values that others of them write in this step: those that verify a
    draft."""

    @property
    def num_decodes(self) -> int:
        return len(self.decode_lengths)


@dataclass(frozen=True, slots=True)
class DecodeBuffers:
    """What a step of N decode rows reads on the device. The addresses are fixed: a CUDA graph that was captured over
    these tensors is replayed over new contents. Rows beyond a step's own are padding: one token in page 0, nothing
    written."""

    page_size: int
    slots: Tensor
    """int32 [N]: the row's row of `block_table`."""
    lengths: Tensor
    """int32 [N]: tokens the row's sequence has with this step's included."""
    write_rows: Tensor
    """int64 [N]: where the row's key and value go in a pool seen as `[pages * page, ...]`; -1 is nowhere."""
    block_table: Tensor
    """int32 [slots, most pages]: of all running sequences."""
    page_indptr: Tensor
    """int32 [N + 1]: where each row's pages begin in `page_indices`."""
    page_indices: Tensor
    """int32 [enough]: the rows' pages laid end to end."""
    last_page_lengths: Tensor
    """int32 [N]: tokens in each row's last page."""
    shared: SharedRanges | None = None
    """What the rows share, where the step is one that reads it together."""
    dependent: bool = False
    """Whether rows may read keys and values that others write in this step: those that verify a
    draft."""


@dataclass(frozen=True, slots=True)
class MixedBuffers:
    """What a step of T packed rows with room for N decodes reads on the device. As in `DecodeBuffers`, the addresses
    are fixed. The step's decodes come first, then its spans, then padding."""

    page_size: int
    slots: Tensor
    """int32 [N]."""
    lengths: Tensor
    """int32 [N]: as in `DecodeBuffers`; 0 for rows that are not decodes."""
    write_rows: Tensor
    """int64 [T]."""
    block_table: Tensor
    """int32 [slots, most pages]."""
    max_spans: int
    shared: SharedRanges
    """What the decodes share."""


class CapturedDecode(Protocol):
    """Decode attention over one set of `DecodeBuffers`."""

    def plan(self, page_indptr: np.ndarray, last_page_lengths: np.ndarray) -> None:
        """The host's work before a replay, given copies of what the buffers will hold (int32 [N + 1], [N]). May enqueue
        copies to the device; must not wait for it."""

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
        """As `AttentionBackend.run` for N decode rows. Launches the same kernels over the same addresses whatever the
        buffers hold, so that it can be captured."""


class CapturedMixed(Protocol):
    """Attention of steps with prefill over one set of `MixedBuffers`."""

    def plan(self, spans: list[tuple[int, int, int]], slots: list[int]) -> None:
        """Before a replay: the spans as (first row, rows, tokens before), and their rows of the block table. May
        enqueue copies to the device; must not wait for it."""

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
        """As `CapturedDecode.run`, for T rows; padding rows get zeros."""


class AttentionBackend(Protocol):
    """A set of kernels. `plan` works on the host, once per step; `run` on the device, once per layer."""

    layout: Layout
    shares: bool
    """Whether it reads what decode rows share once for all of them, when it is told."""

    def plan(self, batch: AttentionBatch, layers: list[LayerSpec]) -> Any:
        """Whatever `run` needs to know of the step, for all layers at once."""

    def run(
        self,
        plan: Any,
        layer: LayerSpec,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_pool: Tensor,
        value_pool: Tensor,
        sinks: Tensor | None,
    ) -> Tensor:
        """Writes the step's keys and values to their pages, then attends.

        Args:
            query: `[T, H, Dk]`; key, value: `[T, Hkv, Dk]`, `[T, Hkv, Dv]`; any strides.
            key_pool, value_pool: the layer's pools, in `layout`.
            sinks: `[H]` or None.

        Returns:
            `[T, H, Dv]` in the query's dtype. No synchronisation with the host.
        """


class CapturableBackend(AttentionBackend, Protocol):
    """A backend whose decode steps can be captured in CUDA graphs."""

    def capture_decode(self, buffers: DecodeBuffers, layers: list[LayerSpec]) -> CapturedDecode:
        """Decode attention bound to `buffers`, for all layers."""


class MixedCapturableBackend(CapturableBackend, Protocol):
    """One whose steps with prefill can be captured too."""

    def capture_mixed(self, buffers: MixedBuffers, layers: list[LayerSpec]) -> CapturedMixed:
        """Attention bound to `buffers`, for all layers."""
