"""FrontEngine: what fronts (lists of prompts, streams, servers) ask of an engine, be it one or several replicas."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from hf_paged.engine.gate import Gate
from hf_paged.engine.intake import Intake
from hf_paged.engine.loop import Deliver
from hf_paged.engine.request import Request
from hf_paged.engine.stats import EngineLoad, EngineStats, StepRecord
from hf_paged.outputs import RequestOutput


class FrontEngine(Protocol):
    """`Engine` says what each of these does."""

    intake: Intake
    gate: Gate
    observers: list[Callable[[StepRecord], None]]

    @property
    def stats(self) -> EngineStats: ...

    @property
    def load(self) -> EngineLoad: ...

    @property
    def paused(self) -> bool: ...

    @property
    def num_unfinished(self) -> int: ...

    def lost(self) -> str | None: ...

    def check(self, request: Request) -> None: ...

    def submit(self, requests: list[Request], deliver: Deliver | None = None) -> None: ...

    def abort(self, request_ids: str | Iterable[str]) -> None: ...

    def run(self, requests: list[Request]) -> Iterator[RequestOutput]: ...

    def drive(self) -> bool: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def sleep(self, level: int = 1) -> None: ...

    def wake_up(self) -> None: ...

    def reset_prefix_cache(self) -> None: ...

    def weights_updated(self, kv: str = "keep") -> None: ...

    def set_tokenizer(self, tokenizer: Any) -> None: ...
