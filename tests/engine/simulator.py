"""A model-free executor, so that engine and scheduler run at a million requests; and what a step costs the host.

`python tests/engine/simulator.py` prints the host's cost per step.
"""

from __future__ import annotations

import itertools
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from hf_paged.engine.batch import Batch
from hf_paged.engine.engine import Engine
from hf_paged.engine.executor import Executor, StepResult
from hf_paged.engine.intake import Intake
from hf_paged.engine.request import Request
from hf_paged.engine.scheduler import Scheduler
from hf_paged.model.inputs import InputBuilder
from hf_paged.outputs import RequestOutput
from hf_paged.sampling_params import RequestOutputKind, SamplingParams
from hf_paged.speculative.config import SpeculativeConfig
from hf_paged.speculative.speculator import Speculator

VOCAB = 50
EOS = 0


# ---- executors -----------------------------------------------------------------------------------------


def fake_token(prompt: list[int], index: int, position: int) -> int:
    """The token that sample `index` of a prompt generates as its `position`-th."""
    return (31 * sum(prompt) + 7 * prompt[0] + 17 * len(prompt) + 13 * index + 5 * position) % VOCAB


class FakeExecutor(Executor):
    """Tokens as a function of the prompt, the sample's index and the position; looks at no page."""

    def __init__(self, lookahead: bool = False) -> None:
        self.lookahead = lookahead
        self.wiped: list[list[int]] = []

    def launch(self, batch: Batch) -> Callable[[], StepResult]:
        result = self.execute(batch)
        return lambda: result

    def looks_ahead(self, request: Request) -> bool:
        return self.lookahead

    def execute(self, batch: Batch) -> StepResult:
        return StepResult(
            [fake_token(s.request.prompt_token_ids, s.index, s.num_generated + s.num_pending) for s in batch.sampled()]
        )

    def expected(self, prompt: list[int], index: int, max_tokens: int) -> list[int]:
        """What a sample generates, its end-of-sequence token included."""
        tokens: list[int] = []
        while len(tokens) < max_tokens and EOS not in tokens[-1:]:
            tokens.append(fake_token(prompt, index, len(tokens)))
        return tokens

    def wipe(self, pages: list[int]) -> None:
        self.wiped.append(pages)


