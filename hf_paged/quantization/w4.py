"""W4A16 linear layers: weights of four bits in one canonical form, whatever format they were read from.

    codes   int16 [ceil(K/128), N, 32]   nibble j (bits 4j to 4j+3) of number h of turn t is input 128 t + 32 j + h
    scales  float [K/G, N]
    zeros   uint8 [K/G, N]               0 to 15
    perm    int64 [K]                    optional: the order of the inputs in which groups are contiguous (act-order)

`W[n, k] = (code[n, k] - zeros[k // G, n]) * scales[k // G, n]`, and `y = x[:, perm] @ W^T + bias`. Why codes lie in
that order says `kernels/triton/w4.py`.

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

TURN, PLANE = 128, 32
"""Inputs whose codes lie together, and how many of them share a place in their numbers."""

# ---- the canonical form --------------------------------------------------------------------------------------------


def pack_codes(nibbles: Tensor) -> Tensor:
    """Integers `[N, K]` of 0 to 15 -> the canonical int16 `[ceil(K/128), N, 32]`, filled up with zeros."""
    outputs, inputs = nibbles.shape
    padded = torch.nn.functional.pad(nibbles.to(torch.uint8), (0, -inputs % TURN))
    planes = padded.view(outputs, -1, TURN // PLANE, PLANE)
    words = planes[:, :, 0].to(torch.int16)
    for j in range(1, TURN // PLANE):
        words |= planes[:, :, j].to(torch.int16) << 4 * j  # the highest bit is the sign
    return words.transpose(0, 1).contiguous()


def unpack_codes(codes: Tensor, inputs: int) -> Tensor:
    """The canonical codes -> uint8 `[N, inputs]`."""
    planes = torch.stack([(codes >> 4 * j & 15).to(torch.uint8) for j in range(TURN // PLANE)], dim=2)
    return planes.transpose(0, 1).flatten(1)[:, :inputs]


def unpack_nibbles(words: Tensor) -> Tensor:
    """int32 `[R, N]`, eight rows packed into each as most formats do -> uint8 `[8 R, N]`: nibble i of word r in row
    8r+i."""
    return torch.stack([(words >> 4 * i & 15).to(torch.uint8) for i in range(8)], dim=1).flatten(0, 1)


def pack_nibbles(nibbles: Tensor) -> Tensor:
    """The inverse of `unpack_nibbles`."""
    words = torch.zeros(nibbles.shape[0] // 8, nibbles.shape[1], dtype=torch.int32, device=nibbles.device)
    for i in range(8):
        words |= nibbles[i::8].to(torch.int32) << 4 * i
    return words


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> Tensor:
    """The weight `[N, K]` in the dtype of `scales`, its inputs in the order of the codes (where there is a `perm`, not
    their own)."""
    if codes.is_cuda:
        from hf_paged.kernels.triton.w4 import w4_dequantize

        return w4_dequantize(codes, scales, zeros, group_size)
    nibbles = unpack_codes(codes, len(scales) * group_size).unflatten(1, (-1, group_size)).to(scales.dtype)
    return nibbles.sub_(zeros.T[..., None]).mul_(scales.T[..., None]).flatten(1)


def pack_for_cpu(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> tuple[Tensor, Tensor] | None:
    """The weight as torch's CPU operator wants it.

    Returns:
        (uint8 `[N, K/2]` in an order of torch's own, scales and offsets `[K/S, N, 2]` in the dtype of `scales`) with S
        the largest size the operator knows that divides the groups; None where it does not take the weight.
    """
    size = next((size for size in CPU_GROUP_SIZES if group_size % size == 0), None)
    if size is None or codes.shape[1] % 16:
        return None
    nibbles = unpack_codes(codes, len(scales) * group_size).to(torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles.contiguous(), 1)
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
    inputs, outputs = len(scales) * group_size, codes.shape[1]
    rows = x.reshape(-1, inputs)
    if perm is not None:
        rows = rows.index_select(1, perm)
    if not rows.shape[0]:
        out = x.new_empty(0, outputs)
    elif packed is not None and packed_scales is not None:
        size = inputs // packed_scales.shape[0]
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(rows.contiguous(), packed, size, packed_scales)
    elif rows.is_cuda:
        from hf_paged.kernels.triton.w4 import w4_linear

        bias = None if bias is None else bias.to(x.dtype)
        return w4_linear(rows, codes, scales.to(x.dtype), zeros, group_size, bias).view(*x.shape[:-1], outputs)
    else:
        out = rows @ dequantize(codes, scales.to(x.dtype), zeros, group_size).T
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
    grad_x = grad @ dequantize(codes, scales.to(grad.dtype), zeros, ctx.group_size)
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
        super().__init__(len(scales) * group_size, codes.shape[1], tensors)
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
        weight = dequantize(self.codes, self.scales.to(dtype), self.zeros, self.group_size)
        return weight if self.perm is None else weight[:, self.perm.argsort()]

    def kind(self) -> tuple[Any, ...] | None:
        """As `model.fuse.Joinable`: layers with an order of inputs of their own are left alone."""
        return None if self.perm is not None else (W4Linear, self.group_size, self.scales.dtype, self.codes.device)

    def join(self, others: list[W4Linear]) -> tuple[W4Linear, list[dict[str, Tensor]]]:
        """As `model.fuse.Joinable`."""
        layers = [self, *others]
        codes = torch.cat([layer.codes for layer in layers], dim=1)
        scales, zeros = (torch.cat([getattr(layer, name) for layer in layers], 1) for name in ("scales", "zeros"))
        bias = None if self.bias is None else torch.cat([layer.bias for layer in layers])  # type: ignore[misc]
        joined = W4Linear(codes, scales, zeros, self.group_size, bias=bias)
        sizes = [layer.out_features for layer in layers]
        split = {"codes": codes.split(sizes, 1), "scales": scales.split(sizes, 1), "zeros": zeros.split(sizes, 1)}
        if bias is not None:
            split["bias"] = bias.split(sizes)
        return joined, [{name: parts[i] for name, parts in split.items()} for i in range(len(layers))]

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
