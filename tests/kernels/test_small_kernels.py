"""Linear layers of few rows, the preparation of decode steps and the checksum, against plain torch and numpy.

Without a GPU they run in Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from hf_paged.kernels.triton.checksum import Checksum
from hf_paged.kernels.triton.linear import MOST_ROWS, linear_of_few_rows
from hf_paged.kernels.triton.prepare import prepare_decode, write_block_table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

few = settings(max_examples=25, deadline=None)


@few
@given(
    rows=st.integers(1, MOST_ROWS),
    n=st.integers(1, 70),
    k=st.integers(1, 1200),
    bias=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 99),
)
@example(rows=1, n=33, k=1024, bias=True, strided=False, seed=0)
@example(rows=2, n=17, k=512, bias=True, strided=True, seed=1)
def test_linear_is_torchs(rows: int, n: int, k: int, bias: bool, strided: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, k, rows, generator=generator).transpose(1, 2) if strided else None
    x = torch.randn(1, rows, k, generator=generator) if x is None else x
    weight, shift = torch.randn(n, k, generator=generator), torch.randn(n, generator=generator)
    x, weight, shift = (tensor.to(DEVICE) for tensor in (x, weight, shift))
    out = linear_of_few_rows(x, weight, shift if bias else None)
    expected = F.linear(x.double(), weight.double(), shift.double() if bias else None).float()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_linear_refuses_more_rows() -> None:
    with pytest.raises(ValueError, match="at most"):
        linear_of_few_rows(torch.ones(MOST_ROWS + 1, 8, device=DEVICE), torch.ones(4, 8, device=DEVICE))


def int32(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@few
@given(data=st.data())
def test_a_decode_step_is_prepared_from_the_block_table(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([1, 4, 16]))
    lengths = data.draw(st.lists(st.integers(1, 5 * size), min_size=1, max_size=6))
    count, slots_in_all, width = len(lengths), 8, 6
    seed = data.draw(st.integers(0, 99))
    draw = np.random.default_rng(seed)
    table = draw.integers(0, 1000, (slots_in_all, width), dtype=np.int32)
    slots = draw.permutation(slots_in_all)[:count]
    previous = draw.integers(-1, 500, 10)
    sources = np.array([data.draw(st.sampled_from([-2, -1, 0, 9])) for _ in range(count)])
    known = draw.integers(0, 500, count)
    pages = [-(-length // size) for length in lengths]
    indptr = np.concatenate([[0], np.cumsum(pages)])

    results = {name: torch.full((count,), -7, device=DEVICE) for name in ("input_ids", "positions", "write_rows")}
    indices = torch.full((sum(pages) + 3,), -7, dtype=torch.int32, device=DEVICE)
    prepare_decode(
        int32(known), int32(sources), torch.tensor(previous, device=DEVICE), int32(slots), int32(lengths),
        int32(indptr), torch.from_numpy(table).to(DEVICE), size, page_indices=indices, **results,
    )  # fmt: skip

    for row, (length, slot, source) in enumerate(zip(lengths, slots, sources, strict=True)):
        token = max(0, previous[source]) if source >= 0 else known[row]
        place = table[slot, (length - 1) // size] * size + (length - 1) % size
        assert results["input_ids"][row] == token
        assert results["positions"][row] == length - 1
        assert results["write_rows"][row] == (-1 if source == -2 else place)
        assert indices[indptr[row] : indptr[row + 1]].tolist() == table[slot, : pages[row]].tolist()
    assert (indices[sum(pages) :] == -7).all(), "written beyond the rows' pages"


@pytest.mark.parametrize("count", [0, 1, 5, 300])
def test_the_block_table_takes_as_many_changes_as_there_are(count: int) -> None:
    room = 400
    table = torch.zeros(20, 30, dtype=torch.int32, device=DEVICE)
    places = np.random.default_rng(count).permutation(600)[:room]
    writes = np.stack([places // 30, places % 30, np.arange(1, room + 1)], 1)
    write_block_table(int32(writes).view(-1), int32([count]), table)
    expected = np.zeros((20, 30), dtype=np.int32)
    expected[writes[:count, 0], writes[:count, 1]] = writes[:count, 2]
    assert (table.cpu().numpy() == expected).all()


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE.type != "cuda", reason="reads memory by address, on a device")
@pytest.mark.parametrize("change", ["a word", "two words change places", "two tensors change places"])
def test_the_checksum_tells(change: str) -> None:
    tensors = [torch.randn(50_000, dtype=torch.bfloat16, device=DEVICE), torch.randn(70, 30, device=DEVICE)]
    tensors.append(torch.randn_like(tensors[1]))
    checksum = Checksum(tensors)
    before = checksum.read()
    assert checksum.read() == before
    if change == "a word":
        tensors[0][41_001] += 1
    elif change == "two words change places":
        tensors[1].view(-1)[[7, 1900]] = tensors[1].view(-1)[[1900, 7]]
    else:
        first = tensors[1].clone()
        tensors[1].copy_(tensors[2])
        tensors[2].copy_(first)
    assert checksum.read() != before
