"""Round-to-nearest: a weight becomes codes and scales by itself, whatever its inputs are."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_paged.quantization.fp8 import E4M3, LARGEST, FP8Linear, quantize_rows
from hf_paged.quantization.w4 import W4Linear, pack_codes


def fit_grid(weight: Tensor, group_size: int, *, symmetric: bool, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The sixteen values that each group of a row may take: `(code - zero) * scale` for codes of 0 to 15.

    Args:
        weight: float32 `[N, K]`.
        group_size: G, which divides K.
        symmetric: put zero at code 8 everywhere.
        scale_dtype: in which scales are stored. They are rounded to it here, so that codes are chosen for the scales
            that a reader will find.

    Returns:
        (scales, zeros), both float32 `[N, K/G]`.
    """
    groups = weight.unflatten(1, (-1, group_size))
    if symmetric:
        scales = groups.abs().amax(dim=2) / 7.5
    else:
        high = groups.amax(dim=2).clamp(min=0)
        # Not above this, so that no zero is 0. GPTQ's first version stores 0 - 1, which some readers carry over.
        low = torch.minimum(groups.amin(dim=2), -high / 14)
        scales = (high - low) / 15
    scales = scales.to(scale_dtype).float()
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))  # of a group of zeros
    if symmetric:
        return scales, torch.full_like(scales, 8)
    return scales, (-low / scales).round_().clamp_(1, 15)


def to_codes(weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The nearest codes, float32, of a weight `[N, G]` whose rows have one scale and zero each, `[N, 1]`."""
    return (weight / scales).round_().add_(zeros).clamp_(0, 15)


def round_to_grid(weight: Tensor, group_size: int, *, symmetric: bool, scale_dtype: torch.dtype) -> Tensor:
    """A weight `[N, K]` as round-to-nearest leaves it, dequantised: float32 `[N, K]`."""
    scales, zeros = fit_grid(weight, group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    codes = to_codes(weight.unflatten(1, (-1, group_size)), scales[..., None], zeros[..., None])
    return codes.sub_(zeros[..., None]).mul_(scales[..., None]).flatten(1)


def round_to_nearest(weight: Tensor, group_size: int, *, symmetric: bool, scale_dtype: torch.dtype) -> W4Linear:
    """A weight `[N, K]` in four bits.

    Args:
        group_size, symmetric, scale_dtype: as for `fit_grid`; a group_size of -1 is one group.
    """
    size = weight.shape[1] if group_size == -1 else group_size
    scales, zeros = fit_grid(weight, size, symmetric=symmetric, scale_dtype=scale_dtype)
    codes = to_codes(weight.unflatten(1, (-1, size)), scales[..., None], zeros[..., None]).flatten(1)
    return w4_linear(codes, scales, zeros, size, scale_dtype)


def w4_linear(
    codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int, scale_dtype: torch.dtype, perm: Tensor | None = None
) -> W4Linear:
    """A layer from float32 codes `[N, K]`, scales and zeros `[N, K/G]`; `perm` as `W4Linear` has it."""
    return W4Linear(
        pack_codes(codes), scales.T.to(scale_dtype).contiguous(), zeros.T.to(torch.uint8).contiguous(), group_size,
        perm=perm,
    )  # fmt: skip


def round_to_fp8(weight: Tensor, block: tuple[int, int] | None) -> FP8Linear:
    """A weight `[N, K]` in FP8, with float32 scales per block, or per output where there is none."""
    if block is None:
        return FP8Linear(*quantize_rows(weight))
    outputs, inputs = weight.shape
    height, width = block
    padded = torch.nn.functional.pad(weight.float(), (0, -inputs % width, 0, -outputs % height))
    blocks = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))  # [rows, height, columns, width]
    scales = blocks.abs().amax(dim=(1, 3)).div_(LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
    values = (blocks / scales[:, None, :, None]).clamp_(-LARGEST, LARGEST).to(E4M3)
    return FP8Linear(values.flatten(2).flatten(0, 1)[:outputs, :inputs].contiguous(), scales, block)
