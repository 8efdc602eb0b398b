"""`hf-paged serve` in processes of its own, and load balancers before several of them."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


CLIENT = httpx.Client(timeout=60)
"""To look at replicas: one that is made per request costs more than the request."""


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def wait_until(true: Callable[[], bool], seconds: float, told: str) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, told
        time.sleep(0.05)


def healthy(url: str, path: str = "/health") -> bool:
    try:
        return CLIENT.get(url + path).status_code == 200
    except httpx.TransportError:
        return False


class Replica:
    """A server process at a port that it keeps when it is started again.

    Args:
        folder: of the model.
        options: of `hf-paged serve`.
    """

    def __init__(self, folder: str, *options: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-c", "from hf_paged.cli import main; main()", "serve", folder]
        self._command += ["--port", str(self.port), "--page-size", "16", "--num-pages", "512", *options]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)

    def wait_ready(self) -> None:
        wait_until(lambda: healthy(self.url) or not self.running, 120, "the server does not start")
        assert self.running, "the server ended"

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self, with_signal: signal.Signals, seconds: float = 60) -> int:
        """Its exit status."""
        assert self.process is not None
        self.process.send_signal(with_signal)
        return self.process.wait(seconds)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = CLIENT.get(self.url + "/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if re.match(rf"hf_paged:{name}\{{", line))

    @property
    def load(self) -> int:
        """Requests under way."""
        return int(CLIENT.get(self.url + "/load").json()["server_load"])


@contextmanager
def replicas(folder: str, count: int, *options: str) -> Iterator[list[Replica]]:
    made = [Replica(folder, *options) for _ in range(count)]
    try:
        for replica in made:
            replica.start()
        for replica in made:
            replica.wait_ready()
        yield made
    finally:
        for replica in made:
            if replica.running:
                replica.stop(signal.SIGKILL)


@contextmanager
def nginx(upstream: str, behind: Sequence[Replica], folder: Path) -> Iterator[str]:
    """nginx with the files in deploy/nginx, at other ports. Gives its URL.

    Args:
        upstream: "least-conn" or "conversation".
        folder: an empty one, for its files.
    """
    port = free_port()
    main = (DEPLOY / "nginx" / "nginx.conf").read_text().replace("listen 8080", f"listen 127.0.0.1:{port}")
    main = main.replace("/tmp/", f"{folder}/").replace("/dev/std", f"{folder}/std")
    servers = "\n".join(f"    server 127.0.0.1:{one.port} max_fails=1 fail_timeout=10s;" for one in behind)
    text = (DEPLOY / "nginx" / f"upstream-{upstream}.conf").read_text()
    text, count = re.subn(r"(?m)(^    server 127\.0\.0\.1:.*\n)+", servers + "\n", text)
    assert count == 1
    (folder / "nginx.conf").write_text(main)
    (folder / "upstream.conf").write_text(text)
    folder.chmod(0o755)
    command = [shutil.which("nginx") or "nginx", "-c", str(folder / "nginx.conf"), "-p", str(folder)]
    with running([*command, "-g", "daemon off;"], f"http://127.0.0.1:{port}", "/health") as url:
        yield url


@contextmanager
def running(command: Sequence[str], url: str, path: str) -> Iterator[str]:
    """A program that serves, until it is no longer needed."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: healthy(url, path) or process.poll() is not None, 60, f"{command[0]} does not start")
        assert process.poll() is None, f"{command[0]} ended"
        yield url
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
