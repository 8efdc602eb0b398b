"""The program as a whole: help that one can act on, and the shell's completion."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from hf_paged.cli import app

runner = CliRunner()
COMMANDS = ["serve", "chat", "complete", "run-batch", "demo", "quantize", "bench"]
BENCHES = ["throughput", "latency", "host", "perplexity", "serve", "server-overhead", "structured"]


def help_of(*command: str) -> str:
    found = runner.invoke(app, [*command, "--help"], env={"COLUMNS": "200"})
    assert found.exit_code == 0, found.output
    return found.output


def test_help_names_every_command() -> None:
    assert all(name in help_of() for name in COMMANDS)
    assert all(name in help_of("bench") for name in BENCHES)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["chat"], ["hf-paged chat --model smollm2", "--url", "--model-name", "--api-key", "--system-prompt", "-q"]),
        (["complete"], ["--max-tokens", "-q", "--url"]),
        (["run-batch"], ["hf-paged run-batch -i in.jsonl -o out.jsonl", "--model", "custom_id"]),
        (["bench", "serve"], ["--request-rate", "--burstiness", "--goodput", "ttft:200", "--dataset-path", "--seed"]),
        (["bench", "server-overhead"], ["--streams", "--tokens", "--model"]),
        (["bench", "structured"], ["--json-schema", "--streams"]),
        (["serve"], ["--served-model-name", "--max-model-len"]),
    ],
)
def test_help_says_what_to_type(command: list[str], said: list[str]) -> None:
    text = help_of(*command)
    assert not [word for word in said if word not in text]


@pytest.mark.parametrize(
    ("line", "offered"),
    [("hf-paged run", "run-batch"), ("hf-paged chat --model ", "smollm2"), ("hf-paged bench se", "serve")],
)
def test_the_shell_completes(line: str, offered: str) -> None:
    words = line.split(" ")
    environment = os.environ | {
        "_HF_PAGED_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1),
    }  # fmt: skip
    program = [sys.executable, "-c", "import sys; sys.argv[0] = 'hf-paged'; from hf_paged.cli import main; main()"]
    found = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=200)
    assert offered in found.stdout.split(), found.stderr
