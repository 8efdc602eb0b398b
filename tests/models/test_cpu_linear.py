"""Linear layers on a CPU: the same numbers, and few enough kernels that memory settles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hf_paged.model import cpu
from hf_paged.model.cpu import fast_linear, rounded

needs_onednn = pytest.mark.skipif(cpu._operator() is None, reason="this torch has no oneDNN")


def test_sizes_are_few_and_near() -> None:
    sizes = {rounded(rows) for rows in range(1, 4097)}
    assert len(sizes) <= 32 + 8 * 7
    for rows in range(1, 4097):
        assert rows <= rounded(rows) <= rows * 9 / 8 + 1
    assert all(rounded(size) == size for size in sizes)


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
def test_any_number_of_rows(dtype: torch.dtype, biased: bool) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(40, 24).to(dtype), torch.randn(40).to(dtype) if biased else None
    for shape in [(1, 24), (33, 24), (1, 37, 24), (2, 51, 24), (64, 24), (24,)]:
        x = torch.randn(shape).to(dtype)
        with fast_linear(torch.device("cpu")):
            out = F.linear(x, weight, bias)
        expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert out.shape == expected.shape and out.dtype is dtype and out.is_contiguous()
        assert torch.allclose(out.double(), expected, atol=1e-4 if dtype is torch.float32 else 0.3)


@needs_onednn
def test_a_server_meets_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    operator, seen = cpu._operator(), set()

    def watched(x: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.add(x.shape[0])
        return operator(x, *args)

    monkeypatch.setattr(cpu, "_operator", lambda: watched)
    weight = torch.randn(8, 8)
    with fast_linear(torch.device("cpu")):
        for rows in range(1, 1025):
            assert F.linear(torch.ones(rows, 8), weight).shape == (rows, 8)
    assert len(seen) <= 32 + 8 * 5
