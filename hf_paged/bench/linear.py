"""`hf-paged bench linear`: linear layers of 4-bit codes and of float8 against a library's product in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
"""(N, K) in an 8B Llama: query, key and value together, attention's output, gate and up together, down."""
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WAYS = ("bf16", "w4", "fp8")

Product = Callable[[Tensor], Tensor]
"""`[M, N]` out of `[M, K]`."""


def run_linear(
    shapes: Sequence[tuple[int, int]] = SHAPES, ms: Sequence[int] = ROWS, *, group_size: int = 128
) -> dict[str, Any]:
    """Times linear layers in bfloat16 on a GPU: as cuBLAS does them, by 4-bit codes, and in float8 with a scale per row
    of activations, which are quantised in the time measured, and per row of weights.

    A call finds its weights outside the L2 cache, as in a model: as many layers take turns as fill it three times.

    Args:
        shapes: N and K of each layer.
        ms: rows of activations.
        group_size: inputs per scale of the codes.

    Returns:
        per shape and number of rows the seconds of a call each way, without launches: in a CUDA graph.
    """
    if not torch.cuda.is_available():
        raise ValueError("bench linear times GPU kernels, and there is no CUDA device")
    rows = []
    for n, k in shapes:
        found: dict[int, dict[str, float]] = {m: {} for m in ms}
        for way in WAYS:
            layers = _layers(way, n, k, group_size)
            for m in ms:
                x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
                found[m][way] = _seconds(layers, x)
            del layers
        rows += [{"n": n, "k": k, "m": m, **{f"{way}_s": times[way] for way in WAYS}} for m, times in found.items()]
    return {"device": torch.cuda.get_device_name(), "group_size": group_size, "layers": rows}


def _layers(way: str, n: int, k: int, group_size: int) -> list[Product]:
    bits = {"bf16": 16, "fp8": 8, "w4": 4}[way]
    cache = torch.cuda.get_device_properties("cuda").L2_cache_size
    make = {"bf16": _bf16, "fp8": _fp8, "w4": _w4}[way]
    return [make(n, k, group_size) for _ in range(1 + -(-3 * cache // (n * k * bits // 8)))]


def _bf16(n: int, k: int, _: int) -> Product:
    weight = torch.randn(n, k, dtype=torch.bfloat16, device="cuda")
    return lambda x: torch.nn.functional.linear(x, weight)


def _w4(n: int, k: int, group_size: int) -> Product:
    from hf_paged.kernels.triton.w4 import w4_linear

    codes = torch.randint(-(2**15), 2**15, (-(-k // 128), n, 32), dtype=torch.int16, device="cuda")
    scales = torch.rand(k // group_size, n, dtype=torch.bfloat16, device="cuda") / 100
    zeros = torch.randint(0, 16, (k // group_size, n), dtype=torch.uint8, device="cuda")
    return lambda x: w4_linear(x, codes, scales, zeros, group_size)


def _fp8(n: int, k: int, _: int) -> Product:
    from hf_paged.kernels.triton.fp8 import fp8_linear, quantize_rows

    weight, scales = quantize_rows(torch.randn(n, k, dtype=torch.bfloat16, device="cuda"))
    return lambda x: fp8_linear(x, weight, scales)


def _seconds(layers: Sequence[Product], x: Tensor, rounds: int = 7) -> float:
    """Seconds of one call, the best of some replays of a CUDA graph in which the layers take turns."""
    calls = max(24, len(layers))
    for layer in layers[:2]:
        layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer, _ in zip(cycle(layers), range(calls), strict=False):
            layer(x)
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
    table = Table(
        title="linear layers, microseconds a call ({device}; codes in groups of {group_size})".format(**result)
    )
    for name in ("N x K", "rows", "bfloat16", "W4", "FP8", "W4 is faster by", "FP8 by"):
        table.add_column(name, justify="left" if name == "N x K" else "right")
    for row in result["layers"]:
        bf16, w4, fp8 = (row[f"{way}_s"] for way in WAYS)
        times = (f"{1e6 * seconds:.1f}" for seconds in (bf16, w4, fp8))
        table.add_row(f"{row['n']} x {row['k']}", str(row["m"]), *times, f"{bf16 / w4:.2f}", f"{bf16 / fp8:.2f}")
    return table
