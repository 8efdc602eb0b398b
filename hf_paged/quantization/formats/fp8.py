"""FP8 as DeepSeek writes it, in blocks, and with one scale per tensor as other checkpoints of the same name have it.

weight float8_e4m3fn `[N, K]`, with weight_scale_inv `[ceil(N/bn), ceil(K/bk)]` (to multiply by, whatever its name says)
or weight_scale, a single number. input_scale, for activations, is not used: they get a scale per token instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_paged.quantization.checkpoint import Entry, TensorSpec
from hf_paged.quantization.formats.base import ONE, option
from hf_paged.quantization.fp8 import E4M3, FP8Linear


class Fp8:
    """FP8 weights, in blocks or with one scale.

    Args:
        options: `quantization_config`.

    Raises:
        ValueError: no such blocks, or another float format.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        option(options, "fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
        option(options, "scale_fmt", ("float", None), "float")
        self.block = block_of(options, "weight_block_size")
        self.scale = "weight_scale_inv" if self.block else "weight_scale"

    def holds(self, entries: Mapping[str, Entry]) -> bool:
        return holds_fp8(entries)

    def specs(self, in_features: int, out_features: int) -> dict[str, TensorSpec]:
        shapes = (num_blocks(in_features, out_features, self.block),) if self.block else ONE
        return {
            "weight": TensorSpec(((out_features, in_features),), frozenset({E4M3})),
            self.scale: TensorSpec(shapes),
            "input_scale": TensorSpec(ONE, required=False),
        }

    def read(self, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype) -> FP8Linear:
        return fp8_linear(tensors["weight"], tensors[self.scale], self.block, bias)

    def write(self, layer: FP8Linear) -> dict[str, Tensor]:
        return {"weight": layer.codes, self.scale: written_scales(layer, self.block, single=self.block is None)}


def holds_fp8(entries: Mapping[str, Entry]) -> bool:
    """Whether a layer's weight is in FP8, or has a scale."""
    weight = entries.get("weight")
    scaled = not entries.keys().isdisjoint({"weight_scale", "weight_scale_inv"})
    return scaled or (weight is not None and weight.dtype is E4M3)


def block_of(options: Mapping[str, Any], name: str) -> tuple[int, int] | None:
    """An entry with two sizes, or none.

    Raises:
        ValueError: it is something else.
    """
    block = options.get(name)
    if block is None:
        return None
    if not (isinstance(block, list | tuple) and len(block) == 2 and all(isinstance(s, int) and s > 0 for s in block)):
        raise ValueError(f"the quantization config says {name}={block!r}, which must be two positive sizes")
    return block[0], block[1]


def num_blocks(in_features: int, out_features: int, block: tuple[int, int]) -> tuple[int, int]:
    """Blocks along outputs and inputs; those at the edges may be cut off."""
    return -(-out_features // block[0]), -(-in_features // block[1])


def fp8_linear(weight: Tensor, scales: Tensor, block: tuple[int, int] | None, bias: Tensor | None) -> FP8Linear:
    """A layer whose scales, where they are not of blocks, are per row (`[N, 1]`) or a single one."""
    scales = scales.float()
    if block is None:
        scales = scales.reshape(-1, 1).expand(weight.shape[0], 1).contiguous()
    return FP8Linear(weight, scales, block, bias=bias)


def written_scales(layer: FP8Linear, block: tuple[int, int] | None, *, single: bool) -> Tensor:
    """A layer's scales as a checkpoint has them: one per block, one per output (block None), or a single one `[1]`.

    Raises:
        ValueError: the layer has others.
    """
    if layer.block != (block or (1, layer.in_features)):
        raise ValueError(f"the format has a scale per {block or 'output'}, and this layer one per block {layer.block}")
    if not single:
        return layer.scales
    if not layer.scales.eq(layer.scales[0]).all():
        raise ValueError("the format has a single scale, and this layer's outputs have different ones")
    return layer.scales[0]
