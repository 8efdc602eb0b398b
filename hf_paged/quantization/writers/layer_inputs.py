"""Decoder layers run one by one, outside of their model, and what their linear layers get."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_paged.model.introspect import evaluation_mode


@dataclass(frozen=True, slots=True)
class LayerCall:
    """With what a decoder layer is called beside the hidden states: positions, masks. The same for every sample."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Hidden states `[1, L, H]` after the layer, on the device of its weights."""
        output = layer(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


@dataclass(slots=True)
class SharedInput:
    """Linear layers of a decoder layer that get the same tensor, and what was seen of it."""

    linears: list[str]
    norm: str | None
    """The module with a weight per channel whose output that tensor is, if there is one."""
    gram: Tensor
    """float32 `[K, K]`: the sum of `x x^T` over tokens, each scaled to a root mean square of 1."""
    size: Tensor
    """float32 `[K]`: the sum of `|x|` over the same."""


class _Reached(Exception):
    pass


@torch.no_grad()
def record_calls(model: Any, layers: list[nn.Module], samples: Tensor) -> tuple[list[Tensor], list[LayerCall]]:
    """What the first decoder layer gets for every sample, and how each layer is called.

    Args:
        samples: token ids `[S, L]`.

    Returns:
        (hidden states, float32 `[1, L, H]` per sample on the CPU; a call per layer).

    Raises:
        ValueError: the layers are called with something that depends on the tokens, or are not called once each.
    """
    device = next(model.parameters()).device
    hidden: list[Tensor] = []

    def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append((args[0] if args else kwargs["hidden_states"]).float().cpu())
        raise _Reached

    with evaluation_mode(model):
        hook = layers[0].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            for sample in samples:
                try:
                    model(sample[None].to(device), use_cache=False)
                except _Reached:
                    continue
        finally:
            hook.remove()
        calls = _calls(model, layers, samples[:1].to(device))
        others = _calls(model, layers, samples[-1:].to(device))
    if not _equal([(call.args, call.kwargs) for call in calls], [(call.args, call.kwargs) for call in others]):
        raise ValueError(
            f"the layers of {type(model).__name__} get something that depends on the tokens, beside hidden states: "
            'only method="rtn" is for such models'
        )
    return hidden, calls


def _calls(model: Any, layers: list[nn.Module], sample: Tensor) -> list[LayerCall]:
    found: list[LayerCall] = []

    def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(LayerCall(args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}))

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(keep, with_kwargs=True).remove)
        model(sample, use_cache=False)
    if len(found) != len(layers):
        raise ValueError(
            f"the {len(layers)} decoder layers of {type(model).__name__} were called {len(found)} times in a forward: "
            'only method="rtn" is for such models'
        )
    return found


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one is other or one == other


@torch.no_grad()
def watch_inputs(layer: nn.Module, call: LayerCall, hidden: list[Tensor]) -> list[SharedInput]:
    """Runs a decoder layer over all samples, and writes down what its linear layers get.

    Args:
        layer: float32.
        hidden: of every sample, as `record_calls` has them.
    """
    device = next(layer.parameters()).device
    shared = _who_shares(layer, call, hidden[0].to(device))
    with ExitStack() as hooks:
        for each in shared:
            linear = layer.get_submodule(each.linears[0])
            hooks.callback(linear.register_forward_pre_hook(_adding_to(each)).remove)
        for sample in hidden:
            call(layer, sample.to(device))
    return shared


def _adding_to(shared: SharedInput) -> Callable[..., None]:
    def add(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].flatten(0, -2)
        # The first token of a text, where attention rests, may be a thousand times as large as the others. A plain sum
        # is about that one alone; without it, it is left to chance, and everything depends on it.
        rows = rows / rows.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-20)
        shared.gram.addmm_(rows.T, rows)
        shared.size.add_(rows.abs().sum(dim=0))

    return add


def _who_shares(layer: nn.Module, call: LayerCall, hidden: Tensor) -> list[SharedInput]:
    """Finds linear layers with the same input, and norms whose output it is, by the tensors themselves."""
    gets: dict[str, Tensor] = {}
    gives: dict[str, Tensor] = {}  # held until the end: ids of tensors that are gone are given away again

    def keep_input(name: str) -> Callable[..., None]:
        return lambda module, args: gets.update({name: args[0]})

    def keep_output(name: str) -> Callable[..., None]:
        return lambda module, args, output: gives.update({name: output})

    with ExitStack() as hooks:
        for name, module in layer.named_modules():
            if type(module) is nn.Linear:
                hooks.callback(module.register_forward_pre_hook(keep_input(name)).remove)
            elif isinstance(weight := getattr(module, "weight", None), Tensor) and weight.ndim == 1:
                hooks.callback(module.register_forward_hook(keep_output(name)).remove)
        call(layer, hidden)
    found: dict[int, SharedInput] = {}
    for name, tensor in gets.items():
        if id(tensor) not in found:
            norm = next((norm for norm, output in gives.items() if output is tensor), None)
            size = torch.zeros(tensor.shape[-1], device=tensor.device)
            found[id(tensor)] = SharedInput([], norm, torch.diag_embed(size), size)
        found[id(tensor)].linears.append(name)
    return list(found.values())
