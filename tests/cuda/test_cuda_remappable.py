"""Memory that is given back and taken again at the same addresses."""

from __future__ import annotations

import gc

import pytest
import torch
from gpu_models import DEVICE, needs_gpu

from hf_paged.cache.remappable import CHUNK_BYTES, RemappableMemory

pytestmark = needs_gpu

MIB = 1 << 20


def free() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def test_a_graph_over_it_outlives_its_memory() -> None:
    memory = RemappableMemory(64 * MIB, torch.device(DEVICE))
    numbers = memory.tensor(MIB, 4096).view(torch.float32).fill_(1.0)
    twice = torch.empty_like(numbers)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.mul(numbers, 2, out=twice)
    for value in (3.0, 5.0):
        memory.unmap()
        assert memory.mapped_bytes == 0
        memory.map()
        numbers.fill_(value)
        graph.replay()
        assert (twice == 2 * value).all()


def test_the_memory_is_really_given_back() -> None:
    before = free()
    size = CHUNK_BYTES + 10 * MIB
    memory = RemappableMemory(size, torch.device(DEVICE))
    part = memory.tensor(CHUNK_BYTES - 8, 16).fill_(7)  # across two pieces
    assert part.tolist() == [7] * 16 and memory.mapped_bytes >= size
    taken = before - free()
    assert 0.95 * size < taken
    memory.unmap()
    memory.unmap()
    assert before - free() < 0.05 * size
    memory.map()
    memory.map()
    assert before - free() == taken
    del memory, part
    gc.collect()
    assert before - free() < 0.05 * size


def test_too_much_is_refused_and_nothing_kept() -> None:
    before = free()
    with pytest.raises(torch.OutOfMemoryError):
        RemappableMemory(1 << 42, torch.device(DEVICE))
    gc.collect()
    assert before - free() < 64 * MIB
