"""The engines that a workload is timed on, ours first."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

import hf_paged
from hf_paged.bench.models import Subject
from hf_paged.bench.peers import run_continuous_batching, run_generate, run_vllm
from hf_paged.bench.run import Deadline, EngineRun, Settings, TimeLimitError, best_of
from hf_paged.bench.workloads import Workload
from hf_paged.cache.storage import page_bytes
from hf_paged.engine.engine import Engine
from hf_paged.engine.stats import StepRecord

START_LENGTH = 8
WARM_UP_PROMPTS, WARM_UP_LENGTH, WARM_UP_TOKENS = 16, 32, 4


def start_engine(model: Any, options: dict[str, Any], prompt: list[int], temperature: float = 0.0) -> float:
    """Wraps a model, and returns the seconds from there to the first token that it generated for `prompt`."""
    params = hf_paged.SamplingParams(temperature=temperature, max_tokens=1, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    hf_paged.wrap(model, **options)
    model.generate_many([prompt], params, progress=False)
    return time.perf_counter() - start


def warm_up(model: Any, prompts: list[list[int]], temperature: float) -> None:
    """Touches what the first steps of each kind would otherwise have to make while they are timed."""
    prepare = getattr(model.engine, "warm_up", None)
    if prepare is not None:
        prepare()
    short = [prompt[:WARM_UP_LENGTH] for prompt in prompts[:WARM_UP_PROMPTS]]
    params = hf_paged.SamplingParams(
        temperature=temperature, max_tokens=WARM_UP_TOKENS, ignore_eos=True, detokenize=False
    )
    model.generate_many(short, params, progress=False)


class _StepCount:
    """Counts an engine's steps, and ends one that takes too long."""

    def __init__(self, deadline: Deadline) -> None:
        self.steps = self.decode_steps = 0
        self._deadline = deadline

    def __call__(self, record: StepRecord) -> None:
        self.steps += 1
        self.decode_steps += not record.chunks
        self._deadline.check()


def run_ours(subject: Subject, work: Workload, settings: Settings) -> EngineRun:
    """hf_paged. Every timed run begins with an empty prefix cache, and the first of them counts steps too."""
    model = subject.model
    requests = work.requests()
    prompts = [prompt for prompt, _, _ in requests]
    params = [
        hf_paged.SamplingParams(n=n, temperature=work.temperature, max_tokens=length, ignore_eos=True, detokenize=False)
        for _, n, length in requests
    ]
    try:
        start_s = start_engine(model, settings.options, work.prompts[0][:START_LENGTH], work.temperature)
        warm_up(model, work.prompts, work.temperature)
        engine: Engine = model.engine
        count: _StepCount | None = None

        def once(left: float | None) -> tuple[float, list[list[int]]]:
            nonlocal count
            torch.manual_seed(0)
            engine.reset_prefix_cache()
            engine.scheduler.stats.peak_pages = 0
            counting = count is None
            if count is None:
                count = _StepCount(Deadline(left))
                engine.observers.append(count)
            try:
                start = time.perf_counter()
                outputs = model.generate_many(prompts, params, progress=False)
                seconds = time.perf_counter() - start
            finally:
                if counting:
                    engine.observers.remove(count)
            return seconds, [completion.token_ids for output in outputs for completion in output.outputs]

        result = best_of(settings, once)
        assert count is not None
        executor: Any = engine.executor
        peak = engine.scheduler.stats.peak_pages
        sleep_s, wake_s = _seconds(engine.sleep), _seconds(engine.wake_up)
        return EngineRun(
            "ours",
            start_s=start_s,
            steps=count.steps,
            decode_steps=count.decode_steps,
            kv_bytes=peak * page_bytes(executor.layout.layers, executor.page_size, executor.layout.kv_dtype),
            note=f"{peak} pages of {executor.page_size}; asleep in {sleep_s:.2f} s, awake in {wake_s:.2f} s",
            **result,
        )
    finally:
        hf_paged.unwrap(model)


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


ENGINES: dict[str, Callable[[Subject, Workload, Settings], EngineRun]] = {
    "ours": run_ours,
    "generate": run_generate,
    "continuous-batching": run_continuous_batching,
    "vllm": run_vllm,
}


def run_engine(name: str, subject: Subject, work: Workload, settings: Settings) -> EngineRun:
    """One engine's run; what goes wrong with it is told in its note."""
    try:
        run = ENGINES[name](subject, work, settings)
        if list(map(len, run.outputs)) != [length for lengths in work.lengths for length in lengths]:
            raise RuntimeError(f"it gave {sum(map(len, run.outputs))} tokens of {work.tokens_out}")
        return run
    except TimeLimitError as error:
        return EngineRun(name, note=str(error))
    except Exception as error:  # a peer may fail in any way, and the others' numbers still count
        first_line = next(iter(str(error).splitlines()), "")
        return EngineRun(name, note=f"failed: {type(error).__name__}: {first_line}")
