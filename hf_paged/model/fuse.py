"""Linear layers that read the same input, computed as one matrix product over the model's own parameters.

Queries, keys and values, or gate and up, are projections of one tensor. In a decode step each is a small product that
leaves most of a GPU idle; the product of their joined weights does not. Which layers read the same tensor is seen in a
dry forward, so no architecture is named here.

Layers of hf_paged's own over quantised weights are joined as well, where they are quantised alike: what can be joined,
and how, they know themselves (see `Joinable`).

No weight exists twice. A group gets one piece of memory `[sum(out), in]`, and the parameters, the same objects as
before, become rows of it: what an optimizer writes through them is what the next product reads. Modules, gradients,
`state_dict` and training forwards stay as they were; only within `installed()` do stand-ins take the layers' places.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hf_paged.model.linear import multiply

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@runtime_checkable
class Joinable(Protocol):
    """A linear layer that is no `nn.Linear`, and can be computed together with others."""

    out_features: int

    def kind(self) -> tuple[Any, ...] | None:
        """What layers must have in common to be joined; None for one that cannot be."""

    def join(self, others: list[Any]) -> tuple[nn.Module, list[dict[str, Tensor]]]:
        """One layer with the outputs of this one and of the others; and for each of them, this one first, its buffers
        as parts of that layer's."""


@dataclass(frozen=True, slots=True)
class Member:
    """A linear layer, and where its parent finds it."""

    siblings: dict[str, nn.Module | None]
    """The parent's `_modules`."""
    name: str
    linear: Any
    """An `nn.Linear` or a `Joinable`."""
    scope: int
    """`id()` of the module list entry that it is part of (of the innermost list); 0 outside of lists."""


Group = list[Member]
"""Linear layers that read the same tensor, in the order they are called in."""


def find_groups(lm: nn.Module, run: Callable[[], object]) -> list[Group]:
    """Watches one forward and groups the linear layers that are given the very same tensor.

    A group stays within one entry of a module list: one layer of the model, one expert. Left alone are linear layers
    that are called more than once or not at all, that are one of several in a module dict (PEFT's adapters: the next
    forward may use others), that have hooks or a forward of their own, and those whose memory other tensors refer to:
    tied weights, flat buffers, a state dict or an autograd graph that somebody holds.

    Args:
        lm: the model, its layers not compiled yet.
        run: does one forward through it.
    """
    # A layer that is found in two places counts twice too.
    uses = Counter(id(parameter) for _, parameter in lm.named_parameters(remove_duplicate=False))
    plain = [member for member in _members(lm, 0) if _is_plain(member.linear, uses)]
    return [group for group in _watch(plain, run) if len(group) > 1]


class FusedLinears:
    """Groups of linear layers whose weights lie side by side, and the stand-ins that make use of it.

    Making one moves the weights, and takes the memory of one group on top; no other thread may use the model then, nor
    during `release()`. Otherwise any thread may run any forward at any time: only a member that is given the very
    tensor that its group's first member was given, without grad and within `installed()`, does other than it always
    did.
    """

    def __init__(self, groups: list[Group]) -> None:
        self._products: list[_Joined] = []
        self._slices: list[tuple[Member, nn.Module]] = []
        for group in groups:
            linears = [member.linear for member in group]
            product = _JoinedLayer(linears) if isinstance(linears[0], Joinable) else _JoinedWeights(linears)
            self._products.append(product)
            self._slices += zip(group, slices(product, linears, linears), strict=True)
        self._released = False
        _return_freed_memory()

    @property
    def groups(self) -> list[list[nn.Module]]:
        """The layers of each group, in the order they are called in."""
        return [product.linears for product in self._products]

    def installed(self) -> _Installed:
        """A context: within it, forwards without grad compute one product per group. Needs `intact()`."""
        return _Installed(self._slices, self._products)

    def intact(self) -> bool:
        """Whether every module is in its place and every parameter where it was put.

        Moving the model, `load_state_dict(assign=True)`, another module or parameter in the place of one, and
        `parameter.data = ...` end that: then `release()`, and group anew.
        """
        for member, stand_in in self._slices:
            now = member.siblings.get(member.name)
            if now is not member.linear and now is not stand_in:
                return False
        return not self._released and all(product.intact() for product in self._products)

    def release(self) -> None:
        """Gives every parameter that still lies in a group's memory some of its own, and forgets the groups."""
        self._released = True
        self._slices.clear()
        while self._products:  # one by one, so that a group's memory is free before the next group is copied
            self._products.pop().release()
        _return_freed_memory()


