"""Experts of a mixture: linear layers one by one in a checkpoint, stacked parameters in transformers.

Which layers a parameter is stacked from, transformers says itself, where it converts checkpoints that are not
quantised. What it computes with are the parameters, so quantised experts are dequantised as they are read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from hf_paged.distributed.plan import Cut
from hf_paged.quantization.checkpoint import Checkpoint, Entry, TensorSpec
from hf_paged.quantization.formats.base import Format
from hf_paged.quantization.layers import layer_specs, read_layer


@dataclass(frozen=True, slots=True)
class Piece:
    """A linear layer of one expert, and its place in a parameter."""

    layer: str
    parts: list[str]
    """The last parts of its tensors' names."""
    quantized: bool
    expert: int
    rows: slice
    """Of the parameter's second dimension."""


@dataclass(frozen=True, slots=True)
class Stacking:
    """Parameters `[experts, outputs, inputs]` and the layers that they are stacked from."""

    pieces: dict[str, list[Piece]]
    """By parameter."""
    missing: list[str]
    """Layers of these parameters that the checkpoint lacks."""


def rename(model: Any, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint under the names that a mixture's tensors have in the model (Mixtral's are older than it)."""
    conversions = get_model_conversion_mapping(model)
    if not any(_stacks(conversion) for conversion in conversions):
        return checkpoint
    entries = {}
    for name, entry in checkpoint.entries.items():
        for conversion in conversions:
            if isinstance(conversion, WeightRenaming):
                name, _ = conversion.rename_source_key(name)
        entries[name] = entry
    return replace(checkpoint, entries=entries)


def plan_experts(
    model: Any, by_module: Mapping[str, Mapping[str, Entry]], checkpoint: Checkpoint, format: Format | None
) -> Stacking:
    """Finds experts among a checkpoint's layers.

    Args:
        model: on the meta device.
        by_module: the checkpoint's entries by layer and the last part of their names.
        format: None where the checkpoint is not quantised.

    Raises:
        ValueError: their tensors are of another shape or dtype.
    """
    stacked = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 3}
    conversions = [conversion for conversion in get_model_conversion_mapping(model) if _stacks(conversion)]
    pieces: dict[str, list[Piece]] = defaultdict(list)
    missing: list[str] = []
    for layer, found in by_module.items():
        for conversion in conversions:
            name, pattern = conversion.rename_source_key(f"{layer}.weight")
            if pattern is None or name not in stacked:
                continue
            _, outputs, inputs = stacked[name].shape
            height = outputs // len(conversion.source_patterns)
            place = conversion.source_patterns.index(pattern)
            quantized = format is not None and format.holds(found)
            specs = {"weight": TensorSpec(((height, inputs),))}
            if format is not None and quantized:
                specs = layer_specs(layer, inputs, height, format, checkpoint)
            missing += [f"{layer}.{part}" for part, spec in specs.items() if spec.required and part not in found]
            parts = [part for part in specs if part in found]
            for part in parts:
                specs[part].check(found[part])
            rows = slice(place * height, (place + 1) * height)
            pieces[name].append(Piece(layer, parts, quantized, _expert(layer, pattern), rows))
    for conversion in conversions:
        for name, found_pieces in pieces.items():
            wanted = stacked[name].shape[0] * len(conversion.source_patterns)
            if name.endswith(conversion.target_patterns[0]) and len(found_pieces) != wanted:
                missing.append(f"{name} ({wanted - len(found_pieces)} of {wanted} layers)")
    return Stacking(dict(pieces), missing)


def read_experts(
    parameter: Tensor,
    pieces: list[Piece],
    checkpoint: Checkpoint,
    format: Format | None,
    device: torch.device,
    cut: Cut | None = None,
) -> Tensor:
    """A parameter stacked from its layers, in the dtype and shape of the one on the meta device, or the part of it that
    a rank holds. Of experts that are not in this part nothing is read."""
    experts = range(*cut.ranges[0]) if cut is not None and cut.dim == 0 else range(parameter.shape[0])
    stacked = torch.empty_like(parameter[: len(experts)], device=device)
    for piece in pieces:
        if piece.expert not in experts:
            continue
        if piece.quantized:
            assert format is not None
            layer = read_layer(piece.layer, piece.parts, checkpoint, format, parameter.dtype, device)
            weight = layer.dequantize(parameter.dtype)
        else:
            name = f"{piece.layer}.weight"
            weight = checkpoint.read([name], device)[name]
        stacked[experts.index(piece.expert), piece.rows] = weight
    return stacked if cut is None or cut.dim == 0 else cut.of(stacked)


def _stacks(conversion: Any) -> bool:
    """Whether a conversion stacks experts' weights, and those of an expert one below the other."""
    if not isinstance(conversion, WeightConverter) or len(conversion.target_patterns) != 1:
        return False
    merge, *rest = conversion.operations
    below = len(rest) == 0 or (len(rest) == 1 and isinstance(rest[0], Concatenate) and rest[0].dim == 1)
    return isinstance(merge, MergeModulelist) and merge.dim == 0 and below


def _expert(layer: str, pattern: str) -> int:
    """The number that stands for the star of a pattern like `.experts.*.w1.weight` in a layer's name."""
    before, after = pattern.split("*")
    name = f"{layer}.weight".removesuffix(after)
    return int(name[name.rindex(before) + len(before) :])
