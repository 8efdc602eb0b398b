"""ModelRunner: packed inputs through the model's own layers, attention over pages, logits out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_paged.attention import interface
from hf_paged.attention.backend import AttentionBackend, LayerSpec
from hf_paged.cache.storage import KVStorage
from hf_paged.model.cpu import fast_linear
from hf_paged.model.inputs import StepInputs
from hf_paged.model.introspect import ModelLayout, causal_lm, evaluation_mode, forward


class _PagedStep:
    """Rides along with one forward: finds the calling layer's pools and hands its rows to the backend."""

    __slots__ = ("backend", "calls", "layers", "plan", "storage")

    def __init__(self, backend: AttentionBackend, plan: Any, storage: KVStorage, layers: dict[int, LayerSpec]) -> None:
        self.backend, self.plan, self.storage, self.layers = backend, plan, storage, layers
        self.calls = 0

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float, options: dict[str, Any]
    ) -> Tensor:
        layer = self.layers[id(module)]
        self.calls += 1
        pools = self.storage.keys[layer.index], self.storage.values[layer.index]
        return self.backend.run(self.plan, layer, query, key, value, *pools, options.get("s_aux"))


class ModelRunner:
    """Runs packed steps of one model over one storage.

    The model is borrowed: outside `forward` its attention, its train/eval mode and its parameters are its own.
    """

    def __init__(self, model: nn.Module, layout: ModelLayout, backend: AttentionBackend, storage: KVStorage) -> None:
        self.lm = causal_lm(model)
        self.layout = layout
        self.backend = backend
        self.storage = storage
        self._configs = interface.attention_configs(self.lm)

    @torch.no_grad()
    def forward(self, inputs: StepInputs, copies: list[tuple[int, int]] | None = None) -> Tensor:
        """Copies the pages named in `copies`, then computes the step.

        Returns:
            logits `[R, V]` of `inputs.logit_rows`, in the model's dtype.
        """
        device = self.layout.device
        if copies:
            self.storage.copy_pages(copies)
        plan = self.backend.plan(inputs.attention, self.layout.layers)
        step = _PagedStep(self.backend, plan, self.storage, self.layout.by_module)
        rows = torch.from_numpy(inputs.logit_rows).to(device, non_blocking=True)
        options = {"logits_to_keep": rows} if self.layout.takes_logits_to_keep else {}
        with evaluation_mode(self.lm), interface.use_paged_attention(self._configs), fast_linear(device):
            logits = forward(
                self.lm,
                torch.from_numpy(inputs.token_ids).to(device, non_blocking=True),
                torch.from_numpy(inputs.positions).to(device, non_blocking=True),
                step,
                attention_mask=interface.packed_mask(device),
                **options,
            )
        if step.calls != len(self.layout.layers):
            raise RuntimeError(
                f"{step.calls} of the model's {len(self.layout.layers)} attention layers went through pages"
            )
        return logits if options else logits[rows]
