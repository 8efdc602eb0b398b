"""AWQ's GEMM format.

qweight int32 `[K, N/8]`, qzeros int32 `[K/G, N/8]`, scales `[K/G, N]`; `W = (q - z) * s`. Eight outputs share a word,
in an order of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_paged.quantization.checkpoint import Entry, TensorSpec
from hf_paged.quantization.formats.base import INT32, group_size_of, num_groups, option, require_words
from hf_paged.quantization.w4 import W4Linear, pack_codes, unpack_codes

SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
"""Where in its word the nibble of an output stands."""


class Awq:
    """AWQ in its GEMM packing.

    Args:
        options: `quantization_config`.

    Raises:
        ValueError: another packing, or not four bits.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        option(options, "bits", (4,), 4)
        version = options.get("version") or options.get("format") or options.get("checkpoint_format") or "gemm"
        option({"version": str(version).lower()}, "version", ("gemm",), "gemm")
        self.group_size = group_size_of(options, 128)

    def holds(self, entries: Mapping[str, Entry]) -> bool:
        return not entries.keys().isdisjoint({"qweight", "qzeros", "scales"})

    def specs(self, in_features: int, out_features: int) -> dict[str, TensorSpec]:
        groups = num_groups(in_features, self.group_size)
        require_words(out_features, "outputs")
        return {
            "qweight": TensorSpec(((in_features, out_features // 8),), INT32),
            "qzeros": TensorSpec(((groups, out_features // 8),), INT32),
            "scales": TensorSpec(((groups, out_features),)),
        }

    def read(self, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype) -> W4Linear:
        nibbles, zeros = _unpack(tensors["qweight"]), _unpack(tensors["qzeros"])
        return W4Linear(
            pack_codes(nibbles.T), tensors["scales"].to(dtype), zeros, nibbles.shape[0] // len(zeros), bias=bias
        )

    def write(self, layer: W4Linear) -> dict[str, Tensor]:
        if layer.perm is not None:
            raise ValueError("AWQ's groups are contiguous, and this layer's are scattered (act-order)")
        return {
            "qweight": _pack(unpack_codes(layer.codes, layer.in_features).T),
            "qzeros": _pack(layer.zeros),
            "scales": layer.scales,
        }


def _unpack(words: Tensor) -> Tensor:
    """int32 `[R, N/8]` -> uint8 `[R, N]`."""
    return torch.stack([(words >> shift & 15).to(torch.uint8) for shift in SHIFTS], dim=2).flatten(1)


def _pack(nibbles: Tensor) -> Tensor:
    """Integers `[R, N]` of 0 to 15 -> int32 `[R, N/8]`."""
    words = torch.zeros(nibbles.shape[0], nibbles.shape[1] // 8, dtype=torch.int32, device=nibbles.device)
    for place, shift in enumerate(SHIFTS):
        words |= nibbles[:, place::8].to(torch.int32) << shift
    return words
