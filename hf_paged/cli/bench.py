"""`hf-paged bench`: hf_paged and its peers on the same work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hf_paged.cli.arguments import (
    DEVICE_HELP,
    DTYPE_HELP,
    MODEL_HELP,
    OPTION_HELP,
    check_model,
    choose,
    engine_options,
    numbers,
)
from hf_paged.cli.terminal import console, friendly, log, show

bench = typer.Typer(no_args_is_help=True, help="Time hf_paged, its server and its peers.")


@bench.command()
def throughput(
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    workload: Annotated[
        str, typer.Option(help="mixed, samples, nano (nano-vllm's), rollout, rollout-long (32 x 16 samples) or single.")
    ] = "mixed",
    dtype: Annotated[str | None, typer.Option(help=DTYPE_HELP)] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    engines: Annotated[str, typer.Option(help="Comma-separated: ours, generate, continuous-batching, vllm.")] = (
        "ours,generate,continuous-batching"
    ),
    requests: Annotated[int | None, typer.Option(min=1, help="Prompts, instead of the workload's own number.")] = None,
    option: Annotated[list[str] | None, typer.Option(help=OPTION_HELP)] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Timed runs; the best counts. Default: 2 on a GPU, 1 on a CPU.")
    ] = None,
    time_limit: Annotated[
        float | None, typer.Option(min=0.0, help="Seconds that an engine's timed runs may take together.")
    ] = None,
    cb_greedy: Annotated[bool, typer.Option(help="Run transformers' continuous batching greedily.")] = False,
    isolate: Annotated[
        bool | None,
        typer.Option("--isolate/--no-isolate", help="Each peer in a process of its own. Default: on a GPU."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Tokens per second against stock generate, transformers' continuous batching and vLLM, and against the floor."""
    from hf_paged.bench import throughput as report
    from hf_paged.bench.engines import ENGINES
    from hf_paged.bench.workloads import WORKLOADS

    names = engines.split(",")
    choose("engine", names, ENGINES)
    choose("workload", [workload], WORKLOADS)
    check_model(model, dtype, device)
    options = engine_options(option or [])

    def run() -> None:
        result = report.run_throughput(
            model,
            workload,
            names,
            requests=requests,
            dtype=dtype,
            device=device,
            options=options,
            repeats=repeats,
            time_limit=time_limit,
            cb_greedy=cb_greedy,
            isolate=isolate,
            log=log(as_json),
        )
        show(result, report.as_table, as_json)

    friendly(run)


