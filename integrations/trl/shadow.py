"""Half-precision copies of linear layers' weights, for rollouts of a model that trains under autocast.

Autocast casts a float32 weight anew in every forward. In training that is little beside the products it is for; a
decode step is bound by reading weights, and reads and writes four times as much that way. So rollouts see copies that
were cast once, and compute the same bits from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Shadow:
    """The copies of one model's weights. They stay where they are from rollout to rollout, so that what was captured
    over them stays right; what they hold is brought up to date each time. They take half of the memory of the float32
    weights of linear layers.

    Args:
        dtype: autocast's.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._copies: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        """By a parameter's id: the parameter, and its copy."""

    @contextmanager
    def cast(self, model: nn.Module) -> Iterator[None]:
        """Within it, linear layers have their copies for weights and biases; embeddings and norms, which autocast
        leaves alone, have their own, also where a linear layer shares an embedding's."""
        taken = [(module, name) for module in model.modules() if isinstance(module, nn.Linear) for name in _NAMES]
        taken = [(module, name) for module, name in taken if _is_float32(module._parameters.get(name))]
        own: list[tuple[dict[str, Any], str, nn.Parameter]] = [
            (module._parameters, name, module._parameters[name]) for module, name in taken
        ]
        self._refresh([parameter for _, _, parameter in own])
        try:
            for parameters, name, parameter in own:
                parameters[name] = self._copies[id(parameter)][1]
            yield
        finally:
            for parameters, name, parameter in own:
                parameters[name] = parameter

    @torch.no_grad()
    def _refresh(self, parameters: list[nn.Parameter]) -> None:
        before, self._copies = self._copies, {}
        for parameter in parameters:
            known = before.get(id(parameter))
            if known is None or not _alike(*known):
                copy = torch.empty_like(parameter, dtype=self._dtype, memory_format=torch.contiguous_format)
                known = parameter, nn.Parameter(copy, requires_grad=False)
            self._copies[id(parameter)] = known
        if self._copies:
            sources, copies = zip(*self._copies.values(), strict=True)
            torch._foreach_copy_(list(copies), list(sources))


_NAMES = ("weight", "bias")


def _is_float32(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.dtype == torch.float32


def _alike(parameter: Tensor, copy: Tensor) -> bool:
    return parameter.shape == copy.shape and parameter.device == copy.device
