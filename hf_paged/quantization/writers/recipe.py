"""What is asked of a quantised checkpoint, and what its config says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hf_paged.quantization.formats.awq import Awq
from hf_paged.quantization.formats.base import Format
from hf_paged.quantization.formats.compressed_tensors import compressed_tensors
from hf_paged.quantization.formats.fp8 import Fp8
from hf_paged.quantization.formats.gptq import Gptq

TARGETS = ("awq", "gptq", "w4a16", "fp8", "fp8-block")
METHODS = {
    "awq": ("awq", "rtn"),
    "gptq": ("gptq", "awq", "rtn"),
    "w4a16": ("gptq", "awq", "rtn"),
    "fp8": ("rtn",),
    "fp8-block": ("rtn",),
}
"""How codes may be chosen; the first is the default."""

BLOCK = (128, 128)
"""Of FP8 in blocks, as DeepSeek's."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model's linear layers are quantised, and in which format they are written."""

    to: str
    """One of `TARGETS`."""
    method: str
    """"gptq", "awq" or "rtn" (round-to-nearest)."""
    group_size: int
    """Inputs of an output that share a scale; -1: all. FP8 has no use for it."""
    symmetric: bool
    desc_act: bool

    @property
    def four_bits(self) -> bool:
        return self.to in ("awq", "gptq", "w4a16")

    @property
    def act_order(self) -> str | None:
        """As `gptq` takes it: compressed-tensors has given up scattered groups."""
        return None if not self.desc_act else "group" if self.to == "gptq" else "weight"

    @property
    def block(self) -> tuple[int, int] | None:
        """Of FP8 in blocks."""
        return BLOCK if self.to == "fp8-block" else None

    @property
    def calibrated(self) -> bool:
        """Whether codes are chosen by the activations on some text."""
        return self.method != "rtn"

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In which dtype four-bit scales are stored, by that of the checkpoint's other tensors."""
        return torch.float16 if dtype is torch.float32 else dtype

    def format(self) -> Format[Any]:
        """What writes the layers, and will read them."""
        options = self.quantization_config([])
        made: Mapping[str, Any] = {"awq": Awq, "gptq": Gptq, "fp8-block": Fp8}
        return made.get(self.to, compressed_tensors)(options)

    def quantization_config(self, ignored: list[str]) -> dict[str, Any]:
        """For config.json.

        Args:
            ignored: names of the linear layers that are not quantised.
        """
        if self.to == "awq":
            return {
                "quant_method": "awq",
                "version": "gemm",
                "bits": 4,
                "group_size": self.group_size,
                "zero_point": True,
                "modules_to_not_convert": ignored,
            }
        if self.to == "gptq":
            return {
                "quant_method": "gptq",
                "checkpoint_format": "gptq",
                "bits": 4,
                "group_size": self.group_size,
                "sym": self.symmetric,
                "desc_act": self.desc_act,
                "lm_head": False,
            }
        if self.to == "fp8-block":
            return {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": list(BLOCK),
                "modules_to_not_convert": ignored,
            }
        return self._compressed_config(ignored)

    def _compressed_config(self, ignored: list[str]) -> dict[str, Any]:
        activations = None
        if self.four_bits:
            grouped = self.group_size != -1
            weights = {
                "num_bits": 4,
                "type": "int",
                "symmetric": self.symmetric,
                "strategy": "group" if grouped else "channel",
                "group_size": self.group_size if grouped else None,
                "actorder": self.act_order,
                "dynamic": False,
            }
        else:
            weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
            activations = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
        format = "pack-quantized" if self.four_bits else "float-quantized"
        group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "format": format}
        return {
            "quant_method": "compressed-tensors",
            "format": format,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ignored,
        }


def make_recipe(
    to: str,
    method: str | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    desc_act: bool = False,
) -> Recipe:
    """A recipe, completed by defaults.

    Raises:
        ValueError: a name that is not known, or options that do not go together.
    """
    if to not in TARGETS:
        raise ValueError(f"to must be one of {', '.join(TARGETS)}, got {to!r}")
    method = method or METHODS[to][0]
    if method not in METHODS[to]:
        raise ValueError(f"method must be one of {', '.join(METHODS[to])} for {to}, got {method!r}")
    if to.startswith("fp8"):
        if group_size is not None or symmetric is False:
            raise ValueError(f"{to} has no groups and no zeros: leave out group_size and symmetric")
    elif to == "awq" and symmetric:
        raise ValueError("AWQ's format is asymmetric: leave out symmetric, or write gptq or w4a16 with method='awq'")
    if desc_act and method != "gptq":
        raise ValueError(f"desc_act is an order of the GPTQ update, and the method is {method}: leave it out")
    group_size = 128 if group_size is None else group_size
    if group_size != -1 and (group_size <= 0 or group_size % 8):
        raise ValueError(f"group_size must be a multiple of 8, or -1 for one group, got {group_size}")
    return Recipe(to, method, group_size, to != "awq" if symmetric is None else symmetric, desc_act)
