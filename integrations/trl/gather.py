"""gathered: whole parameters for a rollout, where a training strategy keeps them in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within it, every rank has all of a model's parameters whole; after it, exceptions included, they are in pieces
    again. Does nothing for a model that is not sharded.

    Gathering is a collective operation: all ranks of the group enter together. What runs inside needs no other rank, so
    each may do as many forwards as it likes.

    Args:
        model: as it is trained: a DeepSpeed engine, an FSDP 2 module (`fully_shard`), or anything else.
    """
    with ExitStack() as stack:
        if _is_zero3(model):
            stack.enter_context(_zero3(model))
        elif sharded := _fsdp_modules(model):
            stack.enter_context(_fsdp2(sharded))
        yield


# ---- FSDP 2 ------------------------------------------------------------------------------------------------


def _fsdp_modules(model: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def _fsdp2(modules: list[Any]) -> Iterator[None]:
    """Layers are told to keep their parameters after a forward; else the first forward would shard them again."""
    root = modules[0]
    root._get_fsdp_state()._lazy_init()  # else what runs first is taken for the root: inside a PEFT model, a layer
    before = [(group, group.post_forward_mesh_info) for module in modules for group in _groups(module)]
    try:
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        yield
    except BaseException:
        if hasattr(root, "reset_iter_state"):  # a forward that was broken off leaves FSDP waiting for its end
            root.reset_iter_state()
        raise
    finally:
        for module in modules:
            module.reshard()
        for group, info in before:
            group.post_forward_mesh_info = info


def _groups(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []  # torch < 2.13


# ---- DeepSpeed ZeRO-3 --------------------------------------------------------------------------------------


def _is_zero3(model: nn.Module) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextmanager
def _zero3(model: nn.Module) -> Iterator[None]:
    """DeepSpeed's hooks would release every layer's parameters after its forward: they are off while a rollout runs."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        offload = _offload(model)
        if offload is None:
            yield
            return
        _remove_hooks(offload)
        try:
            yield
        finally:
            _register_hooks(offload)


def _offload(engine: Any) -> Any:
    """DeepSpeed's object that holds the hooks; None before an engine has one."""
    optimizer = getattr(engine, "optimizer", None)
    return getattr(optimizer, "parameter_offload", optimizer)


def _remove_hooks(offload: Any) -> None:
    for parameter in offload.module.parameters():
        parameter.ds_active_sub_modules.clear()
    for hook in (*offload.forward_hooks, *offload.backward_hooks):
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []


def _register_hooks(offload: Any) -> None:
    coordinator = getattr(offload, "param_coordinator", None)
    if coordinator is not None and not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()  # the order of layers it has recorded did not see the rollout
    offload._register_deepspeed_module(offload.module)
