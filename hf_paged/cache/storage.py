"""KVStorage: the tensors behind the page ids."""

from __future__ import annotations

import itertools
import logging
import math
import os
from pathlib import Path

import torch
from torch import Tensor

from hf_paged.attention.backend import LayerSpec, Layout
from hf_paged.cache.remappable import RemappableMemory, RemappingError
from hf_paged.config import EngineConfig

logger = logging.getLogger(__name__)

ALIGNMENT = 256
"""Bytes: where a pool begins."""

CPU_POOL_BYTES = 4 << 30
"""What a CPU pool takes at most when nobody says. Memory of pages that are never written is never touched."""


def page_bytes(layers: list[LayerSpec], page_size: int, dtype: torch.dtype) -> int:
    """Bytes that one page takes in all layers together."""
    per_token = sum(layer.num_kv_heads * (layer.key_dim + layer.value_dim) for layer in layers)
    return per_token * page_size * dtype.itemsize


def choose_num_pages(
    config: EngineConfig,
    page_size: int,
    size: int,
    device: torch.device,
    max_model_len: int,
    max_num_seqs: int,
    reserved_bytes: int = 0,
) -> int:
    """Pages for the pool: what the config says, else what fits in the memory that is free.

    Args:
        size: bytes of a page, as `page_bytes` says; the sum, where several pools have pages of the same numbers.
        max_model_len, max_num_seqs: so long and so many sequences are the most that could be used.
        reserved_bytes: of that, what is to be left for other things.

    Raises:
        ValueError: the memory does not hold a single page.
    """
    if config.num_pages is not None:
        return config.num_pages
    budget = config.kv_cache_memory_bytes
    if budget is None:
        budget = _free_bytes(device, config.gpu_memory_utilization) - reserved_bytes
    useful = max_num_seqs * -(-max_model_len // page_size)
    count = min(budget // size, useful)
    if count < 1:
        raise ValueError(
            f"the KV cache may take {budget:,} bytes and one page of {page_size} tokens takes {size:,}: give it more "
            "(kv_cache_memory_bytes, gpu_memory_utilization) or free memory first"
        )
    logger.info("KV cache: %d pages of %d tokens, %.2f GiB", count, page_size, count * size / 2**30)
    return int(count)


def _free_bytes(device: torch.device, utilization: float) -> int:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        used = total - free - reusable
        return max(0, int(total * utilization) - used)
    return min(_available_host_bytes() // 4, CPU_POOL_BYTES)


def _available_host_bytes() -> int:
    """Memory that programs could take without swapping, page cache included, as far as the system tells."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _remappable(num_bytes: int, device: torch.device) -> RemappableMemory | None:
    try:
        return RemappableMemory(num_bytes, device)
    except RemappingError as error:
        logger.info("the page pool will be made anew after a sleep (%s)", error)
        return None


class KVStorage:
    """One pool of keys and one of values per attending layer.

    Args:
        layers: the layers, in order of their `index`.
        num_pages, page_size: the pool's shape.
        layout: "NHD": pools are `[pages, page, kv_heads, dim]`; "HND": `[pages, kv_heads, page, dim]`.
        remappable: on a GPU, in memory that `release` can give back while the pools keep their addresses. Where the
            driver cannot do that, it is memory like any other.
    """

    def __init__(
        self,
        layers: list[LayerSpec],
        num_pages: int,
        page_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        layout: Layout,
        remappable: bool = False,
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        shapes = [
            (num_pages, page_size, layer.num_kv_heads, dim)
            if layout == "NHD"
            else (num_pages, layer.num_kv_heads, page_size, dim)
            for layer in layers
            for dim in (layer.key_dim, layer.value_dim)
        ]
        sizes = [-(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT for shape in shapes]
        self._memory = _remappable(sum(sizes), device) if remappable and device.type == "cuda" else None
        # Zeroed: a row that is masked out is still multiplied by weight 0, and 0 times garbage may be NaN.
        if self._memory is None:
            pools = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        else:
            begins = itertools.accumulate(sizes, initial=0)
            pools = [
                self._memory.tensor(begin, math.prod(shape) * dtype.itemsize).zero_().view(dtype).view(shape)
                for begin, shape in zip(begins, shapes, strict=False)
            ]
        self.keys: list[Tensor] = pools[::2]
        self.values: list[Tensor] = pools[1::2]

    def release(self) -> bool:
        """Gives the memory back, and forgets what is in it; the pools must not be touched until `restore`.

        Returns:
            whether that could be done.
        """
        if self._memory is None:
            return False
        self._memory.unmap()
        return True

    def restore(self) -> None:
        """Takes the memory again.

        Raises:
            torch.OutOfMemoryError: so much is not free.
        """
        if self._memory is not None:
            self._memory.map()
            for pool in self._as_bytes():
                pool.zero_()

    @property
    def num_bytes(self) -> int:
        return sum(pool.nbytes for pool in (*self.keys, *self.values))

    def copy_pages(self, copies: list[tuple[int, int]]) -> None:
        """Copies whole pages, `(from, to)` each, in every layer."""
        if not copies:
            return
        pairs = torch.tensor(copies, device="cpu").T.contiguous()
        device = self.keys[0].device
        sources, targets = (pairs.pin_memory() if device.type == "cuda" else pairs).to(device, non_blocking=True)
        for pool in self._as_bytes():
            pool.index_copy_(0, targets, pool.index_select(0, sources))

    def zero_pages(self, pages: list[int]) -> None:
        """Wipes pages in every layer."""
        where = torch.tensor(pages, device=self.keys[0].device)
        for pool in self._as_bytes():
            pool.index_fill_(0, where, 0)

    def _as_bytes(self) -> list[Tensor]:
        """The pools; those of FP8, for which torch has hardly an operation, as bytes (0 is 0 there too)."""
        pools = (*self.keys, *self.values)
        return [pool.view(torch.uint8) if pool.dtype.itemsize == 1 else pool for pool in pools]
