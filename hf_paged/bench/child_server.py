"""A server in a process of its own, for benchmarks: it ends with its parent, however that ends."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from tempfile import TemporaryFile
from typing import Any

from hf_paged.bench.isolate import die_with_parent
from hf_paged.bench.models import DTYPES, SHAPES, checkpoint, make_subject
from hf_paged.bench.run import check_names

START_SECONDS = 600


@dataclass(frozen=True)
class ServedModel:
    """A model by name, to be loaded in this process and in another one alike.

    Raises:
        ValueError: there is no such dtype.
    """

    name: str
    """smollm2, one of `SHAPES`, or what `hf_paged.load` takes."""
    dtype: str | None = None
    device: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of `EngineConfig`."""

    def __post_init__(self) -> None:
        check_names("dtype", [self.dtype] if self.dtype else [], DTYPES)

    def load(self) -> Any:
        """The model, wrapped. Shapes with random weights have no tokenizer.

        Raises:
            FileNotFoundError, ValueError: as `hf_paged.load`.
        """
        from hf_paged.quantization.load import load
        from hf_paged.wrap import wrap

        if self.name in SHAPES:
            return wrap(make_subject(self.name, self.dtype, self.device).model, tokenizer=False, **self.options)
        return load(checkpoint(self.name), self.dtype, device=self.device, **self.options)


@contextmanager
def started(model: ServedModel) -> Iterator[str]:
    """Serves a model in a child process; yields the server's URL, and ends it.

    Raises:
        RuntimeError: it does not start; the message has its last words.
    """
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    with TemporaryFile("w+", errors="replace") as said:
        child = subprocess.Popen(
            [sys.executable, "-m", "hf_paged.bench.child_server", json.dumps(asdict(model))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the parent, which ends the child
        )
        try:
            assert child.stdout is not None
            line = child.stdout.readline()  # its port, or nothing when it has died
            url = f"http://127.0.0.1:{line.decode().strip()}"
            if not line or not _healthy(url, child):
                said.seek(0)
                last = next((words for words in reversed(said.readlines()) if words.strip()), "it said nothing")
                raise RuntimeError(f"the server did not start: {last.strip()}")
            yield url
        finally:
            child.kill()  # nothing is under way that anybody waits for
            child.wait()
            if child.stdout is not None:
                child.stdout.close()


def _healthy(url: str, child: subprocess.Popen[bytes]) -> bool:
    import httpx

    end = time.monotonic() + START_SECONDS
    while child.poll() is None and time.monotonic() < end:
        try:
            return httpx.get(url + "/health", timeout=10).status_code == 200
        except httpx.TransportError:
            time.sleep(0.1)
    return False


def main() -> None:
    """The child."""
    die_with_parent()
    import uvicorn

    from hf_paged.integrations.openai_server import ServerOptions, make_app

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints does so to standard error
    served = ServedModel(**json.loads(sys.argv[1]))
    app = make_app(served.load(), ServerOptions(max_queued_requests=100_000), name=served.name)
    listening = socket.socket(proto=socket.IPPROTO_TCP)  # else asyncio takes it for no TCP, and packets wait for others
    listening.bind(("127.0.0.1", 0))
    out.write(f"{listening.getsockname()[1]}\n")
    out.close()
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listening])


if __name__ == "__main__":
    main()
