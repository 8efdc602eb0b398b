"""`hf-paged bench throughput`: tokens per second, ours against peers, with ratios."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch
import transformers
from rich.table import Table

from hf_paged.bench.engines import EngineRun
from hf_paged.bench.workloads import Workload


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu_threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "processor": platform.machine(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def same_tokens(run: EngineRun, other: EngineRun) -> float:
    """Share of the other's outputs that are the same token for token."""
    pairs = zip(run.outputs, other.outputs, strict=True)
    return sum(a == b for a, b in pairs) / max(1, len(run.outputs))


def as_json(work: Workload, dtype: str, runs: list[EngineRun]) -> dict[str, Any]:
    """Everything measured, as plain data."""
    ours = runs[0]
    return {
        "workload": work.name,
        "dtype": dtype,
        "prompts": len(work.prompts),
        "samples": work.n,
        "tokens_in": work.tokens_in,
        "tokens_out": work.tokens_out,
        "machine": machine(),
        "runs": [
            {
                "engine": run.engine,
                "seconds": round(run.seconds, 3),
                "tokens_per_s": round(run.tokens_per_s, 2),
                "kv_bytes": run.kv_bytes,
                "speedup_of_ours": round(run.seconds / ours.seconds, 3),
                "kv_ratio_of_ours": round(run.kv_bytes / ours.kv_bytes, 2) if run.kv_bytes and ours.kv_bytes else None,
                "same_tokens": round(same_tokens(run, ours), 3) if work.n == 1 else None,
                "note": run.note,
            }
            for run in runs
        ],
    }


def as_table(result: dict[str, Any]) -> Table:
    """The same for people."""
    title = (
        f"{result['workload']}, {result['dtype']}: {result['prompts']} prompts x {result['samples']}, "
        f"{result['tokens_in']} tokens in, {result['tokens_out']} out"
    )
    table = Table(title=title)
    for column in ("engine", "seconds", "tokens/s", "ours is", "KV MiB", "KV vs ours", "same tokens", ""):
        table.add_column(column, justify="left" if column in ("engine", "") else "right")
    for run in result["runs"]:
        table.add_row(
            run["engine"],
            f"{run['seconds']:.1f}",
            f"{run['tokens_per_s']:.1f}",
            f"{run['speedup_of_ours']:.2f}x",
            f"{run['kv_bytes'] / 2**20:.0f}" if run["kv_bytes"] else "",
            f"{run['kv_ratio_of_ours']:.1f}x" if run["kv_ratio_of_ours"] else "",
            f"{100 * run['same_tokens']:.0f}%" if run["same_tokens"] is not None else "",
            run["note"],
        )
    return table
