"""How much memory a step needs beside weights and pages."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_paged.attention.backend import AttentionBackend, LayerSpec
from hf_paged.cache.storage import KVStorage
from hf_paged.lora.layers import LoraLayers
from hf_paged.model.fuse import FusedLinears
from hf_paged.model.introspect import ModelLayout
from hf_paged.model.runner import ModelRunner

SAMPLER_COPIES = 2
"""float32 copies of all logits that sampling may hold at once."""


def measure_activations(
    model: nn.Module,
    layout: ModelLayout,
    backend: AttentionBackend,
    num_tokens: int,
    num_rows: int,
    *,
    exact: bool = False,
    fused: FusedLinears | None = None,
    lora: LoraLayers | None = None,
) -> int:
    """Bytes of GPU memory that the largest step takes at its peak: it is computed once, attending to nothing.

    Args:
        num_tokens: rows of the step.
        num_rows: of these, rows whose logits are wanted.
        exact, fused: as in `ModelRunner`.
        lora: places for adapters, if there are any: then the step has some.
    """
    device = layout.device
    storage = KVStorage(layout.layers, 1, 1, dtype=layout.kv_dtype, device=device, layout=backend.layout)
    runner = ModelRunner(model, layout, backend, storage, exact=exact, fused=fused, lora=lora)

    def attend(
        layer: LayerSpec,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_pool: Tensor,
        value_pool: Tensor,
        sinks: Tensor | None,
    ) -> Tensor:
        return query.new_zeros(query.shape[0], layer.num_heads, layer.value_dim)

    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    ids = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    positions = torch.arange(num_tokens, device=device) % layout.max_model_len
    rows = torch.arange(min(num_rows, num_tokens), device=device)
    runner.compute(ids, positions, attend, rows, adapted=lora is not None)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return peak + SAMPLER_COPIES * 4 * num_rows * layout.vocab_size
