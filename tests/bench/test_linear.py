"""The benchmark of linear layers says what it measured, and where it cannot."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from hf_paged.bench.linear import as_table, run_linear

ON_GPU = torch.cuda.is_available()


def test_the_table_has_times_and_ratios() -> None:
    row = {"n": 4096, "k": 14336, "m": 16, "bf16_s": 60e-6, "w4_s": 24e-6, "fp8_s": 40e-6}
    console = Console(width=120)
    with console.capture() as printed:
        console.print(as_table({"device": "a GPU", "group_size": 64, "layers": [row]}))
    line = next(line for line in printed.get().splitlines() if "4096 x 14336" in line)
    assert line.replace("│", "").split()[3:] == ["16", "60.0", "24.0", "40.0", "2.50", "1.50"]


@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(ValueError, match="bench linear times GPU kernels"):
        run_linear()


@pytest.mark.cuda
@pytest.mark.skipif(not ON_GPU, reason="times a GPU")
def test_it_times_all_three() -> None:
    result = run_linear([(1024, 2048)], [1, 3, 100])
    assert [(row["n"], row["k"], row["m"]) for row in result["layers"]] == [(1024, 2048, m) for m in (1, 3, 100)]
    assert all(1e-7 < row[f"{way}_s"] < 1e-2 for row in result["layers"] for way in ("bf16", "w4", "fp8"))
