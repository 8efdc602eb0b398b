"""`hf-paged bench throughput`: tokens per second, ours against peers and against the machine's floor."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
import transformers
from rich.table import Table

from hf_paged.bench.engines import ENGINES, run_engine
from hf_paged.bench.floor import Floor, ModelCost, Rates, measure_rates, workload_floor
from hf_paged.bench.isolate import run_isolated
from hf_paged.bench.models import free_memory, make_subject
from hf_paged.bench.run import EngineRun, Settings, check_names
from hf_paged.bench.workloads import WORKLOADS, Workload, make_workload
from hf_paged.config import EngineConfig

TITLES = {
    "ours": "hf_paged",
    "generate": "stock generate",
    "continuous-batching": "continuous batching",
    "vllm": "vLLM",
}


def run_throughput(
    model_name: str | None = None,
    workload: str | Workload = "mixed",
    engines: Sequence[str] = ("ours",),
    *,
    requests: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    options: dict[str, Any] | None = None,
    repeats: int | None = None,
    time_limit: float | None = None,
    cb_greedy: bool = False,
    isolate: bool | None = None,
    rates: Rates | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Times engines on one workload; ours comes first, as the others are compared with it.

    Args:
        model_name: one of `MODELS`; None is smollm2 on a CPU and qwen3-0.6b on a GPU.
        workload: one of `WORKLOADS`, or one of your own.
        engines: of `ENGINES`.
        requests: prompts of the workload; None is its own number.
        dtype: None is float32 on a CPU and bfloat16 on a GPU.
        device: None is the GPU where there is one.
        options: fields of `EngineConfig`, for ours.
        repeats: timed runs per engine, of which the best counts; None is 2 on a GPU and 1 on a CPU.
        time_limit: seconds that the timed runs of an engine may take together.
        cb_greedy: run transformers' continuous batching greedily.
        isolate: run each engine but ours in a process of its own; None does so on a GPU.
        rates: the machine's rates; None measures them.
        log: told what is being done.

    Returns:
        everything measured, as plain data; `as_table` shows it.

    Raises:
        ValueError, TypeError: a name that is not known, or an option that makes no sense.
    """
    check_names("engine", engines, ENGINES)
    check_names("workload", [workload] if isinstance(workload, str) else [], WORKLOADS)
    EngineConfig().with_changes(**options or {})
    subject = make_subject(model_name, dtype, device)
    on_gpu = subject.device.type == "cuda"
    settings = Settings(
        repeats=repeats or (2 if on_gpu else 1),
        time_limit=time_limit,
        options=options or {},
        generate_batch=128 if on_gpu else 16,
        cb_greedy=cb_greedy,
    )
    if rates is None:
        log("measuring the machine ...")
        rates = measure_rates(subject.device, subject.dtype)
        free_memory()
    work = make_workload(workload, subject.config.vocab_size, requests) if isinstance(workload, str) else workload
    floor = workload_floor(ModelCost.of(subject.config, subject.dtype), work, rates)
    runs = []
    for name in sorted(engines, key=lambda name: name != "ours"):
        log(f"{name} ...")
        if name != "ours" and (on_gpu if isolate is None else isolate):
            subject.drop()
            runs.append(run_isolated(name, subject, work, settings))
        else:
            runs.append(run_engine(name, subject, work, settings))
            free_memory()
        done = runs[-1]
        log(f"{name}: {done.note if done.seconds is None else f'{done.seconds:.2f} s'}")
    about = {
        "model": subject.name,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "device": str(subject.device),
        "settings": asdict(settings),
        "machine": machine(),
    }
    return about | report(work, runs, floor, rates)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu_threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "processor": platform.machine(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def same_tokens(run: EngineRun, other: EngineRun) -> float:
    """Share of the other's outputs that are the same token for token."""
    pairs = zip(run.outputs, other.outputs, strict=True)
    return sum(a == b for a, b in pairs) / max(1, len(run.outputs))


def report(work: Workload, runs: list[EngineRun], floor: Floor, rates: Rates) -> dict[str, Any]:
    """What came of a workload, as plain data. The first run is what the others are compared with, if it is ours."""
    return {
        "workload": work.name,
        "prompts": len(work.prompts),
        "samples": work.n,
        "temperature": work.temperature,
        "tokens_in": work.tokens_in,
        "tokens_out": work.tokens_out,
        "rates": asdict(rates),
        "floor": asdict(floor) | {"total_s": floor.total_s, "shared_total_s": floor.shared_total_s},
        "runs": [_row(run, runs[0], work, floor) for run in runs],
    }


def _row(run: EngineRun, first: EngineRun, work: Workload, floor: Floor) -> dict[str, Any]:
    row = {name: value for name, value in asdict(run).items() if name != "outputs"}
    row |= dict.fromkeys(
        (
            "tokens_per_s",
            "floor_fraction",
            "shared_floor_fraction",
            "speedup_of_ours",
            "kv_ratio_of_ours",
            "same_tokens",
        )
    )
    if run.seconds is None:
        return row
    row["tokens_per_s"] = work.tokens_out / run.seconds
    row["floor_fraction"] = floor.total_s / run.seconds
    if work.n > 1:
        row["shared_floor_fraction"] = floor.shared_total_s / run.seconds
    if first.engine == "ours" and first.seconds is not None:
        row["speedup_of_ours"] = run.seconds / first.seconds
        if run.kv_bytes and first.kv_bytes:
            row["kv_ratio_of_ours"] = run.kv_bytes / first.kv_bytes
        if not work.temperature and run.engine != "vllm":  # which has weights of its own
            row["same_tokens"] = same_tokens(run, first)
    return row


def as_table(result: dict[str, Any]) -> Table:
    """The same for people."""
    title = (
        f"{result['workload']} on {result['model']}, {result['dtype']}: {result['prompts']} prompts x "
        f"{result['samples']}, {result['tokens_in']} tokens in, {result['tokens_out']} out, "
        f"temperature {result['temperature']:g}"
    )
    table = Table(title=title, caption=_floor_text(result))
    many = result["samples"] > 1
    left = ("engine", "")
    for column in (
        *("engine", "seconds", "tokens/s", "of the floor"),
        *(("of it shared",) if many else ()),
        *("ours is", "KV MiB", "KV vs ours", "same tokens", "start s", "steps", "decode steps", ""),
    ):
        table.add_column(column, justify="left" if column in left else "right")
    for run in result["runs"]:
        table.add_row(
            TITLES[run["engine"]],
            _text(run["seconds"], "{:.2f}"),
            _text(run["tokens_per_s"], "{:.1f}"),
            _text(run["floor_fraction"], "{:.1%}"),
            *((_text(run["shared_floor_fraction"], "{:.1%}"),) if many else ()),
            _text(run["speedup_of_ours"], "{:.2f}x"),
            _text(run["kv_bytes"] and run["kv_bytes"] / 2**20, "{:.0f}"),
            _text(run["kv_ratio_of_ours"], "{:.1f}x"),
            _text(run["same_tokens"], "{:.0%}"),
            _text(run["start_s"], "{:.2f}"),
            _text(run["steps"], "{}"),
            _text(run["decode_steps"], "{}"),
            run["note"],
        )
    return table


def _text(value: Any, form: str) -> str:
    return "" if value is None else form.format(value)


def rates_text(rates: dict[str, float]) -> str:
    """A machine's rates for people."""
    return f"{rates['bytes_per_s'] / 1e9:,.0f} GB/s and {rates['flops_per_s'] / 1e12:.3g} TFLOP/s, measured"


def _floor_text(result: dict[str, Any]) -> str:
    floor = result["floor"]
    text = (
        f"floor {floor['total_s']:.2f} s: weights {floor['weights_s']:.2f}, keys and values {floor['kv_s']:.2f}, "
        f"prefill {floor['prefill_s']:.2f}"
    )
    if result["samples"] > 1:
        text += (
            f"; {floor['shared_total_s']:.2f} s with a group's prompt read once "
            f"(keys and values {floor['shared_kv_s']:.2f})"
        )
    return f"{text}; at {rates_text(result['rates'])}"
