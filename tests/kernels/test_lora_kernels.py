"""The adapters' kernels, and their way in plain torch, against one product per row.

Without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from hf_paged.kernels.triton.lora import add_lora
from hf_paged.lora.operator import add_lora_plainly

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def grouped(slots: list[int], num_slots: int, most: int) -> tuple[Tensor, Tensor]:
    """Rows by slot as a step uploads them, in a buffer for steps of `most` rows."""
    order = sorted(range(len(slots)), key=lambda row: slots[row]) + list(range(len(slots), most))
    starts = [sum(slot < group for slot in slots) for group in range(num_slots + 1)]
    return (torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in (order, starts))  # type: ignore[return-value]


def one_by_one(base: Tensor, x: Tensor, a: Tensor, b: Tensor, slots: list[int]) -> Tensor:
    rows = []
    for row, slot in enumerate(slots):
        own = base[row].double()
        rows.append(own if slot == len(a) else own + b[slot].double() @ (a[slot].double() @ x[row].double()))
    return torch.stack(rows)


def draw(slots: list[int], num_slots: int, sizes: tuple[int, int, int], seed: int, dtype: torch.dtype) -> Any:
    inputs, outputs, rank = sizes
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    rows = len(slots)
    wide = randn(rows, outputs + 8)
    a, b = randn(num_slots, rank, inputs), randn(num_slots, outputs, rank)
    return wide[:, 8:], randn(rows, inputs), a, b, *grouped(slots, num_slots, rows + 5)


@pytest.mark.parametrize("way", [add_lora, add_lora_plainly])
@settings(max_examples=25, deadline=None)
@given(data=st.data(), seed=st.integers(0, 99))
def test_each_row_has_its_own_adapter(way: Any, data: st.DataObject, seed: int) -> None:
    num_slots = data.draw(st.integers(1, 4))
    runs = data.draw(st.lists(st.tuples(st.integers(0, num_slots), st.integers(1, 40)), min_size=1, max_size=5))
    slots = [slot for slot, length in runs for _ in range(length)]
    sizes = data.draw(st.tuples(st.integers(1, 700), st.integers(1, 200), st.sampled_from([16, 32])))
    base, x, a, b, order, starts = draw(slots, num_slots, sizes, seed, torch.float32)
    found = way(base, x, a, b, order, starts)
    expected = one_by_one(base, x, a, b, slots)
    assert found.is_contiguous() and found.dtype == base.dtype
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-2)
    plain = torch.tensor([slot == num_slots for slot in slots], device=DEVICE)
    assert torch.equal(found[plain], base[plain]), "rows without an adapter are not touched"


@pytest.mark.parametrize("rows", [1, 16, 129, 200])
@pytest.mark.parametrize("rank", [16, 128, 256])
def test_ranks_and_rows_of_all_tiles(rows: int, rank: int) -> None:
    slots = [row % 3 for row in range(rows)]
    base, x, a, b, order, starts = draw(slots, 2, (1100, 150, rank), rows, torch.float32)
    found = add_lora(base, x, a, b, order, starts)
    torch.testing.assert_close(found.double(), one_by_one(base, x, a, b, slots), rtol=1e-4, atol=2e-2)


def test_half_precision() -> None:
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter cannot multiply bfloat16
    slots = [0, 2, 1, 1, 0, 2, 2, 0]
    base, x, a, b, order, starts = draw(slots, 2, (300, 90, 16), 0, dtype)
    found = add_lora(base, x, a, b, order, starts)
    expected = one_by_one(base, x, a, b, slots)
    assert found.dtype == dtype
    assert float((found.double() - expected).norm() / expected.norm()) < 0.01


@example(count=0)
@given(count=st.integers(0, 6))
@settings(max_examples=7, deadline=None)
def test_padding_is_the_plain_models(count: int) -> None:
    """A graph's step has more rows than were grouped; groups of an earlier, larger step are not there any more."""
    slots = [row % 2 for row in range(count)] + [2] * (9 - count)
    base, x, a, b, _, _ = draw(slots, 2, (40, 30, 16), count, torch.float32)
    order, starts = grouped(slots[:count], 2, 20)
    found = add_lora(base, x, a, b, order, starts)
    torch.testing.assert_close(found.double(), one_by_one(base, x, a, b, slots), rtol=1e-4, atol=1e-2)