class Product:
    """What layers with one input are computed as, and the last such product while they take their parts of it.

    Args:
        sizes: outputs of each layer.
    """

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes
        self.held: tuple[Tensor, tuple[Tensor, ...]] | None = None
        """An input and the parts of its product. One attribute, so that another thread finds both or neither."""

    def multiply(self, input: Tensor) -> Tensor:
        """`[..., in]` -> `[..., sum(sizes)]`, without grad."""
        raise NotImplementedError


class _Joined(Product):
    """Of one group's joined weights."""

    def __init__(self, linears: list[Any]) -> None:
        super().__init__([linear.out_features for linear in linears])
        self.linears = linears
        self.homes: list[tuple[dict[str, Any], str, int]] = []
        """Where each parameter or buffer is found, and its address."""

    def intact(self) -> bool:
        try:
            for tensors, name, address in self.homes:
                if tensors[name].data_ptr() != address:
                    return False
        except (AttributeError, KeyError, RuntimeError):  # there is none now, or it has no memory
            return False
        return True

    @torch.inference_mode(False)
    @torch.no_grad()
    def release(self) -> None:
        for tensors, name, address in self.homes:
            tensor = tensors.get(name)
            if tensor is not None and type(tensor.data) is Tensor and tensor.data_ptr() == address:
                tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)


