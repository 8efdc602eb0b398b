"""W4A16 linear layers: weights of four bits in one canonical form, whatever format they were read from.

    codes   int32 [K/8, N]   nibble i of word r (bits 4i to 4i+3) belongs to input 8r+i: the packing of GPTQ
    scales  float [K/G, N]
    zeros   uint8 [K/G, N]   0 to 15
    perm    int64 [K]        optional: the order of the inputs in which groups are contiguous (GPTQ's act-order)

`W[k, n] = (code[k, n] - zeros[k // G, n]) * scales[k // G, n]`, and `y = x[:, perm] @ W + bias`.

Everything goes through one operator, `hf_paged::w4_linear`, which a compiler does not look into. It has a gradient with
respect to its input alone: enough to train adapters on top.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_paged.quantization.linear import QuantizedLinear

CPU_GROUP_SIZES = (256, 128, 64, 32)
"""What torch's CPU operator takes."""

FEW_ROWS = 64
"""Up to here a GPU multiplies by the codes themselves; for more rows it dequantises, and cuBLAS multiplies."""

# ---- the canonical form --------------------------------------------------------------------------------------------


def pack_nibbles(nibbles: Tensor) -> Tensor:
    """Integers `[K, N]` of 0 to 15, K a multiple of 8 -> int32 `[K/8, N]`."""
    words = torch.zeros(nibbles.shape[0] // 8, nibbles.shape[1], dtype=torch.int32, device=nibbles.device)
    for i in range(8):
        words |= nibbles[i::8].to(torch.int32) << 4 * i
    return words


def unpack_nibbles(words: Tensor) -> Tensor:
    """int32 `[R, N]` -> uint8 `[8 R, N]`, nibble i of word r in row 8r+i."""
    return torch.stack([(words >> 4 * i & 15).to(torch.uint8) for i in range(8)], dim=1).flatten(0, 1)


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """The weight `[K, N]` in the order of the codes (not of the inputs, where there is a `perm`), in `dtype`."""
    if codes.is_cuda:
        from hf_paged.kernels.triton.w4 import w4_dequantize

        return w4_dequantize(codes, scales, zeros, group_size, dtype)
    nibbles = unpack_nibbles(codes).unflatten(0, (-1, group_size)).to(dtype)
    return nibbles.sub_(zeros[:, None]).mul_(scales[:, None].to(dtype)).flatten(0, 1)


def pack_for_cpu(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> tuple[Tensor, Tensor] | None:
    """The weight as torch's CPU operator wants it.

    Returns:
        (uint8 `[N, K/2]` in an order of torch's own, scales and offsets `[K/S, N, 2]` in the dtype of `scales`) with S
        the largest size the operator knows that divides the groups; None where it does not take the weight.
    """
    size = next((size for size in CPU_GROUP_SIZES if group_size % size == 0), None)
    if size is None or codes.shape[1] % 16:
        return None
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack_nibbles(codes).T.to(torch.int32).contiguous(), 1)
    # The operator has its zero at code 8, and adds an offset.
    offsets = scales * (8 - zeros.to(scales.dtype))
    return packed, torch.stack([scales, offsets], dim=-1).repeat_interleave(group_size // size, dim=0)


# ---- the operator --------------------------------------------------------------------------------------------------

_library = torch.library.Library("hf_paged", "FRAGMENT")
_library.define(
    "w4_linear(Tensor x, Tensor codes, Tensor scales, Tensor zeros, Tensor? perm, Tensor? bias, int group_size,"
    " Tensor? packed=None, Tensor? packed_scales=None) -> Tensor"
)


def _w4_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    perm: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    packed: Tensor | None = None,
    packed_scales: Tensor | None = None,
) -> Tensor:
    inputs, outputs = 8 * codes.shape[0], codes.shape[1]
    rows = x.reshape(-1, inputs)
    if perm is not None:
        rows = rows.index_select(1, perm)
    if not rows.shape[0]:
        out = x.new_empty(0, outputs)
    elif packed is not None and packed_scales is not None:
        size = inputs // packed_scales.shape[0]
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(rows.contiguous(), packed, size, packed_scales)
    elif rows.is_cuda and rows.shape[0] <= FEW_ROWS:
        from hf_paged.kernels.triton.w4 import w4_matmul

        out = w4_matmul(rows.contiguous(), codes, scales.to(x.dtype), zeros, group_size)
    else:
        out = rows @ dequantize(codes, scales, zeros, group_size, x.dtype)
    if bias is not None:
        out += bias  # in place: it is ours
    return out.view(*x.shape[:-1], outputs)


def _shape_of_w4_linear(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scales, zeros, perm, _, ctx.group_size, *_ = inputs
    ctx.save_for_backward(codes, scales, zeros, perm)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """With respect to the input alone."""
    codes, scales, zeros, perm = ctx.saved_tensors
    grad_x = grad @ dequantize(codes, scales, zeros, ctx.group_size, grad.dtype).T
    if perm is not None:
        grad_x = grad_x.index_select(-1, perm.argsort())
    return grad_x, *[None] * 8


_library.impl("w4_linear", _w4_linear, "CompositeExplicitAutograd")
torch.library.register_fake("hf_paged::w4_linear", _shape_of_w4_linear, lib=_library)
torch.library.register_autograd("hf_paged::w4_linear", _gradients, setup_context=_keep, lib=_library)


# ---- the layer -----------------------------------------------------------------------------------------------------


class W4Linear(QuantizedLinear):
    """A linear layer over a weight of four bits.

    Args:
        codes, scales, zeros, perm: as the module says.
        group_size: G; K for one group.
        bias: `[N]` or None.
    """

    scales: Tensor
    zeros: Tensor
    perm: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor,
        group_size: int,
        *,
        perm: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        tensors = {"codes": codes, "scales": scales, "zeros": zeros, "perm": perm, "bias": bias}
        super().__init__(8 * codes.shape[0], codes.shape[1], tensors)
        self.group_size = group_size
        self._packed: tuple[tuple[Any, ...], tuple[Tensor, Tensor] | None] | None = None
        """For a CPU: what the weight was when it was packed, and its packed copy, if it can be had."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` -> `[..., N]` in the dtype of x; under autocast in its dtype, as `F.linear`."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        packed = self._pack(x.dtype) if x.device.type == "cpu" else None
        return torch.ops.hf_paged.w4_linear(
            x, self.codes, self.scales, self.zeros, self.perm, self.bias, self.group_size, *(packed or ())
        )

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight `[N, K]` of an ordinary linear layer."""
        weight = dequantize(self.codes, self.scales, self.zeros, self.group_size, dtype)
        if self.perm is not None:
            weight = weight[self.perm.argsort()]
        return weight.T.contiguous()

    @torch.compiler.disable
    def _pack(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        tensors = self.codes, self.scales, self.zeros
        # Tensors made in inference mode count no versions.
        now = dtype, *((t.data_ptr(), None if t.is_inference() else t._version) for t in tensors)
        held = self._packed  # read once: other threads may be here too
        if held is None or held[0] != now:
            with torch.inference_mode(False), torch.no_grad():  # it outlives the caller's mode
                held = now, pack_for_cpu(self.codes, self.scales.to(dtype), self.zeros, self.group_size)
            self._packed = held
        return held[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None}  # copies and pickles make their own

    def extra_repr(self) -> str:
        """For printing the model."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}, "
            f"bias={self.bias is not None}, perm={self.perm is not None}"
        )
