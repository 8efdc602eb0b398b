"""The model that is to be quantised: which of its linear layers, and whether it can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_paged.model.compile import decoder_layers
from hf_paged.model.introspect import inspect_model
from hf_paged.quantization.formats.base import Format, QuantizedLinear


@dataclass(frozen=True, slots=True)
class Subject:
    """A transformers model and its decoder layers."""

    model: Any
    layers: dict[str, nn.Module]
    """By name, in order."""
    linears: dict[str, list[str]]
    """The linear layers to be quantised: the names that they have in each decoder layer, by its name."""

    def ignored(self) -> list[str]:
        """The names of all other linear layers."""
        quantized = {f"{path}.{name}" for path, names in self.linears.items() for name in names}
        every = (name for name, module in self.model.named_modules() if isinstance(module, nn.Linear))
        return [name for name in every if name not in quantized]


def make_subject(model: Any, format: Format[Any]) -> Subject:
    """Looks a model over.

    Raises:
        TypeError: it is no transformers model.
        ValueError: it is wrapped or quantised already, or the format has no room for one of its layers.
        UnsupportedModelError: hf_paged cannot run it.
    """
    _check(model)
    names = {id(module): name for name, module in model.named_modules()}
    layers = {names[id(layer)]: layer for layer in decoder_layers(model, inspect_model(model).modules)}
    linears = {path: _linears(path, layer, format) for path, layer in layers.items()}
    if not any(linears.values()):
        raise ValueError(f"the decoder layers of {type(model).__name__} have no linear layers")
    return Subject(model, layers, linears)


def _check(model: Any) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise TypeError(
            f"quantize() takes a path or a transformers model without adapters, got {type(model).__name__}: unwrap it, "
            "or merge its adapters, first"
        )
    if "_hf_paged" in model.__dict__:
        raise ValueError("the model is wrapped, and its engine may use its layers: call hf_paged.unwrap(model) first")
    if getattr(model, "is_quantized", False) or any(isinstance(m, QuantizedLinear) for m in model.modules()):
        raise ValueError("the model is quantised already: start from what it was made of")


def _linears(path: str, layer: nn.Module, format: Format[Any]) -> list[str]:
    for name, parameter in layer.named_parameters():
        if parameter.ndim > 2:
            raise ValueError(
                f"{path}.{name} holds several layers in one parameter, as mixtures of experts do: these are not "
                "quantised here"
            )
    found = [(name, module) for name, module in layer.named_modules() if type(module) is nn.Linear]
    for name, linear in found:
        try:
            format.specs(linear.in_features, linear.out_features)
        except ValueError as error:
            raise ValueError(
                f"{path}.{name} ({linear.in_features} inputs, {linear.out_features} outputs) does not fit: {error}. "
                "Choose another group_size; -1 takes any multiple of 8"
            ) from error
    return [name for name, _ in found]
