"""PagePool against a naive model: who owns which pages."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from hf_paged.cache.pages import OutOfPages, PagePool


class PagePoolMachine(RuleBasedStateMachine):
    """Owners take, share and return pages; each owner holds one reference on each of its pages."""

    owners = Bundle("owners")

    @initialize(num_pages=st.integers(1, 12))
    def make(self, num_pages: int) -> None:
        self.pool = PagePool(num_pages)
        self.held: dict[int, list[int]] = {}
        self.names = 0

    def own(self, pages: list[int]) -> int:
        self.names += 1
        self.held[self.names] = pages
        return self.names

    def owners_of(self, page: int) -> int:
        return sum(pages.count(page) for pages in self.held.values())

    def free(self) -> list[int]:
        return [page for page in range(self.pool.num_pages) if not self.owners_of(page)]

    @rule(target=owners, count=st.integers(0, 5))
    def allocate(self, count: int) -> object:
        free = self.free()
        if count > len(free):
            with pytest.raises(OutOfPages, match=f"{count} pages asked for, {len(free)} of"):
                self.pool.allocate(count)
            return multiple()
        pages = self.pool.allocate(count)
        assert pages == free[:count], "the lowest ids go out first"
        return self.own(pages)

    @rule(target=owners, owner=owners, size=st.integers(0, 5))
    def share(self, owner: int, size: int) -> object:
        if owner not in self.held:
            return multiple()
        pages = self.held[owner][:size]
        self.pool.retain(pages)
        return self.own(list(pages))

    @rule(owner=consumes(owners))
    def release(self, owner: int) -> None:
        self.pool.release(self.held.pop(owner))

    @rule(page=st.integers(0, 11))
    def misuse(self, page: int) -> None:
        """A page that nobody owns can be neither shared nor returned."""
        if page < self.pool.num_pages and not self.owners_of(page):
            with pytest.raises(ValueError, match="free"):
                self.pool.retain([page])
            with pytest.raises(ValueError, match="more often"):
                self.pool.release([page])

    @invariant()
    def agrees(self) -> None:
        free = self.free()
        assert self.pool.num_free == len(free)
        assert self.pool.num_used == self.pool.num_pages - len(free)
        for page in range(self.pool.num_pages):
            assert self.pool.refs(page) == self.owners_of(page)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for pages in self.held.values():
                self.pool.release(pages)
            assert self.pool.allocate(self.pool.num_pages) == list(range(self.pool.num_pages)), "a page leaked"


TestPagePool = PagePoolMachine.TestCase
TestPagePool.settings = settings(deadline=None, max_examples=150, stateful_step_count=40)


def test_no_pages() -> None:
    with pytest.raises(ValueError, match="num_pages"):
        PagePool(0)
