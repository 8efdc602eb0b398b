"""What happens around a rank's part of a module.

Layers stay what they are (`nn.Linear`, `W4Linear`, `FP8Linear`), only smaller, so that fusing and kernels for few rows
take them as ever; sums and gathers are forward hooks, which a compiler traces.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_paged.distributed.collectives import all_gather, all_reduce


class SumOutput:
    """Forward hook: the output is one of the parts of a sum."""

    def __init__(self, group: str) -> None:
        self.group = group

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return all_reduce(output, self.group)


class GatherOutput:
    """Forward hook: the output is this rank's columns."""

    def __init__(self, widths: list[int], group: str) -> None:
        self.widths, self.group = widths, group

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return all_gather(output, self.widths, self.group)


class SplitInput:
    """Forward pre-hook: of the input, the module takes these columns."""

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start, end

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args[0][..., self.start : self.end], *args[1:]


class OwnExperts:
    """Forward pre-hook of stacked experts: this rank has those from `start` to `end`, and the others' weights are 0.

    Takes `(hidden, ids, weights)`: `[tokens, hidden]`, and `[tokens, k]` of the experts that the router chose. One
    that is elsewhere gets the number after the last one here, which transformers skips.
    """

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start, end

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, ids, weights = args
        absent = (ids < self.start) | (ids >= self.end)
        return hidden, (ids - self.start).masked_fill(absent, self.end - self.start), weights.masked_fill(absent, 0)


class Lookup:
    """The forward of an embedding that holds the rows from `start` to `end` of a larger one.

    Args:
        embedding: may scale its output, or do what it likes with it row by row.
    """

    def __init__(self, embedding: nn.Embedding, start: int, end: int, group: str) -> None:
        self.embedding, self.start, self.end, self.group = embedding, start, end, group

    def __call__(self, input: Tensor) -> Tensor:
        """Token ids of the whole vocabulary `[...]` -> `[..., hidden]`, on every rank."""
        absent = (input < self.start) | (input >= self.end)
        found = type(self.embedding).forward(self.embedding, (input - self.start).masked_fill(absent, 0))
        return all_reduce(found.masked_fill(absent[..., None], 0), self.group)
