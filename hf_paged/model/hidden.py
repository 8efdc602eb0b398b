"""Hidden states of a forward of ours, for heads that draft from them. The model is left as it was outside of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_paged.model.compile import CALL, calls_replaced


class HiddenStates:
    """What some decoder layers returned for every row of the last packed forward.

    Args:
        layers: the decoder layers, in the order in which their outputs are laid side by side; one may be there twice.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        self._layers = list(dict.fromkeys(layers))
        self._order = [self._layers.index(layer) for layer in layers]
        self._found: list[Tensor] = []
        self._fixed: Tensor | None = None

    def fix(self, num_rows: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Makes a place for forwards of up to so many rows, where graphs that are captured after this leave theirs in
        every replay, as other forwards do."""
        self._fixed = torch.zeros(num_rows, len(self._layers), hidden_size, dtype=dtype, device=device)

    def rows(self, count: int) -> Tensor:
        """`[count, len(layers) * H]`, of the first rows of the last forward; it can be asked for once."""
        if self._fixed is not None and count <= len(self._fixed):
            return self._fixed[:count, self._order].flatten(1)
        found, self._found = self._found, []  # of a step with prefill they are large
        return torch.cat([found[place][:count] for place in self._order], dim=-1)

    @contextmanager
    def captured(self) -> Iterator[None]:
        """Within it the layers' outputs are kept. Goes inside of what else replaces the layers' calls."""
        self._found = [torch.empty(0)] * len(self._layers)
        own = [layer.__dict__.get(CALL) or layer._call_impl for layer in self._layers]
        with calls_replaced(self._layers, [self._keeping(place, call) for place, call in enumerate(own)]):
            yield

    def _keeping(self, place: int, call: Callable[..., Any]) -> Callable[..., Any]:
        def keeping(*args: Any, **kwargs: Any) -> Any:
            output = call(*args, **kwargs)
            if kwargs.get("paged") is not None:  # else it is another thread's forward
                self._keep(place, (output[0] if isinstance(output, tuple) else output)[0])
            return output

        return keeping

    def _keep(self, place: int, rows: Tensor) -> None:
        if self._fixed is not None and len(rows) <= len(self._fixed):
            self._fixed[: len(rows), place].copy_(rows)
        else:
            self._found[place] = rows
