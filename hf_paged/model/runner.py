"""ModelRunner: packed inputs through the model's own layers, attention over pages, logits out."""

from __future__ import annotations

import functools
import logging
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from hf_paged.attention import interface, opaque
from hf_paged.attention.backend import AttentionBackend, LayerSpec
from hf_paged.cache.storage import KVStorage
from hf_paged.lora.layers import LoraLayers
from hf_paged.model.compile import CompiledLayers
from hf_paged.model.cpu import fast_linear
from hf_paged.model.exact import exact_arithmetic
from hf_paged.model.fuse import FusedLinears
from hf_paged.model.hidden import HiddenStates
from hf_paged.model.inputs import StepInputs
from hf_paged.model.introspect import ModelLayout, causal_lm, evaluation_mode, forward
from hf_paged.model.linear import LeanLinears

logger = logging.getLogger(__name__)


class Attend(Protocol):
    """Attention of one step: `AttentionBackend.run` with the step's plan, or `CapturedDecode.run`."""

    def __call__(
        self,
        layer: LayerSpec,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_pool: Tensor,
        value_pool: Tensor,
        sinks: Tensor | None,
    ) -> Tensor: ...


class _Step:
    """The step that is being computed."""

    attend: Attend | None = None
    calls: int = 0
    """Layers that attended so far."""


class _Layer:
    """One layer's pools, and the way from a call of the layer to the step that is being computed."""

    __slots__ = ("__weakref__", "_key_scales", "_spec", "_step", "_value_scales", "key_pool", "value_pool")

    def __init__(self, step: _Step, spec: LayerSpec, key_pool: Tensor, value_pool: Tensor) -> None:
        self._step, self._spec = step, spec
        self.key_pool, self.value_pool = key_pool, value_pool
        self._key_scales = _column(spec.key_head_scales, key_pool.device)
        self._value_scales = _column(spec.value_head_scales, key_pool.device)

    def run(self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
        step, key_scales, value_scales = self._step, self._key_scales, self._value_scales
        assert step.attend is not None, "attention over pages outside a step"
        step.calls += 1
        # A key's scale may as well multiply the query, and a value's the output, whatever kernel is between.
        if key_scales is not None:
            query, key = _times_heads(query, key_scales), key / key_scales.to(key.dtype)
        if value_scales is not None:
            value = value / value_scales.to(value.dtype)
        out = step.attend(self._spec, query, key, value, self.key_pool, self.value_pool, sinks)
        return out if value_scales is None else _times_heads(out, value_scales)


def _column(scales: tuple[float, ...], device: torch.device) -> Tensor | None:
    """float32 `[Hkv, 1]`; None for none."""
    return torch.tensor(scales, device=device)[:, None] if scales else None


def _times_heads(rows: Tensor, scales: Tensor) -> Tensor:
    """`[T, H, D]` times `[Hkv, 1]`; head h has the scale of KV head `h // (H // Hkv)`."""
    return (rows.unflatten(1, (len(scales), -1)) * scales[:, None].to(rows.dtype)).flatten(1, 2)


class _PagedForward:
    """Rides along with each forward, and finds the calling layer's pools."""

    def __init__(self, layers: dict[int, _Layer]) -> None:
        self._layers = layers

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float, options: dict[str, Any]
    ) -> Tensor:
        sinks = options.get("s_aux")
        if torch.compiler.is_compiling():
            # Nothing here may differ from layer to layer but tensors that are attributes of the module.
            pools = module._hf_paged_keys, module._hf_paged_values
            return torch.ops.hf_paged.attend(query, key, value, *pools, sinks)
        return self._layers[id(module)].run(query, key, value, sinks)


