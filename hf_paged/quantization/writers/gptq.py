"""GPTQ (arXiv 2210.17323): inputs are rounded one after the other, and those that are left make up for the error."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_paged.quantization.w4 import W4Linear
from hf_paged.quantization.writers.rounding import fit_grid, to_codes, w4_linear

DAMPING = (0.01, 0.1, 1.0)
"""What is added to the Hessian's diagonal, in parts of its mean: more, where it cannot be inverted with less."""

BLOCK = 128
"""Inputs whose updates are applied to all later ones at once."""


def gptq(
    weight: Tensor,
    gram: Tensor,
    group_size: int,
    *,
    symmetric: bool,
    scale_dtype: torch.dtype,
    act_order: str | None = None,
) -> W4Linear:
    """A weight in four bits, chosen so that what the layer computes changes least on the inputs that were seen.

    Args:
        weight: `[N, K]`.
        gram: float32 `[K, K]`, the sum of `x x^T` over inputs: half the Hessian of the squared error of an output.
        group_size, symmetric, scale_dtype: as for `round_to_nearest`.
        act_order: round the inputs of the largest activations first. "group" makes groups of inputs that follow one
            another in that order, so that they are scattered; with "weight" they are those of the weight as it came.

    Raises:
        ValueError: the inputs were not finite.
    """
    weight = weight.float().clone()
    inputs = weight.shape[1]
    size = inputs if group_size == -1 else group_size
    perm = gram.diagonal().argsort(descending=True, stable=True) if act_order else None
    scales, zeros = fit_grid(weight, size, symmetric=symmetric, scale_dtype=scale_dtype)
    groups = torch.arange(inputs, device=weight.device) // size
    if perm is not None:
        weight, gram = weight[:, perm], gram[perm][:, perm]
        groups = groups[perm] if act_order == "weight" else groups
    factor = _inverse_factor(gram)
    step = math.gcd(size, BLOCK)
    codes = torch.empty_like(weight)
    for start in range(0, inputs, step):
        end = start + step
        if start % size == 0 and act_order != "weight":  # all earlier updates have been applied to this group
            group = weight[:, start : start + size]
            found = fit_grid(group, size, symmetric=symmetric, scale_dtype=scale_dtype)
            scales[:, start // size], zeros[:, start // size] = (part[:, 0] for part in found)
        scale, zero = scales[:, groups[start:end]], zeros[:, groups[start:end]]
        block, errors = weight[:, start:end], torch.empty_like(weight[:, start:end])
        for i in range(step):
            row = factor[start + i, start + i : end]
            column = block[:, i : i + 1]
            s, z = scale[:, i : i + 1], zero[:, i : i + 1]
            codes[:, start + i : start + i + 1] = chosen = to_codes(column, s, z)
            errors[:, i : i + 1] = error = (column - (chosen - z) * s) / row[0]
            block[:, i:] -= error * row
        weight[:, end:] -= errors @ factor[start:end, end:]
    if perm is not None and act_order == "weight":
        codes, perm = codes[:, perm.argsort()], None
    return w4_linear(codes, scales, zeros, size, scale_dtype, perm)


def _inverse_factor(gram: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of a damped Hessian `[K, K]`."""
    if not gram.isfinite().all():
        raise ValueError("the layer's inputs on the calibration text are not finite")
    gram = gram.clone()
    diagonal = gram.diagonal()
    diagonal[diagonal == 0] = 1  # of inputs that were always zero: they are rounded as they are
    for damping in DAMPING:
        lower, failed = torch.linalg.cholesky_ex(gram + damping * diagonal.mean() * torch.eye(len(gram)).to(gram))
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
    raise ValueError("the layer's inputs on the calibration text are too much alike: give more samples")
