"""What tests of exact mode share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(autouse=True)
def ordered_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter multiplies tiles with a BLAS, which does not compute all rows of a tile in the same way.
    Tensor cores do; so does this, which adds one outer product after the other."""
    if ON_GPU:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(_: Any, a: Any, b: Any, d: Any, *__: Any) -> Any:
        total = d.data.copy()
        left, right = a.data.astype(total.dtype), b.data.astype(total.dtype)
        term = np.empty_like(total)
        for k in range(left.shape[1]):
            total += np.multiply(left[:, k, None], right[None, k, :], out=term)
        return TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def bits(x: torch.Tensor) -> np.ndarray:
    """A tensor's bits: NaN equals itself, and 0 is not -0."""
    return x.detach().contiguous().view(torch.uint8).cpu().numpy()
