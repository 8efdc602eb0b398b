"""What a checkpoint format says of a layer: its tensors, their shapes, how they become a layer of ours, and how a layer
of ours becomes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from hf_paged.quantization.checkpoint import Entry, TensorSpec
from hf_paged.quantization.linear import QuantizedLinear
from hf_paged.quantization.w4 import W4Linear, pack_codes, pack_nibbles, unpack_codes

Layer = TypeVar("Layer", bound=QuantizedLinear)

INT32 = frozenset({torch.int32})
ONE: tuple[tuple[int, ...], ...] = ((), (1,))
"""Shapes of a single number."""


class Format(Protocol[Layer]):
    """One way to write quantised linear layers, with the options of one checkpoint."""

    def holds(self, entries: Mapping[str, Entry]) -> bool:
        """Whether a layer is quantised: its entries by the last part of their names, "qweight" and the like."""

    def specs(self, in_features: int, out_features: int) -> dict[str, TensorSpec]:
        """The tensors of a quantised layer, its bias aside.

        Raises:
            ValueError: a layer of such a size cannot be.
        """

    def read(self, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype) -> Layer:
        """A layer from tensors that are as `specs` says, on whatever device they are.

        Args:
            dtype: of activations; scales are converted to it where kernels want that.

        Raises:
            ValueError: what they hold is not possible.
        """

    def write(self, layer: Layer) -> dict[str, Tensor]:
        """The inverse of `read`: a layer's tensors by the last part of their names, its bias aside.

        Raises:
            ValueError: the format has no words for such a layer.
        """


def option(options: Mapping[str, Any], name: str, supported: tuple[Any, ...], default: Any) -> Any:
    """An entry of a quantization config.

    Raises:
        ValueError: it has a value that is not supported.
    """
    value = options.get(name, default)
    if value not in supported:
        choices = ", ".join(map(repr, supported))
        raise ValueError(f"the quantization config says {name}={value!r}, and supported are: {choices}")
    return value


def group_size_of(options: Mapping[str, Any], default: int) -> int:
    """The entry `group_size`: positive, or -1 for one group."""
    size = options.get("group_size", default)
    if not isinstance(size, int) or (size != -1 and (size <= 0 or size % 8)):
        raise ValueError(
            f"the quantization config says group_size={size!r}, and supported are multiples of 8 and -1 (one group)"
        )
    return size


def num_groups(in_features: int, group_size: int) -> int:
    """Groups of a column.

    Raises:
        ValueError: they do not come out even.
    """
    size = in_features if group_size == -1 else group_size
    if in_features % 8 or in_features % size:
        raise ValueError(f"its {in_features} inputs must be a multiple of 8 and of the group size {size}")
    return in_features // size


def require_words(features: int, what: str) -> None:
    """Raises ValueError unless a row of so many nibbles fills its words of eight."""
    if features % 8:
        raise ValueError(f"its {features} {what} must be a multiple of 8, which are packed into one word")


def in_input_order(layer: W4Linear) -> tuple[Tensor, Tensor]:
    """The inverse of `in_group_order`.

    Returns:
        (int32 `[K/8, N]`, packed along the inputs in their own order; int32 `[K]`, the group of every input).
    """
    groups = torch.arange(layer.in_features, device=layer.codes.device, dtype=torch.int32) // layer.group_size
    nibbles = unpack_codes(layer.codes, layer.in_features).T
    if layer.perm is None:
        return pack_nibbles(nibbles), groups
    back = layer.perm.argsort()
    return pack_nibbles(nibbles[back]), groups[back]


def in_group_order(nibbles: Tensor, g_idx: Tensor | None, group_size: int) -> tuple[Tensor, Tensor | None]:
    """Orders a weight so that its groups are contiguous.

    Args:
        nibbles: uint8 `[N, K]`, of 0 to 15.
        g_idx: int `[K]`, the group of every input; None where groups are contiguous.
        group_size: G.

    Returns:
        (the canonical codes, the order of inputs or None where it is their own).

    Raises:
        ValueError: a group has more or less than G inputs.
    """
    if g_idx is None:
        return pack_codes(nibbles), None
    groups = g_idx.long()
    expected = torch.arange(len(groups), device=groups.device) // group_size
    perm = groups.argsort(stable=True)
    if not torch.equal(groups[perm], expected):
        raise ValueError(f"g_idx must name each of {len(groups) // group_size} groups {group_size} times")
    if torch.equal(groups, expected):
        return pack_codes(nibbles), None
    return pack_codes(nibbles[:, perm]), perm
