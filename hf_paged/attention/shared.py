"""Which sequences of a decode step share which tokens, and whether to read these once for all of them.

The samples of a prompt share its pages, and prompts that begin alike (a system prompt) share the pages of that. Decode
attention can read what a group shares once per group: see `kernels/triton/shared_prefix.py`. Here the groups are found,
level by level, from the block table alone; they are cut into items of about equal size; and an estimate of the memory
traffic says whether that pays. numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hf_paged.engine.request import Sequence
from hf_paged.kernels.shared_ranges import ALIGNMENT

if TYPE_CHECKING:
    from hf_paged.attention.backend import LayerSpec

TILE_LINES, MAX_TILE_ROWS = 64, 16
"""An item has up to 64 query heads per KV head, in at most 16 rows."""
ROOM = 2048
"""Parts times rows that there is room for: of 32 heads of 128, 32 MiB."""

FIRST_READ, AGAIN = 0.87, 0.37
"""What plain decode takes for a token that nobody has read before, and for one that a neighbour has just read and that
is in the L2 therefore, in units of reading a token from memory at 3 TB/s. With FIXED_BYTES, fitted to measurements of
128 rows and more (docs/benchmarks.md), within 10%; a few rows alone take longer than this says."""
FIXED_BYTES = 70e6
"""What could be read while a second kernel starts, ends, and hands over what it has found."""
WORTH_TOKENS = 32
"""Tokens that must be saved for each row of an item."""
GAIN = 0.97
"""Sharing must be estimated to take this much of the plain time, or less."""

MAX_DIM = 256
"""Larger heads, with the queries of a whole group beside them, do not fit the shared memory of every GPU."""


def can_share(layer: LayerSpec) -> bool:
    """Whether a layer can read what rows share once for all of them: not if it only looks back so far."""
    return layer.window is None and max(layer.key_dim, layer.value_dim) <= MAX_DIM


@dataclass(frozen=True, slots=True)
class SharedPlan:
    """What rows of a decode step share, as in the kernel's `SharedRanges`.

    It stays right for as long as the same sequences decode: their tokens do not change, whichever pages hold them.
    """

    items: np.ndarray
    """int32 [I, 6]: first place in `rows`, number of rows, first token, the token after the last, number among these
    rows' parts, and one of the rows, whose pages are to be read; longest first."""
    rows: np.ndarray
    """int32 [R]."""
    lengths: np.ndarray
    """int32 [B]."""
    num_parts: np.ndarray
    """int32 [B]."""
    tile_rows: int


