"""Attention as one opaque operator, for layers that are compiled.

A compiler must not look into the attention over pages: plans, kernels of other makers and the pools' writes are none of
its business. So it sees `hf_paged::attend`, an operator over tensors alone. Which layer of which engine calls is told
by the address of the key pool, which no two layers share; an integer would make the compiler treat every layer as
another program.
"""

from __future__ import annotations

from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class BoundLayer(Protocol):
    """One layer of one engine."""

    def run(self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
        """`[T, H, Dk]`, `[T, Hkv, Dk]`, `[T, Hkv, Dv]` -> `[T, H, Dv]`, in the step that is being computed."""


_layers: WeakValueDictionary[int, BoundLayer] = WeakValueDictionary()

_library = torch.library.Library("hf_paged", "DEF")
_library.define(
    "attend(Tensor query, Tensor key, Tensor value, Tensor(a!) key_pool, Tensor(b!) value_pool, Tensor? sinks)"
    " -> Tensor"
)


def bind(key_pool: Tensor, layer: BoundLayer) -> None:
    """Says whose pool this is, for as long as `layer` is alive."""
    _layers[key_pool.data_ptr()] = layer


def _attend(
    query: Tensor, key: Tensor, value: Tensor, key_pool: Tensor, value_pool: Tensor, sinks: Tensor | None
) -> Tensor:
    return _layers[key_pool.data_ptr()].run(query, key, value, sinks)


def _shape_of_attend(
    query: Tensor, key: Tensor, value: Tensor, key_pool: Tensor, value_pool: Tensor, sinks: Tensor | None
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], value.shape[2])


_library.impl("attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("hf_paged::attend", _shape_of_attend, lib=_library)
