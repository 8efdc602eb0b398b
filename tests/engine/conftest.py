"""A small real model for the tests of the engine, and what it says."""

from __future__ import annotations

from typing import Any

import pytest
from lookahead import PROMPTS, wrap
from models.families import make_model, stock_greedy


@pytest.fixture(scope="module")
def stock() -> Any:
    return make_model("Llama")


@pytest.fixture
def model(stock: Any) -> Any:
    return wrap(stock)


@pytest.fixture(scope="module")
def expected(stock: Any) -> list[list[int]]:
    """What greedy search says to PROMPTS, 24 tokens each."""
    return [stock_greedy(stock, prompt, 24) for prompt in PROMPTS]
