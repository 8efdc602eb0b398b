"""A server on a free port, in a thread of this process, and a model that says what a test tells it to."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from hf_paged.integrations.openai_server import ServerOptions, make_app
from hf_paged.integrations.openai_server.http_server import HttpServer


class Live:
    """A server that runs, and the model behind it."""

    def __init__(self, model: Any, app: Any, port: int) -> None:
        self.model, self.app, self.url = model, app, f"http://127.0.0.1:{port}"

    def wait_idle(self, seconds: float = 20.0) -> None:
        """Waits until nothing is under way, and demands that nothing has leaked."""
        engine, end = self.model.engine, time.monotonic() + seconds
        while (engine.has_unfinished() or self.app.state.serving.load.count) and time.monotonic() < end:
            time.sleep(0.01)
        assert not engine.has_unfinished()
        assert self.app.state.serving.load.count == 0
        assert engine.scheduler.num_active_pages == 0
        assert engine.scheduler.num_waiting == 0 and not engine.scheduler.running
        assert engine.scheduler.pool.num_used == engine.scheduler.tree.num_pages


@contextmanager
def serve(model: Any, options: ServerOptions | None = None, **uvicorn_options: Any) -> Iterator[Live]:
    app = make_app(model, options, name="tiny")
    server = HttpServer(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=10, **uvicorn_options))
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: server.run(sockets=[listening]), daemon=True)
    thread.start()
    end = time.monotonic() + 30
    while not server.started and time.monotonic() < end:
        time.sleep(0.01)
    assert server.started
    live = Live(model, app, listening.getsockname()[1])
    try:
        yield live
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server does not end"


def say(monkeypatch: Any, model: Any, *texts: str) -> None:
    """Has the model say these texts, one per sample, whatever it is asked; then its end-of-sequence token."""
    intake = model.engine.intake
    request, tokenizer = type(intake).request, intake.tokenizer
    scripts = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts]

    def scripted(prompt: Any, sampling: Any, **options: Any) -> Any:
        script = scripts.pop(0) if len(scripts) > 1 else scripts[0]

        def force(generated: list[int], logits: Any) -> Any:
            forced = logits.new_full(logits.shape, -float("inf"))
            forced[script[min(len(generated), len(script) - 1)]] = 0.0
            return forced

        return request(intake, prompt, sampling.clone(logits_processors=[force]), **options)

    monkeypatch.setattr(intake, "request", scripted)
