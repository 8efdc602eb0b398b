"""`hf-paged bench serve`, `server-overhead` and `structured`: servers under load."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_paged.cli.arguments import DEVICE_HELP, DTYPE_HELP, OPTION_HELP, choose, engine_options
from hf_paged.cli.terminal import console, friendly, log, notes, show

BACKENDS = {"openai": "/v1/completions", "vllm": "/v1/completions", "openai-chat": "/v1/chat/completions"}
DATASETS = ("random", "sharegpt", "custom", "lognormal")
SERVED_HELP = "smollm2, a shape with random weights (tiny, qwen3-0.6b, ...), or a folder or name on the hub."


def served_models() -> list[str]:
    """For the shell to complete."""
    from hf_paged.bench.models import MODELS

    return MODELS


def serve(
    pairs: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    backend: Annotated[
        str, typer.Option(help="openai or vllm (completions), or openai-chat.", autocompletion=lambda: list(BACKENDS))
    ] = "openai",
    base_url: Annotated[str | None, typer.Option(help="Of the server, without /v1; instead of host and port.")] = None,
    host: Annotated[str, typer.Option(help="Of the server.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of the server.")] = 8000,
    endpoint: Annotated[str | None, typer.Option(help="Path to ask. Default: the backend's.")] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help="The server's key.", envvar=["HF_PAGED_API_KEY", "OPENAI_API_KEY"], show_envvar=True),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The name to ask for. Default: the first that is listed.")] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="smollm2, a folder or a name on the hub: makes prompts of exact lengths. Default: common words, about "
            "a token each; what is reported is the server's own count."
        ),
    ] = None,
    dataset_name: Annotated[
        str,
        typer.Option(
            help="random; sharegpt or custom (files); or lognormal: lengths like ShareGPT's, with nothing to download.",
            autocompletion=lambda: list(DATASETS),
        ),
    ] = "random",
    dataset_path: Annotated[
        Path | None,
        typer.Option(help='Of sharegpt: its JSON. Of custom: lines of {"prompt": "...", "output_tokens": 100}.'),
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests.")] = 1000,
    random_input_len: Annotated[int, typer.Option(min=1, help="Tokens of a random prompt.")] = 1024,
    random_output_len: Annotated[int, typer.Option(min=1, help="Tokens of its answer at most.")] = 128,
    random_range_ratio: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="How far both may be away from that, as a part of it.")
    ] = 0.0,
    random_prefix_len: Annotated[int, typer.Option(min=0, help="Tokens that all random prompts begin with.")] = 0,
    sharegpt_output_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an answer. Default: as ShareGPT's was.")
    ] = None,
    custom_output_len: Annotated[int, typer.Option(min=1, help="Tokens of an answer that has no own number.")] = 256,
    request_rate: Annotated[
        float, typer.Option(help="Requests per second, at random times (Poisson); inf is all at once.")
    ] = math.inf,
    burstiness: Annotated[
        float, typer.Option(help="Shape of the gamma distribution of the gaps: 1 Poisson, less in bursts, more steady.")
    ] = 1.0,
    max_concurrency: Annotated[int | None, typer.Option(min=1, help="Requests under way at once at most.")] = None,
    num_warmups: Annotated[int, typer.Option(min=0, help="Requests before the timing.")] = 1,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Answers have their full length.")] = False,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="Default: the server's.")] = None,
    extra_body: Annotated[
        str | None, typer.Option(help="More fields of every request, as JSON: response_format, top_p, ...")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of prompts, lengths and arrivals.")] = 0,
    request_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds per answer; longer ones are errors.")] = (
        1800.0
    ),
    percentile_metrics: Annotated[str, typer.Option(help="Comma-separated: ttft, tpot, itl, e2el.")] = "ttft,tpot,itl",
    metric_percentiles: Annotated[str, typer.Option(help="Comma-separated: 50,90,99.")] = "99",
    goodput: Annotated[
        list[str] | None,
        typer.Option(help="Most milliseconds of a good request: --goodput ttft:200 tpot:50; also e2el."),
    ] = None,
    save_result: Annotated[bool, typer.Option("--save-result", help="Write a JSON file, in vLLM's words.")] = False,
    save_detailed: Annotated[bool, typer.Option("--save-detailed", help="In it, every request's times too.")] = False,
    result_dir: Annotated[Path, typer.Option(help="Where to.")] = Path("."),
    result_filename: Annotated[str | None, typer.Option(help="Default: of settings and time.")] = None,
    label: Annotated[str | None, typer.Option(help="Of the run, in the file's name. Default: the backend.")] = None,
    metadata: Annotated[list[str] | None, typer.Option(help="key=value pairs to keep in the file.")] = None,
    disable_tqdm: Annotated[bool, typer.Option("--disable-tqdm", help="No progress bar.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Load any server with OpenAI's API with requests, and time its answers: first token, tokens, throughput, goodput.

    Options and result files are those of `vllm bench serve`. Requests arrive when their time has come, whether or not
    earlier ones are answered.

    \b
    hf-paged serve smollm2 &
    hf-paged bench serve --dataset-name lognormal --num-prompts 100 \\
        --request-rate 2 --goodput ttft:500 tpot:100
    """
    from hf_paged.bench import serve as report

    choose("backend", [backend], BACKENDS)
    choose("dataset", [dataset_name], DATASETS)
    metrics = [name.strip() for name in percentile_metrics.split(",")]
    choose("metric", metrics, report.METRICS)
    percentiles = _percentiles(metric_percentiles)
    slos, about = _pairs(goodput, metadata, pairs)
    if not request_rate > 0:
        raise typer.BadParameter(f"--request-rate must be positive, got {request_rate}")
    if not 0 < burstiness < math.inf:
        raise typer.BadParameter(f"--burstiness must be positive, got {burstiness}")
    body = _body(extra_body, ignore_eos, temperature)
    path = endpoint or BACKENDS[backend]
    url = (base_url or f"http://{host}:{port}").rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")):
        raise typer.BadParameter(f"--base-url begins with http:// or https://, got {url!r}")

    def run() -> None:
        from hf_paged.bench import datasets
        from hf_paged.bench.requests import ServerRequests

        chat = path.rstrip("/").endswith("/chat/completions")
        lengths = datasets.Lengths(_tokenizer(tokenizer), as_ids=not chat)
        if dataset_name in ("sharegpt", "custom") and dataset_path is None:
            raise ValueError(f"--dataset-name {dataset_name} needs --dataset-path; lognormal needs no file")
        if dataset_name == "random":
            requests = datasets.random_lengths(
                lengths, num_prompts, seed, input_len=random_input_len, output_len=random_output_len,
                range_ratio=random_range_ratio, prefix_len=random_prefix_len,
            )  # fmt: skip
        elif dataset_name == "lognormal":
            requests = datasets.lognormal_lengths(lengths, num_prompts, seed)
        elif dataset_name == "sharegpt":
            requests = datasets.sharegpt(lengths, num_prompts, seed, Path(str(dataset_path)), sharegpt_output_len)
        else:
            requests = datasets.custom(lengths, num_prompts, seed, Path(str(dataset_path)), custom_output_len)
        name = model or report.first_model(url, api_key)
        server = partial(
            ServerRequests, url, path, {"model": name} | body, api_key=api_key, timeout=request_timeout
        )  # fmt: skip
        arrivals = report.arrival_times(num_prompts, request_rate, burstiness, seed)
        timings, duration = report.run_serve(
            requests, arrivals, server, warmups=num_warmups, max_concurrency=max_concurrency,
            progress=not (disable_tqdm or as_json),
        )  # fmt: skip
        result = report.summarize(timings, duration, metrics=metrics, percentiles=percentiles, goodput=slos)
        told = {key: value for key, value in result.items() if key not in report.DETAILS}
        if as_json:
            typer.echo(json.dumps(told, indent=2))
        else:
            console.print(report.as_table(told))
        if errors := report.errors_text(result):
            notes.print(errors, style="red", markup=False, highlight=False, soft_wrap=True)
        if save_result or save_detailed:
            settings = {
                "backend": backend, "label": label or backend, "model_id": name, "tokenizer_id": tokenizer or name,
                "num_prompts": num_prompts, **about, "request_rate": request_rate, "burstiness": burstiness,
                "max_concurrency": max_concurrency,
            }  # fmt: skip
            file = report.save(result, settings, folder=result_dir, name=result_filename, detailed=save_detailed)
            notes.print(f"written: {file}", markup=False, soft_wrap=True)
        if not result["completed"]:
            raise typer.Exit(1)

    friendly(run, ValueError, ConnectionError)


