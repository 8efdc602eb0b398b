"""Scales of keys and values in a checkpoint: found by their names, and put where the engine looks for them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from hf_paged.quantization.checkpoint import FLOATS, Checkpoint

logger = logging.getLogger(__name__)

SUFFIXES = {
    ".k_proj.output_scale": "k_scale",
    ".v_proj.output_scale": "v_scale",
    ".k_proj.k_scale": "k_scale",
    ".v_proj.v_scale": "v_scale",
    ".k_scale": "k_scale",
    ".v_scale": "v_scale",
}
"""Endings of tensors' names, the longer before those that they end in, and what they are to the module before them."""


def find_kv_scales(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The scales among tensors: (attending module, "k_scale" or "v_scale") by name."""
    found = {}
    for name in names:
        suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
        if suffix is not None:
            found[name] = name.removesuffix(suffix), SUFFIXES[suffix]
    return found


def attach_kv_scales(model: Any, checkpoint: Checkpoint, options: Mapping[str, Any]) -> None:
    """Gives attending modules their scales as attributes, which `kv_cache_dtype="fp8"` uses.

    Args:
        options: `quantization_config`, whose `kv_cache_scheme` may say that the scales are not for FP8.

    Raises:
        ValueError: a scale is not in floating point.
    """
    found = find_kv_scales(checkpoint.entries)
    scheme = options.get("kv_cache_scheme") or {}
    kind = scheme.get("type", "float"), scheme.get("num_bits", 8), bool(scheme.get("symmetric", True))
    if found and kind != ("float", 8, True):
        logger.warning("%s: scales of keys and values are left out, which are not for FP8", checkpoint.folder)
        return
    modules = dict(model.named_modules())
    for name, (module, attribute) in found.items():
        entry = checkpoint.entries[name]
        if entry.dtype not in FLOATS:
            raise ValueError(f"{entry.file}: the tensor {name} must be in floating point, and is {entry.dtype}")
        if module in modules:
            setattr(modules[module], attribute, checkpoint.read([name], torch.device("cpu"))[name])
