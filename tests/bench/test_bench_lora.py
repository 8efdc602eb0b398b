"""The benchmark of adapters, on a model that says nothing."""

from __future__ import annotations

import json

import pytest

from hf_paged.bench import lora


def test_it_times_steps_with_and_without(capsys: pytest.CaptureFixture[str]) -> None:
    line = "--model tiny --batches 2,4 --adapters 0,1,3 --rank 4 --context 16 --steps 2 --rounds 1 --device cpu"
    lora.main([*line.split(), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert [row["batch"] for row in result["decode"]] == [2, 4]
    for row in result["decode"]:
        assert row["base_s"] > 0 and list(row["adapters"]) == ["0", "1", "3"]
        assert all(seconds > 0 for seconds in row["adapters"].values())
    assert lora.as_table(result).row_count == 2
