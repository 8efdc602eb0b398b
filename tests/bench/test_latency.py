"""Decode steps, first tokens and starts are timed, and a batch that does not fit says so."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from hf_paged.bench import latency
from hf_paged.bench.floor import ModelCost, Rates, step_floor
from hf_paged.bench.models import tiny
from hf_paged.cli import app

RATES = Rates(1e10, 1e11)


def test_latency_of_a_tiny_model() -> None:
    result = latency.run_latency(
        "tiny",
        (1, 3, 50),
        40,
        steps=2,
        rounds=3,
        device="cpu",
        rates=RATES,
        options={"num_pages": 30, "max_num_batched_tokens": 256},
    )
    cost = ModelCost.of(tiny(), torch.float32)
    for row, batch in zip(result["decode"][:2], (1, 3), strict=True):
        # The prompt's step gives each sequence a token, the next one is the first that only decodes, five more warm up.
        assert row["mean_context"] == 40 + 7 + 3
        assert len(row["rounds_s"]) == 3 and row["step_s"] in row["rounds_s"]
        assert row["floor_s"] == pytest.approx(step_floor(cost, batch, 50, RATES))
        assert row["floor_fraction"] == pytest.approx(row["floor_s"] / row["step_s"])
        assert row["tokens_per_s"] == pytest.approx(batch / row["step_s"])
    assert "there are 30" in result["decode"][2]["note"]
    assert result["start_s"] > 0 and result["first_token_s"] > 0
    assert result["first_token_floor_s"] == pytest.approx(
        cost.weight_bytes / 1e10 + (2 * cost.body_params * 40 + cost.attention_flops * 40 * 41 / 2) / 1e11
    )
    assert latency.as_table(result).row_count == 5


def test_batches_that_cannot_run_say_why() -> None:
    result = latency.run_latency(
        "tiny", (4, 8), 4000, steps=200, device="cpu", rates=RATES, options={"max_num_seqs": 4}
    )
    assert "max_model_len is 4096" in result["decode"][0]["note"]
    assert "max_num_seqs is 4" in result["decode"][1]["note"]


def test_latency_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "measure_rates", lambda *_: RATES)
    command = [
        "bench",
        "latency",
        "--model",
        "tiny",
        "--device",
        "cpu",
        "--batches",
        "1,2",
        "--context",
        "20",
        "--steps",
        "2",
    ]
    result = CliRunner().invoke(app, [*command, "--json", "--temperature", "0.5"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert [row["batch"] for row in data["decode"]] == [1, 2]
    assert data["rates"]["bytes_per_s"] == 1e10
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "decode step of 2" in result.output


@pytest.mark.parametrize("quantization", ["w4", "fp8"])
def test_latency_of_a_quantised_model(quantization: str) -> None:
    plain, small = (
        latency.run_latency("tiny", [1], 8, steps=2, rounds=1, device="cpu", quantization=how, rates=RATES)
        for how in (None, quantization)
    )
    assert small["quantization"] == quantization and "step_s" in small["decode"][0]
    assert small["weight_bytes"] < plain["weight_bytes"]
    assert quantization in (latency.as_table(small).title or "")
