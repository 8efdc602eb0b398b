"""QuantizedLinear: what layers over quantised weights have in common, and how others see them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class QuantizedLinear(nn.Linear):
    """A linear layer whose tensors are buffers, so that no optimizer finds them: `codes`, what goes with them, `bias`.

    It is an `nn.Linear` to those who look for places to put adapters, PEFT for one, and passes gradients through.
    """

    codes: Tensor
    bias: Tensor | None  # type: ignore[assignment]

    def __init__(self, in_features: int, out_features: int, tensors: dict[str, Tensor | None]) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make parameters
        self.in_features, self.out_features = in_features, out_features
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The codes as integers, as bitsandbytes' layers have theirs here: others look for a layer's device and for
        whether it is in floating point. They can be read, not written to."""
        codes = self.codes if not self.codes.is_floating_point() else self.codes.view(torch.uint8)
        return codes.as_subclass(_Codes)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight `[N, K]` of an ordinary linear layer."""
        raise NotImplementedError


class _Codes(Tensor):
    """Refuses what merging an adapter begins with. As integers would take it, the codes would be other codes."""

    @property
    def data(self) -> Tensor:
        raise RuntimeError(_NO_MERGING)

    @data.setter
    def data(self, _: Any) -> None:
        raise RuntimeError(_NO_MERGING)


_NO_MERGING = (
    "the weight of a quantised layer cannot be changed: load the checkpoint with quantization=None to merge an adapter "
    "into it"
)
