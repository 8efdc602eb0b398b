"""Logs: as JSON, a line per request, and a line about the engine every now and then."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from hf_paged.engine.engine import Engine
from hf_paged.engine.request import Request

logger = logging.getLogger(__name__)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time` (ISO 8601, UTC), `level`, `logger`, `message`, and what is in the record's
    `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": when, "level": record.levelname, "logger": record.name}
        line["message"] = record.getMessage()
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.name == "uvicorn.access" and isinstance(record.args, tuple) and len(record.args) == 5:
            line |= dict(zip(("client", "method", "path", "http_version", "status"), record.args, strict=True))
        line |= getattr(record, "fields", {})
        return json.dumps(line, ensure_ascii=False, default=str)


def configure_logging(log_format: str) -> None:
    """Has the root logger write to stderr.

    Args:
        log_format: "json" or "text".
    """
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if log_format == "json" else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


class RequestLog:
    """Logs a line about every request that ends, until `close`: counts and times, nothing of what was said."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self._engine, self._model_name = engine, model_name
        engine.request_observers.append(self._ended)

    def close(self) -> None:
        self._engine.request_observers.remove(self._ended)

    def _ended(self, request: Request) -> None:
        times = request.metrics
        end = times.finished_time or time.monotonic()
        fields: dict[str, Any] = {
            "request_id": request.request_id,
            "model": self._model_name,
            "adapter": request.adapter_name,
            "finish_reason": request.sequences[0].finish_reason,
            "prompt_tokens": request.num_prompt,
            "cached_tokens": request.num_cached_tokens,
            "completion_tokens": sum(sequence.num_generated for sequence in request.sequences),
            "queue_s": _since(times.arrival_time, times.first_scheduled_time),
            "ttft_s": _since(times.arrival_time, times.first_token_time),
            "e2e_s": _since(times.arrival_time, end),
            "preemptions": times.num_preemptions,
        }
        if request.error is not None:
            fields["error"] = f"{type(request.error).__name__}: {request.error}"
        log_fields("request", fields)


class StatsLog:
    """Logs what the engine does, every so many seconds while it does something, until `close`."""

    def __init__(self, engine: Engine, interval_s: float = 10.0) -> None:
        self._engine, self._interval_s = engine, interval_s
        self._before = self._totals()
        self._was_idle = True
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hf_paged-stats", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(self._interval_s):
            self._log()

    def _totals(self) -> tuple[float, int, int, int, int]:
        stats, found = self._engine.stats, self._engine.scheduler.stats
        return time.monotonic(), stats.prompt_tokens, stats.generation_tokens, found.prefix_queries, found.prefix_hits

    def _log(self) -> None:
        engine, scheduler, totals = self._engine, self._engine.scheduler, self._totals()
        seconds, prompt, generated, queries, hits = (new - old for new, old in zip(totals, self._before, strict=True))
        self._before = totals
        running = len({sequence.request.request_id for sequence in list(scheduler.running)})
        idle = not (prompt or generated or engine.num_unfinished)
        if not (idle and self._was_idle):  # the end of work is told once
            fields = {
                "prompt_tokens_per_s": round(prompt / seconds, 1),
                "generation_tokens_per_s": round(generated / seconds, 1),
                "running": running,
                "waiting": max(engine.num_unfinished - running, 0),
                "kv_cache_usage": round(scheduler.num_active_pages / scheduler.num_pages, 4),
                "prefix_cache_hit_rate": round(hits / queries, 4) if queries else None,
            }
            log_fields("engine", fields)
        self._was_idle = idle


def log_fields(what: str, fields: Mapping[str, Any]) -> None:
    """A line of named values: fields of an object as JSON, `name=value` as text."""
    shown = " ".join(f"{name}={value}" for name, value in fields.items() if value is not None)
    logger.info("%s: %s", what, shown, extra={"fields": {"event": what, **fields}})


def _since(start: float, end: float | None) -> float | None:
    return None if end is None else round(end - start, 6)
