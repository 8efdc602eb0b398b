"""The page pool as a map."""

from __future__ import annotations

import numpy as np

from hf_paged.engine.scheduler import Scheduler

FREE, OWNED, SHARED, CACHED = range(4)
MOST_CELLS = 8192


def page_map(scheduler: Scheduler, most_cells: int = MOST_CELLS) -> tuple[int, list[int]]:
    """Who holds which page, read while the engine may be at work: single cells may be a step apart.

    Returns:
        how many pages a cell stands for, and runs of equal cells as [cell, length, cell, length, ...]. A cell is
        `4 * fill + state`: the state that most of its pages in use have (FREE, OWNED by one sequence, SHARED by
        several, CACHED for whoever comes), and how many quarters of its pages are in use, less one.
    """
    pool, tree = scheduler.pool, scheduler.tree
    in_tree = np.frombuffer(bytes(tree.holds), dtype=np.uint8)
    users = np.array(pool.all_refs(), dtype=np.int64) - in_tree
    states = np.where(users > 1, SHARED, np.where(users == 1, OWNED, np.where(in_tree > 0, CACHED, FREE)))
    per_cell = -(-len(states) // most_cells)
    if per_cell == 1:
        cells = np.where(states == FREE, FREE, states + 12)
    else:
        padded = np.pad(states, (0, -len(states) % per_cell)).reshape(-1, per_cell)
        counts = np.stack([(padded == state).sum(1) for state in (OWNED, SHARED, CACHED)])
        used = counts.sum(0)
        fill = np.ceil(4 * used / per_cell).astype(np.int64) - 1
        cells = np.where(used == 0, FREE, counts.argmax(0) + 1 + 4 * fill)
    starts = np.flatnonzero(np.diff(cells, prepend=-1))
    lengths = np.diff(np.append(starts, len(cells)))
    return per_cell, np.stack([cells[starts], lengths]).T.ravel().tolist()
