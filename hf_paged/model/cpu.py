"""Linear layers on a CPU through oneDNN: the model's own layers and weights, a faster matrix product.

torch computes float32 `F.linear` with MKL, which on processors of other makers than its own takes up to twice as long
as oneDNN, the library that computes bfloat16 already. torch has oneDNN's product as an operator of its compiler; here
it is called for the layers as they are, without compiling or repacking anything.
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
    """Within it, float32 linear layers on a CPU run through oneDNN, where this torch has it. Not for training."""
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
                x.dtype is torch.float32
                and type(weight) in (nn.Parameter, Tensor)
                and weight.dtype is torch.float32
                and x.is_contiguous()
                and weight.is_contiguous()
                and x.numel()
                and not torch.is_autocast_enabled("cpu")
            ):
                bias = args[2] if len(args) > 2 else None
                return self._operator(x, weight, bias, "none", [], "")
        return func(*args, **(kwargs or {}))
