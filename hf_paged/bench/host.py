"""`hf-paged bench host`: what a step costs before and after the model, and how fast the scheduler is on its own."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from hf_paged.engine.batch import Batch
from hf_paged.engine.engine import Engine
from hf_paged.engine.executor import Executor, StepResult
from hf_paged.engine.intake import Intake
from hf_paged.engine.scheduler import Scheduler
from hf_paged.model.inputs import InputBuilder
from hf_paged.sampling_params import RequestOutputKind, SamplingParams


class FakeExecutor(Executor):
    """Computes nothing; every token is `token`.

    Args:
        builder: packs each batch into arrays first, as the real executor would, and throws them away.
    """

    def __init__(self, builder: InputBuilder | None = None, token: int = 7) -> None:
        self._builder = builder
        self._token = token

    def launch(self, batch: Batch) -> Callable[[], StepResult]:
        if self._builder is not None:
            self._builder.write_pages(batch)
            self._builder.build(batch)
        count = len(batch.decodes) + sum(len(chunk.samples) for chunk in batch.chunks)
        return lambda: StepResult([self._token] * count)


def simulated_engine(
    *, num_pages: int, page_size: int, max_num_seqs: int, max_model_len: int, prepare: bool, token_budget: int = 2048
) -> Engine:
    """An engine over a `FakeExecutor`; with `prepare` the packing of inputs is part of each step."""
    pages = -(-max_model_len // page_size) + 1
    builder = InputBuilder(page_size, max_num_seqs, pages) if prepare else None
    scheduler = Scheduler(
        num_pages=num_pages,
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(token_budget, max_num_seqs),
    )
    intake = Intake(
        None,
        vocab_size=50_000,
        max_model_len=max_model_len,
        pool_tokens=num_pages * page_size,
        eos_token_ids=frozenset,
    )
    return Engine(FakeExecutor(builder), scheduler, intake)


def host_cost(num_seqs: int = 256, context: int = 1024, steps: int = 50, page_size: int = 16) -> float:
    """Median milliseconds of a whole engine step but for the model: schedule, prepare, advance, append, report.

    Args:
        num_seqs: sequences decoding at once.
        context: tokens that each has already.
    """
    length = context + steps + 8
    engine = simulated_engine(
        num_pages=num_seqs * (-(-length // page_size) + 1),
        page_size=page_size,
        max_num_seqs=num_seqs,
        max_model_len=length + page_size,
        prepare=True,
        token_budget=1 << 16,
    )
    sampling = SamplingParams(max_tokens=steps + 8, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
    draw = random.Random(0)
    for _ in range(num_seqs):
        engine.add_request([draw.randrange(50_000) for _ in range(context)], sampling)
    engine.step()
    while engine.scheduler.num_waiting:
        engine.step()
    engine.step()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2] * 1e3


def simulate(num_requests: int, wave: int = 1024) -> tuple[float, int]:
    """Takes in, schedules and finishes many short requests. Returns (seconds, steps); drawing the prompts is not timed.

    Prompts of 1-20 tokens, 1-8 tokens out; 256 at once, in a pool that keeps evicting cached pages.
    """
    engine = simulated_engine(num_pages=600, page_size=16, max_num_seqs=256, max_model_len=64, prepare=False)
    draw = random.Random(0)
    kinds = [
        SamplingParams(max_tokens=count, detokenize=False, seed=0, output_kind=RequestOutputKind.FINAL_ONLY)
        for count in range(1, 9)
    ]
    finished, seconds = 0, 0.0

    def done(_: object) -> None:
        nonlocal finished
        finished += 1

    for first in range(0, num_requests, wave):
        count = min(wave, num_requests - first)
        prompts = [[draw.randrange(1000) for _ in range(draw.randint(1, 20))] for _ in range(count)]
        start = time.perf_counter()
        engine.submit([engine.intake.request(prompt, draw.choice(kinds)) for prompt in prompts], done)
        while engine.has_unfinished():
            engine.step()
        seconds += time.perf_counter() - start
    assert finished == num_requests
    return seconds, engine.stats.steps
