"""How a kernel is told which rows of a decode step share which tokens."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

ALIGNMENT = 64
"""Shared ranges begin and end at multiples of this many tokens, so that no block of the kernel needs a mask."""
ITEM_FIELDS = 6


class SharedRanges(NamedTuple):
    """Which rows of a decode step share which tokens. An item is a range of tokens that up to `tile_rows` rows share;
    several items may be parts of one long range, or of a chain of ranges, each shared by fewer rows than the one
    before."""

    items: Tensor
    """int32 `[I, 6]`, contiguous: the item's first place in `rows`, how many there are, first token, the token after
    the last (both multiples of ALIGNMENT), its number among the parts of these rows, and a slot (row of the block
    table) whose pages hold these tokens."""
    num_items: Tensor
    """int32 `[1]`: how many of the I there are."""
    rows: Tensor
    """int32 `[R]`: rows of the step, item by item."""
    lengths: Tensor
    """int32 `[B]`: per row, the tokens that its parts cover: [0, length)."""
    num_parts: Tensor
    """int32 `[B]`: per row, how many parts there are."""
    max_parts: int
    """Room for so many parts per row."""
    tile_rows: int
    """The most rows an item has."""
