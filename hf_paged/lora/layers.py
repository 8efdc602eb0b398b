"""Where adapters meet the model: stand-ins for its linear layers, in place during a forward of ours that has any.

A stand-in calls whatever was in the layer's place, the layer or a stand-in that fuses it with others or knows a faster
product, and adds the adapters' parts to what comes out. So nothing below knows of adapters, quantised layers neither,
and a forward without any is the same program as if there were none.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_paged.lora.adapter import Adapter, TargetShape
from hf_paged.lora.operator import add_adapters
from hf_paged.model.buffers import PackedBuffer
from hf_paged.model.compile import decoder_layers
from hf_paged.model.introspect import dry_forward


class LoraLayers:
    """The linear layers of a model's decoder layers, with room for adapters beside each.

    Left alone are layers that are not given all rows of a step, once (experts of a mixture), and those with a forward
    of their own.

    Args:
        lm: the model.
        attending: its attending modules.
        num_slots: adapters that there is room for.
        rank: the highest of them; rows beyond an adapter's own are zero.
        dtype: of the adapters.
        max_rows: of a step.

    Raises:
        ValueError: the model has adapters of PEFT's in it, or no linear layers.
    """

    def __init__(
        self, lm: nn.Module, attending: list[nn.Module], num_slots: int, rank: int, dtype: torch.dtype, max_rows: int
    ) -> None:
        if any(hasattr(module, "base_layer") for module in lm.modules()):
            raise ValueError(
                "enable_lora=True is for a model without adapters in it, and this one has PEFT's: merge them "
                "(merge_and_unload), or name their folder in a LoRARequest"
            )
        device = next(lm.parameters()).device
        self.num_slots = num_slots
        self.device, self.dtype = device, dtype
        self.rows = PackedBuffer({"order": (torch.int32, max_rows), "starts": (torch.int32, num_slots + 1)}, device)
        """Which rows of a step are whose, as `add_adapters` has it."""
        self._lm = lm
        self._thread = 0
        """Whose forward has adapters; 0 is nobody's."""
        self._stand_ins: dict[str, Any] = {}
        for name, linear in _find(lm, attending).items():
            a = torch.zeros(num_slots, rank, linear.in_features, dtype=dtype, device=device)
            b = torch.zeros(num_slots, linear.out_features, rank, dtype=dtype, device=device)
            self._stand_ins[name] = self._stand_in(linear, a, b)
        if not self._stand_ins:
            raise ValueError("enable_lora=True: the model's decoder layers have no linear layers that could be adapted")

    @property
    def targets(self) -> dict[str, TargetShape]:
        """The layers, by their names in the model."""
        return {name: TargetShape(s.linear.in_features, s.linear.out_features) for name, s in self._stand_ins.items()}

    @torch.inference_mode(False)
    @torch.no_grad()
    def write(self, slot: int, adapter: Adapter) -> None:
        """Enqueues an adapter's way into a slot, in place of what was there."""
        for name, stand_in in self._stand_ins.items():
            a, b = stand_in.a[slot], stand_in.b[slot]
            found = adapter.layers.get(name)
            rank = 0 if found is None else len(found[0])
            a[rank:].zero_()
            b[:, rank:].zero_()
            if found is not None:
                a[:rank].copy_(found[0], non_blocking=True)
                b[:, :rank].copy_(found[1], non_blocking=True)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within it this thread's forwards without grad have the adapters that `rows` say. It goes around
        the forward alone, inside of what else replaces linear layers.

        Raises:
            RuntimeError: a layer was replaced by something that is no linear layer of its size.
        """
        placed: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for path in self._stand_ins:
                parent, _, name = path.rpartition(".")
                siblings = self._lm.get_submodule(parent)._modules
                siblings[name], before = self._around(path, siblings.get(name)), siblings.get(name)
                placed.append((siblings, name, before))
            self._thread = threading.get_ident()
            yield
        finally:
            self._thread = 0
            for siblings, name, before in placed:
                siblings[name] = before

    def runs_here(self) -> bool:
        """Whether the forward under way in this thread is the one that has adapters."""
        return self._thread == threading.get_ident()

    def _around(self, path: str, inner: Any) -> Any:
        """The layer's stand-in, around what is in its place now."""
        stand_in = self._stand_ins[path]
        if stand_in.inner is inner:
            return stand_in
        linear = getattr(inner, "linear", inner)  # inside of a stand-in for it
        if linear is not stand_in.linear:
            old = stand_in.linear
            sizes = old.in_features, old.out_features
            if not _is_plain(linear) or (linear.in_features, linear.out_features) != sizes:
                raise RuntimeError(
                    f"{path} is not the linear layer any more that adapters were made for: wrap the model again"
                )
            stand_in = self._stand_ins[path] = self._stand_in(linear, stand_in.a, stand_in.b)
        object.__setattr__(stand_in, "inner", inner)
        return stand_in

    def _stand_in(self, linear: Any, a: Tensor, b: Tensor) -> Any:
        kind: Any = type(linear)
        return _class(kind)(linear, self, a, b)


