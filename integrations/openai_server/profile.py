"""/start_profile and /stop_profile: traces of what the engine does, while it serves."""

from __future__ import annotations

import time
from pathlib import Path

from fastapi import FastAPI

from hf_paged.engine.engine import Engine
from hf_paged.integrations.openai_server.errors import ApiError
from hf_paged.observe.perfetto import PerfettoTrace


class Profiler:
    """One trace at a time, each in a file of its own.

    Args:
        folder: made when it is first needed.
    """

    def __init__(self, engine: Engine, folder: Path) -> None:
        self._engine, self._folder = engine, folder
        self._trace: PerfettoTrace | None = None

    def start(self) -> Path:
        """Begins a trace. Returns the file that it is written to.

        Raises:
            ApiError: 409, one is under way.
        """
        if self._trace is not None:
            raise ApiError(409, f"a profile is being taken already, to {self._trace.path}: POST /stop_profile first")
        self._folder.mkdir(parents=True, exist_ok=True)
        when = time.strftime("%Y%m%d-%H%M%S")
        number = sum(1 for _ in self._folder.glob(f"engine-{when}*.json"))
        file = self._folder / f"engine-{when}{f'-{number}' if number else ''}.json"
        self._trace = PerfettoTrace(file, self._engine)
        return file

    def stop(self) -> Path:
        """Ends it. Returns its file.

        Raises:
            ApiError: 409, none was begun.
        """
        trace, self._trace = self._trace, None
        if trace is None:
            raise ApiError(409, "no profile is being taken: POST /start_profile first")
        trace.close()
        return trace.path

    def close(self) -> None:
        """Ends what is under way."""
        if self._trace is not None:
            self.stop()


def add_profile(app: FastAPI, profiler: Profiler) -> None:
    """The two endpoints; they answer with the path of the file."""

    @app.post("/start_profile")
    async def start_profile() -> dict[str, str]:
        return {"path": str(profiler.start())}

    @app.post("/stop_profile")
    async def stop_profile() -> dict[str, str]:
        return {"path": str(profiler.stop())}
