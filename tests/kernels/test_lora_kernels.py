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


def one_by_one(base: Tensor, x: Tensor, a: Tensor, b: Tensor, slots: list[int], sizes: list[int]) -> Tensor:
    """Row by row, and layer by layer."""
    rows = []
    for row, slot in enumerate(slots):
        if slot < len(a):
            downs, ups = a[slot].double().split(b.shape[2]), b[slot].double().split(sizes)
            rows.append(torch.cat([up @ (down @ x[row].double()) for down, up in zip(downs, ups, strict=True)]))
        else:
            rows.append(torch.zeros(sum(sizes), dtype=torch.float64, device=DEVICE))
    return base.double() + torch.stack(rows)


def draw(
    slots: list[int], num_slots: int, inputs: int, sizes: list[int], rank: int, seed: int, dtype: torch.dtype
) -> Any:
    """All that the kernels take but `sizes`, which are the outputs of each layer."""
    outputs, generator = sum(sizes), torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    rows = len(slots)
    wide = randn(rows, outputs + 8)
    a, b = randn(num_slots, len(sizes) * rank, inputs), randn(num_slots, outputs, rank)
    return wide[:, 8:], randn(rows, inputs), a, b, *grouped(slots, num_slots, rows + 5)


@pytest.mark.parametrize("way", [add_lora, add_lora_plainly])
@settings(max_examples=40, deadline=None)
@given(data=st.data(), seed=st.integers(0, 99))
def test_each_row_has_its_own_adapter(way: Any, data: st.DataObject, seed: int) -> None:
    num_slots = data.draw(st.integers(1, 4))
    runs = data.draw(st.lists(st.tuples(st.integers(0, num_slots), st.integers(1, 60)), min_size=1, max_size=5))
    slots = [slot for slot, length in runs for _ in range(length)]
    inputs = data.draw(st.integers(1, 700))
    sizes = data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=4))
    rank = data.draw(st.sampled_from([16, 32, 64, 128]))
    base, x, a, b, order, starts = draw(slots, num_slots, inputs, sizes, rank, seed, torch.float32)
    found = way(base, x, a, b, order, starts, sizes)
    expected = one_by_one(base, x, a, b, slots, sizes)
    assert found.is_contiguous() and found.dtype == base.dtype
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-2)
    plain = torch.tensor([slot == num_slots for slot in slots], device=DEVICE)
    assert torch.equal(found[plain], base[plain]), "rows without an adapter are not touched"


@pytest.mark.parametrize("way", [add_lora, add_lora_plainly])
def test_a_layer_of_several(way: Any) -> None:
    """Its matrices lie between those of others, whether it is computed with them or alone; what it has none of is
    zero."""
    slots, sizes, rank = [1, 0, 2, 1], [128, 130, 5], 16
    base, x, a, b, order, starts = draw(slots, 2, 300, sizes, rank, 0, torch.float32)
    b[0, 128:258] = 0
    together = way(base, x, a, b, order, starts, sizes)
    for place, (down, up, own) in enumerate(
        zip(a.split(rank, 1), b.split(sizes, 1), base.split(sizes, 1), strict=True)
    ):
        found = way(own, x, down, up, order, starts, [sizes[place]])
        torch.testing.assert_close(found, together.split(sizes, 1)[place])
        assert torch.equal(found[1], own[1]) == (place == 1)


@pytest.mark.parametrize("rows", [1, 16, 129, 300])
@pytest.mark.parametrize("rank", [16, 128, 256])
def test_ranks_and_rows_of_all_tiles(rows: int, rank: int) -> None:
    slots = [row % 3 for row in range(rows)]
    sizes = [128, 22]
    base, x, a, b, order, starts = draw(slots, 2, 1100, sizes, rank, rows, torch.float32)
    found = add_lora(base, x, a, b, order, starts, sizes)
    torch.testing.assert_close(found.double(), one_by_one(base, x, a, b, slots, sizes), rtol=1e-4, atol=2e-2)


@pytest.mark.parametrize("inputs", [300, 1100])
def test_half_precision(inputs: int) -> None:
    """With the way down in one part, and in several."""
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter cannot multiply bfloat16
    slots, sizes = [0, 2, 1, 1, 0, 2, 2, 0], [40, 50]
    base, x, a, b, order, starts = draw(slots, 2, inputs, sizes, 16, 0, dtype)
    found = add_lora(base, x, a, b, order, starts, sizes)
    expected = one_by_one(base, x, a, b, slots, sizes)
    assert found.dtype == dtype
    assert float((found.double() - expected).norm() / expected.norm()) < 0.01


@example(count=0)
@given(count=st.integers(0, 6))
@settings(max_examples=7, deadline=None)
def test_padding_is_the_plain_models(count: int) -> None:
    """A graph's step has more rows than were grouped; groups of an earlier, larger step are not there any more."""
    slots = [row % 2 for row in range(count)] + [2] * (9 - count)
    base, x, a, b, _, _ = draw(slots, 2, 40, [30], 16, count, torch.float32)
    order, starts = grouped(slots[:count], 2, 20)
    found = add_lora(base, x, a, b, order, starts, [30])
    torch.testing.assert_close(found.double(), one_by_one(base, x, a, b, slots, [30]), rtol=1e-4, atol=1e-2)
