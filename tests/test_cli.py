"""The program as a whole: help that one can act on, and the shell's completion."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers.utils.logging as bars
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from tqdm import auto
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

import hf_paged.quantization.load
from hf_paged.bench.models import load_smollm2
from hf_paged.cli import app
from hf_paged.cli.terminal import NO_BARS, friendly

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


def bars_now() -> tuple[Any, ...]:
    shown = [bars.is_progress_bar_enabled(), not are_progress_bars_disabled(), not auto.tqdm(()).disable]
    return *shown, *(os.environ.get(name) for name in NO_BARS)


def test_bars_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere there are none while a command runs, in processes that it starts neither; then all is as it was."""
    for name in NO_BARS:
        monkeypatch.delenv(name, raising=False)
    before = bars_now()
    assert before == (True, True, True, None, None)
    assert friendly(bars_now) == (False, False, False, "1", "1")
    assert friendly(lambda: auto.tqdm((), disable=False).disable) is False
    assert bars_now() == before
    with pytest.raises(ZeroDivisionError):
        friendly(lambda: 1 // 0)
    assert bars_now() == before
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert friendly(bars_now) == before


@pytest.mark.parametrize(
    ("off", "on"),
    [(bars.disable_progress_bar, bars.enable_progress_bar), (disable_progress_bars, enable_progress_bars)],
)
def test_bars_that_somebody_turned_off_stay_off(off: Any, on: Any) -> None:
    off()
    try:
        before = bars_now()
        friendly(lambda: None)
        assert bars_now() == before != (True, True, True, None, None)
    finally:
        on()


def test_a_model_is_read_without_bars(smollm2_dir: str, capfd: pytest.CaptureFixture[str]) -> None:
    friendly(load_smollm2)
    assert "it/s" not in capfd.readouterr().err


FILES = {"bytes": b"\xff\xfe\x00", "cut.json": b"{no", "list.json": b"[1]", "kind.json": b'{"type": "objekt"}'}


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        ("bench structured --json-schema nowhere", 2, "error: there is no schema nowhere"),
        ("bench structured --json-schema .", 2, "error: there is no schema ."),
        ("bench structured --json-schema bytes", 2, "error: bytes is no text in UTF-8: byte 0 is not"),
        ("bench structured --json-schema cut.json", 2, "error: cut.json is no JSON: Expecting"),
        ("bench structured --json-schema list.json", 2, "error: list.json is no JSON schema: an object is wanted"),
        (
            "bench structured --json-schema kind.json",
            2,
            "error: kind.json: the schema cannot be compiled: Unsupported type",
        ),
        ("bench serve --dataset-name custom --dataset-path bytes", 1, "error: bytes is no text in UTF-8"),
        ("bench serve --dataset-name sharegpt --dataset-path bytes", 1, "error: bytes is no text in UTF-8"),
        ("bench perplexity smollm2 --text bytes", 1, "error: bytes is no text in UTF-8"),
        ("quantize smollm2 --to awq --out new --calibration bytes", 1, "error: bytes is no text in UTF-8"),
        ("quantize smollm2 --to awq --out new --calibration nowhere", 1, "error: there is no calibration text nowhere"),
        ("run-batch -i cut.json -o out --model smollm2 --chat-template bytes", 1, "error: bytes is no text in UTF-8"),
        ("run-batch -i cut.json -o out --model smollm2 --chat-template nowhere", 1, "error: chat_template must be"),
        ("run-batch -i cut.json -o out --config bytes", 1, "error: bytes is no text in UTF-8"),
        ("serve smollm2 --chat-template nowhere", 2, "chat_template must be a Jinja template or the path of one"),
        ("serve --config bytes", 2, "bytes is no text in UTF-8"),
        ("serve --config nowhere", 1, "error: there is no file of options nowhere"),
    ],
)
def test_bad_files_are_named_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, status: int, said: str
) -> None:
    def load(*args: object, **options: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", load)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(hf_paged.quantization.load, "load", load)
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    found = runner.invoke(app, command.split(), env={"COLUMNS": "300"})
    assert (found.exit_code, found.stdout) == (status, ""), found.output
    line = " ".join(found.stderr.replace("│", "").split())
    assert said in line
    if said.startswith("error:"):
        assert line.startswith("error:") and len(found.stderr.splitlines()) == 1