class PagedExecutor(FakeExecutor):
    """Tokens computed from the pages of a pretended cache, found the way the real executor finds them.

    Each position's entry is a hash of all tokens up to it; a token follows from the sum of all positions' entries, so
    one wrong page anywhere changes it.
    """

    def __init__(
        self, num_pages: int, page_size: int, max_num_seqs: int, max_model_len: int, lookahead: bool = False
    ) -> None:
        super().__init__(lookahead)
        self._before: list[int] = []
        self._inputs = InputBuilder(page_size, max_num_seqs, -(-max_model_len // page_size) + 1)
        self.cache = np.full((num_pages, page_size), -1, dtype=np.int64)

    def execute(self, batch: Batch) -> StepResult:
        self._inputs.write_pages(batch)
        inputs = self._inputs.build(batch)
        attention, size, cache = inputs.attention, inputs.attention.page_size, self.cache
        for source, target in batch.copies:
            cache[target] = cache[source]
        sums = np.zeros(len(inputs.token_ids), dtype=np.int64)
        count = len(attention.decode_lengths)
        if inputs.sources is not None:
            unknown = np.flatnonzero(inputs.sources >= 0)
            inputs.token_ids[unknown] = np.array(self._before)[inputs.sources[unknown]]
        last = attention.decode_lengths - 2
        # Rows that verify drafts come after the rows whose entries they follow.
        each = range(count) if batch.drafts else [slice(count)]
        for rows in each:
            before = cache[attention.decode_pages[np.arange(count)[rows], last[rows] // size], last[rows] % size]
            entry = _entry(before, inputs.token_ids[:count][rows])
            cache[attention.write_pages[:count][rows], attention.write_offsets[:count][rows]] = entry
        entries = cache[attention.decode_pages].reshape(count, attention.decode_pages.shape[1] * size)
        inside = np.arange(entries.shape[1]) < attention.decode_lengths[:, None]
        sums[:count] = (entries * inside).sum(1)
        for span in attention.spans:
            entry = cache[span.pages[(span.context - 1) // size], (span.context - 1) % size] if span.context else 0
            for row in range(span.row, span.row + span.length):
                entry = _entry(entry, inputs.token_ids[row])
                cache[attention.write_pages[row], attention.write_offsets[row]] = entry
            entries = cache[span.pages].reshape(-1)
            sums[span.row : span.row + span.length] = entries.cumsum()[span.context : span.context + span.length]
        wanted = sums[inputs.logit_rows][inputs.sample_rows].tolist()
        self._before = [(s + sequence.index) % VOCAB for s, sequence in zip(wanted, batch.sampled(), strict=True)]
        return StepResult(self._before)

    def expected(self, prompt: list[int], index: int, max_tokens: int) -> list[int]:
        total = entry = 0
        tokens: list[int] = []
        fed = list(prompt)
        while len(tokens) < max_tokens and EOS not in tokens[-1:]:
            for token in fed:
                entry = _entry(entry, token)
                total += entry
            tokens.append((total + index) % VOCAB)
            fed = tokens[-1:]
        return tokens


def _entry(before, token):  # type: ignore[no-untyped-def]  # ints or arrays
    return (before * 1_000_003 + token + 1) % 2_147_483_647


# ---- engines and traffic -------------------------------------------------------------------------------


def make_engine(
    *,
    num_pages: int = 4096,
    page_size: int = 4,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = 2048,
    max_model_len: int = 64,
    paged: bool = False,
    lookahead: bool = False,
    micro_batches: int = 1,
    speculator: Speculator | None = None,
    speculation: SpeculativeConfig | None = None,
) -> Engine:
    """The real engine over a fake executor."""
    scheduler = Scheduler(
        num_pages=num_pages,
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        micro_batches=micro_batches,
    )
    intake = Intake(
        None,
        vocab_size=VOCAB,
        max_model_len=max_model_len,
        pool_tokens=num_pages * page_size,
        eos_token_ids=lambda: frozenset({EOS}),
        speculation=speculation,
    )
    executor = (
        PagedExecutor(num_pages, page_size, max_num_seqs, max_model_len, lookahead)
        if paged
        else FakeExecutor(lookahead)
    )
    executor.micro_batches, executor.most_in_flight = micro_batches, max(2, micro_batches)
    return Engine(executor, scheduler, intake, speculator)


def traffic(engine: Engine, count: int, seed: int = 0) -> Iterator[Request]:
    """Requests of 1 to 20 tokens for 1 to 8 more, a tenth of them with n of 2 to 4; half begin like others."""
    draw = random.Random(seed)
    stems = [draw.choices(range(1, VOCAB), k=16) for _ in range(40)]
    params = {
        (n, most): SamplingParams(n=n, max_tokens=most, seed=0, output_kind=RequestOutputKind.FINAL_ONLY)
        for n in range(1, 5)
        for most in range(1, 9)
    }
    for _ in range(count):
        prompt = draw.choices(range(1, VOCAB), k=draw.randint(1, 20))
        if draw.random() < 0.5:
            stem = draw.choice(stems)[: draw.randint(1, 16)]
            prompt = (stem + prompt)[:20]
        n = draw.randint(2, 4) if draw.random() < 0.1 else 1
        yield engine.intake.request(prompt, params[n, draw.randint(1, 8)])


@dataclass
class Simulation:
    """Feeds requests to an engine in waves, so that only so many exist at once, and checks every output."""

    engine: Engine
    count: int
    wave: int = 1000
    seed: int = 0
    finished: int = 0
    steps: int = 0
    seconds: float = 0.0
    preemptions: int = 0
    _pending: dict[str, Request] = field(default_factory=dict)

    def run(self) -> Simulation:
        engine, start = self.engine, time.perf_counter()
        requests = traffic(engine, self.count, self.seed)
        while True:
            if len(self._pending) <= self.wave // 2:
                batch = list(itertools.islice(requests, self.wave))
                if batch:
                    self._pending |= {request.request_id: request for request in batch}
                    engine.submit(batch)
            if not engine.has_unfinished():
                break
            for output in engine.step():
                self._check(output)
            self.steps += 1
        self.seconds = time.perf_counter() - start
        assert not self._pending
        return self

    def _check(self, output: RequestOutput) -> None:
        request = self._pending.pop(output.request_id)
        assert output.finished
        assert output.error is None
        assert len(output.outputs) == request.sampling.n
        expected = self.engine.executor.expected  # type: ignore[attr-defined]
        for completion in output.outputs:
            tokens = expected(request.prompt_token_ids, completion.index, request.max_tokens)
            assert completion.token_ids == tokens
            assert completion.finish_reason == ("stop" if tokens[-1] == EOS else "length")
        self.finished += 1
        self.preemptions += request.metrics.num_preemptions


def check_nothing_left(engine: Engine) -> None:
    """All pages are free or cached, and free after a flush; no trace of any request remains."""
    scheduler = engine.scheduler
    assert not engine.has_unfinished()
    assert not scheduler.has_unfinished()
    assert not engine._requests
    assert not engine._ids
    assert not engine._unclaimed
    assert not scheduler._waiting
    assert not scheduler._reserved_slots
    assert len(scheduler._slots) == scheduler.max_num_seqs
    assert scheduler.num_active_pages == 0
    assert scheduler.pool.num_used == scheduler.tree.num_pages == scheduler.tree.num_evictable
    scheduler.flush_prefix_cache()
    assert scheduler.pool.num_free == scheduler.num_pages


# ---- what a step costs the host ------------------------------------------------------------------------


@dataclass
class HostCost:
    """Milliseconds per step of `num_seqs` decoding sequences, without the model; medians, but for `worst_ms`."""

    schedule_ms: float
    build_ms: float
    advance_ms: float
    rest_ms: float
    """Appending tokens, stop conditions, outputs."""
    total_ms: float
    worst_ms: float


class _TimedExecutor(FakeExecutor):
    """Builds the arrays and returns the same token for all."""

    def __init__(self, builder: InputBuilder) -> None:
        super().__init__()
        self.builder = builder

    def execute(self, batch: Batch) -> StepResult:
        self.builder.write_pages(batch)
        self.builder.build(batch)
        return StepResult([1] * len(batch.sampled()))


def decoding_engine(
    num_seqs: int, context: int, steps: int, page_size: int, kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY
) -> Engine:
    """An engine in which `num_seqs` sequences of `context` tokens decode, at all phases of a page."""
    length = context + page_size + steps + 8
    engine = make_engine(
        num_pages=num_seqs * (length // page_size + 2),
        page_size=page_size,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=num_seqs * (context + page_size),
        max_model_len=length + 1,
    )
    engine.executor = _TimedExecutor(InputBuilder(page_size, num_seqs, length // page_size + 2))
    draw = random.Random(0)
    params = SamplingParams(max_tokens=steps + 8, ignore_eos=True, seed=0, output_kind=kind)
    for i in range(num_seqs):
        engine.add_request(draw.choices(range(1, VOCAB), k=context + i % page_size), params)
    engine.step()
    engine.step()
    assert len(engine.scheduler.running) == num_seqs
    return engine


def host_cost(
    num_seqs: int = 256,
    context: int = 1024,
    *,
    steps: int = 192,
    page_size: int = 16,
    kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY,
) -> HostCost:
    """Times the host's part of decode steps: schedule, build arrays, advance, and the rest of `Engine.step`."""
    engine = decoding_engine(num_seqs, context, steps, page_size, kind)
    spent: dict[str, list[float]] = {"schedule": [], "advance": [], "build": [], "total": []}

    def timed(name: str, work: Callable) -> Callable:
        def wrapper(*args):  # type: ignore[no-untyped-def]
            start = time.perf_counter()
            try:
                return work(*args)
            finally:
                spent[name].append((time.perf_counter() - start) * 1e3)

        return wrapper

    engine.scheduler.schedule = timed("schedule", engine.scheduler.schedule)  # type: ignore[method-assign]
    engine.scheduler.advance = timed("advance", engine.scheduler.advance)  # type: ignore[method-assign]
    builder = engine.executor.builder  # type: ignore[attr-defined]
    builder.build = timed("build", builder.build)
    step = timed("total", engine.step)
    for _ in range(steps):
        step()
    median = {name: float(np.median(values)) for name, values in spent.items()}
    rest = np.array(spent["total"]) - spent["schedule"] - np.array(spent["advance"]) - spent["build"]
    return HostCost(
        schedule_ms=median["schedule"],
        build_ms=median["build"],
        advance_ms=median["advance"],
        rest_ms=float(np.median(rest)),
        total_ms=median["total"],
        worst_ms=max(spent["total"]),
    )


def main() -> None:
    for kind in (RequestOutputKind.FINAL_ONLY, RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA):
        for context in (128, 1024, 8192):
            cost = host_cost(context=context, kind=kind)
            print(f"256 sequences, context {context:5d}, {kind.name:10s}:", end=" ")
            print(", ".join(f"{name[:-3]} {value:.3f} ms" for name, value in vars(cost).items()))


if __name__ == "__main__":
    sys.exit(main())
