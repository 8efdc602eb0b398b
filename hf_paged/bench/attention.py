"""`hf-paged bench attention`: decode attention of groups of samples, with what they share read once or row by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from hf_paged.attention.shared import SharedLimits, SharedPlan, SharedPlanner, make_plan, shared_ranges
from hf_paged.bench.floor import measure_rates
from hf_paged.engine.request import Request, Sequence
from hf_paged.kernels.shared_ranges import SharedRanges
from hf_paged.sampling_params import SamplingParams

PAGE_SIZE = 16
SHAPES = ((16, 16, 512, 256), (16, 16, 2048, 256), (64, 4, 1024, 256), (16, 16, 2048, 1024))
"""Groups, samples each, tokens shared, tokens of each one's own: what rollouts come to."""


@dataclass(frozen=True)
class _Step:
    """One layer's decode attention."""

    query: Tensor
    pools: tuple[Tensor, Tensor]
    block_table: Tensor
    slots: Tensor
    lengths: Tensor

    def run(self, shared: SharedRanges | None) -> Tensor:
        from hf_paged.kernels.triton.paged_decode import paged_decode

        return paged_decode(
            self.query, *self.pools, self.block_table, self.slots, self.lengths,
            scaling=self.query.shape[-1] ** -0.5, shared=shared,
        )  # fmt: skip


def run_attention(
    shapes: tuple[tuple[int, int, int, int], ...] = SHAPES, *, heads: int = 32, kv_heads: int = 8, head_dim: int = 128
) -> dict[str, Any]:
    """Times one layer in bfloat16, on a GPU.

    Args:
        shapes: groups, samples per group, tokens that a group shares, tokens of each sample's own.

    Returns:
        per shape seconds of both ways, the floor (each group's bytes once, at the machine's measured rate), and which
        way the planner takes.
    """
    if not torch.cuda.is_available():
        raise ValueError("bench attention times GPU kernels, and there is no CUDA device")
    device = torch.device("cuda")
    rate = measure_rates(device, torch.bfloat16).bytes_per_s
    rows = [_measure(shape, heads, kv_heads, head_dim, rate, device) for shape in shapes]
    return {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "bytes_per_s": rate, "shapes": rows}


def _measure(
    shape: tuple[int, int, int, int], heads: int, kv_heads: int, head_dim: int, rate: float, device: torch.device
) -> dict[str, Any]:
    groups, samples, shared, own = shape
    count, table = groups * samples, _block_table(*shape)
    num_pages = int(table.max()) + 1
    pools = tuple(
        torch.randn(num_pages, PAGE_SIZE, kv_heads, head_dim, dtype=torch.bfloat16, device=device) for _ in range(2)
    )
    step = _Step(
        torch.randn(count, heads, head_dim, dtype=torch.bfloat16, device=device),
        (pools[0], pools[1]),
        torch.from_numpy(table).to(device),
        torch.arange(count, dtype=torch.int32, device=device),
        torch.full((count,), shared + own, dtype=torch.int32, device=device),
    )
    token_bytes = 2 * kv_heads * head_dim * 2
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    limits = SharedLimits.of(count, heads // kv_heads)
    stored = np.full(count, shared + own - 1)
    plan = make_plan(shared_ranges(table, stored, PAGE_SIZE), count, limits, max(1, 2 * processors // kv_heads))
    planner = SharedPlanner(
        page_size=PAGE_SIZE,
        token_bytes=token_bytes,
        kv_heads=kv_heads,
        group=heads // kv_heads,
        multiprocessors=processors,
    )
    plain_s = _seconds(lambda: step.run(None))
    found = {
        "shape": shape,
        "plain_s": plain_s,
        "floor_s": token_bytes * (groups * shared + count * own) / rate,
        "takes_shared": planner.plan(_sequences(count, shared + own - 1), table) is not None,
    }
    if plan is not None:
        ranges = _upload(plan, limits, device)
        torch.testing.assert_close(step.run(ranges), step.run(None), rtol=4e-2, atol=4e-2)
        found["shared_s"] = _seconds(lambda: step.run(ranges))
    return found


def _block_table(groups: int, samples: int, shared: int, own: int) -> np.ndarray:
    """int32 [rows, pages], pages in random order."""
    common, each = shared // PAGE_SIZE, -(-own // PAGE_SIZE)
    ids = np.random.default_rng(0).permutation(groups * common + groups * samples * each).astype(np.int32)
    prefixes = ids[: groups * common].reshape(groups, common).repeat(samples, axis=0)
    return np.concatenate([prefixes, ids[groups * common :].reshape(groups * samples, each)], axis=1)


def _sequences(count: int, stored: int) -> list[Sequence]:
    sequences = Request("bench", [0], SamplingParams(n=count)).sequences
    for slot, sequence in enumerate(sequences):
        sequence.slot, sequence.num_computed = slot, stored
    return sequences


def _upload(plan: SharedPlan, limits: SharedLimits, device: torch.device) -> SharedRanges:
    """As a captured step has it, with room for as many items as there may be."""
    items = np.zeros((limits.max_items, plan.items.shape[1]), dtype=np.int32)
    items[: len(plan.items)] = plan.items
    arrays = (items, np.array([len(plan.items)], dtype=np.int32), plan.rows, plan.lengths, plan.num_parts)
    items_, number, rows, lengths, parts = (torch.from_numpy(array).to(device) for array in arrays)
    return SharedRanges(items_, number, rows, lengths, parts, limits.max_parts, limits.tile_rows)


def _seconds(work: Callable[[], Any], calls: int = 20, rounds: int = 5) -> float:
    """Seconds of one call, from a CUDA graph of several."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            work()
    times = []
    for _ in range(rounds + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    return min(times[1:])


def as_table(result: dict[str, Any]) -> Table:
    """The result for a terminal."""
    title = "decode attention, one layer: {heads} heads over {kv_heads} KV heads of {head_dim}, bfloat16, ms"
    table = Table(title=title.format(**result))
    for name in ("groups x samples, shared + own tokens", "each row alone", "shared read once", "ratio", "floor"):
        table.add_column(name, justify="left" if name.startswith("groups") else "right")
    table.add_column("planner takes")
    for row in result["shapes"]:
        groups, samples, shared, own = row["shape"]
        together = row.get("shared_s")
        table.add_row(
            f"{groups} x {samples}, {shared} + {own}",
            f"{1e3 * row['plain_s']:.3f}",
            "-" if together is None else f"{1e3 * together:.3f}",
            "-" if together is None else f"{row['plain_s'] / together:.2f}",
            f"{1e3 * row['floor_s']:.3f}",
            "shared" if row["takes_shared"] else "alone",
        )
    return table
