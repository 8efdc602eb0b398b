"""`hf-paged bench latency --speculative`: it times what it says, and leaves nothing behind."""

from __future__ import annotations

import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from hf_paged.bench.speculation import METHODS, as_table, run_speculation
from hf_paged.cli import app

SMALL = {"device": "cpu", "context": 20, "tokens": 16, "repeats": 1, "options": {"num_pages": 64}}


def test_forced_acceptance_is_what_was_asked_for() -> None:
    result = run_speculation("forced", "tiny", [1, 3], acceptance=1.0, num_speculative_tokens=3, **SMALL)
    assert [row["batch"] for row in result["rows"]] == [1, 3]
    for row in result["rows"]:
        assert row["tokens"] == 16 * row["batch"]
        assert row["acceptance_rate"] == 1.0
        assert row["acceptance_length"] > 2
        assert row["ratio"] == row["plain_s"] / row["speculating_s"]
    console = Console(width=200)
    with console.capture() as captured:
        console.print(as_table(result))
    assert "100%" in captured.get()
    never = run_speculation("forced", "tiny", [1], acceptance=0.0, num_speculative_tokens=3, **SMALL)
    assert never["rows"][0]["acceptance_length"] == 1.0


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"forced"}))
def test_real_drafters_change_nothing(method: str) -> None:
    """In float32 and greedy, as random models are asked."""
    result = run_speculation(method, "tiny", [2], **SMALL)
    assert result["rows"][0]["same"] == 1.0


def test_a_method_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="method must be one of forced, ngram, suffix; got 'magic'"):
        run_speculation("magic")
    found = CliRunner().invoke(app, ["bench", "latency", "--speculative", "magic"])
    assert found.exit_code == 2


def test_from_the_command_line() -> None:
    how = "--speculative forced --model tiny --device cpu --batches 1 --context 9 --tokens 8 --json"
    found = CliRunner().invoke(app, ["bench", "latency", *how.split(), "--option", "num_pages=9"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["rows"][0]["tokens"] == 8
