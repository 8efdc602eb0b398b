"""GPTQ, versions 1 and 2.

qweight int32 `[K/8, N]`, qzeros int32 `[K/G, N/8]`, scales `[K/G, N]`, g_idx int32 `[K]`; `W = (q - z) * s` with z and
s of the input's group. Version 1 stores z - 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_paged.quantization.checkpoint import Entry, TensorSpec
from hf_paged.quantization.formats.base import (
    INT32,
    group_size_of,
    in_group_order,
    in_input_order,
    num_groups,
    option,
    require_words,
)
from hf_paged.quantization.w4 import W4Linear, pack_nibbles, unpack_nibbles


class Gptq:
    """GPTQ with four bits.

    Args:
        options: `quantization_config`, or what quantize_config.json says.

    Raises:
        ValueError: another number of bits or another packing.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        option(options, "bits", (4,), 4)
        name = "checkpoint_format" if options.get("checkpoint_format") else "format"
        # Without either it is from the time before there was a second version.
        self.version = ("gptq", "gptq_v2").index(option(options, name, ("gptq", "gptq_v2"), "gptq")) + 1
        self.group_size = group_size_of(options, 128)

    def holds(self, entries: Mapping[str, Entry]) -> bool:
        return not entries.keys().isdisjoint({"qweight", "qzeros", "scales", "g_idx"})

    def specs(self, in_features: int, out_features: int) -> dict[str, TensorSpec]:
        groups = num_groups(in_features, self.group_size)
        require_words(out_features, "outputs")
        return {
            "qweight": TensorSpec(((in_features // 8, out_features),), INT32),
            "qzeros": TensorSpec(((groups, out_features // 8),), INT32),
            "scales": TensorSpec(((groups, out_features),)),
            "g_idx": TensorSpec(((in_features,),), INT32 | {torch.int64}, required=False),
        }

    def read(self, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype) -> W4Linear:
        nibbles = unpack_nibbles(tensors["qweight"]).T
        zeros = unpack_nibbles(tensors["qzeros"].T.contiguous()).T.contiguous()
        if self.version == 1:
            zeros = zeros + 1 & 15  # nibble by nibble: a zero of 0 was stored as 15
        group_size = nibbles.shape[1] // len(zeros)
        codes, perm = in_group_order(nibbles, tensors.get("g_idx"), group_size)
        return W4Linear(codes, tensors["scales"].to(dtype), zeros, group_size, perm=perm, bias=bias)

    def write(self, layer: W4Linear) -> dict[str, Tensor]:
        words, groups = in_input_order(layer)
        zeros = layer.zeros - 1 & 15 if self.version == 1 else layer.zeros
        return {
            "qweight": words,
            "qzeros": pack_nibbles(zeros.T).T,
            "scales": layer.scales,
            "g_idx": groups,
        }
