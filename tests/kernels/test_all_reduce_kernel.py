"""Sums that ranks push to each other, against plain torch: several ranks of one process, one after the other.

Without a GPU they run in Triton's interpreter. A rank's call waits for what others push, so here it has come before.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("triton")

from hf_paged.distributed.collectives import fuse_additions
from hf_paged.kernels.triton.all_reduce import BLOCK_BYTES, COPIES, DTYPES, EMPTY, SharedMemory, memory_bytes, push_sum

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CAPACITY = 3 * BLOCK_BYTES


def make_memory(ranks: int) -> list[SharedMemory]:
    own = [
        torch.full((memory_bytes(ranks, CAPACITY) // 2,), EMPTY, dtype=torch.int16, device=DEVICE).view(torch.uint8)
        for _ in range(ranks)
    ]
    addresses = torch.tensor([one.data_ptr() for one in own], device=DEVICE)
    turns = CAPACITY // BLOCK_BYTES
    return [
        SharedMemory(one, addresses, torch.zeros(turns, dtype=torch.int32, device=DEVICE), rank)
        for rank, one in enumerate(own)
    ]


def place(memory: SharedMemory, sender: int, turn: int, dtype: torch.dtype) -> Tensor:
    """Where a rank finds what another one pushes in the given turn."""
    width = CAPACITY // dtype.itemsize
    return memory.own.view(dtype)[((turn % COPIES) * memory.ranks + sender) * width :][:width]


@settings(max_examples=15, deadline=None)
@given(
    ranks=st.integers(2, 3),
    dtype=st.sampled_from(DTYPES),
    sizes=st.lists(st.integers(1, CAPACITY // 4), min_size=1, max_size=7),
    adds=st.booleans(),
    seed=st.integers(0, 99),
)
def test_sums_are_torchs(ranks: int, dtype: torch.dtype, sizes: list[int], adds: bool, seed: int) -> None:
    """Calls of any sizes, one after another, with the same bits on all ranks, through memory that is used again."""
    generator = torch.Generator().manual_seed(seed)
    memory = make_memory(ranks)
    for size in sizes:
        parts = [torch.randn(size, generator=generator).to(DEVICE, dtype) for _ in range(ranks)]
        for part in parts:
            part[:: 1 + seed % 3] *= -0.0  # the pattern that nobody may send
        addend = torch.randn(size, generator=generator).to(DEVICE, dtype) if adds else None
        expected = sum(part.float() for part in parts) + (0 if addend is None else addend.float())
        turns = [memory[0].turns.clone() for _ in parts]
        found = []
        for rank, part in enumerate(parts):
            for other in range(rank + 1, ranks):  # those before have pushed theirs
                copies = torch.arange(size) // (BLOCK_BYTES // dtype.itemsize)
                for turn in turns[0][copies.unique().to(DEVICE)].unique().tolist():
                    here = (turns[0][copies.to(DEVICE)] == turn).nonzero().flatten()
                    place(memory[rank], other, turn, dtype)[here] = parts[other][here] + 0.0
            found.append(push_sum(part, memory[rank], addend))
        for one in found:
            assert torch.equal(one, found[0])
            # Triton's interpreter cuts what it casts to bfloat16.
            rtol = torch.finfo(dtype).eps if DEVICE.type == "cpu" else 0
            torch.testing.assert_close(
                one, expected.to(dtype), rtol=rtol, atol=1e-6 if adds and dtype.itemsize > 2 else 0
            )
        assert all(one.turns.tolist() == memory[0].turns.tolist() for one in memory)


def test_what_nobody_sends_is_sent_as_zero() -> None:
    memory = make_memory(2)
    place(memory[0], 1, 0, torch.bfloat16)[:4] = torch.tensor([1.0, 2.0, float("nan"), float("inf")])
    x = torch.tensor([-0.0, -0.0, 1.0, -0.0], dtype=torch.bfloat16, device=DEVICE)
    found = push_sum(x, memory[0])
    torch.testing.assert_close(found.cpu().float(), torch.tensor([1, 2, torch.nan, torch.inf]), equal_nan=True)
    assert place(memory[1], 0, 0, torch.int16)[:5].tolist() == [0, 0, 0x3F80, 0, EMPTY]


def test_what_can_be_pushed() -> None:
    memory = make_memory(2)[0]
    assert memory.capacity == CAPACITY
    assert memory.takes(torch.zeros(CAPACITY // 4)) and not memory.takes(torch.zeros(CAPACITY // 4 + 1))
    assert not memory.takes(torch.zeros(0)) and not memory.takes(torch.zeros(2, dtype=torch.float64))


def test_additions_are_fused_into_sums() -> None:
    """The residual stream's; not where the sum itself is used too, or another thing is added."""
    sum_up = torch.ops.hf_paged.all_reduce

    def layer(x: Tensor, residual: Tensor, row: Tensor) -> tuple[Tensor, ...]:
        first = residual + sum_up(x, "g")
        second = sum_up(first * 2, "g") + first
        kept = sum_up(second, "g")
        return second, kept + second, kept, sum_up(x, "g") + row, sum_up(x, "g") + 1.0

    x = torch.zeros(4, 6)
    traced = make_fx(layer, tracing_mode="fake")(x, x, torch.zeros(6))
    fuse_additions(traced.graph)
    traced.graph.lint()
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert called.count(torch.ops.hf_paged.all_reduce_add.default) == 2
    assert called.count(sum_up.default) == 3
