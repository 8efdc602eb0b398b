"""ExactForward: a model's own forward, gradients included, with the bits of the engine's exact mode."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_paged.attention.exact import EXACT
from hf_paged.attention.interface import attention_configs, use_paged_attention
from hf_paged.model.exact import exact_arithmetic


class ExactForward:
    """Gives one model's forward exact arithmetic and attention, until it is removed. Forwards over a cache, the
    engine's among them, are not concerned.

    Layers that gradient checkpointing computes again during the backward pass are computed in the same way again.

    Args:
        lm: the transformers model, out of its wrappers.
    """

    def __init__(self, lm: nn.Module) -> None:
        self._configs = attention_configs(lm)
        self._active = True
        self._restores = [self._replace(lm, self._around_model)]
        self._restores += [
            self._replace(part, self._around_part)
            for module in lm.modules()
            if isinstance(module, GradientCheckpointingLayer)
            for part in module.children()
        ]

    def remove(self) -> None:
        """The model's forward is what it was. Where somebody wrapped it since, what is in there does nothing more."""
        self._active = False
        for restore in self._restores:
            restore()
        self._restores = []

    def _replace(self, module: nn.Module, around: Callable[..., Any]) -> Callable[[], None]:
        own, original = module.__dict__.get("forward"), module.forward

        @functools.wraps(type(module).forward)
        def forward(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return around(original, args, kwargs)

        forward.replaces = original  # type: ignore[attr-defined]
        replacement = types.MethodType(forward, module)
        module.__dict__["forward"] = replacement

        def restore() -> None:
            if module.__dict__.get("forward") is not replacement:
                return
            if own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = own

        return restore

    def _around_model(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._active or kwargs.get("paged") is not None or kwargs.get("past_key_values") is not None:
            return original(*args, **kwargs)
        with self._exact():
            return original(*args, **_with_positions(kwargs))

    def _around_part(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A checkpointed layer is computed again from within, so it is its parts that are told."""
        if not self._active or not _in_backward():
            return original(*args, **kwargs)
        with self._exact():
            return original(*args, **kwargs)

    @contextmanager
    def _exact(self) -> Iterator[None]:
        with exact_arithmetic(), use_paged_attention(self._configs, EXACT):
            yield


def replaced_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """What an `ExactForward` put its own in place of; any other forward is returned as it is."""
    while hasattr(forward, "replaces"):
        forward = forward.replaces
    return forward


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _with_positions(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A token's position is its place among the real tokens of its row, as it is in the engine; a model would count
    padding on the left, and rotate by other angles."""
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or kwargs.get("position_ids") is not None:
        return kwargs
    return kwargs | {"position_ids": (mask.long().cumsum(1) - 1).clamp_(min=0)}