class _JoinedLayer(_Joined):
    """Of layers that join themselves."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, linears: list[Any]) -> None:
        super().__init__(linears)
        self.layer, parts = linears[0].join(linears[1:])
        for linear, buffers in zip(linears, parts, strict=True):
            for name, tensor in buffers.items():
                linear._buffers[name] = tensor
                self.homes.append((linear._buffers, name, tensor.data_ptr()))

    def multiply(self, input: Tensor) -> Tensor:
        return self.layer(input)


class _JoinedWeights(_Joined):
    """Of ordinary linear layers."""

    def __init__(self, linears: list[nn.Linear]) -> None:
        super().__init__(linears)
        self.weight = self._join(linears, "weight")
        self.bias = None if linears[0].bias is None else self._join(linears, "bias")

    def multiply(self, input: Tensor) -> Tensor:
        return multiply(input, self.weight, self.bias)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _join(self, linears: list[nn.Linear], name: str) -> nn.Parameter:
        parameters = [getattr(linear, name) for linear in linears]
        joined = torch.cat([parameter.data for parameter in parameters])
        for linear, parameter, rows in zip(linears, parameters, joined.split(self.sizes), strict=True):
            # The same memory under a storage object for these rows alone, which keeps all of it alive. Tensors of one
            # storage are duplicates to what saves weights: safetensors refuses them, accelerate drops all but one.
            parameter.data = torch.from_dlpack(rows)
            self.homes.append((linear._parameters, name, rows.data_ptr()))
        # A parameter, so that the compiler takes its shape and address for constants like those of the others.
        return nn.Parameter(joined, requires_grad=False)


class Slice(nn.Module):
    """Stands in for a linear layer whose group is computed as one product.

    It shares the layer's `__dict__` and so is that layer, parameters, hooks and mode included, to whoever looks at it;
    only what it computes, and how, is its own.
    """

    linear: Any
    product: Product
    place: int
    """The layer's, in its group."""
    alone: Any
    """What computes the layer without the others: by a forward with grad, or of another input than theirs."""

    def __init__(self, linear: Any, product: Product, place: int, alone: Any) -> None:
        # Past nn.Module's own `__setattr__`, which would make the layer a child of itself.
        object.__setattr__(self, "__dict__", linear.__dict__)
        for name, value in (("linear", linear), ("product", product), ("place", place), ("alone", alone)):
            object.__setattr__(self, name, value)

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`, not contiguous: columns of the group's product."""
        product, place = self.product, self.place
        if torch.is_grad_enabled():
            return self.alone.forward(input)  # not its call: hooks are this module's too
        if place == 0:
            parts = product.multiply(input).split(product.sizes, -1)
            product.held = input, parts
            return parts[0]
        held = product.held
        if held is None or held[0] is not input:
            return self.alone.forward(input)
        if place == len(product.sizes) - 1:
            product.held = None
        return held[1][place]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Copies and pickles are of the layer. From protocol 2 on, pickle insists on an object's own class.
        return self.linear.__reduce_ex__(1)


@functools.cache
def _slice_class(kind: Any) -> Any:
    return type("_Slice", (Slice, kind), {"__slots__": ("alone", "linear", "place", "product")})


def slices(product: Product, linears: list[Any], alone: list[Any]) -> list[Slice]:
    """Stand-ins for the linear layers of a product.

    Args:
        alone: what computes each of them without the others, by its `forward`.
    """
    found = []
    for place, (linear, by_itself) in enumerate(zip(linears, alone, strict=True)):
        kind: Any = type(linear)
        found.append(_slice_class(kind)(linear, product, place, by_itself))
    return found


class _Installed:
    """Within it the stand-ins are in the layers' places; after it, exceptions included, the layers are."""

    __slots__ = ("_products", "_slices")

    def __init__(self, slices: list[tuple[Member, nn.Module]], products: list[_Joined]) -> None:
        self._slices, self._products = slices, products

    def __enter__(self) -> None:
        for member, stand_in in self._slices:
            if member.siblings.get(member.name) is member.linear:
                member.siblings[member.name] = stand_in

    def __exit__(self, *_: object) -> None:
        for member, stand_in in self._slices:
            if member.siblings.get(member.name) is stand_in:
                member.siblings[member.name] = member.linear
        for product in self._products:
            product.held = None


def _members(module: nn.Module, scope: int) -> Iterator[Member]:
    for name, child in module._modules.items():
        if child is None:
            continue
        inner = id(child) if isinstance(module, nn.ModuleList) else scope
        if type(child) is not nn.Linear and not isinstance(child, Joinable):
            yield from _members(child, inner)
        elif not isinstance(module, nn.ModuleDict):
            yield Member(module._modules, name, child, inner)


def _is_plain(linear: Any, uses: Counter[int]) -> bool:
    """Whether a layer computes `F.linear` of parameters that are ordinary tensors and no other layer's."""
    own = vars(linear)
    if any(own[hooks] for hooks in HOOKS) or "forward" in own or own.get("_compiled_call_impl") is not None:
        return False
    if isinstance(linear, Joinable):
        return linear.kind() is not None
    shape = linear.out_features, linear.in_features
    return (
        linear._parameters.keys() == {"weight", "bias"}
        and getattr(linear.weight, "shape", None) == shape
        and all(
            type(parameter) is nn.Parameter
            and type(parameter.data) is Tensor
            and parameter.layout is torch.strided
            and parameter.device.type != "meta"
            and not parameter.is_inference()
            and not (parameter.device.type == "cpu" and parameter.is_shared())  # with other processes
            and uses[id(parameter)] == 1
            and _references(parameter) == _ALONE
            for parameter in linear._parameters.values()
            if parameter is not None
        )
    )


def _watch(members: list[Member], run: Callable[[], object]) -> list[Group]:
    """The members by the tensor they were given in a forward, those left out that were called more than once."""
    calls: Counter[int] = Counter()
    read: dict[tuple[Any, ...], tuple[Tensor, Group]] = {}  # the inputs are kept, so that their ids stay theirs
    thread = threading.get_ident()

    def watch(member: Member) -> Any:
        def hook(linear: Any, args: tuple[Any, ...]) -> None:
            if threading.get_ident() != thread:
                return
            calls[id(linear)] += 1
            x = args[0] if args else None
            if type(x) is Tensor and not x.is_inference():
                # The version tells apart what was written to in place between two calls.
                key = id(x), x._version, member.scope, _kind(linear), linear.bias is None
                read.setdefault(key, (x, []))[1].append(member)

        return member.linear.register_forward_pre_hook(hook)

    handles = [watch(member) for member in members]
    try:
        with torch.inference_mode(False), torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return [[member for member in group if calls[id(member.linear)] == 1] for _, group in read.values()]


def _kind(linear: Any) -> Any:
    return linear.kind() if isinstance(linear, Joinable) else (linear.weight.dtype, linear.weight.device)


def _references(tensor: Tensor) -> int:
    """To a tensor's storage: one by every tensor that lies in it, and ours while we ask."""
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata)


_ALONE = _references(torch.empty(1, device="cpu"))
"""What a tensor has that shares its storage with none."""


def _return_freed_memory() -> None:
    """Gives the memory of the old weights back, which torch would keep for tensors of their sizes."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
