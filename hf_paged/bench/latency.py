"""`hf-paged bench latency`: how long a decode step, the first token of a prompt and the engine's start take."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from rich.table import Table
from torch.autograd import DeviceType

import hf_paged
from hf_paged.bench.engines import START_LENGTH, start_engine, warm_up
from hf_paged.bench.floor import ModelCost, Rates, measure_rates, step_floor, synchronize, workload_floor
from hf_paged.bench.models import free_memory, make_subject
from hf_paged.bench.throughput import machine, rates_text
from hf_paged.bench.workloads import Workload
from hf_paged.engine.engine import Engine
from hf_paged.engine.stats import StepRecord

WARM_STEPS = 5
TTFT_RUNS = 3


def run_latency(
    model_name: str | None = None,
    batches: Sequence[int] = (1, 64, 256),
    context: int = 900,
    *,
    steps: int = 20,
    rounds: int = 5,
    temperature: float = 0.0,
    dtype: str | None = None,
    device: str | None = None,
    quantization: str | None = None,
    options: dict[str, Any] | None = None,
    rates: Rates | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Times hf_paged's steps.

    Args:
        model_name, dtype, device, options, rates, log: as for `run_throughput`. `max_num_seqs` is the largest batch, or
            256, unless an option says otherwise.
        quantization: "w4" or "fp8": the model's linear layers are quantised.
        batches: sequences that decode at once.
        context: tokens of each prompt.
        steps: decode steps per round.
        rounds: the median of their mean step times counts.

    Returns:
        everything measured, as plain data; `as_table` shows it. A batch that could not be timed says why.

    Raises:
        ValueError, TypeError: a name that is not known, or an option that makes no sense.
    """
    options = {"max_num_seqs": max(256, *batches)} | (options or {})
    hf_paged.EngineConfig().with_changes(**options)
    subject = make_subject(model_name, dtype, device, quantization)
    if rates is None:
        log("measuring the machine ...")
        rates = measure_rates(subject.device, subject.dtype)
        free_memory()
    model, vocab = subject.model, subject.config.vocab_size
    cost = replace(ModelCost.of(subject.config, subject.dtype), weight_bytes=_weights_read(model))
    draw = random.Random(0)
    prompts = [[draw.randrange(vocab) for _ in range(context)] for _ in range(max(batches))]
    try:
        log("starting ...")
        start_s = start_engine(model, options, prompts[0][:START_LENGTH], temperature)
        warm_up(model, prompts, temperature)
        log("the first token of one prompt ...")
        first = _first_token(model.engine, prompts[0], temperature)
        decode = []
        for batch in batches:
            log(f"{batch} sequences ...")
            row: dict[str, Any] = {"batch": batch}
            try:
                clock = DecodeClock(model.engine, prompts[:batch], temperature)
                row |= clock.measure(steps, rounds, subject.device)
                row["floor_s"] = step_floor(cost, batch, row["mean_context"], rates)
                row["floor_fraction"] = row["floor_s"] / row["step_s"]
                row["tokens_per_s"] = batch / row["step_s"]
            except Exception as error:  # too large a batch, most likely; the others' numbers still count
                row["note"] = f"failed: {error}"
            decode.append(row)
    finally:
        hf_paged.unwrap(model)
    first_floor = workload_floor(cost, Workload("first token", [prompts[0]], [[1]]), rates).total_s
    return {
        "model": subject.name,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "device": str(subject.device),
        "quantization": quantization,
        "weight_bytes": sum(tensor.nbytes for tensor in _weights(model)),
        "options": options,
        "machine": machine(),
        "rates": asdict(rates),
        "context": context,
        "temperature": temperature,
        "start_s": start_s,
        "first_token_s": first,
        "first_token_floor_s": first_floor,
        "first_token_floor_fraction": first_floor / first,
        "decode": decode,
    }


def _weights(model: Any) -> list[torch.Tensor]:
    kept = model.state_dict().keys()  # not what is computed, such as rotary frequencies
    return [*model.parameters(), *(buffer for name, buffer in model.named_buffers() if name in kept)]


def _weights_read(model: Any) -> int:
    """Bytes of weights that a step reads: all but an input embedding's, unless it is the output's too."""
    embedding = model.get_input_embeddings().weight
    tied = embedding is model.get_output_embeddings().weight
    return sum(tensor.nbytes for tensor in _weights(model)) - (0 if tied else embedding.nbytes)


def _sampling(temperature: float, max_tokens: int | None) -> hf_paged.SamplingParams:
    return hf_paged.SamplingParams(
        temperature=temperature,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=hf_paged.RequestOutputKind.FINAL_ONLY,
    )


def _first_token(engine: Engine, prompt: list[int], temperature: float) -> float:
    """Median seconds from a request, to an idle engine that knows nothing of its prompt, to the first token."""
    times = []
    for _ in range(TTFT_RUNS):
        engine.reset_prefix_cache()
        start = time.perf_counter()
        engine.add_request(prompt, _sampling(temperature, 1))
        outputs: list[hf_paged.RequestOutput] = []
        while not outputs:
            outputs = engine.step()
        times.append(time.perf_counter() - start)
        if outputs[0].error is not None:
            raise outputs[0].error
    return statistics.median(times)