@bench.command()
def latency(
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    batches: Annotated[str, typer.Option(help="Comma-separated: sequences that decode at once.")] = "1,64,256",
    context: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 900,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps per round; the median of the rounds counts.")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 5,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    speculative: Annotated[
        str | None,
        typer.Option(
            help="Instead: the same requests with and without drafts by this method: forced (drafts right by chance), "
            "ngram or suffix."
        ),
    ] = None,
    acceptance: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="With --speculative forced: how likely a drafted token is right.")
    ] = 0.7,
    draft_tokens: Annotated[int, typer.Option(min=1, help="With --speculative: tokens drafted at most.")] = 5,
    tokens: Annotated[int, typer.Option(min=1, help="With --speculative: tokens per sequence at most.")] = 200,
    dtype: Annotated[str | None, typer.Option(help=DTYPE_HELP)] = None,
    quantization: Annotated[
        str | None, typer.Option(help="Of the linear layers: w4 (four bits, groups of 128) or fp8 (a scale per row).")
    ] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    option: Annotated[list[str] | None, typer.Option(help=OPTION_HELP)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """What hf_paged's decode steps, its first token and its start take, against the floor."""
    from hf_paged.bench import latency as report

    sizes = batches.split(",")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise typer.BadParameter(f"batches must be positive numbers with commas between them, got {batches!r}")
    check_model(model, dtype, device)
    if quantization is not None:
        from hf_paged.bench.models import QUANTIZATIONS

        choose("quantization", [quantization], QUANTIZATIONS)
    options = engine_options(option or [])
    if speculative is not None:
        from hf_paged.bench import speculation

        choose("speculative", [speculative], speculation.METHODS)

    def run() -> None:
        if speculative is not None:
            found = speculation.run_speculation(
                speculative,
                model,
                [int(size) for size in sizes],
                context,
                tokens=tokens,
                num_speculative_tokens=draft_tokens,
                acceptance=acceptance,
                dtype=dtype,
                device=device,
                options=options,
                log=log(as_json),
            )
            show(found, speculation.as_table, as_json)
            return
        result = report.run_latency(
            model,
            [int(size) for size in sizes],
            context,
            steps=steps,
            rounds=rounds,
            temperature=temperature,
            dtype=dtype,
            device=device,
            quantization=quantization,
            options=options,
            log=log(as_json),
        )
        show(result, report.as_table, as_json)

    friendly(run)


@bench.command()
def attention(
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="KV heads; they divide the query heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=16, help="Of keys and values.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Decode attention over groups of samples: shared prefixes read once against each row alone, on a GPU."""
    from hf_paged.bench import attention as report

    if heads % kv_heads:
        raise typer.BadParameter(f"{heads} query heads cannot be shared out among {kv_heads} KV heads")

    def run() -> None:
        show(report.run_attention(heads=heads, kv_heads=kv_heads, head_dim=head_dim), report.as_table, as_json)

    friendly(run)


@bench.command()
def linear(
    shapes: Annotated[
        str | None, typer.Option(help="Comma-separated: N x K as 4096x14336. Default: the layers of an 8B Llama.")
    ] = None,
    rows: Annotated[
        str | None, typer.Option(help="Comma-separated: rows of activations. Default: 1 to 256 in powers of two.")
    ] = None,
    group_size: Annotated[int, typer.Option(min=8, help="Inputs per scale of 4-bit codes.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Linear layers of 4-bit codes and of float8 against bfloat16, on a GPU."""
    from hf_paged.bench import linear as report

    sizes = [numbers("shapes", shape.split("x"), 2) for shape in shapes.split(",")] if shapes else report.SHAPES
    if any(n % 16 or k % 16 or k % group_size for n, k in sizes) or group_size % 8:
        raise typer.BadParameter(
            f"N and K must be multiples of 16, K of the group size, and that one of 8: got groups of {group_size} in "
            f"{shapes or 'the layers of an 8B Llama'}"
        )
    ms = numbers("rows", rows.split(",")) if rows else report.ROWS

    def run() -> None:
        result = report.run_linear([(n, k) for n, k in sizes], ms, group_size=group_size)
        show(result, report.as_table, as_json)

    friendly(run)


@bench.command()
def host(
    sequences: Annotated[int, typer.Option(min=1, help="Sequences decoding at once.")] = 256,
    requests: Annotated[int, typer.Option(min=1, help="Requests to schedule in the simulator.")] = 1_000_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """What a step costs on the host without the model, by context length, and the scheduler alone on many requests."""
    from hf_paged.bench.host import host_cost, simulate

    costs = {context: host_cost(sequences, context) for context in (128, 1024, 4096)}
    seconds, steps = simulate(requests)
    if as_json:
        result = {"sequences": sequences, "ms_per_step_by_context": costs, "requests": requests, "seconds": seconds}
        typer.echo(json.dumps(result, indent=2))
        return
    for context, cost in costs.items():
        console.print(f"{sequences} sequences at {context} tokens: {cost:.2f} ms a step")
    console.print(f"{requests:,} requests scheduled in {seconds:.1f} s, {steps:,} steps")


@bench.command()
def perplexity(
    models: Annotated[list[str], typer.Argument(help="Folders, names on the hub, or smollm2; the first is 1.")],
    text: Annotated[Path, typer.Option(help="What is predicted.")],
    window: Annotated[int, typer.Option(min=2, help="Tokens of the pieces that it is cut into.")] = 512,
    dtype: Annotated[str | None, typer.Option(help=DTYPE_HELP)] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """How well models predict a text: what a quantised checkpoint lost."""
    from hf_paged.bench import perplexity as report

    check_model(None, dtype, device)

    def run() -> None:
        result = report.run_perplexity(models, text, window=window, dtype=dtype, device=device, log=log(as_json))
        show(result, report.as_table, as_json)

    friendly(run, ValueError)


@bench.command()
def lora(
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    batches: Annotated[str, typer.Option(help="Comma-separated: sequences that decode at once.")] = "8,64",
    adapters: Annotated[str, typer.Option(help="Comma-separated: different adapters among them.")] = "1,8",
    rank: Annotated[int, typer.Option(min=1, help="Of the adapters.")] = 16,
    dtype: Annotated[str | None, typer.Option(help=DTYPE_HELP)] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """What LoRA adapters by request cost a decode step."""
    from hf_paged.bench import lora as report

    check_model(model, dtype, device)
    sizes, counts = numbers("batches", batches.split(",")), [0, *numbers("adapters", adapters.split(","))]

    def run() -> None:
        result = report.run_lora(model, sizes, counts, rank=rank, dtype=dtype, device=device, log=log(as_json))
        show(result, report.as_table, as_json)

    friendly(run, ValueError)
