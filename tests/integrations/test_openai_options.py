"""Options of `hf-paged serve`."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_paged.cli import app
from hf_paged.integrations.openai_server.options import help_text, parse_options
from hf_paged.llm.arguments import EngineArgs


def test_the_command_line() -> None:
    line = "folder --host 0.0.0.0 --port=9000 --api-key a b --served-model-name m --enforce-eager --max-model-len 4096"
    line += " --no-enable-prefix-caching --enable-auto-tool-choice --tool-call-parser hermes --api-key c --swap-space 4"
    line += " --gpu-memory-utilization 0.5 --kv-cache-dtype auto --speculative-config"
    server, args = parse_options([*line.split(" "), '{"method": "ngram"}'])
    assert (server.host, server.port, server.served_model_name) == ("0.0.0.0", 9000, ["m"])
    assert server.api_key == ["c"] and server.enable_auto_tool_choice and server.tool_call_parser == "hermes"
    config = args.engine_config()
    assert args.model == "folder" and args.enforce_eager and config.compile == "off"
    assert config.max_model_len == 4096 and not config.enable_prefix_caching and config.gpu_memory_utilization == 0.5
    assert config.speculation is not None and config.speculation.method == "ngram"


def test_a_file_of_options(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("model: there\nport: 7000\napi-key: 123\nmax_num_seqs: 8\nenforce-eager: true\n")
    server, args = parse_options(["--config", str(file), "--port", "7001"])
    assert (args.model, server.port, server.api_key) == ("there", 7001, ["123"])
    assert args.engine_config().max_num_seqs == 8 and args.enforce_eager


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--port 80", "which model"),
        ("m other", "one model"),
        ("m --prot 80", "Did you mean --port"),
        ("m --max-model-length 80", "Did you mean --max-model-len"),
        ("m --port x", "--port must be an integer"),
        ("m --port -1", "port must not be negative"),
        ("m --port", "needs a value"),
        ("m --enable-auto-tool-choice", "needs tool_call_parser"),
        ("m --tool-call-parser none", "tool_call_parser must be one of hermes"),
        ("m --reasoning-parser none", "reasoning_parser must be one of think"),
        ("m --ssl-keyfile k", "both ssl_keyfile and ssl_certfile"),
        ("m --ssl-keyfile k --ssl-certfile c", "there is no file k"),
        ("m --data-parallel-size 0", "data_parallel_size must be a positive integer"),
        ("m --max-num-seqs 0", "max_num_seqs"),
        ("m --config nowhere.yaml", "nowhere.yaml"),
        ("m --uvicorn-log-level loud", "uvicorn_log_level"),
        ("m --log-format xml", "log_format"),
    ],
)
def test_bad_lines(line: str, told: str) -> None:
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=told):
        parse_options(line.split())


@pytest.mark.parametrize("text", ["- a", "{", "prot: 1"])
def test_bad_files(tmp_path: Path, text: str) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"options\.yaml|prot"):
        parse_options(["m", "--config", str(file)])


def test_the_program_says_what_is_wrong(tiny_checkpoint: str) -> None:
    runner: Any = CliRunner()
    assert "--served-model-name" in runner.invoke(app, ["serve", "--help"]).output
    found = runner.invoke(app, ["serve", tiny_checkpoint, "--prot", "1"])
    assert found.exit_code == 2 and "--port" in found.output
    assert help_text().count("\n") > 30


def test_what_is_wrong_is_said_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: EngineArgs) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(EngineArgs, "load", load)
    monkeypatch.setattr("hf_paged.integrations.openai_server.run.configure_logging", lambda log_format: None)
    runner: Any = CliRunner()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        found = runner.invoke(app, ["serve", "m", "--port", port])
        assert found.exit_code == 1 and f"cannot listen at 127.0.0.1:{port}" in found.output.replace("\n", " ")
    lora = ["--enable-lora", "--lora-modules", f"sql={tmp_path / 'nothing'}", "--port", "0"]
    found = runner.invoke(app, ["serve", "m", *lora])
    assert found.exit_code == 1 and "there is no folder" in found.output
    assert runner.invoke(app, ["serve", "m", "--port", "70000"]).exit_code == 2
