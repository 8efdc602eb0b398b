"""`hf-paged chat` and `hf-paged complete`, against a live server and with a model in the process."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import Live, say, serve
from models.families import make_model
from models.tiny_tokenizer import make_tokenizer
from typer.testing import CliRunner

import hf_paged
from hf_paged.cli import app
from hf_paged.integrations.openai_server import ServerOptions

runner = CliRunner()
OPTIONS = {"page_size": 16, "num_pages": 256, "max_num_seqs": 8, "max_model_len": 2000}
GREEDY = ["--temperature", "0", "--max-tokens", "8"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    model = make_model("Llama", max_position_embeddings=2048)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def live(checkpoint: Path) -> Iterator[Live]:
    with serve(hf_paged.load(checkpoint, **OPTIONS), ServerOptions(api_key=["secret"])) as running:
        yield running


@pytest.fixture(autouse=True)
def left_idle(live: Live) -> Iterator[None]:
    yield
    live.wait_idle()


def run(*arguments: str, text: str | None = None) -> Any:
    return runner.invoke(app, arguments, input=text, env={"COLUMNS": "200", "OPENAI_API_KEY": "secret"})


def asked(live: Live, path: str, **body: Any) -> dict[str, Any]:
    body |= {"temperature": 0, "max_tokens": 8}
    return httpx.post(live.url + path, json=body, headers={"Authorization": "Bearer secret"}).json()["choices"][0]


@pytest.mark.parametrize("local", [False, True])
def test_an_answer_is_the_servers(live: Live, checkpoint: Path, local: bool) -> None:
    where = ["--model", str(checkpoint), "--option", "max_model_len=200"] if local else ["--url", live.url]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the sea"}]
    wanted = asked(live, "/v1/chat/completions", messages=messages)["message"]["content"]
    found = run("chat", *where, *GREEDY, "--system-prompt", "be brief", "-q", "the sea")
    assert (found.exit_code, found.stdout) == (0, wanted + "\n")
    # A pipe is one message, newlines and all, and its answer is all that standard output gets.
    messages = [{"role": "user", "content": "the sea\nand the sky"}]
    wanted = asked(live, "/v1/chat/completions", messages=messages)["message"]["content"]
    assert run("chat", *where, *GREEDY, text="the sea\nand the sky").stdout == wanted + "\n"
    wanted = asked(live, "/v1/completions", prompt="the sea")["text"]
    assert run("complete", *where, *GREEDY, "-q", "the sea").stdout == wanted + "\n"
    found = run("complete", *where, *GREEDY, "--stats", text="the sea")
    assert found.stdout == wanted + "\n" and "8 tokens in" in found.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["chat", "--url", "http://127.0.0.1:9", "-q", "x"], 1, "start a server with hf-paged serve MODEL"),
        (["chat", "--url", "localhost:8000", "-q", "x"], 1, "a URL begins with http://"),
        (["chat", "--url", "LIVE", "--api-key", "wrong", "-q", "x"], 1, "give the server's key with --api-key"),
        (["chat", "--url", "LIVE", "--model-name", "gpt", "-q", "x"], 1, "the model 'gpt' does not exist"),
        (["chat", "--url", "LIVE", "--model", "m", "-q", "x"], 2, "give one or the other"),
        (["complete", "--option", "a=1", "-q", "x"], 2, "give --model with it"),
        (["complete", "--model", "nowhere", "-q", "x"], 1, "no checkpoint at 'nowhere'"),
        (["complete", "--model", "CHECKPOINT", "--option", "page_sise=4", "-q", "x"], 1, "Did you mean 'page_size'?"),
        (["complete", "--model", "CHECKPOINT", "--option", "page_size", "-q", "x"], 2, "an option is key=value"),
        (["complete", "--url", "LIVE", "-q", " "], 2, "there is nothing to answer"),
        (["complete", "--url", "LIVE", "-q", "x" * 3000], 1, "nothing is left to generate"),
        (["complete", "--url", "LIVE", "-q", "x", "--max-tokens", "0"], 2, "max-tokens"),
    ],
)
def test_what_is_wrong_is_said(live: Live, checkpoint: Path, arguments: list[str], status: int, said: str) -> None:
    places = {"LIVE": live.url, "CHECKPOINT": str(checkpoint)}
    found = run(*(places.get(word, word) for word in arguments))
    assert (found.exit_code, found.stdout) == (status, "")
    assert said in " ".join(found.stderr.replace("│", "").split())


def test_a_missing_httpx_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    found = run("chat", "-q", "x")
    assert found.exit_code == 1 and "pip install 'hf_paged[server]'" in found.stderr


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = pty.openpty()

        def take_terminal() -> None:
            os.setsid()
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

        program = [sys.executable, "-c", "from hf_paged.cli import main; main()", *arguments]
        environment = os.environ | {"TERM": "dumb", "OPENAI_API_KEY": "secret"}
        self.process = subprocess.Popen(
            program, stdin=slave, stdout=slave, stderr=slave, preexec_fn=take_terminal, env=environment, close_fds=True
        )
        os.close(slave)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, text: str, seconds: float = 120.0) -> str:
        """Reads until a text comes; returns what came with it, and forgets it."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"{text!r} does not come: {self.seen!r}"
            if select.select([self._master], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self._master, 4096).decode("utf-8", "replace")
                except OSError as error:  # the program has ended
                    raise AssertionError(f"{text!r} did not come: {self.seen!r}") from error
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def test_a_conversation_at_a_terminal(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several turns; Ctrl-C stops an answer, on the server too, and not the program."""
    seen: list[list[dict[str, str]]] = []
    say(monkeypatch, live.model, "first.", "second.", "x" * 1500, "fourth.", "fifth.")
    template = live.model.engine.intake.tokenizer.apply_chat_template

    def watched(messages: Any, **options: Any) -> Any:
        seen.append([dict(message) for message in messages])
        return template(messages, **options)

    monkeypatch.setattr(live.model.engine.intake.tokenizer, "apply_chat_template", watched)
    terminal = Terminal("chat", "--url", live.url, "--system-prompt", "S")
    try:
        terminal.wait_for("/reset forgets")
        terminal.wait_for("> ")
        terminal.type("one\n")
        terminal.wait_for("first.")
        terminal.wait_for("> ")
        terminal.type("\x03")  # with nothing to stop
        terminal.wait_for("ends the program")
        terminal.wait_for("> ")
        terminal.type("two\n")
        terminal.wait_for("second.")
        terminal.wait_for("> ")
        assert [message["content"] for message in seen[-1]] == ["S", "one", "first.", "two"]
        terminal.type("long\n")
        terminal.wait_for("xxx")
        terminal.type("\x03")
        terminal.wait_for("> ")
        live.wait_idle()
        terminal.type("/rest\n")
        terminal.wait_for("/reset forgets")
        terminal.type("three\n")
        terminal.wait_for("fourth.")
        stopped = seen[-1][-2]["content"]
        assert stopped.startswith("xxx") and len(stopped) < 1500
        terminal.wait_for("> ")
        terminal.type("/reset\n")
        terminal.wait_for("is forgotten")
        terminal.type("anew\n")
        terminal.wait_for("fifth.")
        assert [message["content"] for message in seen[-1]] == ["S", "anew"]
        terminal.wait_for("> ")
        terminal.type("/exit\n")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.end()


def test_ctrl_c_with_a_model_in_the_process(checkpoint: Path) -> None:
    terminal = Terminal("complete", "--model", str(checkpoint), "--max-tokens", "1900", "--temperature", "1")
    try:
        terminal.wait_for("> ")
        for _ in range(2):
            terminal.type("sea\n")
            terminal.wait_for("sea")  # the terminal's echo, and the completion's beginning
            terminal.wait_for("sea")
            time.sleep(0.3)
            terminal.type("\x03")
            terminal.wait_for("> ", 30)
        for _ in range(20):  # one that comes before the prompt is nobody's
            terminal.type("\x04")
            with suppress(subprocess.TimeoutExpired):
                terminal.process.wait(2)
                break
        assert terminal.process.poll() in (0, 130), "a signal that is late may come after the end of the input"
    finally:
        terminal.end()


def test_ctrl_c_ends_a_single_question(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, live.model, "x" * 1500)
    program = [sys.executable, "-c", "from hf_paged.cli import main; main()", "chat", "--url", live.url, "-q", "x"]
    with subprocess.Popen(
        program, stdout=subprocess.PIPE, env=os.environ | {"OPENAI_API_KEY": "secret"}
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.read(3) == b"xxx"
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(30) == 130 and len(rest) < 1400
