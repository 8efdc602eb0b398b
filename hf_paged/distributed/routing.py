"""Router: which replica computes which request, and when it gets it. Plain Python, no torch."""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

UNKNOWN_LENGTH = 256
"""Tokens that a sample is expected to have before any has ended."""
AHEAD = 0.5
"""Samples that a replica is given beside those that it can run at once, as a share of these: enough to go on with until
it gets more."""
ADAPTER_TOKENS = 256
"""What it counts, in tokens left to do, that a replica computes nothing with a request's adapter yet: it would have to
bring one more to its device, and there is room for `max_loras` of them in a step."""

Order = tuple[int, int]
"""Who goes first: priority (lower first), then arrival."""


@dataclass
class _Replica:
    tokens: int = 0
    """To be computed for what it has and what waits for it, as far as can be told."""
    samples: int = 0
    """Of requests that it has."""
    waiting: list[tuple[Order, str]] = field(default_factory=list)
    """A heap of requests that are to go there. Some may have gone elsewhere, or ended."""
    num_waiting: int = 0
    """Those that have not."""
    prefixes: OrderedDict[int, None] = field(default_factory=OrderedDict)
    """Hashes of prompts' beginnings, page by page, that it was meant to compute; the last used is last."""
    adapters: Counter[int] = field(default_factory=Counter)
    """Unfinished requests with an adapter that are to go there or have gone there."""


@dataclass
class _Request:
    order: Order
    pages: list[int]
    """A hash per full page of the prompt, of everything up to its end."""
    num_prompt: int
    samples: int
    max_tokens: int
    adapter: int
    home: int = -1
    tokens: int = 0
    """To be computed for it there."""
    given: bool = False


