"""PagePool: page ids and their reference counts. Plain integers, no torch.

A *page* is room for `page_size` tokens of keys and values in every layer. The pool only knows ids; the tensors are
`hf_paged.cache.storage.KVStorage`'s.
"""

from __future__ import annotations

import heapq


class OutOfPages(RuntimeError):
    """More pages were asked for than are free."""


class PagePool:
    """Page ids 0..num_pages-1, each free or held by one or more owners.

    A page is handed out with one reference. Siblings that share it (n samples of a prompt, or the prefix tree) add
    one each, and it is free again when the last owner lets go.

    The lowest free id goes out first. It keeps the live part of the pool dense, which the CPU backend reads in one
    stride, and it makes runs repeatable.

    Args:
        num_touched: pages that an earlier pool over the same memory handed out.
    """

    def __init__(self, num_pages: int, num_touched: int = 0) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, got {num_pages}")
        self.num_pages = num_pages
        self._free = list(range(num_pages))  # a sorted list is a heap
        self._refs = [0] * num_pages
        self.num_touched = num_touched
        """Pages from here on were never handed out."""

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free)

    def refs(self, page: int) -> int:
        return self._refs[page]

    def all_refs(self) -> list[int]:
        """A copy of every page's count, in order; safe to take while another thread uses the pool."""
        return self._refs.copy()

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free pages, one reference each.

        Raises:
            OutOfPages: fewer than `count` are free; nothing is taken.
        """
        free = self._free
        if count > len(free):
            raise OutOfPages(f"{count} pages asked for, {len(free)} of {self.num_pages} are free")
        pages = [heapq.heappop(free) for _ in range(count)]
        for page in pages:
            self._refs[page] = 1
        if pages:
            self.num_touched = max(self.num_touched, pages[-1] + 1)
        return pages

    def retain(self, pages: list[int]) -> None:
        """Adds one reference to each page; every page must be held already."""
        refs = self._refs
        for page in pages:
            if refs[page] == 0:
                raise ValueError(f"page {page} is free and cannot be shared")
            refs[page] += 1

    def release(self, pages: list[int]) -> None:
        """Drops one reference from each page; a page without references is free again."""
        refs = self._refs
        for page in pages:
            count = refs[page] - 1
            if count < 0:
                raise ValueError(f"page {page} was released more often than it was taken")
            refs[page] = count
            if count == 0:
                heapq.heappush(self._free, page)
