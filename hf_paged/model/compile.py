"""Decoder layers compiled one by one: identical layers share one compiled program, so that compiling costs seconds.

The compiled calls stand in only within a forward of ours. Outside it the layers run as their authors wrote them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo
from torch import nn

from hf_paged.distributed.collectives import fuse_additions

_GPU_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {"combo_kernels": True}
"""Small kernels that do not depend on each other (of queries and of keys, say) become one."""

_MANY = 256
"""Programs that the layers of all models in the process may have."""

CALL = "_compiled_call_impl"
"""Where `nn.Module.__call__` looks for a compiled version of the module's call."""


def decoder_layers(lm: nn.Module, attending: list[nn.Module]) -> list[nn.Module]:
    """The elements of the model's list of layers that the attending modules are in, or are, in order."""
    names = {id(module): name for name, module in lm.named_modules()}
    modules = dict(lm.named_modules())
    found: dict[int, nn.Module] = {}
    for module in attending:
        path = names[id(module)].split(".")
        for end in range(len(path), 0, -1):
            layer = modules[".".join(path[:end])]
            if isinstance(modules[".".join(path[: end - 1])], nn.ModuleList):
                found[id(layer)] = layer
                break
    return list(found.values())


class CompiledLayers:
    """The layers' compiled calls. Compiling happens at the first forward, for whatever shapes may come.

    Args:
        layers: modules whose inputs are packed rows `[1, T, hidden]`; T stays symbolic.
        spread: whether they sum across ranks.
    """

    def __init__(self, layers: list[nn.Module], *, spread: bool = False) -> None:
        self._layers = layers
        on_gpu = any(parameter.is_cuda for layer in layers for parameter in layer.parameters())
        options = (_GPU_OPTIONS if on_gpu else {}) | ({"post_grad_custom_pre_pass": _fusing_pass()} if spread else {})
        self._calls = [_only_paged(layer, options) for layer in layers]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within it the layers' calls are the compiled ones."""
        # transformers' layers share one function, whose programs are counted for all models together.
        with calls_replaced(self._layers, self._calls), torch._dynamo.config.patch(recompile_limit=_MANY):
            yield


def _fusing_pass() -> Callable[[torch.fx.Graph], None]:
    from torch._inductor.custom_graph_pass import CustomGraphPass  # seconds, for those alone who compile

    class FuseAdditions(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            fuse_additions(graph)

        def uuid(self) -> str:
            """What the pass does, for the compiler's cache."""
            return "hf_paged.fuse_additions.1"

    return FuseAdditions()


@contextmanager
def calls_replaced(layers: list[nn.Module], calls: list[Callable[..., Any]]) -> Iterator[None]:
    """Within it each layer's call is another one; what had replaced it before is back afterwards."""
    before = [layer.__dict__.get(CALL) for layer in layers]
    try:
        for layer, call in zip(layers, calls, strict=True):
            layer.__dict__[CALL] = call
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                layer.__dict__.pop(CALL, None)
            else:
                layer.__dict__[CALL] = own


def _only_paged(layer: nn.Module, options: dict[str, Any]) -> Callable[..., Any]:
    compiled = torch.compile(layer._call_impl, dynamic=True, options=options)

    def call(*args: Any, **kwargs: Any) -> Any:
        # Another thread may train the model meanwhile: its forward is not ours to compile.
        return (layer._call_impl if kwargs.get("paged") is None else compiled)(*args, **kwargs)

    return call
