"""AWQ (arXiv 2306.00978): inputs with large activations get finer steps, by scales that the model does not notice.

The columns of a weight are multiplied by scales `s = activation ** alpha` before it is rounded, and what feeds the
layer is divided by them: a norm's weight, or the outputs of a linear layer. Whether that leaves the model's function as
it was is not concluded from names, but tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_paged.quantization.writers.layer_inputs import LayerCall, SharedInput
from hf_paged.quantization.writers.rounding import round_to_grid

ALPHAS = tuple(step / 20 for step in range(20))
"""0, which is no scales at all, to 0.95."""

LINEAR_FEEDERS = {"o_proj": "v_proj", "out_proj": "v_proj", "down_proj": "up_proj"}
"""What feeds a linear layer of this name linearly, all else being equal: its neighbour of that name."""

TOLERANCE = 1e-3
"""Of a layer's output, relative to its size: float32 with scales in it."""


@dataclass(frozen=True, slots=True)
class Feeder:
    """A module whose outputs can be divided by what a weight's columns are multiplied by."""

    name: str
    rows: Tensor
    """int64 `[K]`: the output that each of the K inputs is (several may be the same: grouped-query attention)."""
    offset: float = 0.0
    """What the module adds to its weight: Gemma's norms multiply by 1 + weight."""


@torch.no_grad()
def scale_inputs(
    layer: nn.Module,
    call: LayerCall,
    hidden: Tensor,
    shared: list[SharedInput],
    group_size: int,
    *,
    symmetric: bool,
    scale_dtype: torch.dtype,
) -> set[str]:
    """Searches for scales and folds them into a decoder layer, in place.

    Args:
        layer: float32; what it computes stays as it is.
        hidden: one sample, `[1, L, H]` on the layer's device, to try that with.
        shared: what was seen of the inputs of its linear layers.
        group_size, symmetric, scale_dtype: as for `round_to_nearest`.

    Returns:
        the linear layers that have scales now. For the others there is nothing that would take them up.
    """
    scaled: set[str] = set()
    before = call(layer, hidden)
    for inputs in shared:
        for feeder in _feeders(layer, inputs):
            scales = _search(layer, inputs, feeder.rows, group_size, symmetric=symmetric, scale_dtype=scale_dtype)
            saved = [(p, p.clone()) for name in (feeder.name, *inputs.linears) for p in _parameters(layer, name)]
            _fold(layer, feeder, inputs.linears, scales)
            after = call(layer, hidden)
            if (after - before).norm() <= TOLERANCE * before.norm():
                scaled.update(inputs.linears)
                break
            for parameter, values in saved:
                parameter.copy_(values)
    return scaled


def _feeders(layer: nn.Module, inputs: SharedInput) -> Iterator[Feeder]:
    """Candidates; not all of them need be right."""
    width = inputs.size.numel()
    every = torch.arange(width, device=inputs.size.device)
    if inputs.norm is not None and layer.get_parameter(f"{inputs.norm}.weight").numel() == width:
        yield Feeder(inputs.norm, every)
        yield Feeder(inputs.norm, every, offset=1.0)
    if len(inputs.linears) > 1:
        return
    path, _, leaf = inputs.linears[0].rpartition(".")
    parent = layer.get_submodule(path)
    source = getattr(parent, LINEAR_FEEDERS.get(leaf, leaf), None)
    if leaf not in LINEAR_FEEDERS or type(source) is not nn.Linear:
        return
    name = f"{path}.{LINEAR_FEEDERS[leaf]}".lstrip(".")
    head_dim = getattr(parent, "head_dim", None)
    if source.out_features == width:
        yield Feeder(name, every)
    elif isinstance(head_dim, int) and source.out_features % head_dim == 0 and width % source.out_features == 0:
        # Grouped queries: a head of values is read by several heads of queries, which follow one another.
        heads = every // head_dim // (width // source.out_features)
        yield Feeder(name, heads * head_dim + every % head_dim)


def _search(
    layer: nn.Module,
    inputs: SharedInput,
    rows: Tensor,
    group_size: int,
    *,
    symmetric: bool,
    scale_dtype: torch.dtype,
) -> Tensor:
    """The scales `[K]` with which rounding changes the outputs of the linear layers least, on the inputs seen."""
    weights = torch.cat([layer.get_parameter(f"{name}.weight") for name in inputs.linears])
    size = weights.shape[1] if group_size == -1 else group_size
    # Inputs that are one output have one scale.
    outputs = int(rows.max()) + 1
    counts = torch.zeros(outputs, device=rows.device).index_add_(0, rows, torch.ones_like(inputs.size))
    activation = torch.zeros_like(counts).index_add_(0, rows, inputs.size).div_(counts)
    activation = activation.div_(activation.mean().clamp_(min=1e-30)).clamp_(min=1e-4)

    best, least = torch.ones_like(inputs.size), float("inf")
    for alpha in ALPHAS:
        scales = activation**alpha
        scales = (scales / (scales.max() * scales.min()).sqrt())[rows]
        rounded = round_to_grid(weights * scales, size, symmetric=symmetric, scale_dtype=scale_dtype)
        difference = rounded.div_(scales).sub_(weights)
        error = float((difference @ inputs.gram).mul_(difference).sum())  # the squared error of all outputs
        if error < least:
            best, least = scales, error
    return best


def _fold(layer: nn.Module, feeder: Feeder, linears: list[str], scales: Tensor) -> None:
    for name in linears:
        layer.get_parameter(f"{name}.weight").mul_(scales)
    for parameter in _parameters(layer, feeder.name):
        per_row = torch.ones(len(parameter), device=scales.device).index_copy_(0, feeder.rows, scales)
        # Only a weight has the offset, and a linear layer's none.
        offset = feeder.offset if parameter is layer.get_parameter(f"{feeder.name}.weight") else 0.0
        divisor = per_row[:, None] if parameter.ndim == 2 else per_row
        parameter.copy_((parameter + offset) / divisor - offset)


def _parameters(layer: nn.Module, name: str) -> list[Tensor]:
    """A module's own: weight and bias."""
    return list(layer.get_submodule(name).parameters(recurse=False))
