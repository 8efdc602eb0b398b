"""An engine in a process of its own: one that breaks its CUDA context or keeps memory harms nobody else.

The parent writes what to run as JSON to the child's standard input, and the child writes the `EngineRun` as JSON to its
standard output; whatever else it prints goes to standard error.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from tempfile import TemporaryFile

import torch

from hf_paged.bench.engines import run_engine
from hf_paged.bench.models import Subject
from hf_paged.bench.run import EngineRun, Settings
from hf_paged.bench.workloads import Workload

START_SECONDS = 180
"""What a child may take beside its timed runs: importing, making the model, compiling."""


def run_isolated(name: str, subject: Subject, work: Workload, settings: Settings) -> EngineRun:
    """As `run_engine`, in a child process. One that outlives its time limit by far is killed with its own children."""
    job = {
        "engine": name,
        "subject": [subject.name, str(subject.dtype).removeprefix("torch."), str(subject.device)],
        "work": asdict(work),
        "settings": asdict(settings),
    }
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    patience = None if settings.time_limit is None else settings.time_limit + START_SECONDS
    # Files, not pipes: those end only when every process that the child started has closed them.
    with TemporaryFile("w+") as given, TemporaryFile("w+") as printed, TemporaryFile("w+", errors="replace") as said:
        json.dump(job, given)
        given.seek(0)
        child = subprocess.Popen(
            [sys.executable, "-m", "hf_paged.bench.isolate"],
            stdin=given,
            stdout=printed,
            stderr=said,
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,
        )
        try:
            status = child.wait(patience)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        printed.seek(0)
        said.seek(0)
        answer, last = printed.read(), next((line for line in reversed(said.readlines()) if line.strip()), "")
    if answer:
        return EngineRun(**json.loads(answer))
    if status is None:
        return EngineRun(name, note=f"did not finish in {settings.time_limit:g} s, and was killed")
    return EngineRun(name, note=f"failed: its process ended with status {status}: {last.strip()}")


def die_with_parent() -> None:
    """On Linux the kernel kills this process when its parent ends, however that ends: a peer must not go on alone."""
    set_death_signal = 1
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def main() -> None:
    """The child."""
    die_with_parent()
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = json.load(sys.stdin)
    name, dtype, device = job["subject"]
    run = run_engine(
        job["engine"],
        Subject(name, getattr(torch, dtype), torch.device(device)),
        Workload(**job["work"]),
        Settings(**job["settings"]),
    )
    json.dump(asdict(run), answer)
    answer.close()


if __name__ == "__main__":
    main()
