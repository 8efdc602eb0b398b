"""compressed-tensors, as llm-compressor writes them: weights of four bits, or in FP8.

pack-quantized: weight_packed int32 `[N, K/8]`, weight_scale `[N, K/G]`, weight_zero_point int32 `[N/8, K/G]` (packed
along the outputs; 8 everywhere where it is not there), weight_g_idx `[K]`; `W = (q - z) * s`.

float-quantized: weight float8_e4m3fn `[N, K]`, weight_scale `[N, 1]`, `[1]` or one per block; `W = weight * scale`.
input_scale is not used: activations get a scale per token instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_paged.quantization.checkpoint import Entry, TensorSpec
from hf_paged.quantization.formats.base import (
    INT32,
    ONE,
    Format,
    group_size_of,
    in_group_order,
    in_input_order,
    num_groups,
    option,
    require_words,
)
from hf_paged.quantization.formats.fp8 import block_of, fp8_linear, holds_fp8, num_blocks, written_scales
from hf_paged.quantization.fp8 import E4M3, FP8Linear
from hf_paged.quantization.w4 import W4Linear, pack_nibbles, unpack_nibbles


def compressed_tensors(options: Mapping[str, Any]) -> Format:
    """The format of a checkpoint whose quantised layers are all quantised alike.

    Args:
        options: `quantization_config`.

    Raises:
        ValueError: layers are quantised in different ways, or in one that is not supported.
    """
    sparsity = options.get("sparsity_config") or {}
    option({"sparsity_config.format": sparsity.get("format")}, "sparsity_config.format", (None, "dense"), None)
    by_name = options.get("config_groups")
    groups = list(by_name.values()) if isinstance(by_name, Mapping) else []
    if not groups or not all(isinstance(g, Mapping) and isinstance(g.get("weights"), Mapping) for g in groups):
        raise ValueError("the quantization config must say in config_groups how weights are quantised")
    weights = groups[0]["weights"]
    if any(_essence(group["weights"]) != _essence(weights) for group in groups):
        raise ValueError("config_groups quantise layers in different ways, which is not supported")
    option(options, "format", (None, "pack-quantized", "float-quantized", "naive-quantized"), None)
    kind = weights.get("type", "int"), weights.get("num_bits")
    if kind == ("int", 4):
        if any(group.get("input_activations") for group in groups):
            raise ValueError("activations of four-bit layers are quantised too (W4A8), which is not supported")
        return PackQuantized(weights)
    if kind == ("float", 8):
        return FloatQuantized(weights)
    raise ValueError(f"weights are of type {kind[0]} with {kind[1]} bits; supported are int with 4 and float with 8")


def _essence(weights: Mapping[str, Any]) -> tuple[Any, ...]:
    """What decides how a weight is stored."""
    names = ("type", "num_bits", "strategy", "group_size", "symmetric", "block_structure")
    return tuple(weights.get(name) for name in names)


class PackQuantized:
    """Four bits, in groups or with a scale per output."""

    def __init__(self, weights: Mapping[str, Any]) -> None:
        strategy = option(weights, "strategy", ("group", "channel"), "group")
        self.group_size = group_size_of(weights, 128) if strategy == "group" else -1
        self.symmetric = option(weights, "symmetric", (True, False), True)

    def holds(self, entries: Mapping[str, Entry]) -> bool:
        return not entries.keys().isdisjoint({"weight_packed", "weight_scale", "weight_zero_point"})

    def specs(self, in_features: int, out_features: int) -> dict[str, TensorSpec]:
        groups = num_groups(in_features, self.group_size)
        specs = {
            "weight_packed": TensorSpec(((out_features, in_features // 8),), INT32),
            "weight_scale": TensorSpec(((out_features, groups),)),
            "weight_g_idx": TensorSpec(((in_features,),), INT32 | {torch.int64}, required=False),
            "weight_shape": TensorSpec(((2,),), INT32 | {torch.int64}, required=False),
        }
        if not self.symmetric:
            require_words(out_features, "outputs")
            specs["weight_zero_point"] = TensorSpec(((out_features // 8, groups),), INT32)
        return specs

    def read(self, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype) -> W4Linear:
        nibbles = unpack_nibbles(tensors["weight_packed"].T).T
        scales = tensors["weight_scale"].T.contiguous()
        if self.symmetric:
            zeros = torch.full(scales.shape, 8, dtype=torch.uint8, device=scales.device)
        else:
            zeros = unpack_nibbles(tensors["weight_zero_point"]).T.contiguous()
        group_size = nibbles.shape[1] // len(scales)
        codes, perm = in_group_order(nibbles, tensors.get("weight_g_idx"), group_size)
        return W4Linear(codes, scales.to(dtype), zeros, group_size, perm=perm, bias=bias)

    def write(self, layer: W4Linear) -> dict[str, Tensor]:
        words, groups = in_input_order(layer)
        tensors = {
            "weight_packed": words.T,
            "weight_scale": layer.scales.T,
            "weight_shape": torch.tensor([layer.out_features, layer.in_features]),
        }
        if not self.symmetric:
            tensors["weight_zero_point"] = pack_nibbles(layer.zeros.T)
        elif not layer.zeros.eq(8).all():
            raise ValueError("the format is symmetric, and this layer has zeros other than 8")
        return tensors | ({"weight_g_idx": groups} if layer.perm is not None else {})


class FloatQuantized:
    """FP8 with one scale, one per output, or one per block."""

    def __init__(self, weights: Mapping[str, Any]) -> None:
        self.strategy = option(weights, "strategy", ("tensor", "channel", "block"), "tensor")
        self.block = block_of(weights, "block_structure") if self.strategy == "block" else None
        if self.strategy == "block" and self.block is None:
            raise ValueError("the quantization config says strategy='block' and must say block_structure too")

    def holds(self, entries: Mapping[str, Entry]) -> bool:
        return holds_fp8(entries)

    def specs(self, in_features: int, out_features: int) -> dict[str, TensorSpec]:
        if self.block is not None:
            shapes: tuple[tuple[int, ...], ...] = (num_blocks(in_features, out_features, self.block),)
        else:
            shapes = ((out_features, 1),) if self.strategy == "channel" else ONE
        return {
            "weight": TensorSpec(((out_features, in_features),), frozenset({E4M3})),
            "weight_scale": TensorSpec(shapes),
            "input_scale": TensorSpec(ONE, required=False),
        }

    def read(self, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype) -> FP8Linear:
        return fp8_linear(tensors["weight"], tensors["weight_scale"], self.block, bias)

    def write(self, layer: FP8Linear) -> dict[str, Tensor]:
        scales = written_scales(layer, self.block, single=self.strategy == "tensor")
        return {"weight": layer.codes, "weight_scale": scales}