@dataclass(frozen=True, slots=True)
class SharedLimits:
    """What a plan must fit in."""

    tile_rows: int
    """Rows of an item."""
    max_items: int
    max_rows: int
    """Rows of all items together."""
    max_parts: int
    """Parts of a row."""

    @classmethod
    def of(cls, batch: int, group: int) -> SharedLimits:
        """For `batch` rows of a model with `group` query heads per KV head; the same for all up to the next power of
        two, so that what was captured for some rows takes a plan for fewer."""
        batch = 1 << (batch - 1).bit_length()
        return cls(
            tile_rows=max(1, min(MAX_TILE_ROWS, TILE_LINES // group)),
            max_items=max(64, batch),
            max_rows=4 * batch,
            max_parts=max(4, min(32, ROOM // batch)),
        )


class SharedPlanner:
    """Plans, and remembers the plan while the same sequences decode.

    Args:
        token_bytes: keys and values of one token in one layer.
        kv_heads: of a layer.
        group: query heads per KV head, the most of any layer.
        multiprocessors: of the device.
    """

    def __init__(self, *, page_size: int, token_bytes: int, kv_heads: int, group: int, multiprocessors: int) -> None:
        self._group = group
        self._page_size, self._token_bytes = page_size, token_bytes
        self._wanted_items = max(1, 2 * multiprocessors // kv_heads)
        self._last: list[Sequence] = []
        self._plan: SharedPlan | None = None

    def plan(self, sequences: list[Sequence], block_table: np.ndarray) -> SharedPlan | None:
        """What decoding sequences share; None if that is nothing, or not worth it.

        Args:
            block_table: int32 [slots, most pages].
        """
        if sequences != self._last:  # compares identities
            self._last, self._plan = list(sequences), None
            if len(sequences) < 2:
                return None
            slots = np.array([sequence.slot for sequence in sequences])
            stored = np.array([sequence.num_computed for sequence in sequences])
            table = block_table[slots, : int(stored.max()) // self._page_size + 1]
            self._plan = self._make(table, stored, SharedLimits.of(len(sequences), self._group))
        return self._plan

    def _make(self, table: np.ndarray, stored: np.ndarray, limits: SharedLimits) -> SharedPlan | None:
        ranges = shared_ranges(table, stored, self._page_size)
        if not ranges:
            return None
        plan = make_plan(ranges, len(stored), limits, self._wanted_items)
        return plan if plan is not None and self._pays(plan, ranges, stored) else None

    def _pays(self, plan: SharedPlan, ranges: list[SharedRange], stored: np.ndarray) -> bool:
        """Compares estimates of both ways' time, in tokens read from memory."""
        total = float(stored.sum())
        repeated = sum((len(r.rows) - 1) * (r.end - r.begin) for r in ranges)
        distinct = total - repeated
        spared = float(((plan.items[:, 1] - 1) * (plan.items[:, 3] - plan.items[:, 2])).sum())
        together = distinct + AGAIN * (repeated - spared) + FIXED_BYTES / self._token_bytes
        return together < GAIN * (FIRST_READ * distinct + AGAIN * repeated)


@dataclass(frozen=True, slots=True)
class SharedRange:
    """Tokens `[begin, end)`, multiples of ALIGNMENT, that these rows and no others share. A row's ranges follow one
    another without gaps from token 0 on, and each has fewer rows than the one before."""

    rows: np.ndarray
    """int64, two at least."""
    begin: int
    end: int


def shared_ranges(table: np.ndarray, stored: np.ndarray, page_size: int) -> list[SharedRange]:
    """Who shares what, by comparing pages.

    Args:
        table: int32 [B, P], the rows' pages in order of position.
        stored: int64 [B], tokens that each row has in its pages and that nobody writes any more.
    """
    full = stored // page_size
    found: list[SharedRange] = []
    todo = [(np.arange(len(table)), 0, 0)]  # rows that agree on pages [0, depth), and the tokens covered so far
    while todo:
        rows, depth, covered = todo.pop()
        if len(rows) < 2:
            continue
        limit = int(full[rows].min())
        part = table[rows, depth:limit]
        differs = (part != part[0]).any(0)
        depth = depth + int(differs.argmax()) if differs.any() else limit
        end = depth * page_size // ALIGNMENT * ALIGNMENT
        if end > covered:
            found.append(SharedRange(rows, covered, end))
            covered = end
        rows = rows[full[rows] > depth]
        if not len(rows):
            continue
        pages = table[rows, depth]
        order = np.argsort(pages, kind="stable")
        pages, rows = pages[order], rows[order]
        edges = np.flatnonzero(pages[1:] != pages[:-1]) + 1
        todo += [(group, depth, covered) for group in np.split(rows, edges)]
    return found


def make_plan(ranges: list[SharedRange], batch: int, limits: SharedLimits, wanted: int) -> SharedPlan | None:
    """Cuts ranges into items that fit the limits. A range that is not worth an item, or for which there is no room, is
    read by the smaller groups within it, each for itself, or by single rows.

    Args:
        ranges: as from `shared_ranges`: a row's ranges in order.
        batch: rows of the step.
        wanted: items that keep the device busy.
    """
    size = limits.tile_rows
    work = sum((r.end - r.begin) * -(-len(r.rows) // size) for r in ranges)
    longest = max(4 * ALIGNMENT, -(-work // (wanted * ALIGNMENT)) * ALIGNMENT)
    lengths, num_parts = np.zeros((2, batch), dtype=np.int32)
    items: list[tuple[int, int, int, int, int, int]] = []
    rows: list[np.ndarray] = []
    num_rows = 0
    for shared in ranges:
        first = shared.rows[0]
        begin, used = int(lengths[first]), int(num_parts[first])  # a range that was left out is its heirs' own
        if not _worth(len(shared.rows), shared.end - begin):
            continue
        cuts = _cut(begin, shared.end, longest, limits.max_parts - used)
        tiles = [shared.rows[i : i + size] for i in range(0, len(shared.rows), size)]
        if not cuts or len(items) + len(cuts) * len(tiles) > limits.max_items:
            continue
        if num_rows + len(shared.rows) > limits.max_rows:
            continue
        for tile in tiles:
            items += [(num_rows, len(tile), b, e, used + i, int(first)) for i, (b, e) in enumerate(cuts)]
            num_rows += len(tile)
        rows.append(shared.rows)
        lengths[shared.rows] = shared.end
        num_parts[shared.rows] += len(cuts)
    if not items:
        return None
    packed = np.array(items, dtype=np.int32)
    packed = packed[np.argsort(packed[:, 2] - packed[:, 3], kind="stable")]
    return SharedPlan(packed, np.concatenate(rows).astype(np.int32), lengths, num_parts, size)


def _worth(count: int, length: int) -> bool:
    return (count - 1) * length > WORTH_TOKENS * count


def _cut(begin: int, end: int, longest: int, most: int) -> list[tuple[int, int]]:
    """Cuts a range into at most `most` parts of about equal length, which is a multiple of ALIGNMENT."""
    parts = min(most, -(-(end - begin) // longest))
    if parts < 1:
        return []
    step = -(-(end - begin) // (parts * ALIGNMENT)) * ALIGNMENT
    return [(at, min(at + step, end)) for at in range(begin, end, step)]
