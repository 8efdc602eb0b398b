"""`hf-paged`: demo and benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, add_completion=True, help="Paged generation for Hugging Face models.")
bench = typer.Typer(no_args_is_help=True, help="Time hf_paged and its peers on the same work, in one process.")
app.add_typer(bench, name="bench")
console = Console()


@app.callback()
def _root() -> None:
    """Keeps `hf-paged COMMAND` a group, however many commands there are."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where to draw the timeline and the page pool.")] = Path("demo.png"),
    compare: Annotated[bool, typer.Option(help="Also run stock generate on the same work.")] = True,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens per answer at most.")] = 96,
) -> None:
    """Answer a batch of chats with SmolLM2-135M, four samples each, one streamed live, and show what the engine did."""
    from hf_paged.demo import run_demo

    _friendly(lambda: run_demo(console, out, compare=compare, max_tokens=max_tokens))


@bench.command()
def throughput(
    workload: Annotated[str, typer.Option(help="mixed: 64 prompts; samples: 16 samples of one prompt.")] = "mixed",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    engines: Annotated[str, typer.Option(help="Comma-separated: ours, generate, continuous-batching.")] = (
        "ours,generate,continuous-batching"
    ),
    requests: Annotated[int, typer.Option(min=1, help="Prompts of the mixed workload.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Tokens per second on SmolLM2-135M against stock generate and transformers' continuous batching."""
    import torch

    from hf_paged.bench import throughput as report
    from hf_paged.bench import workloads
    from hf_paged.bench.engines import ENGINES
    from hf_paged.bench.models import load_smollm2

    names = engines.split(",")
    _choose("engine", names, list(ENGINES))
    _choose("workload", [workload], ["mixed", "samples"])
    _choose("dtype", [dtype], ["float32", "bfloat16", "float16"])
    if names[0] != "ours":
        raise typer.BadParameter("the first engine must be ours: the others are compared with it")

    def run() -> None:
        model, _ = load_smollm2(getattr(torch, dtype))
        vocab = model.config.vocab_size
        work = workloads.mixed(vocab, requests) if workload == "mixed" else workloads.samples(vocab)
        runs = []
        for name in names:
            console.log(f"{name} ...") if not as_json else None
            runs.append(ENGINES[name](model, work))
        result = report.as_json(work, dtype, runs)
        if as_json:
            typer.echo(json.dumps(result, indent=2))
        else:
            console.print(report.as_table(result))

    _friendly(run)


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


def _choose(what: str, given: list[str], known: list[str]) -> None:
    for name in given:
        if name not in known:
            raise typer.BadParameter(f"unknown {what} {name!r}: choose from {', '.join(known)}")


def _friendly(run: object) -> None:
    """Runs a command; what is missing is said in a line, and Ctrl-C ends it without a traceback."""
    assert callable(run)
    try:
        run()
    except (ImportError, FileNotFoundError) as error:
        console.print(f"[red]error:[/red] {error}")
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        console.print("\nstopped")
        raise typer.Exit(130) from None


def main() -> None:
    """The `hf-paged` program."""
    app()
