"""Where adapters meet the model: stand-ins for its linear layers, in place during a forward of ours that has any.

A stand-in calls whatever was in the layer's place, the layer or a stand-in that fuses it with others or knows a faster
product, and adds the adapters' parts to what comes out. So nothing below knows of adapters, quantised layers neither,
and a forward without any is the same program as if there were none.

Layers that are fused are given their parts together: the first adds them to the product of all, and the others take
theirs of that. The matrices lie side by side for it, as the weights do.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_paged.distributed.plan import LinearCut
from hf_paged.lora.adapter import Adapter, TargetShape
from hf_paged.lora.operator import add_adapters
from hf_paged.model.buffers import PackedBuffer
from hf_paged.model.compile import decoder_layers
from hf_paged.model.fuse import Product, Slice, slices
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
        groups: layers that are fused (see `FusedLinears.groups`). Where they are not any more, or not in some forwards,
            each is given its part by itself.
        cuts: layers of which this process has a part, by name. It has that of adapters too: where outputs are cut the
            rows of B, where inputs are cut the columns of A, whose products are then summed with the layer's own.
        in_flight: steps that may be launched before the first of them has ended.

    Raises:
        ValueError: the model has adapters of PEFT's in it, or no linear layers.
    """

    def __init__(
        self,
        lm: nn.Module,
        attending: list[nn.Module],
        num_slots: int,
        rank: int,
        dtype: torch.dtype,
        max_rows: int,
        groups: Sequence[Sequence[nn.Module]] = (),
        cuts: Mapping[str, LinearCut] | None = None,
        in_flight: int = 2,
    ) -> None:
        if any(hasattr(module, "base_layer") for module in lm.modules()):
            raise ValueError(
                "enable_lora=True is for a model without adapters in it, and this one has PEFT's: merge them "
                "(merge_and_unload), or name their folder in a LoRARequest"
            )
        device = next(lm.parameters()).device
        self.num_slots = num_slots
        self.device, self.dtype = device, dtype
        fields = {"order": (torch.int32, max_rows), "starts": (torch.int32, num_slots + 1)}
        self.rows = PackedBuffer(fields, device, in_flight)
        """Which rows of a step are whose, as `add_adapters` has it."""
        # These, A and B are parameters, so that the compiler takes their shapes for constants like those of the others.
        self.order, self.starts = (nn.Parameter(t, requires_grad=False) for t in self.rows.device.values())
        self._lm = lm
        self._cuts = cuts or {}
        self._thread = 0
        """Whose forward has adapters; 0 is nobody's."""
        self._stand_ins: dict[str, Any] = {}
        self._groups: list[_Group] = []
        found = _find(lm, attending)
        for names in _together(found, groups):
            linears = [found[name] for name in names]
            sizes = [linear.out_features for linear in linears]
            a = torch.zeros(num_slots, len(names) * rank, linears[0].in_features, dtype=dtype, device=device)
            b = torch.zeros(num_slots, sum(sizes), rank, dtype=dtype, device=device)
            parts = zip(a.split(rank, 1), b.split(sizes, 1), strict=True)
            for name, linear, (own_a, own_b) in zip(names, linears, parts, strict=True):
                self._stand_ins[name] = _stand_in(linear, _Room(self, own_a, own_b, [linear.out_features]))
            if len(names) > 1:
                self._groups.append(_Group(names, _Room(self, a, b, sizes)))
        if not self._stand_ins:
            raise ValueError("enable_lora=True: the model's decoder layers have no linear layers that could be adapted")

    @property
    def targets(self) -> dict[str, TargetShape]:
        """The layers, whole, by their names in the model."""
        own = {name: (s.linear.in_features, s.linear.out_features) for name, s in self._stand_ins.items()}
        return {
            name: TargetShape(*(self._cuts[name].whole if name in self._cuts else shape)) for name, shape in own.items()
        }

    @torch.inference_mode(False)
    @torch.no_grad()
    def write(self, slot: int, adapter: Adapter) -> None:
        """Enqueues an adapter's way into a slot, in place of what was there."""
        for name, stand_in in self._stand_ins.items():
            a, b = stand_in.room.a[slot], stand_in.room.b[slot]
            found = adapter.layers.get(name)
            rank = 0 if found is None else len(found[0])
            a[rank:].zero_()
            b[:, rank:].zero_()
            if found is not None:
                own_a, own_b = _part(*found, self._cuts.get(name))
                a[:rank].copy_(own_a, non_blocking=True)
                b[:, :rank].copy_(own_b, non_blocking=True)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within it this thread's forwards without grad have the adapters that `rows` say. It goes around
        the forward alone, inside of what else replaces linear layers.

        Raises:
            RuntimeError: a layer was replaced by something that is no linear layer of its size.
        """
        places = {path: self._place(path) for path in self._stand_ins}
        before = {path: siblings.get(name) for path, (siblings, name) in places.items()}
        stand_ins = {path: self._around(path, inner) for path, inner in before.items()}
        for group in self._groups:
            stand_ins |= zip(group.paths, group.around([stand_ins[path] for path in group.paths]), strict=True)
        try:
            for path, (siblings, name) in places.items():
                siblings[name] = stand_ins[path]
            self._thread = threading.get_ident()
            yield
        finally:
            self._thread = 0
            for path, (siblings, name) in places.items():
                siblings[name] = before[path]
            for group in self._groups:
                group.let_go()

    def forget(self) -> None:
        """Lets go of what was in the layers' places in the last step: weights that are fused anew must not be kept."""
        for stand_in in self._stand_ins.values():
            object.__setattr__(stand_in, "inner", stand_in.linear)
        for group in self._groups:
            group.forget()

    def _place(self, path: str) -> tuple[dict[str, Any], str]:
        """Where a layer is found: its parent's `_modules`, and its name there."""
        parent, _, name = path.rpartition(".")
        return self._lm.get_submodule(parent)._modules, name

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
            stand_in = self._stand_ins[path] = _stand_in(linear, stand_in.room)
        object.__setattr__(stand_in, "inner", inner)
        return stand_in