def _percentiles(given: str) -> list[float]:
    try:
        found = [float(word) for word in given.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 <= percentile <= 100 for percentile in found):
        raise typer.BadParameter(f"--metric-percentiles must be numbers from 0 to 100 with commas, got {given!r}")
    return found


def _pairs(
    goodput: list[str] | None, metadata: list[str] | None, rest: list[str] | None
) -> tuple[dict[str, float], dict[str, str]]:
    """Of `--goodput ttft:200 tpot:50` and `--metadata a=1 b=2` typer takes the first word for the option, and the rest
    for arguments."""
    aims, about = " ".join(goodput or []).replace(",", " ").split(), list(metadata or [])
    for word in rest or []:
        if goodput and ":" in word and "=" not in word:
            aims.append(word)
        elif metadata and "=" in word:
            about.append(word)
        else:
            raise typer.BadParameter(f"what is {word!r}? Options begin with --; --help lists them")
    for word in about:
        if "=" not in word:
            raise typer.BadParameter(f"--metadata takes key=value pairs, got {word!r}")
    return dict(map(_slo, aims)), {key: value for key, _, value in (word.partition("=") for word in about)}


def _slo(word: str) -> tuple[str, float]:
    name, _, value = word.partition(":")
    try:
        ms = float(value)
    except ValueError:
        ms = -1.0
    if name not in ("ttft", "tpot", "e2el") or not ms >= 0:
        raise typer.BadParameter(f"--goodput takes ttft, tpot and e2el with milliseconds, as ttft:200; got {word!r}")
    return name, ms


