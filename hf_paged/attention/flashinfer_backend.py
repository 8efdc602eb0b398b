"""Attention over pages by FlashInfer's kernels (arXiv 2501.01005), where it is installed and serves the layer.

FlashInfer plans on the host how a step's work is cut up, once for all layers that attend alike; its kernels then run
without looking back. Layers that it cannot serve (float32, sinks, head dimensions it has no kernel for) go through
`TritonBackend`, which needs no plan.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_paged.attention.backend import AttentionBatch, CapturedDecode, DecodeBuffers, LayerSpec, Layout
from hf_paged.attention.triton_backend import TritonBackend
from hf_paged.kernels.triton.append import append_kv

logger = logging.getLogger(__name__)

WORKSPACE_BYTES = 256 << 20
"""For the partial results of sequences that are cut up; FlashInfer's own suggestion is 128 MiB."""

TENSOR_CORE_GROUP = 4
"""Query heads per KV head from which decode pays on tensor cores."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """Layers that can share a plan."""

    num_heads: int
    num_kv_heads: int
    dim: int
    scaling: float
    window: int | None
    softcap: float | None

    @classmethod
    def of(cls, layer: LayerSpec) -> _Kind:
        return cls(
            layer.num_heads, layer.num_kv_heads, layer.key_dim, layer.scaling, layer.window, layer.softcap
        )  # fmt: skip

    def options(self, dtype: torch.dtype, kv_dtype: torch.dtype) -> dict[str, Any]:
        """What FlashInfer's `plan` wants to know of it."""
        return {
            "window_left": -1 if self.window is None else self.window - 1,
            "logits_soft_cap": self.softcap,
            "sm_scale": self.scaling,
            "q_data_type": dtype,
            "kv_data_type": kv_dtype,
        }


class _Planned:
    """A FlashInfer wrapper whose plan may be made again while the last one's copy is still on its way."""

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper
        self._copied = torch.cuda.Event()

    def plan(self, *args: Any, **options: Any) -> None:
        # `plan` fills one pinned buffer and copies it asynchronously: the earlier copy must have ended.
        self._copied.synchronize()
        self.wrapper.plan(*args, **options)
        self._copied.record()


@dataclass(frozen=True, slots=True)
class _Plan:
    write_rows: Tensor
    num_decodes: int
    kinds: dict[_Kind, tuple[_Planned | None, _Planned | None]]
    """For decodes, for prefill."""
    other: Any
    """The plan of layers that go another way; None when there are none."""