class Router:
    """A request is to go where it would be done first: where the least is left to do, its own prompt included, of which
    a replica need not compute what it has cached. So requests with a common beginning meet on one replica, until others
    have less to do by more than that beginning; and so do requests with the same adapter, less strongly.

    A replica is given no more than it needs to be busy. One that could run more than it has takes what waits for
    others.

    Args:
        replicas: their number.
        page_size: tokens of the pieces in which prompts are cached.
        num_pages: pieces that one replica can hold.
        max_num_seqs: samples that one replica runs at once.
    """

    def __init__(self, replicas: int, *, page_size: int, num_pages: int, max_num_seqs: int) -> None:
        self._page_size, self._num_pages = page_size, num_pages
        self._max_num_seqs = max_num_seqs
        self._most = max_num_seqs + max(int(AHEAD * max_num_seqs), 1)
        self._replicas = {number: _Replica() for number in range(replicas)}
        self._requests: dict[str, _Request] = {}
        self._ended_samples = self._ended_tokens = 0

    @property
    def num_waiting(self) -> int:
        """Requests that were not given to anybody."""
        return sum(replica.num_waiting for replica in self._replicas.values())

    def add(
        self, request_id: str, order: Order, prompt: list[int], samples: int, max_tokens: int, adapter: int = 0
    ) -> None:
        """Queues a request.

        Args:
            prompt: token ids.
            samples: that are drawn of it.
            max_tokens: per sample.
            adapter: a number for what it is computed with, 0 for the model alone. Prompts of different ones have
                nothing in common.
        """
        request = _Request(order, self._pages(prompt, adapter), len(prompt), samples, max_tokens, adapter)
        self._requests[request_id] = request
        self._queue(request_id, request)

    def take(self) -> tuple[str, int] | None:
        """The next request that a replica has room for, and the replica's number; it counts as given to it. None: all
        have enough to do, or there is none."""
        for room, find in ((self._most, self._next), (self._max_num_seqs, self._steal)):
            for number, replica in self._replicas.items():
                if replica.samples < room and (request_id := find(number)) is not None:
                    request = self._requests[request_id]
                    request.given = True
                    replica.num_waiting -= 1
                    replica.samples += request.samples
                    return request_id, number
        return None

    def done(self, request_id: str, generated: Iterable[int] = ()) -> None:
        """A request has ended, or is taken back.

        Args:
            generated: its samples' tokens, if these tell how long samples become.
        """
        request = self._requests.pop(request_id)
        self._unplan(request)
        if request.given and request.home in self._replicas:
            self._replicas[request.home].samples -= request.samples
        for length in generated:
            self._ended_samples += 1
            self._ended_tokens += length

    def lose(self, number: int) -> None:
        """There is no such replica any more: what waits for it goes elsewhere, if there is any other."""
        self._replicas.pop(number, None)
        for request_id, request in self._requests.items():
            if request.home == number and not request.given and self._replicas:
                self._queue(request_id, request)

    def forget_prefixes(self) -> None:
        """Nothing is cached any more."""
        for replica in self._replicas.values():
            replica.prefixes.clear()

    # ---- details ---------------------------------------------------------------------------------------------------

    def _queue(self, request_id: str, request: _Request) -> None:
        _, number = min((self._until_done(request, replica), n) for n, replica in self._replicas.items())
        self._plan(request, number)
        heapq.heappush(self._replicas[number].waiting, (request.order, request_id))

    def _plan(self, request: _Request, number: int) -> None:
        replica = self._replicas[number]
        request.home = number
        request.tokens = self._missing(request, replica) + request.samples * self._expected(request.max_tokens)
        replica.tokens += request.tokens
        replica.num_waiting += 1
        replica.adapters[request.adapter] += 1
        for page in reversed(request.pages):  # so that a beginning is forgotten after what follows it
            replica.prefixes[page] = None
            replica.prefixes.move_to_end(page)
        while len(replica.prefixes) > self._num_pages:
            replica.prefixes.popitem(last=False)

    def _unplan(self, request: _Request) -> None:
        if (replica := self._replicas.get(request.home)) is not None:
            replica.tokens -= request.tokens
            replica.num_waiting -= not request.given
            replica.adapters[request.adapter] -= 1
            if not replica.adapters[request.adapter]:
                del replica.adapters[request.adapter]

    def _next(self, number: int) -> str | None:
        """Takes the first of those that wait for a replica."""
        replica = self._replicas[number]
        while replica.waiting:
            entry = heapq.heappop(replica.waiting)
            if self._waits(entry, number):
                return entry[1]
        return None

    def _steal(self, number: int) -> str | None:
        """Takes the last of those that wait where most do, which has no room for them."""
        victim = max(self._replicas, key=lambda n: self._replicas[n].num_waiting)
        waiting = [entry for entry in self._replicas[victim].waiting if self._waits(entry, victim)]
        if not waiting:
            return None
        last = max(waiting)
        waiting.remove(last)
        heapq.heapify(waiting)
        self._replicas[victim].waiting = waiting
        self._unplan(self._requests[last[1]])
        self._plan(self._requests[last[1]], number)
        return last[1]

    def _waits(self, entry: tuple[Order, str], number: int) -> bool:
        order, request_id = entry
        request = self._requests.get(request_id)
        return request is not None and (request.order, request.home, request.given) == (order, number, False)

    def _expected(self, max_tokens: int) -> int:
        mean = self._ended_tokens // self._ended_samples if self._ended_samples else UNKNOWN_LENGTH
        return min(max_tokens, mean)

    def _until_done(self, request: _Request, replica: _Replica) -> int:
        """What comes before its own tokens, and with them those of its prompt."""
        foreign = bool(request.adapter) and request.adapter not in replica.adapters
        return replica.tokens + self._missing(request, replica) + ADAPTER_TOKENS * foreign

    def _missing(self, request: _Request, replica: _Replica) -> int:
        """Tokens of the prompt that a replica has not been meant to compute before."""
        known = 0
        for page in request.pages:
            if page not in replica.prefixes:
                break
            known += self._page_size
        return request.num_prompt - known

    def _pages(self, prompt: list[int], adapter: int) -> list[int]:
        pages: list[int] = []
        for end in range(self._page_size, len(prompt) + 1, self._page_size):
            pages.append(hash((pages[-1] if pages else adapter, *prompt[end - self._page_size : end])))
        return pages