class _Adapted(nn.Module):
    """Stands in for a linear layer, whose `__dict__` it shares: to whoever looks at it, hooks included, it is that
    layer."""

    linear: Any
    inner: Any
    owner: LoraLayers
    a: Tensor
    b: Tensor
    order: Tensor
    starts: Tensor

    def __init__(self, linear: Any, owner: LoraLayers, a: Tensor, b: Tensor) -> None:
        own = {"linear": linear, "inner": linear, "owner": owner} | owner.rows.device
        # Parameters, so that the compiler takes their shapes for constants like those of the others.
        own |= {"a": nn.Parameter(a, requires_grad=False), "b": nn.Parameter(b, requires_grad=False)}
        # Past nn.Module's own `__setattr__`, which would make the layer a child of itself.
        object.__setattr__(self, "__dict__", linear.__dict__)
        for name, value in own.items():
            object.__setattr__(self, name, value)

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        out = self.inner.forward(input)  # not its call: hooks are this module's too
        if torch.is_grad_enabled():
            return out
        # Only forwards of ours are compiled; without a compiler any thread may come by.
        if not torch.compiler.is_compiling() and not self.owner.runs_here():
            return out
        return add_adapters(out, input, self.a, self.b, self.order, self.starts)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Copies and pickles are of the layer. From protocol 2 on, pickle insists on an object's own class.
        return self.linear.__reduce_ex__(1)


@functools.cache
def _class(kind: Any) -> Any:
    slots = ("a", "b", "inner", "linear", "order", "owner", "starts")
    return type("_Adapted", (_Adapted, kind), {"__slots__": slots})


def _is_plain(module: Any) -> bool:
    return isinstance(module, nn.Linear) and "forward" not in vars(module)


def _find(lm: nn.Module, attending: list[nn.Module]) -> dict[str, Any]:
    """The linear layers that are given every row of a dry forward, once, by name."""
    names = {id(module): name for name, module in lm.named_modules()}
    calls: dict[str, list[int]] = {}
    found: dict[str, Any] = {}
    handles = []

    def watch(name: str) -> Any:
        def hook(linear: Any, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                calls.setdefault(name, []).append(args[0].numel() // linear.in_features)

        return hook

    for layer in decoder_layers(lm, attending):
        for linear in _linears(layer):
            name = names[id(linear)]
            found[name] = linear
            handles.append(linear.register_forward_pre_hook(watch(name)))
    try:
        with torch.inference_mode(False):
            dry_forward(lm)
    finally:
        for handle in handles:
            handle.remove()
    return {name: linear for name, linear in found.items() if calls.get(name) == [DRY_ROWS]}


DRY_ROWS = 2
"""Tokens of a dry forward."""


def _linears(module: nn.Module) -> Iterator[Any]:
    for child in module._modules.values():
        if child is None or isinstance(child, nn.ModuleList | nn.ModuleDict):
            continue  # of several, a row meets some
        if _is_plain(child):
            yield child
        else:
            yield from _linears(child)
