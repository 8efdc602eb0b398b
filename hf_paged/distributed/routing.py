"""Router: which replica computes a request. Plain Python, no torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

UNKNOWN_LENGTH = 256
"""Tokens that a sample is expected to have before any has ended."""
AHEAD = 0.5
"""Samples that a replica is given beside those that it can run at once, as a share of these: enough to go on with until
it gets more. What it is not given can still go elsewhere."""


@dataclass
class _Replica:
    tokens: int = 0
    """To be computed for what it was given, as far as can be told."""
    samples: int = 0
    prefixes: OrderedDict[int, None] = field(default_factory=OrderedDict)
    """Hashes of prompts' beginnings, page by page, that it was given; the last used is last."""


class Router:
    """Says where a request would be done first: where the least is left to do, its own prompt included, of which a
    replica need not compute what it has cached.

    So requests with a common beginning meet on one replica until others have less to do by more than that beginning.

    Args:
        replicas: their number.
        page_size: tokens of the pieces in which prompts are cached.
        num_pages: pieces that one replica can hold.
        max_num_seqs: samples that one replica runs at once.
    """

    def __init__(self, replicas: int, *, page_size: int, num_pages: int, max_num_seqs: int) -> None:
        self._page_size, self._num_pages = page_size, num_pages
        self._most = max_num_seqs + max(int(AHEAD * max_num_seqs), 1)
        self._replicas = {number: _Replica() for number in range(replicas)}
        self._given: dict[str, tuple[int, int, int]] = {}
        """By request: replica, tokens, samples."""
        self._ended_samples = self._ended_tokens = 0

    def choose(self, request_id: str, prompt: list[int], samples: int, max_tokens: int) -> int | None:
        """The replica for a request, which counts as given to it from here to `done`; None while all have enough to do.

        Args:
            prompt: token ids.
            samples: that are drawn of it.
            max_tokens: per sample.
        """
        pages = self._pages(prompt)
        best: tuple[int, int] | None = None
        for number, replica in self._replicas.items():
            if replica.samples < self._most:
                left = replica.tokens + len(prompt) - self._page_size * _known(pages, replica)
                best = min(best or (left, number), (left, number))
        if best is None:
            return None
        number, replica = best[1], self._replicas[best[1]]
        own = len(prompt) - self._page_size * _known(pages, replica) + samples * self._expected(max_tokens)
        replica.tokens += own
        replica.samples += samples
        self._given[request_id] = number, own, samples
        self._remember(replica, pages)
        return number

    def done(self, request_id: str, generated: Iterable[int] = ()) -> None:
        """A request has ended, or is taken back.

        Args:
            generated: its samples' tokens, if these tell how long samples become.
        """
        number, tokens, samples = self._given.pop(request_id)
        if (replica := self._replicas.get(number)) is not None:
            replica.tokens -= tokens
            replica.samples -= samples
        for length in generated:
            self._ended_samples += 1
            self._ended_tokens += length

    def lose(self, number: int) -> None:
        """There is no such replica any more."""
        self._replicas.pop(number, None)

    def forget_prefixes(self) -> None:
        """Nothing is cached any more."""
        for replica in self._replicas.values():
            replica.prefixes.clear()

    def _expected(self, max_tokens: int) -> int:
        mean = self._ended_tokens // self._ended_samples if self._ended_samples else UNKNOWN_LENGTH
        return min(max_tokens, mean)

    def _pages(self, prompt: list[int]) -> list[int]:
        """A hash per full page of the prompt, of everything up to its end."""
        pages: list[int] = []
        for end in range(self._page_size, len(prompt) + 1, self._page_size):
            pages.append(hash((pages[-1] if pages else None, *prompt[end - self._page_size : end])))
        return pages

    def _remember(self, replica: _Replica, pages: list[int]) -> None:
        for page in reversed(pages):  # so that a beginning is forgotten after what follows it
            replica.prefixes[page] = None
            replica.prefixes.move_to_end(page)
        while len(replica.prefixes) > self._num_pages:
            replica.prefixes.popitem(last=False)


def _known(pages: list[int], replica: _Replica) -> int:
    """Full pages at the beginning of a prompt that a replica was given before."""
    for count, page in enumerate(pages):
        if page not in replica.prefixes:
            return count
    return len(pages)