class FlashInferBackend:
    """See the module's docstring.

    Args:
        dtype: of queries, float16 or bfloat16; kv_dtype: of the pools, the same or float8_e4m3fn.
        layers: all that will attend; those without a kernel are found out here.
    """

    layout: Layout = "NHD"
    shares = False

    def __init__(
        self, device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype, layers: list[LayerSpec]
    ) -> None:
        self._device, self._dtype, self._kv_dtype = device, dtype, kv_dtype
        self._others = TritonBackend(device)
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._decode: dict[_Kind, _Planned] = {}
        self._prefill: dict[_Kind, _Planned] = {}
        self._served: dict[_Kind, bool] = {}
        for layer in layers:
            kind = _Kind.of(layer)
            if kind not in self._served:
                self._served[kind] = self._serves(layer)

    # ---- what it can serve ---------------------------------------------------------------------------------

    def _serves(self, layer: LayerSpec) -> bool:
        reason = None
        if layer.sinks:
            reason = "it ignores attention sinks"
        elif layer.key_dim != layer.value_dim:
            reason = f"keys of {layer.key_dim} and values of {layer.value_dim}"
        elif self._dtype not in (torch.float16, torch.bfloat16):
            reason = f"queries of {self._dtype}"
        else:
            try:
                self._try(layer)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # no module for this head dimension, no compiler to make one, ...
                reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if reason is not None:
            logger.info(
                "attention of layer %d and its like goes through Triton, not FlashInfer (%s)", layer.index, reason
            )
        return reason is None

    def _try(self, layer: LayerSpec) -> None:
        """Loads the kernels and runs them once."""
        kind = _Kind.of(layer)
        pool = torch.zeros(1, 16, layer.num_kv_heads, layer.key_dim, dtype=self._kv_dtype, device=self._device)
        query = torch.zeros(1, layer.num_heads, layer.key_dim, dtype=self._dtype, device=self._device)
        indptr = torch.tensor([0, 1], dtype=torch.int32, device="cpu")
        last = torch.tensor([1], dtype=torch.int32, device="cpu")
        indices = torch.zeros(1, dtype=torch.int32, device=self._device)
        shape = (layer.num_heads, layer.num_kv_heads, layer.key_dim, 16)
        options = kind.options(self._dtype, self._kv_dtype)
        decode, prefill = self._decode_wrapper(kind), self._prefill_wrapper(kind)
        decode.plan(indptr, indices, last, *shape, **options)
        decode.wrapper.run(query, (pool, pool))
        prefill.plan(indptr, indptr, indices, last, *shape, causal=True, **options)
        prefill.wrapper.run(query, (pool, pool))
        torch.cuda.current_stream(self._device).synchronize()

    def _decode_wrapper(self, kind: _Kind) -> _Planned:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        if kind not in self._decode:
            # Pinned to fa2: on Hopper "auto" takes fa3, which does not cut sequences up.
            self._decode[kind] = _Planned(
                BatchDecodeWithPagedKVCacheWrapper(
                    self._workspace, self.layout, use_tensor_cores=_on_tensor_cores(kind), backend="fa2"
                )
            )
        return self._decode[kind]

    def _prefill_wrapper(self, kind: _Kind) -> _Planned:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        if kind not in self._prefill:
            self._prefill[kind] = _Planned(
                BatchPrefillWithPagedKVCacheWrapper(self._workspace, self.layout, backend="fa2")
            )
        return self._prefill[kind]

    # ---- any step ------------------------------------------------------------------------------------------

    def plan(self, batch: AttentionBatch, layers: list[LayerSpec]) -> _Plan:
        kinds = {kind: (None, None) for layer in layers if self._served[kind := _Kind.of(layer)]}
        others = [layer for layer in layers if not self._served[_Kind.of(layer)]]
        decode = self._decode_pages(batch) if batch.num_decodes and kinds else None
        prefill = self._prefill_pages(batch) if batch.spans and kinds else None
        planned: dict[_Kind, tuple[_Planned | None, _Planned | None]] = {}
        for kind in kinds:
            shape = (kind.num_heads, kind.num_kv_heads, kind.dim, batch.page_size)
            options = kind.options(self._dtype, self._kv_dtype)
            decode_wrapper = prefill_wrapper = None
            if decode is not None:
                decode_wrapper = self._decode_wrapper(kind)
                decode_wrapper.plan(*decode, *shape, **options)
            if prefill is not None:
                prefill_wrapper = self._prefill_wrapper(kind)
                prefill_wrapper.plan(*prefill, *shape, causal=True, **options)
            planned[kind] = decode_wrapper, prefill_wrapper
        return _Plan(
            write_rows=self._upload(batch.write_pages * batch.page_size + batch.write_offsets),
            num_decodes=batch.num_decodes,
            kinds=planned,
            other=self._others.plan(batch, others) if others else None,
        )

    def _decode_pages(self, batch: AttentionBatch) -> tuple[Tensor, Tensor, Tensor]:
        counts = -(-batch.decode_lengths // batch.page_size)
        indptr = _indptr(counts)
        owned = np.arange(batch.decode_pages.shape[1]) < counts[:, None]
        last = batch.decode_lengths - (counts - 1) * batch.page_size
        return torch.from_numpy(indptr), self._upload(batch.decode_pages[owned]), _int32(last)

    def _prefill_pages(self, batch: AttentionBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        spans = batch.spans
        rows = _indptr(np.array([span.length for span in spans]))
        totals = np.array([span.context + span.length for span in spans])
        counts = -(-totals // batch.page_size)
        pages = np.concatenate([span.pages[:count] for span, count in zip(spans, counts, strict=True)])
        last = totals - (counts - 1) * batch.page_size
        return torch.from_numpy(rows), torch.from_numpy(_indptr(counts)), self._upload(pages), _int32(last)

    def run(
        self,
        plan: _Plan,
        layer: LayerSpec,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_pool: Tensor,
        value_pool: Tensor,
        sinks: Tensor | None,
    ) -> Tensor:
        kind = _Kind.of(layer)
        if kind not in plan.kinds:
            return self._others.run(plan.other, layer, query, key, value, key_pool, value_pool, sinks)
        scales = {"key_scale": layer.key_scale, "value_scale": layer.value_scale}
        append_kv(key, value, key_pool, value_pool, plan.write_rows, **scales)
        decode, prefill = plan.kinds[kind]
        query, pools, count = query.contiguous(), (key_pool, value_pool), plan.num_decodes
        out = torch.empty_like(query)
        if decode is not None:
            _run(decode.wrapper, layer, query[:count], pools, out[:count])
        if prefill is not None:
            _run(prefill.wrapper, layer, query[count:], pools, out[count:])
        return out

    def _upload(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).pin_memory().to(self._device, non_blocking=True)

    # ---- captured decode steps -----------------------------------------------------------------------------

    def capture_decode(self, buffers: DecodeBuffers, layers: list[LayerSpec]) -> CapturedDecode:
        kinds = {kind for layer in layers if self._served[kind := _Kind.of(layer)]}
        others = [layer for layer in layers if not self._served[_Kind.of(layer)]]
        return _CapturedFlashInfer(
            buffers,
            {kind: _Captured(self._workspace, kind, buffers, self._dtype, self._kv_dtype) for kind in kinds},
            self._others.capture_decode(buffers, others) if others else None,
        )


class _CapturedFlashInfer:
    def __init__(self, buffers: DecodeBuffers, kinds: dict[_Kind, _Captured], others: CapturedDecode | None) -> None:
        self._buffers, self._kinds, self._others = buffers, kinds, others

    def plan(self, page_indptr: np.ndarray, last_page_lengths: np.ndarray) -> None:
        for captured in self._kinds.values():
            captured.plan(page_indptr, last_page_lengths)
        if self._others is not None:
            self._others.plan(page_indptr, last_page_lengths)

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
        captured = self._kinds.get(_Kind.of(layer))
        if captured is None:
            assert self._others is not None
            return self._others.run(layer, query, key, value, key_pool, value_pool, sinks)
        scales = {"key_scale": layer.key_scale, "value_scale": layer.value_scale}
        append_kv(key, value, key_pool, value_pool, self._buffers.write_rows, **scales)
        query = query.contiguous()
        return _run(captured.wrapper, layer, query, (key_pool, value_pool), torch.empty_like(query))


class _Captured(_Planned):
    """The decode wrapper of one kind of layer over one set of buffers, whose contents the step itself fills in."""

    def __init__(
        self, workspace: Tensor, kind: _Kind, buffers: DecodeBuffers, dtype: torch.dtype, kv_dtype: torch.dtype
    ) -> None:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        super().__init__(
            BatchDecodeWithPagedKVCacheWrapper(
                workspace,
                "NHD",
                use_cuda_graph=True,
                use_tensor_cores=_on_tensor_cores(kind),
                paged_kv_indptr_buffer=buffers.page_indptr,
                paged_kv_indices_buffer=buffers.page_indices,
                paged_kv_last_page_len_buffer=buffers.last_page_lengths,
                backend="fa2",
            )
        )
        self._shape = (kind.num_heads, kind.num_kv_heads, kind.dim, buffers.page_size)
        self._options = kind.options(dtype, kv_dtype)
        self._indices = buffers.page_indices[:1]
        self._planned: np.ndarray | None = None

    def plan(self, page_indptr: np.ndarray, last_page_lengths: np.ndarray) -> None:
        from flashinfer.decode import fast_decode_plan

        if self._planned is not None and np.array_equal(self._planned, page_indptr):
            return  # the cut depends on nothing else
        indptr, last = torch.from_numpy(page_indptr), torch.from_numpy(last_page_lengths)
        if self._planned is None:
            self._copied.synchronize()
            # The first time in full: it picks the kernels.
            pages = torch.zeros(int(page_indptr[-1]), dtype=torch.int32, device=self._indices.device)
            self.wrapper.plan(indptr, pages, last, *self._shape, **self._options)
        else:
            self._copied.synchronize()
            fast_decode_plan(
                self.wrapper,
                indptr,
                self._indices,
                last,
                *self._shape,
                **self._options,
                global_override_indptr_cpu=indptr,
            )
        self._copied.record()
        self._planned = page_indptr.copy()


def _run(wrapper: Any, layer: LayerSpec, query: Tensor, pools: tuple[Tensor, Tensor], out: Tensor) -> Tensor:
    scales: dict[str, float] = {}
    if (layer.key_scale, layer.value_scale) != (1.0, 1.0):
        scales = {"k_scale": layer.key_scale, "v_scale": layer.value_scale}
    wrapper.run(query, pools, out=out, **scales)
    return out


def _on_tensor_cores(kind: _Kind) -> bool:
    return kind.num_heads // kind.num_kv_heads >= TENSOR_CORE_GROUP


def _indptr(counts: np.ndarray) -> np.ndarray:
    indptr = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=indptr[1:])
    return indptr


def _int32(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.int32))