class ModelRunner:
    """Runs packed steps of one model over one storage.

    The model is borrowed: outside a forward of ours its attention, its train/eval mode, its layers and its parameters
    are its own.

    Args:
        fused: linear layers to compute together.
        lean: the other linear layers' way for few rows.
        compiled: layers to run compiled. Should compiling fail they run as they are, with a logged reason.
        exact: compute within `exact_arithmetic`; then the three above must be None.
        hidden: layers' outputs to keep for others.
        lora: adapters' places beside linear layers, for forwards that have any.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: ModelLayout,
        backend: AttentionBackend,
        storage: KVStorage,
        *,
        fused: FusedLinears | None = None,
        lean: LeanLinears | None = None,
        compiled: CompiledLayers | None = None,
        exact: bool = False,
        hidden: HiddenStates | None = None,
        lora: LoraLayers | None = None,
    ) -> None:
        self.lm = causal_lm(model)
        self.layout = layout
        self.backend = backend
        self.fused = fused
        self.lean = lean
        self.compiled = compiled
        self._exact = exact
        self._hidden = hidden
        self._lora = lora
        self._step = _Step()
        self._configs = interface.attention_configs(self.lm)
        self._layers = [
            _Layer(self._step, spec, storage.keys[spec.index], storage.values[spec.index]) for spec in layout.layers
        ]
        for layer in self._layers:
            opaque.bind(layer.key_pool, layer)
        self._paged = _PagedForward(
            {id(module): layer for module, layer in zip(layout.modules, self._layers, strict=True)}
        )
        self._mask = interface.packed_mask(layout.device)

    def close(self) -> None:
        """Lets go of the pools: what a compiler keeps of a forward must not keep them."""
        for layer in self._layers:
            del layer.key_pool, layer.value_pool

    def forward(self, inputs: StepInputs, previous: Tensor | None = None, adapted: bool = False) -> Tensor:
        """Computes one step from the host's arrays.

        Args:
            previous: int64 [S], the tokens that the step before sampled, where `inputs.sources` refers to them.
            adapted: whether some rows have adapters.

        Returns:
            logits `[R, V]` of `inputs.logit_rows`, in the model's dtype.
        """
        plan = self.backend.plan(inputs.attention, self.layout.layers)
        token_ids = self.upload(inputs.token_ids)
        if inputs.sources is not None:
            assert previous is not None
            sources = self.upload(inputs.sources)
            known = token_ids[: len(sources)]
            # A token of -1 is one that could not be sampled; its sequence ends when that is seen.
            known.copy_(torch.where(sources < 0, known, previous[sources.clamp(min=0)].clamp(min=0)))
        return self.compute(
            token_ids,
            self.upload(inputs.positions),
            functools.partial(self.backend.run, plan),
            self.upload(inputs.logit_rows),
            adapted,
        )

    @torch.no_grad()
    def compute(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attend: Attend,
        rows: Tensor | None = None,
        adapted: bool = False,
    ) -> Tensor:
        """Computes one packed forward of T rows, whose attention is `attend`.

        Args:
            token_ids, positions: int64 `[T]`.
            rows: int64 `[R]`, the rows whose logits are wanted; None is all.
            adapted: whether some rows have adapters: a program of its own, so that others need not look.

        Returns:
            logits `[R, V]`, in the model's dtype.
        """
        if self.compiled is not None:
            try:
                return self._compute(token_ids, positions, attend, rows, adapted)
            except Exception as error:
                if isinstance(error, torch.OutOfMemoryError) or not _is_compilers(error):
                    raise
                logger.warning("the model's layers run uncompiled: compiling failed (%s)", first_line(error))
                self.compiled = None
        return self._compute(token_ids, positions, attend, rows, adapted)

    def _compute(
        self, token_ids: Tensor, positions: Tensor, attend: Attend, rows: Tensor | None, adapted: bool
    ) -> Tensor:
        takes_rows = self.layout.takes_logits_to_keep
        options: dict[str, Any] = {"logits_to_keep": 0 if rows is None else rows} if takes_rows else {}
        self._step.attend, self._step.calls = attend, 0
        try:
            with ExitStack() as stack:
                stack.enter_context(evaluation_mode(self.lm))
                stack.enter_context(_autocast_without_cache(self.layout.device))
                stack.enter_context(interface.use_paged_attention(self._configs))
                if self._exact:
                    stack.enter_context(exact_arithmetic())
                elif self.compiled is None:  # a compiler does not look through it
                    stack.enter_context(fast_linear(self.layout.device))
                if self.fused is not None:
                    stack.enter_context(self.fused.installed())
                if self.lean is not None:
                    stack.enter_context(self.lean.installed())
                if adapted:
                    assert self._lora is not None
                    stack.enter_context(self._lora.installed())  # around what the others put there
                if self.compiled is not None:
                    stack.enter_context(self._pools_on_modules())
                    stack.enter_context(self.compiled.installed())
                if self._hidden is not None:
                    stack.enter_context(self._hidden.captured())
                logits = forward(
                    self.lm, token_ids, positions, self._paged, attention_mask=self._mask, **options
                )  # fmt: skip
        finally:
            self._step.attend = None
        if self._step.calls != len(self._layers):
            raise RuntimeError(
                f"{self._step.calls} of the model's {len(self._layers)} attention layers went through pages"
            )
        return logits if takes_rows or rows is None else logits[rows]

    def _pools_on_modules(self) -> ExitStack:
        """Compiled layers find their pools as attributes of the attending modules, while a forward of ours runs."""
        attributes = [module.__dict__ for module in self.layout.modules]
        stack = ExitStack()
        stack.callback(_take_pools_off, attributes)
        for own, layer in zip(attributes, self._layers, strict=True):
            own["_hf_paged_keys"], own["_hf_paged_values"] = layer.key_pool, layer.value_pool
        return stack

    def upload(self, array: np.ndarray) -> Tensor:
        """A copy on the model's device, under way; the host does not wait for it."""
        tensor = torch.from_numpy(array)
        if self.layout.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.layout.device, non_blocking=True)


def _autocast_without_cache(device: torch.device) -> AbstractContextManager[Any]:
    """The caller's autocast goes for our forwards too, but a graph must not refer to the casts that it keeps for a
    while."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.get_autocast_dtype(device.type), cache_enabled=False)


def _take_pools_off(attributes: list[dict[str, Any]]) -> None:
    for own in attributes:
        own.pop("_hf_paged_keys", None)
        own.pop("_hf_paged_values", None)


def _is_compilers(error: BaseException) -> bool:
    """Whether an exception comes from compiling, not from what was compiled."""
    while True:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "triton")):
            return True
        if error.__cause__ is None:
            return False
        error = error.__cause__


def first_line(error: BaseException) -> str:
    """An exception's kind and the first line of what it says, for a log."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
