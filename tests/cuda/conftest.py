"""Tests that need a GPU leave it as they found it, for the next module."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def clean_gpu() -> Iterator[None]:
    yield
    if torch.cuda.is_available():
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
