"""EngineMetrics: what an engine does, counted under vLLM's names."""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate

from hf_paged.engine.engine import Engine
from hf_paged.engine.request import Request
from hf_paged.engine.stats import StepRecord
from hf_paged.speculative.speculator import FORCED

_SHORT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0)
_LONG_S = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0)
_TOKENS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))
_STEP_TOKENS = tuple(float(2**e) for e in range(15))
_FEW = (1.0, 2.0, 5.0, 10.0, 20.0)


@dataclass
class Histogram:
    """Counts of values by upper bound.

    Args:
        bounds: ascending; what is beyond the last is counted too.
    """

    name: str
    help: str
    bounds: tuple[float, ...]
    labels: tuple[tuple[str, str], ...] = ()
    counts: list[int] = field(default_factory=list)
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> list[int]:
        """Per bound, and for all: how many values are no larger."""
        return list(accumulate(self.counts))


@dataclass(frozen=True)
class Value:
    """A counter or a gauge at one moment."""

    name: str
    kind: str
    """"counter" or "gauge"."""
    help: str
    value: float
    labels: tuple[tuple[str, str], ...] = ()


class EngineMetrics:
    """Watches an engine from its making to `close`.

    `values` and `histograms` may be read in any thread; the names are vLLM's, without a prefix.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._last_token_s: dict[tuple[str, int], float] = {}
        self._over: list[tuple[str, int]] = []
        """Sequences that have ended, and whose last step is not counted yet."""
        self._success: dict[str, int] = {"stop": 0, "length": 0, "abort": 0, "error": 0}
        self._histograms = {
            histogram.name: histogram
            for histogram in (
                Histogram("time_to_first_token_seconds", "Time to first token.", _SHORT_S),
                Histogram("inter_token_latency_seconds", "Time between two tokens of a sequence.", _SHORT_S),
                Histogram("request_time_per_output_token_seconds", "Mean time per token of a request.", _SHORT_S),
                Histogram("e2e_request_latency_seconds", "Time from arrival to the end.", _LONG_S),
                Histogram("request_queue_time_seconds", "Time until a request was first scheduled.", _LONG_S),
                Histogram("request_prefill_time_seconds", "Time from then to the first token.", _LONG_S),
                Histogram("request_decode_time_seconds", "Time from the first token to the end.", _LONG_S),
                Histogram("request_inference_time_seconds", "Time from first scheduled to the end.", _LONG_S),
                Histogram("request_prompt_tokens", "Prompt tokens per request.", _TOKENS),
                Histogram("request_generation_tokens", "Generated tokens per request.", _TOKENS),
                Histogram("request_max_num_generation_tokens", "Tokens of a request's longest sample.", _TOKENS),
                Histogram("request_params_n", "n per request.", _FEW),
                Histogram("request_params_max_tokens", "max_tokens per request.", _TOKENS),
                Histogram("iteration_tokens_total", "Tokens per step.", _STEP_TOKENS),
            )
        }
        engine.observers.append(self._step)
        engine.request_observers.append(self._ended)

    def close(self) -> None:
        """Stops watching."""
        self._engine.observers.remove(self._step)
        self._engine.request_observers.remove(self._ended)

    def histograms(self) -> list[Histogram]:
        """Copies, as they stand."""
        with self._lock:
            copies = []
            for histogram in self._histograms.values():
                copy = Histogram(histogram.name, histogram.help, histogram.bounds)
                copy.counts, copy.sum = list(histogram.counts), histogram.sum
                copies.append(copy)
            return copies

    def values(self) -> list[Value]:
        """Counters and gauges, as they stand."""
        engine = self._engine
        scheduler, stats = engine.scheduler, engine.stats
        running = {sequence.request.request_id for sequence in list(scheduler.running)}
        unfinished = engine.num_unfinished
        used = scheduler.num_active_pages / scheduler.num_pages
        counters = [
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", scheduler.stats.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found there.", scheduler.stats.prefix_hits),
            ("num_preemptions", "Sequences that went back to the queue.", scheduler.stats.num_preemptions),
            ("prompt_tokens", "Prompt tokens computed.", stats.prompt_tokens),
            ("generation_tokens", "Tokens generated.", stats.generation_tokens),
        ]
        drafts = [stats for method, stats in engine.speculator.stats.items() if method != FORCED]
        if drafts:
            counters += [
                ("spec_decode_num_drafts", "Drafts verified.", sum(d.num_drafts for d in drafts)),
                ("spec_decode_num_draft_tokens", "Tokens drafted.", sum(d.num_draft_tokens for d in drafts)),
                (
                    "spec_decode_num_accepted_tokens",
                    "Drafted tokens taken.",
                    sum(d.num_accepted_tokens for d in drafts),
                ),
            ]
        gauges = [
            ("num_requests_running", "Requests that run.", len(running)),
            ("num_requests_waiting", "Requests that wait.", max(unfinished - len(running), 0)),
            ("kv_cache_usage_perc", "Share of the pages that running sequences hold; 1 is all.", used),
            ("engine_sleep_state", "1 while the engine is paused.", float(engine.paused)),
        ]
        found = [Value(name, "counter", help, value) for name, help, value in counters]
        found += [Value(name, "gauge", help, value) for name, help, value in gauges]
        with self._lock:
            ends = dict(self._success)
        told = "Requests that ended."
        found += [Value("request_success", "counter", told, n, (("finished_reason", end),)) for end, n in ends.items()]
        labels = (
            ("block_size", str(scheduler.page_size)),
            ("num_gpu_blocks", str(scheduler.num_pages)),
            ("enable_prefix_caching", str(scheduler.enable_prefix_caching)),
        )
        found.append(Value("cache_config_info", "gauge", "How the page pool is made.", 1.0, labels))
        if engine.intake.adapters is not None:
            found.append(self._adapters())
        return found

    def _adapters(self) -> Value:
        """Whose requests run and wait. As in vLLM, the value is the time (Unix, in seconds): of several label sets that
        a scraper has kept, the latest holds."""
        scheduler = self._engine.scheduler
        running = {sequence.request for sequence in list(scheduler.running)}
        waiting = set(self._engine.unfinished) - running
        labels = (
            ("running_lora_adapters", _adapter_names(running)),
            ("waiting_lora_adapters", _adapter_names(waiting)),
            ("max_lora", str(scheduler.max_adapters)),
        )
        return Value("lora_requests_info", "gauge", "Adapters of requests; the value is the time.", time.time(), labels)

    def _step(self, record: StepRecord) -> None:
        now = time.monotonic()
        with self._lock:
            tokens = len(record.decodes) + sum(length for _, _, length in record.chunks)
            self._histograms["iteration_tokens_total"].observe(tokens)
            for request_id, index in record.decodes:
                # Samples that forked had their first token in the step of the first one's prompt.
                before = self._last_token_s.get((request_id, index), self._last_token_s.get((request_id, 0)))
                if before is not None:
                    self._histograms["inter_token_latency_seconds"].observe(now - before)
                self._last_token_s[request_id, index] = now
            for request_id, index, _ in record.chunks:
                self._last_token_s[request_id, index] = now
            for name in self._over:
                self._last_token_s.pop(name, None)
            self._over.clear()

    def _ended(self, request: Request) -> None:
        if request.scored is not None:
            return
        times, sampling = request.metrics, request.sampling
        lengths = [sequence.num_generated for sequence in request.sequences]
        seen: dict[str, float] = {
            "request_prompt_tokens": request.num_prompt,
            "request_generation_tokens": sum(lengths),
            "request_max_num_generation_tokens": max(lengths),
            "request_params_n": sampling.n,
            "request_params_max_tokens": request.max_tokens,
        }
        end = times.finished_time or time.monotonic()
        seen["e2e_request_latency_seconds"] = end - times.arrival_time
        if times.first_scheduled_time is not None:
            seen["request_queue_time_seconds"] = times.first_scheduled_time - times.arrival_time
            seen["request_inference_time_seconds"] = end - times.first_scheduled_time
            if times.first_token_time is not None:
                seen["request_prefill_time_seconds"] = times.first_token_time - times.first_scheduled_time
        if times.first_token_time is not None:
            seen["time_to_first_token_seconds"] = times.first_token_time - times.arrival_time
            seen["request_decode_time_seconds"] = end - times.first_token_time
            if max(lengths) > 1:
                per_token = (end - times.first_token_time) / (max(lengths) - 1)
                seen["request_time_per_output_token_seconds"] = per_token
        with self._lock:
            for name, value in seen.items():
                self._histograms[name].observe(value)
            self._over += [(request.request_id, sequence.index) for sequence in request.sequences]
            reason = request.sequences[0].finish_reason or "abort"
            self._success[reason] = self._success.get(reason, 0) + 1


def _adapter_names(requests: Iterable[Request]) -> str:
    return ",".join(sorted({request.adapter_name for request in requests if request.adapter_name is not None}))
