"""Quantised layers that read the same tensor are computed as one, and stay layers of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from quantization.test_fp8 import make_layer as make_fp8
from quantization.test_w4 import make_layer as make_w4
from torch import Tensor, nn

from hf_paged.model.fuse import FusedLinears, find_groups
from hf_paged.quantization.fp8 import FP8Linear
from hf_paged.quantization.w4 import W4Linear


class Attention(nn.Module):
    """Three layers of one tensor, and a fourth of another."""

    def __init__(self, make: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = make(48, 0), make(16, 1), make(16, 2), make(128, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(torch.cat([q, k, v, q], -1))


MAKERS: dict[str, Callable[[int, int], nn.Module]] = {
    "w4": lambda outputs, seed: make_w4(128, outputs, 32, seed, bias=True)[0],
    "w4, one group": lambda outputs, seed: make_w4(128, outputs, -1, seed)[0],
    "fp8": lambda outputs, seed: make_fp8(128, outputs, None, seed, bias=True)[0],
    "fp8 in blocks": lambda outputs, seed: make_fp8(128, outputs, (16, 32), seed)[0],
}


@pytest.mark.parametrize("name", MAKERS)
def test_they_are_computed_as_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Attention(MAKERS[name])
    x = torch.randn(5, 128)
    with torch.no_grad():
        expected, state = model(x), copy.deepcopy(model.state_dict())
        groups = find_groups(model, lambda: model(x))
        assert [[member.name for member in group] for group in groups] == [["q", "k", "v"]]
        fused = FusedLinears(groups)
        calls: list[int] = []
        for kind in (W4Linear, FP8Linear):
            forward = kind.forward
            monkeypatch.setattr(
                kind, "forward", lambda self, x, f=forward: calls.append(self.out_features) or f(self, x)
            )
        with fused.installed():
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
            assert calls == [80, 128]
            assert type(model.q).__name__ == "_Slice" and isinstance(model.q, W4Linear | FP8Linear)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert fused.intact()
    buffer = next(model.k.buffers())
    assert buffer.untyped_storage().nbytes() > buffer.nbytes, "a copy of its own"
    fused.release()
    assert not fused.intact()
    buffer = next(model.k.buffers())
    assert buffer.untyped_storage().nbytes() == buffer.nbytes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_another_device_or_dtype_ends_it() -> None:
    model = Attention(MAKERS["w4"])
    fused = FusedLinears(find_groups(model, lambda: model(torch.randn(2, 128))))
    assert fused.intact()
    model.to(torch.bfloat16)
    assert not fused.intact()


def test_what_is_quantised_otherwise_is_left_out() -> None:
    """Another group size, and an order of inputs of its own."""
    model = Attention(MAKERS["w4"])
    model.k = make_w4(128, 16, 64, 1, bias=True)[0]
    model.v = make_w4(128, 16, 32, 2, act_order=True, bias=True)[0]
    assert find_groups(model, lambda: model(torch.randn(2, 128))) == []
