"""`hf-paged`: server, quantised checkpoints, demo and benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(no_args_is_help=True, add_completion=True, help="Paged generation for Hugging Face models.")
bench = typer.Typer(no_args_is_help=True, help="Time hf_paged and its peers on the same work.")
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


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="A folder, the name of a repository on the hub, or smollm2.")],
    to: Annotated[str, typer.Option(help="awq, gptq, w4a16 (compressed-tensors), fp8 or fp8-block.")],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    method: Annotated[
        str | None,
        typer.Option(
            help="How four-bit codes are chosen: awq, gptq or rtn (nearest). Default: awq for awq, else gptq."
        ),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Inputs that share a scale; -1: all of an output. Default: 128.")
    ] = None,
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="Default: asymmetric for awq alone.")
    ] = None,
    desc_act: Annotated[bool, typer.Option("--desc-act", help="GPTQ in the order of activations (act-order).")] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(help='Text, or .jsonl with "text" in every line. Default: the model\'s own at temperature 1.'),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples.")] = 128,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 512,
    dtype: Annotated[
        str | None, typer.Option(help="Of what is not quantised: float32, bfloat16 or float16. Default: the model's.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: the GPU where there is one.")] = None,
    seed: Annotated[int, typer.Option(help="Of the model's own text.")] = 0,
) -> None:
    """Write a quantised checkpoint of a model, for hf_paged.load and others that read the format."""
    from hf_paged.quantization.writers.quantize import quantize as write

    def run() -> None:
        subject: Any = model
        tokenizer = None
        if model == "smollm2":
            from hf_paged.bench.models import load_smollm2

            subject, tokenizer = load_smollm2()
        write(
            subject, to, out, tokenizer=tokenizer, method=method, group_size=group_size, symmetric=symmetric,
            desc_act=desc_act, calibration=calibration, samples=samples, sequence_length=sequence_length, dtype=dtype,
            device=device, seed=seed,
        )  # fmt: skip
        console.print(f"written: {out}")

    _friendly(run, ValueError, FileExistsError)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def serve(context: typer.Context) -> None:
    """Serve a model with OpenAI's API: hf-paged serve MODEL [options]; --help lists them."""
    from hf_paged.integrations.openai_server.run import serve as run_server

    def run() -> None:
        try:
            run_server(context.args)
        except (ValueError, TypeError) as error:
            raise typer.BadParameter(str(error)) from error

    _friendly(run)


MODEL_HELP = (
    "smollm2, or with random weights qwen3-0.6b, llama-3.1-8b or tiny. Default: smollm2 on a CPU, qwen3-0.6b on a GPU."
)
DTYPE_HELP = "float32, bfloat16 or float16. Default: float32 on a CPU, bfloat16 on a GPU."
DEVICE_HELP = "cpu or cuda. Default: the GPU where there is one."
OPTION_HELP = "A field of EngineConfig for hf_paged, as key=value; may be given several times."


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
    _choose("engine", names, ENGINES)
    _choose("workload", [workload], WORKLOADS)
    _check_model(model, dtype, device)
    options = _options(option or [])

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
            log=_log(as_json),
        )
        _show(result, report.as_table, as_json)

    _friendly(run)


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
    _check_model(model, dtype, device)
    if quantization is not None:
        from hf_paged.bench.models import QUANTIZATIONS

        _choose("quantization", [quantization], QUANTIZATIONS)
    options = _options(option or [])
    if speculative is not None:
        from hf_paged.bench import speculation

        _choose("speculative", [speculative], speculation.METHODS)

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
                log=_log(as_json),
            )
            _show(found, speculation.as_table, as_json)
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
            log=_log(as_json),
        )
        _show(result, report.as_table, as_json)

    _friendly(run)


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
        _show(report.run_attention(heads=heads, kv_heads=kv_heads, head_dim=head_dim), report.as_table, as_json)

    _friendly(run)


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

    sizes = [_numbers("shapes", shape.split("x"), 2) for shape in shapes.split(",")] if shapes else report.SHAPES
    if any(n % 16 or k % 16 or k % group_size for n, k in sizes) or group_size % 8:
        raise typer.BadParameter(
            f"N and K must be multiples of 16, K of the group size, and that one of 8: got groups of {group_size} in "
            f"{shapes or 'the layers of an 8B Llama'}"
        )
    ms = _numbers("rows", rows.split(",")) if rows else report.ROWS

    def run() -> None:
        result = report.run_linear([(n, k) for n, k in sizes], ms, group_size=group_size)
        _show(result, report.as_table, as_json)

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

    _check_model(None, dtype, device)

    def run() -> None:
        result = report.run_perplexity(models, text, window=window, dtype=dtype, device=device, log=_log(as_json))
        _show(result, report.as_table, as_json)

    _friendly(run, ValueError)


def _numbers(what: str, given: list[str], count: int | None = None) -> list[int]:
    if not all(number.isdecimal() and int(number) for number in given) or len(given) != (count or len(given)):
        raise typer.BadParameter(f"{what} must be positive numbers, got {given}")
    return [int(number) for number in given]


def _choose(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    from hf_paged.bench.run import check_names

    try:
        check_names(what, given, known)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _check_model(model: str | None, dtype: str | None, device: str | None) -> None:
    from hf_paged.bench.models import DTYPES, MODELS

    _choose("model", [model] if model else [], MODELS)
    _choose("dtype", [dtype] if dtype else [], DTYPES)
    _choose("device", [device] if device else [], ["cpu", "cuda"])


def _options(given: list[str]) -> dict[str, Any]:
    """key=value pairs as fields of EngineConfig: numbers, true, false and null are read as JSON, the rest is text."""
    from hf_paged.config import EngineConfig

    options: dict[str, Any] = {}
    for pair in given:
        key, sign, value = pair.partition("=")
        if not sign:
            raise typer.BadParameter(f"an option is key=value, got {pair!r}")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    try:
        EngineConfig().with_changes(**options)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    return options


def _log(quiet: bool) -> Callable[[str], None]:
    return lambda text: None if quiet else console.print(text, style="dim")


def _show(result: dict[str, Any], as_table: Callable[[dict[str, Any]], Table], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        console.print(as_table(result))


def _friendly(run: object, *errors: type[Exception]) -> None:
    """Runs a command; what is missing, and `errors`, are said in a line, and Ctrl-C ends it without a traceback."""
    assert callable(run)
    said: tuple[type[Exception], ...] = (ImportError, FileNotFoundError, *errors)
    try:
        run()
    except said as error:
        console.print(f"[red]error:[/red] {error}")
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        console.print("\nstopped")
        raise typer.Exit(130) from None


def main() -> None:
    """The `hf-paged` program."""
    app()
