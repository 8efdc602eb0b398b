"""Linear layers of decode steps: on a GPU a handful of rows go through a kernel made for them.

The choice is made where the number of rows is known, inside one operator that a compiler does not look into; more rows
than a handful are torch's own product, as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_library = torch.library.Library("hf_paged", "FRAGMENT")
_library.define("linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor")


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from hf_paged.kernels.triton.linear import MOST_ROWS, linear_of_few_rows

    few = 0 < input.numel() <= MOST_ROWS * weight.shape[1]
    if few and _is_half(input) and input.dtype == weight.dtype and weight.is_contiguous():
        return linear_of_few_rows(input, weight, bias)
    return F.linear(input, weight, bias)


def _shape_of_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


_library.impl("linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("hf_paged::linear", _shape_of_linear, lib=_library)


def multiply(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` without gradients: `[..., in]` -> `[..., out]`; under autocast in its dtype, like torch's own."""
    if not input.is_cuda:
        return F.linear(input, weight, bias)
    if torch.is_autocast_enabled("cuda"):  # in a compiled layer, autocast does not see what is inside of an operator
        dtype = torch.get_autocast_dtype("cuda")
        input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return torch.ops.hf_paged.linear(input, weight, bias)


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)


class LeanLinears:
    """Stand-ins that send a model's linear layers through `multiply`.

    Args:
        lm: the model; linear layers with a forward or call of their own are left alone.
    """

    def __init__(self, lm: nn.Module) -> None:
        self._places = [
            (parent._modules, name, child, _Lean(child))
            for parent in lm.modules()
            for name, child in parent._modules.items()
            if type(child) is nn.Linear and _is_half(child.weight) and "forward" not in vars(child)
        ]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within it the stand-ins are in the layers' places, where nothing else has taken them."""
        try:
            for siblings, name, linear, stand_in in self._places:
                if siblings.get(name) is linear:
                    siblings[name] = stand_in
            yield
        finally:
            for siblings, name, linear, stand_in in self._places:
                if siblings.get(name) is stand_in:
                    siblings[name] = linear


class _Lean(nn.Linear):
    """Stands in for a linear layer, whose `__dict__` it shares: to whoever looks at it, it is that layer."""

    __slots__ = ("linear",)
    linear: nn.Linear

    def __init__(self, linear: nn.Linear) -> None:
        # Past nn.Module's own `__setattr__`, which would make the layer a child of itself.
        for name, value in (("__dict__", linear.__dict__), ("linear", linear)):
            object.__setattr__(self, name, value)

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        if torch.is_grad_enabled():
            return super().forward(input)
        return multiply(input, self.weight, self.bias)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Copies and pickles are of the layer. The protocols from 2 on insist on an object's own class.
        return self.linear.__reduce_ex__(1)
