"""The benchmark of adapters, on a model that says nothing."""

from __future__ import annotations

import json

import pytest
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from hf_paged.bench import lora
from hf_paged.bench.latency import count_kernels


def test_it_times_steps_with_and_without(capsys: pytest.CaptureFixture[str]) -> None:
    line = "--model tiny --batches 2,4 --adapters 0,1,3 --rank 4 --context 16 --steps 2 --rounds 1 --device cpu"
    lora.main([*line.split(), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert [row["batch"] for row in result["decode"]] == [2, 4]
    for row in result["decode"]:
        assert row["base_s"] > 0 and list(row["adapters"]) == ["0", "1", "3"]
        assert all(seconds > 0 for seconds in row["adapters"].values())
        assert row["base_launches"] is None and set(row["launches"].values()) == {None}, "not on a GPU"
    assert lora.as_table(result).row_count == 2


def test_the_table_tells_launches() -> None:
    row = {"batch": 1, "base_s": 0.002, "adapters": {"1": 0.003}, "base_launches": 300, "launches": {"1": 556}}
    table = lora.as_table({"model": "m", "dtype": "d", "quantization": None, "rank": 16, "decode": [row]})
    assert [list(column.cells) for column in table.columns] == [
        ["1"], ["2.000 (300 kernels)"], ["3.000 (1.50x, 556 kernels)"]
    ]  # fmt: skip


def test_kernels_among_what_a_profiler_saw() -> None:
    def event(name: str, device: DeviceType = DeviceType.CUDA, label: bool = False) -> FunctionEvent:
        return FunctionEvent(0, name, 0, 0, 1, device_type=device, is_user_annotation=label)

    seen = [
        event("_shrink"),
        event("_expand"),
        event("Memcpy HtoD (Pinned -> Device)"),
        event("Memset (Device)"),
        event("a step", label=True),
        event("cudaGraphLaunch", DeviceType.CPU),
    ]
    assert count_kernels(seen) == 2
