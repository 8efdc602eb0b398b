"""Decoder layers quantised one after the other, each with the inputs that the quantised ones before it give."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hf_paged.quantization.formats.base import QuantizedLinear
from hf_paged.quantization.writers.awq import scale_inputs
from hf_paged.quantization.writers.gptq import gptq
from hf_paged.quantization.writers.layer_inputs import LayerCall, record_calls, watch_inputs
from hf_paged.quantization.writers.recipe import Recipe
from hf_paged.quantization.writers.rounding import round_to_fp8, round_to_nearest
from hf_paged.quantization.writers.subject import Subject

logger = logging.getLogger(__name__)


def quantized_tensors(
    subject: Subject, recipe: Recipe, dtype: torch.dtype, samples: Tensor | None, progress: bool | None
) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's tensors by name, as they are made. The model is not changed.

    Args:
        dtype: of what is not quantised.
        samples: token ids `[S, L]` for a recipe that is calibrated.
        progress: a bar of layers; None shows one on a terminal.

    Raises:
        ValueError: the model's layers cannot be run one by one, or their inputs are of no use.
    """
    model = subject.model
    state = model.state_dict()
    calls: list[LayerCall] = []
    hidden: list[Tensor] = []
    if samples is not None:
        hidden, calls = record_calls(model, list(subject.layers.values()), samples)

    def stored(name: str, tensor: Tensor) -> tuple[str, Tensor]:
        # What is of another dtype than the model, transformers keeps so on purpose.
        return name, tensor.to(dtype if state[name].dtype is model.dtype else state[name].dtype)

    tied = {end for end, source in getattr(model, "all_tied_weights_keys", {}).items() if source in state}
    inside = tuple(f"{path}." for path in subject.layers)
    for name, tensor in state.items():
        if name not in tied and not name.startswith(inside):
            yield stored(name, tensor)

    format = recipe.format()
    hide = not (sys.stderr.isatty() if progress is None else progress)
    bar = tqdm(subject.layers.items(), disable=hide, unit="layer", desc="quantize", dynamic_ncols=True)
    for place, (path, own) in enumerate(bar):
        layer = copy.deepcopy(own).eval().requires_grad_(False).float()
        call = calls[place] if calls else None
        quantized = _quantize_layer(path, layer, subject.linears[path], recipe, dtype, call, hidden)
        for name, tensor in layer.state_dict().items():
            if name.removesuffix(".weight") not in quantized:
                yield stored(f"{path}.{name}", tensor)
        for name, linear in quantized.items():
            for part, tensor in format.write(linear).items():
                yield f"{path}.{name}.{part}", tensor
        if call is not None:
            device = next(layer.parameters()).device
            hidden = [call(layer, sample.to(device)).cpu() for sample in hidden]


def _quantize_layer(
    path: str,
    layer: nn.Module,
    linears: list[str],
    recipe: Recipe,
    dtype: torch.dtype,
    call: LayerCall | None,
    hidden: list[Tensor],
) -> dict[str, QuantizedLinear]:
    """Quantises a float32 decoder layer. Its weights become what a reader will find, for the layers that follow."""
    grid: dict[str, Any] = {"symmetric": recipe.symmetric, "scale_dtype": recipe.scale_dtype(dtype)}
    grams: dict[str, Tensor] = {}
    if call is not None:
        shared = watch_inputs(layer, call, hidden)
        if recipe.method == "gptq":
            grams = {name: inputs.gram for inputs in shared for name in inputs.linears}
            served = set(grams)
        else:
            sample = hidden[0].to(next(layer.parameters()).device)
            served = scale_inputs(layer, call, sample, shared, recipe.group_size, **grid)
        if left := [name for name in linears if name not in served]:
            logger.info("%s: only rounded to nearest, not by %s: %s", path, recipe.method, ", ".join(left))
    found: dict[str, QuantizedLinear] = {}
    for name in linears:
        weight = layer.get_parameter(f"{name}.weight")
        if not recipe.four_bits:
            found[name] = round_to_fp8(weight, recipe.block)
        elif name in grams:
            try:
                found[name] = gptq(weight, grams[name], recipe.group_size, act_order=recipe.act_order, **grid)
            except ValueError as error:
                raise ValueError(f"{path}.{name} cannot be quantised: {error}") from error
        else:
            found[name] = round_to_nearest(weight, recipe.group_size, **grid)
        weight.copy_(found[name].dequantize(torch.float32))
    return found