class DecodeClock:
    """Times the steps of a batch that only decodes.

    Args:
        adapters: one per prompt; None is none for any.

    Raises:
        ValueError: the engine does not hold the batch.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: list[list[int]],
        temperature: float,
        adapters: list[hf_paged.LoRARequest | None] | None = None,
    ) -> None:
        self._engine = engine
        self._prompts = prompts
        self._adapters = adapters or [None] * len(prompts)
        self._temperature = temperature
        self._last: StepRecord | None = None

    def measure(self, steps: int, rounds: int, device: torch.device) -> dict[str, Any]:
        """Prefills all prompts, then times rounds of steps with nothing but decoding."""
        engine, batch = self._engine, len(self._prompts)
        self._check_room(WARM_STEPS + steps * rounds)
        generated = engine.stats.generation_tokens
        with self._decoding():
            before = engine.stats.generation_tokens - generated
            times = []
            for _ in range(rounds):
                synchronize(device)
                start = time.perf_counter()
                for _ in range(steps):
                    engine.step()
                synchronize(device)
                times.append((time.perf_counter() - start) / steps)
            done = engine.stats.generation_tokens - generated - before
            if done != batch * steps * rounds:
                raise ValueError(f"{steps * rounds} steps gave {done} tokens, not {batch} each")
        mean_context = len(self._prompts[0]) + before / batch + steps * rounds / 2
        return {"step_s": statistics.median(times), "rounds_s": times, "mean_context": mean_context}

    def count_launches(self, device: torch.device) -> int | None:
        """Kernels of one step that only decodes; None where there is no GPU that runs them."""
        if device.type != "cuda":
            return None
        self._check_room(WARM_STEPS + 1)
        with self._decoding():
            synchronize(device)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                self._engine.step()
                synchronize(device)
        return count_kernels(profile.events() or ())

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        """Within it all prompts are done, and some steps of the batch."""
        engine = self._engine
        engine.reset_prefix_cache()
        ids = [
            engine.add_request(prompt, _sampling(self._temperature, None), lora_request=adapter)
            for prompt, adapter in zip(self._prompts, self._adapters, strict=True)
        ]
        try:
            self._prefill()
            for _ in range(WARM_STEPS):
                engine.step()
            yield
        finally:
            engine.abort(ids)
            while engine.has_unfinished():
                engine.step()

    def _prefill(self) -> None:
        """Steps until every prompt is done: those that are done early decode meanwhile."""
        self._last = None
        self._engine.observers.append(self._look)
        try:
            while self._last is None or len(self._last.decodes) < len(self._prompts):
                self._engine.step()
        finally:
            self._engine.observers.remove(self._look)

    def _look(self, record: StepRecord) -> None:
        self._last = record

    def _check_room(self, steps: int) -> None:
        scheduler, intake = self._engine.scheduler, self._engine.intake
        batch, context = len(self._prompts), len(self._prompts[0])
        if batch > scheduler.max_num_seqs:
            raise ValueError(f"{batch} sequences cannot run at once: max_num_seqs is {scheduler.max_num_seqs}")
        prefill_steps = -(-batch * context // (scheduler.max_num_batched_tokens - batch + 1))
        longest = context + prefill_steps + steps + 1
        if longest > intake.max_model_len:
            raise ValueError(f"up to {longest} tokens per sequence, and max_model_len is {intake.max_model_len}")
        pages = batch * scheduler.pages_for(longest)
        if pages > scheduler.num_pages:
            raise ValueError(
                f"up to {pages} pages of {scheduler.page_size} tokens, and there are {scheduler.num_pages}"
            )


def count_kernels(events: Iterable[Any]) -> int:
    """How many of torch's profiler's events are kernels on a GPU, not copies, fillings or labels."""
    on_gpu = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_gpu)


def as_table(result: dict[str, Any]) -> Table:
    """The same for people."""
    table = Table(
        title=f"{result['model']}, {result['quantization'] or result['dtype']}: prompts of {result['context']} tokens",
        caption=f"floors at {rates_text(result['rates'])}",
    )
    for column in ("", "ms", "floor ms", "of the floor", "tokens/s", "mean context"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("from wrap to the first token", f"{result['start_s'] * 1e3:.0f}")
    table.add_row(
        "first token of one prompt",
        f"{result['first_token_s'] * 1e3:.2f}",
        f"{result['first_token_floor_s'] * 1e3:.2f}",
        f"{result['first_token_floor_fraction']:.1%}",
    )
    for row in result["decode"]:
        name = f"decode step of {row['batch']}"
        if "note" in row:
            table.add_row(f"{name}: {row['note']}")
            continue
        table.add_row(
            name,
            f"{row['step_s'] * 1e3:.3f}",
            f"{row['floor_s'] * 1e3:.3f}",
            f"{row['floor_fraction']:.1%}",
            f"{row['tokens_per_s']:.1f}",
            f"{row['mean_context']:.0f}",
        )
    return table
