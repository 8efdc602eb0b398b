"""One quantised layer of a checkpoint: what its tensors must look like, and reading it."""

from __future__ import annotations

import torch

from hf_paged.quantization.checkpoint import Checkpoint, TensorSpec
from hf_paged.quantization.formats.base import Format
from hf_paged.quantization.linear import QuantizedLinear


def layer_specs(
    name: str, in_features: int, out_features: int, format: Format, checkpoint: Checkpoint
) -> dict[str, TensorSpec]:
    """The layer's tensors, its bias aside.

    Raises:
        ValueError: a layer of such a size cannot be quantised like this.
    """
    try:
        return format.specs(in_features, out_features)
    except ValueError as error:
        raise ValueError(f"{checkpoint.folder}: the layer {name} cannot be quantised like this: {error}") from error


def read_layer(
    name: str, parts: list[str], checkpoint: Checkpoint, format: Format, dtype: torch.dtype, device: torch.device
) -> QuantizedLinear:
    """The layer, on the device.

    Args:
        parts: the last parts of its tensors' names; a bias of zeros is left out.

    Raises:
        ValueError: its tensors cannot be what they are.
    """
    tensors = checkpoint.read([f"{name}.{part}" for part in parts], device)
    tensors = {part: tensors[f"{name}.{part}"] for part in parts}
    bias = tensors.pop("bias", None)
    try:
        return format.read(tensors, bias.to(dtype) if bias is not None and bias.any() else None, dtype)
    except ValueError as error:
        file = checkpoint.entries[f"{name}.{parts[0]}"].file
        raise ValueError(f"{file}: the layer {name} cannot be read: {error}") from error
