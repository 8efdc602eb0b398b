"""gathered() with DeepSpeed's ZeRO-3, which takes GPUs: here its documented interface is played by a fake."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hf_paged.integrations.trl.gather import gathered


class Hook:
    def __init__(self) -> None:
        self.removed = False

    def remove(self) -> None:
        self.removed = True


class Offload:
    """As DeepSpeedZeRoOffload: what holds the hooks of a model."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.param_coordinator = SimpleNamespace(
            is_invalid_trace=lambda: self.invalid, _invalidate_trace=lambda: setattr(self, "invalid", True)
        )
        self.invalid = False
        self._register_deepspeed_module(module)

    def _register_deepspeed_module(self, module: nn.Module) -> None:
        self.forward_hooks, self.backward_hooks = [Hook(), Hook()], [Hook()]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A fake `deepspeed`, and what happened to it."""
    log: list[Any] = []

    @contextmanager
    def gather(parameters: list[nn.Parameter]) -> Iterator[None]:
        log.append(("gathered", len(parameters)))
        try:
            yield
        finally:
            log.append("released")

    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=SimpleNamespace(GatheredParameters=gather)))
    return log


def make_engine(wrapped: bool = True) -> tuple[nn.Module, Offload]:
    """As DeepSpeedEngine, and its hooks' holder. `wrapped`: behind an optimizer, as when training."""
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    for number, parameter in enumerate(module.parameters()):
        parameter.ds_id, parameter.ds_active_sub_modules = number, {1, 2}  # type: ignore[attr-defined]
    engine, offload = nn.Sequential(module), Offload(module)
    engine.optimizer = SimpleNamespace(parameter_offload=offload) if wrapped else offload  # type: ignore[assignment]
    return engine, offload


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_zero3(log: list[Any], wrapped: bool, error: type[BaseException] | None) -> None:
    engine, offload = make_engine(wrapped)
    hooks = offload.forward_hooks + offload.backward_hooks
    try:
        with gathered(engine):
            assert log == [("gathered", 4)]
            assert all(hook.removed for hook in hooks) and not offload.forward_hooks + offload.backward_hooks
            assert not any(parameter.ds_active_sub_modules for parameter in engine.parameters())
            if error is not None:
                raise error
    except KeyboardInterrupt:
        assert error is KeyboardInterrupt
    assert log == [("gathered", 4), "released"]
    assert len(offload.forward_hooks) == 2 and not any(hook.removed for hook in offload.forward_hooks)
    assert offload.invalid, "the recorded order of layers is forgotten"


def test_zero3_before_there_are_hooks(log: list[Any]) -> None:
    engine, _ = make_engine()
    del engine.optimizer
    with gathered(engine):
        assert log == [("gathered", 4)]
    assert log[-1] == "released"


def test_a_whole_model_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    model = nn.Linear(2, 2)
    weight = model.weight
    with gathered(model):
        assert model.weight is weight
    assert torch.equal(model.weight, weight)
