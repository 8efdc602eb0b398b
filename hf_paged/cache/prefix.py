"""PrefixTree: full pages found again by their content. Plain integers, no torch.

A radix tree whose edges are whole pages of tokens (the idea of SGLang's RadixAttention, arXiv 2312.07104, at page
granularity as in vLLM): the path from the root spells a prompt's prefix, and each node names the page that holds the
keys and values of its last `page_size` tokens.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from hf_paged.cache.pages import PagePool


def edge(tokens: list[int], place: int, page_size: int, adapter: int = 0) -> tuple[int, ...]:
    """What leads to a sequence's page number `place` from the page before it: its tokens. An adapter's number comes
    before those of its first page, so that adapters, and the model alone (0), never share a page."""
    tokens_of_page = tuple(tokens[place * page_size : (place + 1) * page_size])
    return (adapter, *tokens_of_page) if adapter and not place else tokens_of_page


@dataclass(eq=False, slots=True)
class Node:
    """One cached page: its tokens (the edge from the parent), its page id, and how many sequences use it now."""

    tokens: tuple[int, ...]
    page: int
    parent: Node | None
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    users: int = 0
    released: int = 0
    """When its last user let go, in releases of the tree."""

    def __lt__(self, other: Node) -> bool:
        return self.released < other.released


class PrefixTree:
    """Cached pages in a tree, least recently used evicted first.

    The tree holds one reference of its own on every page in it. A node is *in use* while a sequence holds it
    (`match`/`insert` count users up, `release` counts them down). A sequence that uses a node uses all its ancestors,
    so unused nodes form whole subtrees and every one of them can be evicted, leaves first.
    """

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self.pool = pool
        self.page_size = page_size
        self._root = Node(tokens=(), page=-1, parent=None)
        self._idle_leaves: list[tuple[int, Node]] = []
        """A heap of (released, node). Entries of nodes that are used again, have children or are gone are skipped."""
        self._releases = 0
        self._num_nodes = 0
        self._num_idle = 0
        self.holds = bytearray(pool.num_pages)
        """Per page, 1 where it is in the tree."""
        self.epoch = 0
        """Goes up with every `clear`: a sequence that began before must not cache what it computed then."""

    @property
    def num_pages(self) -> int:
        """Pages in the tree."""
        return self._num_nodes

    @property
    def num_evictable(self) -> int:
        """Pages that no sequence uses and that eviction could free."""
        return self._num_idle

    def match(self, tokens: list[int], limit: int, adapter: int = 0) -> list[Node]:
        """The longest prefix of `tokens` that is cached for an adapter (see `edge`), at most `limit` pages, as nodes
        from the root down.

        Read-only: call `use` to hold what was found.
        """
        node, path = self._root, []
        for place in range(limit):
            child = node.children.get(edge(tokens, place, self.page_size, adapter))
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def use(self, path: list[Node]) -> list[int]:
        """Holds every node of a path for one sequence and returns the pages, each with a new reference."""
        for node in path:
            if node.users == 0:
                self._num_idle -= 1
            node.users += 1
        pages = [node.page for node in path]
        self.pool.retain(pages)
        return pages

    def insert(self, parent: Node | None, tokens: tuple[int, ...], page: int) -> Node:
        """Caches a full page below `parent` (None: the root) for the sequence that computed it, and holds the node.

        When the same content is cached already, the existing node is held instead, and the caller should swap its own
        page for `node.page` (on which it is given a reference): twins that were computed at the same time become one.
        The caller holds `parent`, and took it after the last `clear` (see `epoch`).
        """
        above = parent or self._root
        node = above.children.get(tokens)
        if node is not None:
            if node.page != page:
                self.use([node])
                return node
            raise ValueError(f"page {page} is in the tree already")
        self.pool.retain([page])
        node = Node(tokens=tokens, page=page, parent=above, users=1)
        above.children[tokens] = node
        self._num_nodes += 1
        self.holds[page] = 1
        return node

    def release(self, path: list[Node]) -> None:
        """Lets go of a path that a sequence held (its page references are the pool's business).

        Deepest first, so that the end of a prefix is evicted before its beginning.
        """
        for node in reversed(path):
            node.users -= 1
            if node.users == 0 and node.parent is not None:  # a flushed node has no parent any more
                self._releases += 1
                node.released = self._releases
                self._num_idle += 1
                self._offer(node)

    def _offer(self, node: Node) -> None:
        if node.users == 0 and not node.children and node.parent is not None:
            heapq.heappush(self._idle_leaves, (node.released, node))
            if len(self._idle_leaves) > 2 * self._num_nodes + 64:
                self._idle_leaves = [entry for entry in self._idle_leaves if self._is_idle_leaf(*entry)]
                heapq.heapify(self._idle_leaves)

    @staticmethod
    def _is_idle_leaf(released: int, node: Node) -> bool:
        return node.parent is not None and not node.users and not node.children and node.released == released

    def share(self, path: list[Node]) -> None:
        """One more sequence uses the path (a fork); its page references are the pool's business."""
        for node in path:
            node.users += 1

    def evict(self, count: int) -> int:
        """Frees up to `count` pages, least recently used leaves first. Returns how many."""
        freed = 0
        while freed < count and self._idle_leaves:
            released, node = heapq.heappop(self._idle_leaves)
            if not self._is_idle_leaf(released, node):
                continue
            parent = node.parent
            assert parent is not None
            del parent.children[node.tokens]
            node.parent = None
            self._num_nodes -= 1
            self._num_idle -= 1
            self.holds[node.page] = 0
            self.pool.release([node.page])
            freed += 1
            self._offer(parent)  # a leaf now, as old as its own last use
        return freed

    def clear(self) -> int:
        """Forgets everything. Pages that sequences hold stay theirs, under no name. Returns the pages let go."""
        nodes = []
        stack = list(self._root.children.values())
        while stack:
            node = stack.pop()
            nodes.append(node)
            stack.extend(node.children.values())
        for node in nodes:
            node.parent = None
            node.children = {}
            self.holds[node.page] = 0
        self.pool.release([node.page for node in nodes])
        self._root.children = {}
        self._idle_leaves.clear()
        self._num_nodes = self._num_idle = 0
        self.epoch += 1
        return len(nodes)
