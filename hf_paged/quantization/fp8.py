"""FP8 linear layers: weights in float8_e4m3fn with one float32 scale per block of them.

    codes   float8_e4m3fn [N, K]
    scales  float32 [ceil(N/bn), ceil(K/bk)]   `W = code * scale`; blocks of (1, K) are scales per row

With scales per row, a GPU that has FP8 tensor cores multiplies in FP8: activations are quantised as they come, with one
scale per token. With blocks of 128 x 128 (DeepSeek's) it does so for few rows, with a scale per token and 128 inputs.
Everywhere else the weight is dequantised.

Everything goes through one operator, `hf_paged::fp8_linear`, whose gradient is with respect to its input alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_paged.quantization.linear import QuantizedLinear

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max

MOST_ROWS_IN_BLOCKS = 256
"""Of activations that a weight with a scale per 128 x 128 is multiplied with as it is."""


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Float `[M, K]` -> (float8_e4m3fn `[M, K]`, float32 scales `[M, 1]`), `x = values * scales`; NaN stays NaN."""
    if x.is_cuda:
        from hf_paged.kernels.triton.fp8 import quantize_rows as quantize_on_gpu

        return quantize_on_gpu(x)
    x = x.float()
    scales = x.abs().amax(dim=1, keepdim=True).div_(LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
    return (x / scales).clamp_(-LARGEST, LARGEST).to(E4M3), scales


def dequantize(weight: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight `[N, K]` in `dtype`; blocks at the edges may be cut off."""
    outputs, inputs = weight.shape
    if block != (1, inputs):
        if weight.is_cuda and block == (128, 128):
            from hf_paged.kernels.triton.fp8 import dequantize_blocks

            return dequantize_blocks(weight, scales, dtype)
        scales = scales.repeat_interleave(block[0], 0)[:outputs].repeat_interleave(block[1], 1)[:, :inputs]
    return (weight.float() * scales).to(dtype)


# ---- the operator --------------------------------------------------------------------------------------------------

_library = torch.library.Library("hf_paged", "FRAGMENT")
_library.define("fp8_linear(Tensor x, Tensor weight, Tensor scales, Tensor? bias, int[] block) -> Tensor")


def _fp8_linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, block: list[int]) -> Tensor:
    outputs, inputs = weight.shape
    rows = x.reshape(-1, inputs).contiguous()
    if rows.shape[0] and _multiplies_in_fp8(rows, weight, block):
        from hf_paged.kernels.triton import fp8

        if block == [1, inputs]:
            out = fp8.fp8_linear(rows, weight, scales)
        else:
            out = fp8.fp8_matmul(*fp8.quantize_groups(rows), weight, scales)
    else:
        out = F.linear(rows, dequantize(weight, scales, (block[0], block[1]), x.dtype))
    if bias is not None:
        out += bias  # in place: it is ours
    return out.view(*x.shape[:-1], outputs)


def _multiplies_in_fp8(rows: Tensor, weight: Tensor, block: list[int]) -> bool:
    """On a GPU, to bfloat16."""
    outputs, inputs = weight.shape
    by_row = block == [1, inputs] and outputs % 16 == 0 and inputs % 16 == 0
    in_blocks = block == [128, 128] and inputs % 128 == 0 and rows.shape[0] <= MOST_ROWS_IN_BLOCKS
    fits = (by_row or in_blocks) and rows.is_cuda and rows.dtype is torch.bfloat16
    return fits and torch.cuda.get_device_capability(rows.device) >= (9, 0)


def _shape_of_fp8_linear(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, scales, _, ctx.block = inputs
    ctx.save_for_backward(weight, scales)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """With respect to the input alone."""
    weight, scales = ctx.saved_tensors
    return grad @ dequantize(weight, scales, (ctx.block[0], ctx.block[1]), grad.dtype), None, None, None, None


_library.impl("fp8_linear", _fp8_linear, "CompositeExplicitAutograd")
torch.library.register_fake("hf_paged::fp8_linear", _shape_of_fp8_linear, lib=_library)
torch.library.register_autograd("hf_paged::fp8_linear", _gradients, setup_context=_keep, lib=_library)


# ---- the layer -----------------------------------------------------------------------------------------------------


class FP8Linear(QuantizedLinear):
    """A linear layer over a weight in FP8.

    Args:
        codes: float8_e4m3fn `[N, K]`.
        scales: float32, one per block.
        block: (rows, columns) that share a scale; None: a scale per row.
        bias: `[N]` or None.
    """

    scales: Tensor

    def __init__(
        self, codes: Tensor, scales: Tensor, block: tuple[int, int] | None = None, *, bias: Tensor | None = None
    ) -> None:
        super().__init__(codes.shape[1], codes.shape[0], {"codes": codes, "scales": scales, "bias": bias})
        self.block = block or (1, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` -> `[..., N]` in the dtype of x; under autocast in its dtype, as `F.linear`."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return torch.ops.hf_paged.fp8_linear(x, self.codes, self.scales, self.bias, self.block)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight `[N, K]` of an ordinary linear layer."""
        return dequantize(self.codes, self.scales, self.block, dtype)

    def kind(self) -> tuple[Any, ...] | None:
        """As `model.fuse.Joinable`: blocks must not straddle two layers."""
        whole = self.out_features % self.block[0] == 0
        return (FP8Linear, tuple(self.block), self.codes.device) if whole else None

    def join(self, others: list[FP8Linear]) -> tuple[FP8Linear, list[dict[str, Tensor]]]:
        """As `model.fuse.Joinable`."""
        layers = [self, *others]
        tensors = {"codes": [layer.codes for layer in layers], "scales": [layer.scales for layer in layers]}
        if self.bias is not None:
            tensors["bias"] = [layer.bias for layer in layers]  # type: ignore[misc]
        joined = {name: torch.cat(parts) for name, parts in tensors.items()}
        split = {name: joined[name].split([len(part) for part in parts]) for name, parts in tensors.items()}
        layer = FP8Linear(joined["codes"], joined["scales"], self.block, bias=joined.get("bias"))
        return layer, [{name: parts[i] for name, parts in split.items()} for i in range(len(layers))]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FP8Linear:
        # `model.to(dtype)` means what is computed with. It would make the codes wrong ones of that dtype.
        def in_own_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            stays = tensor is self.codes or tensor is self.scales
            return tensor.to(moved.device) if stays and moved.dtype is not tensor.dtype else moved

        return super()._apply(in_own_dtype, recurse)

    def extra_repr(self) -> str:
        """For printing the model."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, block={self.block}, "
            f"bias={self.bias is not None}"
        )
