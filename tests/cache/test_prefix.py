"""PrefixTree against a naive model: a dict from prefixes to pages."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from hf_paged.cache.pages import PagePool
from hf_paged.cache.prefix import Node, PrefixTree

SIZE = 2
NUM_PAGES = 14
Prefix = tuple[int, ...]

contents = st.lists(st.integers(0, 1), max_size=5 * SIZE + 1).map(tuple)


@dataclass
class Cached:
    """What the model knows of one cached page."""

    page: int
    users: int = 0
    released: int = 0
    """When its last user let go; counts releases of single nodes."""


@dataclass(eq=False)
class Holder:
    """A sequence: its content, its pages and its path in the tree."""

    tokens: Prefix
    pages: list[int]
    path: list[Node]
    epoch: int

    def prefixes(self) -> list[Prefix]:
        return [self.tokens[: (i + 1) * SIZE] for i in range(len(self.path))]


class PrefixTreeMachine(RuleBasedStateMachine):
    """Sequences find, compute, share and return cached pages while others are evicted."""

    holders = Bundle("holders")

    @initialize()
    def make(self) -> None:
        self.pool = PagePool(NUM_PAGES)
        self.tree = PrefixTree(self.pool, SIZE)
        self.cached: dict[Prefix, Cached] = {}
        self.live: list[Holder] = []
        self.clock = 0

    # ---- the model -------------------------------------------------------------------------------------

    def children(self, prefix: Prefix) -> list[Prefix]:
        return [p for p in self.cached if len(p) == len(prefix) + SIZE and p[: len(prefix)] == prefix]

    def idle_leaves(self) -> list[Prefix]:
        return [p for p, entry in self.cached.items() if not entry.users and not self.children(p)]

    def longest(self, tokens: Prefix, limit: int) -> list[Prefix]:
        found: list[Prefix] = []
        while len(found) < min(limit, len(tokens) // SIZE) and tokens[: (len(found) + 1) * SIZE] in self.cached:
            found.append(tokens[: (len(found) + 1) * SIZE])
        return found

    def nodes(self) -> dict[Prefix, Node]:
        """What is really in the tree."""
        found: dict[Prefix, Node] = {}
        stack: list[tuple[Prefix, Node]] = [((), self.tree._root)]
        while stack:
            prefix, above = stack.pop()
            for tokens, node in above.children.items():
                assert tokens == node.tokens
                assert len(tokens) == SIZE
                assert node.parent is above
                found[prefix + tokens] = node
                stack.append((prefix + tokens, node))
        return found

    def take_evicted(self, freed: int) -> None:
        """Brings the model up to date with evictions, one leaf at a time, and checks their order."""
        gone = self.cached.keys() - self.nodes().keys()
        assert freed == len(gone)
        while gone:
            leaves = self.idle_leaves()
            evicted = [p for p in leaves if p in gone]
            assert evicted, f"evicted, but in use or above what stays: {gone}"
            victim = min(evicted, key=lambda p: self.cached[p].released)
            staying = [p for p in leaves if p not in gone]
            assert all(self.cached[victim].released < self.cached[p].released for p in staying)
            del self.cached[victim]
            gone.discard(victim)

    def allocate(self) -> int | None:
        """A page for a sequence, evicting where that is needed."""
        if not self.pool.num_free:
            freed = self.tree.evict(1)
            assert freed == min(1, len([c for c in self.cached.values() if not c.users]))
            self.take_evicted(freed)
        return self.pool.allocate(1)[0] if self.pool.num_free else None

    def extend(self, holder: Holder, tokens: Prefix) -> None:
        """Computes pages of `tokens` after the holder's own, and caches them."""
        for start in range(0, len(tokens) - SIZE + 1, SIZE):
            page = self.allocate()
            if page is None:
                return
            edge = tokens[start : start + SIZE]
            prefix = holder.tokens + edge
            before = self.pool.refs(page)
            node = self.tree.insert(holder.path[-1] if holder.path else None, edge, page)
            if prefix in self.cached:
                assert node.page == self.cached[prefix].page, "twins become one page"
                assert self.pool.refs(page) == before
                self.pool.release([page])
            else:
                assert node.page == page
                self.cached[prefix] = Cached(page)
            self.cached[prefix].users += 1
            holder.tokens = prefix
            holder.pages.append(node.page)
            holder.path.append(node)

    # ---- what sequences do -----------------------------------------------------------------------------

    @rule(target=holders, tokens=contents, limit=st.integers(0, 6))
    def begin(self, tokens: Prefix, limit: int) -> Holder:
        """A sequence looks itself up, holds what is there and computes the rest."""
        expected = self.longest(tokens, limit)
        path = self.tree.match(list(tokens), limit)
        assert [node.page for node in path] == [self.cached[p].page for p in expected]
        pages = self.tree.use(path)
        assert pages == [node.page for node in path]
        for prefix in expected:
            self.cached[prefix].users += 1
        holder = Holder(tokens[: len(path) * SIZE], pages, path, self.tree.epoch)
        self.live.append(holder)
        self.extend(holder, tokens[len(path) * SIZE :])
        return holder

    @rule(holder=holders, tokens=contents)
    def go_on(self, holder: Holder, tokens: Prefix) -> None:
        if holder in self.live and holder.epoch == self.tree.epoch:
            self.extend(holder, tokens[: 2 * SIZE])

    @rule(target=holders, holder=holders)
    def fork(self, holder: Holder) -> object:
        if holder not in self.live:
            return multiple()
        self.tree.share(holder.path)
        self.pool.retain(holder.pages)
        sibling = Holder(holder.tokens, list(holder.pages), list(holder.path), holder.epoch)
        self.live.append(sibling)
        if holder.epoch == self.tree.epoch:
            for prefix in holder.prefixes():
                self.cached[prefix].users += 1
        return sibling

    @rule(holder=consumes(holders))
    def release(self, holder: Holder) -> None:
        self.live = [other for other in self.live if other is not holder]
        self.pool.release(holder.pages)
        self.tree.release(holder.path)
        if holder.epoch == self.tree.epoch:
            for prefix in reversed(holder.prefixes()):
                self.clock += 1
                self.cached[prefix].users -= 1
                self.cached[prefix].released = self.clock

    @rule(count=st.one_of(st.integers(0, 4), st.just(10**9)))
    def evict(self, count: int) -> None:
        evictable, free = self.tree.num_evictable, self.pool.num_free
        freed = self.tree.evict(count)
        assert freed == min(count, evictable)
        assert self.pool.num_free == free + freed
        self.take_evicted(freed)

    @rule()
    def clear(self) -> None:
        held = {page for holder in self.live for page in holder.pages}
        epoch = self.tree.epoch
        assert self.tree.clear() == len(self.cached)
        self.cached.clear()
        assert self.tree.epoch == epoch + 1
        assert self.pool.num_used == len(held)
        assert all(self.pool.refs(page) for page in held)

    @rule(tokens=contents)
    def look(self, tokens: Prefix) -> None:
        """Looking changes nothing."""
        path = self.tree.match(list(tokens), len(tokens) // SIZE)
        assert [node.page for node in path] == [self.cached[p].page for p in self.longest(tokens, 99)]

    # ---- what must hold --------------------------------------------------------------------------------

    @invariant()
    def agrees(self) -> None:
        nodes = self.nodes()
        assert {p: (n.page, n.users) for p, n in nodes.items()} == {
            p: (c.page, c.users) for p, c in self.cached.items()
        }
        assert self.tree.num_pages == len(self.cached)
        assert self.tree.num_evictable == sum(not c.users for c in self.cached.values())
        refs = Counter(page for holder in self.live for page in holder.pages)
        refs.update(c.page for c in self.cached.values())
        assert [self.pool.refs(page) for page in range(NUM_PAGES)] == [refs[page] for page in range(NUM_PAGES)]
        assert self.pool.num_free == NUM_PAGES - len(refs)

    def teardown(self) -> None:
        if hasattr(self, "tree"):
            for holder in list(self.live):
                self.release(holder)
            assert self.tree.evict(10**9) == len(self.cached)
            assert self.pool.num_free == NUM_PAGES, "a page leaked"


TestPrefixTree = PrefixTreeMachine.TestCase
TestPrefixTree.settings = settings(deadline=None, max_examples=200, stateful_step_count=40)


# ---- single cases --------------------------------------------------------------------------------------


def cache(tree: PrefixTree, *pages: Prefix) -> list[Node]:
    """A sequence that finds or computes these pages; it holds the path it returns."""
    tokens = [token for page in pages for token in page]
    path = tree.match(tokens, len(pages))
    held = tree.use(path)
    for edge in pages[len(path) :]:
        held += tree.pool.allocate(1)
        path.append(tree.insert(path[-1] if path else None, edge, held[-1]))
    tree.pool.release(held)
    return path


def test_a_page_is_cached_once() -> None:
    tree = PrefixTree(PagePool(4), SIZE)
    path = cache(tree, (0, 1))
    with pytest.raises(ValueError, match="already"):
        tree.insert(None, (0, 1), path[0].page)


def test_held_pages_survive_a_clear() -> None:
    tree = PrefixTree(PagePool(4), SIZE)
    [page] = tree.pool.allocate(1)
    path = [tree.insert(None, (0, 1), page)]
    assert tree.clear() == 1
    assert tree.match([0, 1], 1) == []
    assert tree.pool.refs(page) == 1
    tree.release(path)
    assert tree.num_evictable == 0
    tree.pool.release([page])
    assert tree.pool.num_free == 4


def test_least_recently_released_leaf_goes_first() -> None:
    tree = PrefixTree(PagePool(8), SIZE)
    paths = [cache(tree, (i, i)) for i in range(3)]
    for i in (1, 0, 2):
        tree.release(paths[i])
    tree.release(cache(tree, (1, 1)))  # used again: now the most recent
    gone = []
    for _ in range(3):
        tree.evict(1)
        gone += [i for i in range(3) if not tree.match([i, i], 1) and i not in gone]
    assert gone == [0, 2, 1]


def test_recently_used_parent_outlives_older_leaves() -> None:
    """A system prompt that every short question uses must not go because an old long question's end went."""
    tree = PrefixTree(PagePool(8), SIZE)
    tree.release(cache(tree, (0, 0), (1, 1)))
    tree.release(cache(tree, (2, 2)))
    tree.release(cache(tree, (0, 0)))  # the shared beginning, used last of all
    assert tree.evict(2) == 2
    assert tree.match([2, 2], 1) == [], "the older leaf should have gone"
    assert len(tree.match([0, 0], 1)) == 1