class _Room:
    """Room for adapters beside a layer, or beside the product of several."""

    def __init__(self, owner: LoraLayers, a: Tensor, b: Tensor, sizes: list[int]) -> None:
        self.owner, self.sizes = owner, sizes
        self.a, self.b = nn.Parameter(a, requires_grad=False), nn.Parameter(b, requires_grad=False)
        self.order, self.starts = owner.order, owner.starts

    def add(self, out: Tensor, input: Tensor) -> Tensor:
        """What the layers made of an input, and the adapters' parts, as `add_adapters`."""
        # Only forwards of ours are compiled; without a compiler any thread may come by.
        if not torch.compiler.is_compiling() and not self.owner.runs_here():
            return out
        return add_adapters(out, input, self.a, self.b, self.order, self.starts, self.sizes)


class _Adapted(nn.Module):
    """Stands in for a linear layer, whose `__dict__` it shares: to whoever looks at it, hooks included, it is that
    layer."""

    linear: Any
    inner: Any
    room: _Room

    def __init__(self, linear: Any, room: _Room) -> None:
        # Past nn.Module's own `__setattr__`, which would make the layer a child of itself.
        object.__setattr__(self, "__dict__", linear.__dict__)
        for name, value in (("linear", linear), ("inner", linear), ("room", room)):
            object.__setattr__(self, name, value)

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        out = self.inner.forward(input)  # not its call: hooks are this module's too
        return out if torch.is_grad_enabled() else self.room.add(out, input)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Copies and pickles are of the layer. From protocol 2 on, pickle insists on an object's own class.
        return self.linear.__reduce_ex__(1)


@functools.cache
def _class(kind: Any) -> Any:
    return type("_Adapted", (_Adapted, kind), {"__slots__": ("inner", "linear", "room")})


def _stand_in(linear: Any, room: _Room) -> Any:
    kind: Any = type(linear)
    return _class(kind)(linear, room)


class _AdaptedProduct(Product):
    """A product of several layers, to which the adapters' parts of all of them are added at once."""

    def __init__(self, inner: Product, room: _Room) -> None:
        super().__init__(inner.sizes)
        self.inner, self.room = inner, room

    def multiply(self, input: Tensor) -> Tensor:
        return self.room.add(self.inner.multiply(input), input)


class _Group:
    """Layers that may be fused.

    Args:
        paths: their names in the model, in the order they are called in.
        room: beside their product.
    """

    def __init__(self, paths: list[str], room: _Room) -> None:
        self.paths, self._room = paths, room
        self._product: _AdaptedProduct | None = None
        self._slices: list[Slice] = []

    def around(self, stand_ins: list[Any]) -> list[Any]:
        """Stand-ins for the layers around their product; where they are not fused as they were, those given."""
        parts = [(inner.product, inner.place) for s in stand_ins if isinstance(inner := s.inner, Slice)]
        product = parts[0][0] if parts else None
        if product is None or parts != [(product, place) for place in range(len(product.sizes))]:
            return stand_ins
        if product.sizes != self._room.sizes:
            return stand_ins
        if self._product is None or self._product.inner is not product or stand_ins != [s.alone for s in self._slices]:
            self._product = _AdaptedProduct(product, self._room)
            self._slices = slices(self._product, [s.linear for s in stand_ins], alone=stand_ins)
        return self._slices

    def let_go(self) -> None:
        """Holds no output any more."""
        if self._product is not None:
            self._product.held = None

    def forget(self) -> None:
        """Holds no weights any more."""
        self._product = None
        self._slices = []


def _part(a: Tensor, b: Tensor, cut: LinearCut | None) -> tuple[Tensor, Tensor]:
    """What belongs to a part of a layer, of an adapter for the whole one."""
    if cut is None:
        return a, b
    if cut.inputs is not None:
        return a[:, slice(*cut.inputs)], b
    rows = [b[start:end] for start, end in cut.outputs or ()]
    return a, rows[0] if len(rows) == 1 else torch.cat(rows)


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


def _together(found: dict[str, Any], groups: Sequence[Sequence[nn.Module]]) -> Iterator[list[str]]:
    """The layers' names: those of each group all of whose layers are found, and every other by itself."""
    names = {id(linear): name for name, linear in found.items()}
    fused = [
        [names[id(linear)] for linear in group] for group in groups if all(id(linear) in names for linear in group)
    ]
    yield from fused
    yield from ([name] for name in found if not any(name in group for group in fused))


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
