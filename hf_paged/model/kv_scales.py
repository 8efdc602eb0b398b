"""Scales of keys and values in FP8: a checkpoint's, or measured on prompts.

float8_e4m3fn goes from 2**-9 to 448 with the same few bits nearly everywhere. A scale moves what a layer computes to
where that lies; more precise than a power of two it need not be. Scales are settled before anything is in the pages,
since what is stored means nothing without them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_paged.attention.backend import AttentionBatch, LayerSpec, PrefillSpan
from hf_paged.attention.torch_backend import FP8_MAX, TorchBackend
from hf_paged.cache.storage import KVStorage
from hf_paged.model.introspect import ModelLayout, trial
from hf_paged.model.runner import ModelRunner

MEASURED_TOKENS = 2048
"""Of the first prompts, in order: what they hold beyond that is not looked at."""

MARGIN = 2.0
"""How many times as large as the largest that was measured later keys and values may be, at the least, before they are
clamped."""


def with_stored_scales(layout: ModelLayout) -> ModelLayout:
    """The layout with the scales that a checkpoint brought along: attributes `k_scale` and `v_scale` of attending
    modules, tensors of one number or of one per KV head.

    Raises:
        ValueError: a scale is not positive and finite, or there are more or less of them than KV heads.
    """
    layers = []
    for module, layer in zip(layout.modules, layout.layers, strict=True):
        key, key_heads = _stored(module, "k_scale", layer.num_kv_heads)
        value, value_heads = _stored(module, "v_scale", layer.num_kv_heads)
        scales: dict[str, Any] = {"key_scale": key, "value_scale": value}
        layers.append(replace(layer, **scales, key_head_scales=key_heads, value_head_scales=value_heads))
    return replace(layout, layers=layers)


def with_measured_scales(model: nn.Module, layout: ModelLayout, prompts: list[list[int]]) -> ModelLayout:
    """The layout with scales for what the model computes of prompts, which are cut off together at `MEASURED_TOKENS`.

    One forward in plain torch, through no pages. A scale is the lowest power of two that leaves room for `MARGIN` times
    the largest absolute value; where nothing finite was found it is 1.

    Raises:
        UnsupportedModelError: the model fails in that forward.
    """
    spans: list[PrefillSpan] = []
    ids: list[int] = []
    positions: list[int] = []
    for prompt in prompts:
        taken = prompt[: MEASURED_TOKENS - len(ids)]
        if taken:
            spans.append(PrefillSpan(row=len(ids), length=len(taken), context=0, pages=np.zeros(0, dtype=np.int32)))
            ids += taken
            positions += range(len(taken))
    nowhere = np.zeros(len(ids), dtype=np.int64)  # spans without a context attend to their own rows, not to pages
    batch = AttentionBatch(1, nowhere[:0], np.zeros((0, 0), dtype=np.int32), spans, nowhere, nowhere)
    bare = [replace(layer, key_scale=1.0, value_scale=1.0) for layer in layout.layers]
    backend = TorchBackend(layout.device)
    storage = KVStorage(bare, 1, 1, dtype=layout.kv_dtype, device=layout.device, layout=backend.layout)
    runner = ModelRunner(model, replace(layout, layers=bare), backend, storage)
    attend = functools.partial(backend.run, backend.plan(batch, bare))
    largest: dict[int, tuple[Tensor, Tensor]] = {}

    def watch(
        layer: LayerSpec,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_pool: Tensor,
        value_pool: Tensor,
        sinks: Tensor | None,
    ) -> Tensor:
        largest[layer.index] = key.abs().amax(), value.abs().amax()
        return attend(layer, query, key, value, key_pool, value_pool, sinks)

    with trial(model):
        tokens, places, row = (torch.tensor(numbers, device=layout.device) for numbers in (ids, positions, [0]))
        runner.compute(tokens, places, watch, row)
    layers = []
    for layer in bare:
        key, value = (_fitting(MARGIN * float(found) / FP8_MAX) for found in largest[layer.index])
        layers.append(replace(layer, key_scale=key, value_scale=value, key_head_scales=(), value_head_scales=()))
    return replace(layout, layers=layers)


def _fitting(least: float) -> float:
    """The lowest power of two that is at least so large."""
    return 2.0 ** math.ceil(math.log2(least)) if 0 < least < math.inf else 1.0


def _stored(module: nn.Module, name: str, num_kv_heads: int) -> tuple[float, tuple[float, ...]]:
    """(the scale of all heads, or 1; one per head, if they differ)."""
    tensor = getattr(module, name, None)
    if not isinstance(tensor, Tensor):
        return 1.0, ()
    scales = tensor.detach().float().flatten().tolist()
    if not all(0 < scale < math.inf for scale in scales):
        raise ValueError(f"{name} of a {type(module).__name__} must be positive and finite, got {scales}")
    if len(scales) not in (1, num_kv_heads):
        raise ValueError(f"{name} of a {type(module).__name__} must be one number or {num_kv_heads}, got {len(scales)}")
    if len(set(scales)) == 1:
        return scales[0], ()
    return 1.0, tuple(map(_fitting, scales))  # a row is multiplied by powers of two without rounding
