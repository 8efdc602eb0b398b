"""Linear layers on a CPU through oneDNN: the model's own layers and weights, a faster matrix product.

torch computes float32 `F.linear` with MKL, which on processors of other makers than its own takes up to twice as long
as oneDNN, the library that computes bfloat16 already. torch has oneDNN's product as an operator of its compiler; here
it is called for the layers as they are, without compiling or repacking anything.

oneDNN keeps a kernel for every number of rows that it meets, of about half a megabyte each, and steps of a server have
any number: rows are rounded up to a few sizes, so that memory settles.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def fast_linear(device: torch.device) -> AbstractContextManager[Any]:
    """Within it, float32 and bfloat16 linear layers on a CPU run through oneDNN, where this torch has it. Not for
    training."""
    operator = _operator()
    return _OneDnnLinear(operator) if device.type == "cpu" and operator is not None else nullcontext()


def _operator() -> Callable[..., Tensor] | None:
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


class _OneDnnLinear(TorchFunctionMode):
    def __init__(self, operator: Callable[..., Tensor]) -> None:
        super().__init__()
        self._operator = operator

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not kwargs and len(args) >= 2:
            x, weight = args[0], args[1]
            if (
                x.dtype in (torch.float32, torch.bfloat16)
                and type(weight) in (nn.Parameter, Tensor)
                and weight.dtype is x.dtype
                and x.is_contiguous()
                and weight.is_contiguous()
                and x.numel()
                and not torch.is_autocast_enabled("cpu")
            ):
                return self._linear(x, weight, args[2] if len(args) > 2 else None)
        return func(*args, **(kwargs or {}))

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if (more := rounded(rows) - rows) == 0:
            return self._product(x, weight, bias)
        out = self._product(F.pad(x.view(rows, -1), (0, 0, 0, more)), weight, bias)
        return out[:rows].view(*x.shape[:-1], len(weight))

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.dtype is torch.float32:
            return self._operator(x, weight, bias, "none", [], "")
        return F.linear(x, weight, bias)  # torch's own is oneDNN's


def rounded(rows: int) -> int:
    """The next of the sizes: all up to 32, from there on eight to every power of two."""
    if rows <= 32:
        return rows
    step = 1 << ((rows - 1).bit_length() - 4)
    return -(-rows // step) * step
