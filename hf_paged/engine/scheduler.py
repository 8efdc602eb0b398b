"""Scheduler: which tokens of which sequences the next step computes, and in which pages. Plain integers, no torch.

Continuous batching (Orca, OSDI 2022) with chunked prefill (Sarathi-Serve, arXiv 2403.02310): every step carries one
token of each running sequence whose prompt is done, and fills the rest of its token budget with pieces of prompts.
Pages (PagedAttention, arXiv 2309.06180) are taken for what the step will write and nothing more; when they run out, the
youngest running sequence goes back to the queue with its tokens kept, and is computed again later.
"""

from __future__ import annotations

import bisect
import heapq
import time
from collections.abc import Mapping
from operator import attrgetter

from hf_paged.cache.prefix import Node, edge
from hf_paged.engine.batch import Batch, Chunk, DraftRow
from hf_paged.engine.request import Sequence
from hf_paged.engine.sequence_table import SequenceTable

_order, _num_computed = attrgetter("order"), attrgetter("num_computed")


class Scheduler(SequenceTable):
    """Decides; never computes.

    `schedule` -> `Batch`, then the caller launches it, then `advance` says that it is on its way. When its tokens are
    known the caller hands them to `append`, and calls `finish` for sequences that are done; between the two it may
    schedule one step more, whose sequences continue from tokens that nobody knows yet. If anything fails, `recover`.

    Args:
        num_pages, page_size: the pool.
        max_num_seqs: sequences that may run at once.
        max_num_batched_tokens: the token budget of a step, at least `max_num_seqs`.
        enable_prefix_caching: keep full pages in a prefix tree.
        max_prompt_logits: tokens of prompts whose logits may be wanted in one step; None is any number.
        micro_batches: steps over which decodes are spread. With more than one, a sequence goes on only from tokens that
            are known, so that others may be computed meanwhile.
        max_adapters: different adapters that running sequences may have.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool = True,
        max_prompt_logits: int | None = None,
        micro_batches: int = 1,
        max_adapters: int = 1,
    ) -> None:
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({max_num_batched_tokens}) must be at least max_num_seqs ({max_num_seqs}), "
                "so that every running sequence can advance in every step"
            )
        super().__init__(num_pages, page_size, max_num_seqs, max_num_batched_tokens)
        self.enable_prefix_caching = enable_prefix_caching
        self.max_prompt_logits = max_prompt_logits or max_num_batched_tokens
        self.micro_batches = micro_batches
        self.max_adapters = max_adapters
        self._prefilled = False

    @property
    def growing(self) -> bool:
        """Whether the last step computed prompts, and more is waiting."""
        return self._prefilled and self._num_waiting > 0

    # ---- one step ------------------------------------------------------------------------------------------

    def schedule(self, drafts: Mapping[Sequence, list[int]] | None = None) -> Batch:
        """The next step. An empty batch means that nothing is left to do before another step has landed.

        Args:
            drafts: tokens to verify, of decoding sequences; cut short where max_tokens, the budget or the pages end.
        """
        batch = Batch()
        budget = self.max_num_batched_tokens - len(self.running)  # one token of each is paid for in advance
        self._room_for_logits = self.max_prompt_logits
        preempted = False
        for_drafts = self._budget_for_drafts(budget) if drafts else 0
        decodes, page_size, running = batch.decodes, self.page_size, self.running
        most_decodes = -(-len(running) // self.micro_batches)
        i = 0
        while i < len(running):
            sequence = running[i]
            start, total = sequence.num_computed, len(sequence.tokens)
            enough = len(decodes) == most_decodes and total - start == 1
            if self.micro_batches > 1 and (sequence.num_pending or enough):
                i += 1  # it is in another step, or will be
                continue
            if sequence.num_pending:
                total += sequence.num_pending
                if total - sequence.num_prompt >= sequence.request.max_tokens:
                    i += 1  # the pending token is its last
                    continue
            length = total - start
            if length != 1 or sequence.request.scored is not None:
                length = self._take_logits(sequence, start, min(length, budget + 1))
                if not length:
                    i += 1  # all of it is on its way, or the step has logits enough
                    continue
                budget -= length - 1
            draft = drafts.get(sequence) if drafts else None
            if draft and length == 1 and (draft := self._fitting(draft, sequence, min(for_drafts, budget))):
                batch.drafts[sequence] = draft
                budget -= len(draft)
                for_drafts -= len(draft)
                length += len(draft)
            end = start + length
            if end > len(sequence.pages) * page_size or sequence.may_share_tail:
                if not self._make_room(sequence, end, batch):
                    preempted = True
                    if sequence.slot < 0:
                        batch.drafts.pop(sequence, None)
                        break  # it was the last, and had to go itself
            decodes_alone = length == 1 and end == total and sequence.request.forked
            if draft or (decodes_alone and sequence.request.scored is None):
                decodes.append(sequence)
            else:
                batch.chunks.append(self._chunk(sequence, start, length))
            i += 1
        # Longest first: a device that hands out the rows in order is then done with all of them at about the same time.
        decodes.sort(key=_num_computed, reverse=True)
        if batch.drafts:
            batch.drafts = {sequence: batch.drafts[sequence] for sequence in decodes if sequence in batch.drafts}
            batch.decodes = [row for sequence in decodes for row in _with_draft(sequence, batch.drafts.get(sequence))]
        if not preempted:
            self._admit(budget, batch)
        self._prefilled = bool(batch.chunks)
        if batch:
            batch.page_writes, self._page_writes = self._page_writes, []
        self.stats.peak_pages = max(self.stats.peak_pages, self.num_active_pages)
        return batch

    def advance(self, batch: Batch) -> None:
        """The batch is on its way: sequences move on, pages full of known tokens are cached (whoever finds them is
        computed later), samples of a finished prompt fork."""
        for row in batch.decodes:
            sequence = row.origin
            sequence.num_computed += 1
            sequence.num_pending += 1
        for chunk in batch.chunks:
            sequence = chunk.sequence
            sequence.num_computed += chunk.length
            if self.enable_prefix_caching:
                self._cache_full_pages(sequence)
            for sample in chunk.samples:
                sample.num_pending += 1
            if len(chunk.samples) > 1:
                self._fork(sequence)

    def reject(self, sequence: Sequence, count: int) -> None:
        """The last so many drafted tokens are not the sequence's: what was computed of them is nobody's, and what was
        sampled after them is forgotten. Comes before the step's tokens are appended."""
        sequence.num_pending -= count
        if sequence.slot >= 0:
            sequence.num_computed -= count

    def append(self, sequence: Sequence, token: int) -> None:
        """A sampled token has become known."""
        sequence.tokens.append(token)
        sequence.num_pending -= 1
        if self.enable_prefix_caching and sequence.num_computed >= (len(sequence.path) + 1) * self.page_size:
            self._cache_full_pages(sequence)

    # ---- pages ---------------------------------------------------------------------------------------------

    def _budget_for_drafts(self, budget: int) -> int:
        """Half of it where prompts wait for the other half."""
        prefills = any(len(s.tokens) + s.num_pending - s.num_computed > 1 for s in self.running)
        return budget // 2 if self._num_waiting or prefills else budget

    def _fitting(self, draft: list[int], sequence: Sequence, budget: int) -> list[int]:
        """What of a draft can be verified: nobody is preempted for it."""
        most = min(len(draft), budget, sequence.request.max_tokens - sequence.num_generated - 1)
        known = len(sequence.tokens)
        # Each that runs may need one in this step, for its next token or a copy of its last page.
        free = self.num_available_pages - len(self.running)
        while most > 0 and self.pages_for(known + most) - max(len(sequence.pages), self.pages_for(known)) > free:
            most -= 1
        return draft[: max(most, 0)]

    def _make_room(self, sequence: Sequence, end: int, batch: Batch) -> bool:
        """Gives a running sequence pages for tokens up to `end`, its own ones where it writes.

        Returns False when something was preempted for it, perhaps the sequence itself (its slot is then -1).
        """
        undisturbed = True
        while True:
            tail = sequence.num_computed // self.page_size
            shared = sequence.may_share_tail and tail < len(sequence.pages) and self.pool.refs(sequence.pages[tail]) > 1
            needed = self.pages_for(end) - len(sequence.pages) + shared
            if needed <= self.num_available_pages:
                break
            victim = self.running[-1]
            undisturbed = False
            self._preempt(victim)
            batch.preempted.append(victim)
            if victim is sequence:
                return False
        sequence.may_share_tail = False
        pages = self._allocate(needed)
        if shared:
            source, copy = sequence.pages[tail], pages.pop()
            batch.copies.append((source, copy))
            self.pool.release([source])
            sequence.pages[tail] = copy
            self._page_writes.append((sequence.slot, tail, copy))
        self._append_pages(sequence, pages)
        return undisturbed

    # ---- who is let in -------------------------------------------------------------------------------------

    def _admit(self, budget: int, batch: Batch) -> None:
        """Lets waiting sequences run, in order, while there are slots, pages and budget for them.

        One whose next page of prompt is being computed by another sequence in this very step waits for it: then it
        finds the page cached, and the common beginning of many prompts is computed once even if all arrive together.
        """
        in_progress = {key for chunk in batch.chunks if (key := self._page_in_progress(chunk)) is not None}
        adapters = {s.request.adapter_generation for s in self.running} - {0}
        held_back: list[tuple[tuple[int, int, int], Sequence]] = []
        put_off: list[tuple[tuple[int, int, int], Sequence]] = []
        while self._waiting and budget > 0 and len(held_back) < self.max_num_seqs:
            entry = self._waiting[0]
            sequence = entry[1]
            request = sequence.request
            if sequence.finish_reason is not None:
                heapq.heappop(self._waiting)
                continue
            if sequence.num_pending:  # it is computed again from tokens, so these must be known
                put_off.append(heapq.heappop(self._waiting))
                continue
            adapter = request.adapter_generation
            if adapter and not self._may_join(adapter, adapters, bool(held_back)):
                held_back.append(heapq.heappop(self._waiting))
                if len(held_back) == 1 and sequence is not self._held_back:
                    self._held_back, self._overtaken = sequence, 0
                continue
            slots = 1 if request.forked else min(len(request.sequences), self.max_num_seqs)
            if len(self._slots) - self._reserved_slots < slots:
                break
            total = len(sequence.tokens)
            path: list[Node] = []
            first = sequence.logits_from
            if self.enable_prefix_caching:
                # What logits are wanted of is always computed; of the last token they always are.
                most = (total - 1 if first is None else first) // self.page_size
                path = self.tree.match(sequence.tokens, most, request.adapter_generation)
                if in_progress and len(path) < most and self._page_key(sequence, path) in in_progress:
                    put_off.append(heapq.heappop(self._waiting))
                    continue
            if first is not None and first <= len(path) * self.page_size and not self._room_for_logits:
                put_off.append(heapq.heappop(self._waiting))
                continue
            idle = sum(node.users == 0 for node in path)
            # A little room is left to those that run, lest the newcomer be preempted at the next page boundary.
            spare = max(1, self.num_pages // 100) if self.running else 0
            if self.pages_for(total) - len(path) + spare > self.num_available_pages - idle:
                break
            heapq.heappop(self._waiting)
            if adapter:
                adapters.add(adapter)
                self._overtaken += bool(held_back)
            chunk = self._start(sequence, path, slots, budget)
            budget -= chunk.length
            batch.chunks.append(chunk)
            if (key := self._page_in_progress(chunk)) is not None:
                in_progress.add(key)
        for entry in put_off + held_back:
            heapq.heappush(self._waiting, entry)

    def _may_join(self, adapter: int, running: set[int], overtakes: bool) -> bool:
        """Whether a sequence may run beside those of other adapters.

        One that came later may overtake one that is held back, if its own adapter runs already. But room for another
        adapter comes only when one has nobody running any more, so no more may overtake than run at once.

        Args:
            overtakes: whether one that came earlier is held back.
        """
        if adapter in running:
            return not overtakes or self._overtaken < self.max_num_seqs
        return not overtakes and len(running) < self.max_adapters

    def _start(self, sequence: Sequence, path: list[Node], slots: int, budget: int) -> Chunk:
        """Gives a waiting sequence a slot, its cached pages and the pages of its first chunk."""
        request = sequence.request
        self._num_waiting -= 1
        sequence.slot = self._slots.pop()
        sequence.epoch = self.tree.epoch
        request.reserved = slots - 1
        self._reserved_slots += request.reserved
        bisect.insort(self.running, sequence, key=_order)
        total, cached = len(sequence.tokens), len(path) * self.page_size
        sequence.path = path
        self._append_pages(sequence, self.tree.use(path))
        length = self._take_logits(sequence, cached, min(total - cached, budget))
        self._append_pages(sequence, self._allocate(self.pages_for(cached + length) - len(path)))
        sequence.num_computed = cached
        if request.metrics.first_scheduled_time is None:
            request.metrics.first_scheduled_time = time.monotonic()
            request.num_cached_tokens = cached
            self.stats.prefix_queries += total
            self.stats.prefix_hits += cached
        return self._chunk(sequence, cached, length)

    def _take_logits(self, sequence: Sequence, start: int, length: int) -> int:
        """How long a chunk may be, given how many tokens' logits the step has room for; takes that room."""
        first = sequence.logits_from
        if first is None:
            return length
        before = max(first - start, 0)
        length = min(length, before + self._room_for_logits)
        self._room_for_logits -= max(length - before, 0)
        return length

    def _page_key(self, sequence: Sequence, path: list[Node]) -> tuple[int, tuple[int, ...]]:
        """Names a sequence's first page below the cached `path`."""
        adapter = sequence.request.adapter_generation
        return id(path[-1]) if path else 0, edge(sequence.tokens, len(path), self.page_size, adapter)

    def _page_in_progress(self, chunk: Chunk) -> tuple[int, tuple[int, ...]] | None:
        """The next page that a prefilling sequence will put in the prefix tree; None when it will put none."""
        sequence = chunk.sequence
        if not self.enable_prefix_caching or sequence.epoch != self.tree.epoch:
            return None
        if (len(sequence.path) + 1) * self.page_size > len(sequence.tokens):
            return None
        return self._page_key(sequence, sequence.path)

    def _chunk(self, sequence: Sequence, start: int, length: int) -> Chunk:
        samples = []
        if start + length == len(sequence.tokens) and sequence.request.scored is None:
            samples = [sequence] if sequence.request.forked else sequence.request.sequences
        return Chunk(sequence, start, length, samples)

    def _fork(self, first: Sequence) -> None:
        """The prompt is computed: the other samples join, sharing all its pages; those without a slot wait their
        turn."""
        request = first.request
        request.forked = True
        self._release_reservation(request)
        first.may_share_tail = True
        for sibling in request.sequences[1:]:
            if sibling.finish_reason is not None:
                continue
            if not self._slots:
                self._enqueue(sibling)
                continue
            sibling.slot = self._slots.pop()
            sibling.epoch = first.epoch
            sibling.num_computed = first.num_computed
            sibling.may_share_tail = True
            sibling.path = list(first.path)
            self.tree.share(first.path)
            self.pool.retain(first.pages)
            self._append_pages(sibling, first.pages)
            bisect.insort(self.running, sibling, key=_order)


def _with_draft(sequence: Sequence, draft: list[int] | None) -> list[Sequence]:
    """A decode row, and those that verify a draft after it."""
    return [sequence, *(DraftRow(sequence, draft, count + 1) for count in range(len(draft)))] if draft else [sequence]