def _body(extra: str | None, ignore_eos: bool, temperature: float | None) -> dict[str, Any]:
    body: dict[str, Any] = {"ignore_eos": True} if ignore_eos else {}
    body |= {} if temperature is None else {"temperature": temperature}
    if extra is not None:
        try:
            given = json.loads(extra)
        except ValueError as error:
            raise typer.BadParameter(f"--extra-body is no JSON: {error}") from error
        if not isinstance(given, dict):
            raise typer.BadParameter("--extra-body must be a JSON object")
        body |= given
    return body


def _tokenizer(name: str | None) -> Any:
    if name is None:
        return None
    from transformers import AutoTokenizer

    from hf_paged.bench.models import smollm2_folder

    if name == "smollm2":
        folder, file = smollm2_folder()
        return AutoTokenizer.from_pretrained(folder, gguf_file=file)
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"there is no tokenizer {name!r}: {error}") from error


def server_overhead(
    model: Annotated[str, typer.Option(help=SERVED_HELP, autocompletion=served_models)] = "smollm2",
    streams: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="Of every answer.")] = 64,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of every prompt.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Timed on either side; the median counts.")] = 3,
    dtype: Annotated[str | None, typer.Option(help=DTYPE_HELP)] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help=OPTION_HELP + " On one GPU, gpu_memory_utilization=0.4: two models share it."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """What the server costs: the same requests over HTTP and straight to the engine, in turns.

    The server runs in a process of its own, the engine in this one. Both need memory for the model, and cores: with
    fewer than four, client and server are in each other's way and the server looks worse than it is.
    """
    choose("device", [device] if device else [], ["cpu", "cuda"])
    options = engine_options(option or [])

    def run() -> None:
        from hf_paged.bench import overhead
        from hf_paged.bench.child_server import ServedModel

        result = overhead.run_overhead(
            ServedModel(model, dtype, device, options), streams=streams, tokens=tokens, input_len=input_len,
            rounds=rounds, log=log(as_json),
        )  # fmt: skip
        show(result, overhead.as_table, as_json)

    friendly(run, ValueError, RuntimeError)


def structured(
    model: Annotated[str, typer.Option(help=SERVED_HELP, autocompletion=served_models)] = "smollm2",
    json_schema: Annotated[Path | None, typer.Option(help="A file with the schema. Default: a small record.")] = None,
    streams: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="Of an answer at most.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Timed of either kind; the median counts.")] = 3,
    dtype: Annotated[str | None, typer.Option(help=DTYPE_HELP)] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    option: Annotated[list[str] | None, typer.Option(help=OPTION_HELP)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """What a JSON schema costs: constrained answers, and free ones of the same lengths, in turns."""
    from hf_paged.bench import structured as report
    from hf_paged.bench.child_server import ServedModel

    choose("device", [device] if device else [], ["cpu", "cuda"])
    options = engine_options(option or [])
    schema = None
    if json_schema is not None:
        schema = friendly(partial(report.read_schema, json_schema), ValueError, status=2)

    def run() -> None:
        served = ServedModel(model, dtype, device, options)
        result = report.run_structured(
            served, schema, streams=streams, tokens=tokens, rounds=rounds, log=log(as_json)
        )  # fmt: skip
        show(result, report.as_table, as_json)

    friendly(run, ValueError, RuntimeError)
