"""Where transformers meets us: the attention function registered under the name "hf_paged".

transformers looks its attention function up by the config's `_attn_implementation` at every call and passes the keyword
arguments of `model(...)` through to it. So the batch's metadata rides in as one keyword, `paged=PagedForward(...)`, and
the function is the only place where a model's layers and our pages touch.

A forward without that keyword (a training step in another thread while we generate) gets what it would have got without
us: torch's own attention under the mask that transformers made for it, which is why the name is registered with the
mask interface too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

NAME = "hf_paged"
PROBE = "hf_paged_probe"
"""The same attention function under a name that makes transformers tell which mask each layer would get."""


class PagedForward(Protocol):
    """What rides along with one forward."""

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float, options: dict[str, Any]
    ) -> Tensor:
        """`[T, H, Dk]`, `[T, Hkv, Dk]`, `[T, Hkv, Dv]` -> `[T, H, Dv]` for the layer that `module` is."""


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    paged: PagedForward | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query `[1, H, T, D]`, key and value `[1, Hkv, T, D]` -> `[1, T, H, Dv]`."""
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if paged is None:
        return _unpaged(module, query, key, value, attention_mask, scaling, dropout, options), None
    dtype = compute_dtype(query.device, query.dtype)
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    options["attention_mask"] = attention_mask
    return paged.attend(module, q, k, v, scaling, options)[None], None


def _unpaged(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float,
    options: dict[str, Any],
) -> Tensor:
    softcap, sinks = options.pop("softcap", None), options.get("s_aux")
    if softcap is None and sinks is None:
        sdpa = ALL_ATTENTION["sdpa"]
        return sdpa(module, query, key, value, mask, dropout=dropout, scaling=scaling, **options)[0]
    # torch's attention knows neither soft caps nor sinks; transformers computes such models in the open, and so do we.
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(key.shape[2] - query.shape[2])
    low = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, low) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], -1)
    weights = torch.softmax(scores.float(), -1).to(value.dtype)[..., : key.shape[2]]
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2)


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What attention computes in for operands of `dtype`: torch's own casts them under autocast, and so do we."""
    casts = torch.is_autocast_enabled(device.type) and dtype != torch.float64
    return torch.get_autocast_dtype(device.type) if casts else dtype


class ProbedMask(Tensor):
    """A stand-in for a mask that says what the mask would have been."""

    window: int | None
    """Latest positions a row sees, its own included; None is all."""
    problem: str | None
    """Why it is no causal mask, with or without a window; None when it is."""


def probe_mask(*_: Any, mask_function: Callable[..., Tensor], **__: Any) -> ProbedMask:
    """transformers' mask interface, asked about single positions far out instead of building anything."""

    def sees(row: int, column: int) -> bool:
        index = (torch.tensor(i) for i in (0, 0, row, column))
        return bool(mask_function(*index))

    def window_at(row: int) -> int | None:
        if sees(row, 0):
            return None
        low, high = 0, row  # sees `low` tokens back, not `high`
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if sees(row, row - middle) else (low, middle)
        return high

    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool).as_subclass(ProbedMask)
    mask.window, mask.problem = window_at(1 << 22), None
    if sees(5, 6) or not sees(6, 6):
        mask.problem = "its attention is not causal"
    elif any(window_at(row) != mask.window for row in ((1 << 22) + 1, (1 << 22) + 77)):
        mask.problem = "its attention mask is not a sliding window but something else (chunks, say)"
    return mask


ALL_ATTENTION = AttentionInterface()
AttentionInterface.register(NAME, paged_attention)
AttentionInterface.register(PROBE, paged_attention)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
AttentionMaskInterface.register(PROBE, probe_mask)


def packed_mask(device: torch.device) -> Tensor:
    """A stand-in for the attention mask of a packed forward. Being 4-D it is passed on as it is, and no mask is
    built."""
    return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)


def attention_configs(model: nn.Module) -> list[Any]:
    """The distinct config objects in which a model's layers look up their attention."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
    return list(found.values())


@contextmanager
def use_paged_attention(configs: list[Any], name: str = NAME) -> Iterator[None]:
    """Within it, the configs' layers call `paged_attention`; after it, exceptions included, what they called before."""
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation_internal = own
