"""SequenceTable: which sequences wait and which run, and the slots and pages that they hold."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterable
from operator import attrgetter

from hf_paged.cache.pages import PagePool
from hf_paged.cache.prefix import PrefixTree, edge
from hf_paged.engine.batch import SchedulerStats
from hf_paged.engine.request import Request, Sequence

_order = attrgetter("order")


class SequenceTable:
    """What a `Scheduler` keeps; its arguments are explained there."""

    def __init__(self, num_pages: int, page_size: int, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.stats = SchedulerStats()
        self.running: list[Sequence] = []
        """In order of priority and arrival: the last is the first to be preempted."""
        self._waiting: list[tuple[tuple[int, int, int], Sequence]] = []
        self._num_waiting = 0
        self._arrivals = 0
        self._held_back: Sequence | None = None
        """The first that waits because too many other adapters run."""
        self._overtaken = 0
        """Sequences with adapters that were let in before it though they came later."""
        self._configured = max_num_batched_tokens, max_num_seqs
        self._reset_pages(0)

    def _reset_pages(self, num_touched: int) -> None:
        self.pool = PagePool(self.num_pages, num_touched)
        self.tree = PrefixTree(self.pool, self.page_size)
        self._slots = list(range(self.max_num_seqs - 1, -1, -1))
        self._reserved_slots = 0
        self._page_writes: list[tuple[int, int, int]] = []

    # ---- what is there -------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    @property
    def num_available_pages(self) -> int:
        """Pages free now, or after eviction of cached ones."""
        return self.pool.num_free + self.tree.num_evictable

    @property
    def num_active_pages(self) -> int:
        """Pages that running sequences hold."""
        return self.num_pages - self.num_available_pages

    def has_unfinished(self) -> bool:
        return bool(self.running or self._num_waiting)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    # ---- requests come and go ------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raises ValueError, with the numbers, for a request that could not finish even alone in the whole pool."""
        tokens = request.num_prompt + request.max_tokens - 1  # the last token is never written
        if self.pages_for(tokens) > self.num_pages:
            raise ValueError(
                f"request {request.request_id!r}: {request.num_prompt} prompt tokens and up to {request.max_tokens} "
                f"new ones need {self.pages_for(tokens)} pages of {self.page_size} tokens, and the whole pool has "
                f"{self.num_pages}. Shorten the prompt, lower max_tokens, or give the pool more memory (num_pages or "
                "kv_cache_memory_bytes)."
            )

    def add(self, request: Request) -> None:
        """Queues a request (`check` says whether it can be served)."""
        self._number(request)
        self._enqueue(request.sequences[0])

    def finish(self, sequence: Sequence, reason: str) -> None:
        """Ends a sequence, wherever it is, and lets go of its pages."""
        if sequence.finish_reason is not None:
            return
        if sequence.slot >= 0:
            self._remove_running(sequence)
        elif sequence is sequence.request.sequences[0] or sequence.request.forked:
            self._num_waiting -= 1  # its entry in the queue is skipped later
        sequence.finish_reason = reason
        request = sequence.request
        request.num_unfinished = sum(s.finish_reason is None for s in request.sequences)
        if not self._num_waiting:
            self._waiting.clear()

    def flush_prefix_cache(self) -> int:
        """Forgets all cached pages, and caches nothing that was computed before. Returns the pages forgotten."""
        return self.tree.clear()

    def shrink(self) -> None:
        """Halves what a step may hold; `recover` must follow."""
        self.max_num_batched_tokens = max(1, self.max_num_batched_tokens // 2)
        self.max_num_seqs = min(self.max_num_seqs, self.max_num_batched_tokens)

    def unshrink(self) -> None:
        """Back to what was configured; nothing may be unfinished."""
        if (self.max_num_batched_tokens, self.max_num_seqs) != self._configured:
            self.max_num_batched_tokens, self.max_num_seqs = self._configured
            self.recover(())

    def recover(self, requests: Iterable[Request]) -> None:
        """After a step that failed half way: the pool is made anew, and everything unfinished is queued with its
        tokens.

        Nothing that the step had done to pages, slots or queues matters any more, so no failure can leak anything.

        Args:
            requests: all that were added and are not forgotten by the caller.
        """
        self.running = []
        self._waiting = []
        self._num_waiting = 0
        self._held_back = None
        self._reset_pages(self.pool.num_touched)
        for request in requests:
            request.reserved = 0
            request.num_unfinished = sum(s.finish_reason is None for s in request.sequences)
            for sequence in request.sequences:
                sequence.slot, sequence.num_computed, sequence.pages, sequence.path = -1, 0, [], []
                sequence.may_share_tail, sequence.num_pending = False, 0
            # In a fork that was cut short, samples that have no token yet run on their own from here.
            request.forked = len(request.sequences) == 1 or any(s.num_generated for s in request.sequences)
            self._number(request)
            for sequence in request.sequences if request.forked else request.sequences[:1]:
                if sequence.finish_reason is None:
                    self._enqueue(sequence)

    # ---- pages ---------------------------------------------------------------------------------------------

    def _allocate(self, count: int) -> list[int]:
        if count > self.pool.num_free:
            self.tree.evict(count - self.pool.num_free)
        return self.pool.allocate(count)

    def _append_pages(self, sequence: Sequence, pages: list[int]) -> None:
        start = len(sequence.pages)
        sequence.pages.extend(pages)
        self._page_writes.extend((sequence.slot, start + i, page) for i, page in enumerate(pages))

    def _cache_full_pages(self, sequence: Sequence) -> None:
        """Puts pages that have become full into the prefix tree; a page that a twin cached first is swapped for the
        twin's."""
        if sequence.epoch != self.tree.epoch:
            return
        size, path, pages = self.page_size, sequence.path, sequence.pages
        for i in range(len(path), min(sequence.num_computed, len(sequence.tokens)) // size):
            tokens = edge(sequence.tokens, i, size, sequence.request.adapter_generation)
            node = self.tree.insert(path[-1] if path else None, tokens, pages[i])
            if node.page != pages[i]:
                self.pool.release([pages[i]])
                pages[i] = node.page
                self._page_writes.append((sequence.slot, i, node.page))
            path.append(node)

    def _let_go(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        self.tree.release(sequence.path)
        sequence.pages, sequence.path = [], []

    # ---- queue and slots -----------------------------------------------------------------------------------

    def _number(self, request: Request) -> None:
        """Gives a request its place in the order of arrival, once."""
        if request.sequences[0].order[1] < 0:
            arrival = self._arrivals
            self._arrivals += 1
            for sequence in reversed(request.sequences):  # the first one's says that it is done
                sequence.order = (request.priority, arrival, sequence.index)

    def _enqueue(self, sequence: Sequence) -> None:
        heapq.heappush(self._waiting, (sequence.order, sequence))
        self._num_waiting += 1

    def _remove_running(self, sequence: Sequence) -> None:
        index = bisect.bisect_left(self.running, sequence.order, key=_order)
        assert self.running[index] is sequence
        del self.running[index]
        self._let_go(sequence)
        self._slots.append(sequence.slot)
        sequence.slot = -1
        self._release_reservation(sequence.request)

    def _release_reservation(self, request: Request) -> None:
        self._reserved_slots -= request.reserved
        request.reserved = 0

    def _preempt(self, sequence: Sequence) -> None:
        self._remove_running(sequence)
        sequence.num_computed = 0
        sequence.may_share_tail = False
        sequence.request.metrics.num_preemptions += 1
        self.stats.num_preemptions += 1
        self._enqueue(sequence)
