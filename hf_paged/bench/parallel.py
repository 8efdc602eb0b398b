"""Decode steps of a model spread over several GPUs, and what its sums across them cost.

    torchrun --nproc-per-node 2 -m hf_paged.bench.parallel llama-3.1-8b --batches 1,128 --tp 2
    torchrun --nproc-per-node 2 -m hf_paged.bench.parallel llama-3.1-8b --batches 1,128 --pp 2
    torchrun --nproc-per-node 2 -m hf_paged.bench.parallel qwen3-30b-a3b --batches 1,128 --tp 2 --ep

Weights are random, and each rank makes its own part alone. Rank 0 prints a table and a line of JSON. With neither it is
one GPU, without torchrun. A step of a pipeline is one of all its micro-batches: a token for every sequence. `--dp`
replicas compute the same at the same time, and share the rollouts out.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import hf_paged
from hf_paged.bench.models import DTYPES, QUANTIZATIONS, SHAPES, quantized, random_model
from hf_paged.distributed.collectives import all_reduce, pushed_bytes
from hf_paged.distributed.groups import TensorParallel, check_expert_parallel, join
from hf_paged.distributed.shard import install, plan_part
from hf_paged.engine.engine import Engine
from hf_paged.quantization.assemble import compute_buffers, place

WARM_STEPS = 5
SUMS = 32
"""Sums that are timed as one graph."""


@torch.no_grad()
def random_part(
    config: Any,
    dtype: torch.dtype,
    parallel: TensorParallel,
    quantization: str | None = None,
    *,
    expert_parallel: bool = False,
) -> Any:
    """This rank's part of a causal LM with random weights: normal, of deviation 0.02; norms 1. What all ranks have
    whole is the same on all. With `expert_parallel` it has whole experts."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plan = plan_part(model, parallel, expert_parallel=expert_parallel)
    own = torch.Generator(parallel.device).manual_seed(1 + parallel.link.rank)
    common = torch.Generator(parallel.device).manual_seed(0)
    for name, parameter in model.named_parameters():
        shape, cut = list(parameter.shape), plan.cut_of(name)
        if cut is not None:
            shape[cut.dim] = cut.width
        part = torch.ones(shape, dtype=dtype, device=parallel.device)
        if name.endswith("bias"):
            part.zero_()
        elif len(shape) > 1:
            part.normal_(0.0, 0.02, generator=common if cut is None else own)
        place(model, name, part, None)
    model.tie_weights()
    compute_buffers(model, parallel.device)
    if quantization is not None:
        quantized(model, quantization)
    install(model, plan, parallel)
    return model.eval()


def run_parallel(
    name: str,
    batches: list[int],
    parallel: TensorParallel | None,
    *,
    context: int = 900,
    steps: int = 20,
    rounds: int = 5,
    dtype: torch.dtype = torch.bfloat16,
    quantization: str | None = None,
    layers: int | None = None,
    expert_parallel: bool = False,
    rollouts: tuple[int, int, int] | None = None,
    replicas: int = 1,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Times decode steps, and rollouts; every rank calls it.

    Args:
        name: one of `SHAPES`.
        batches: sequences that decode at once.
        parallel: None is one GPU, or the CPU.
        context: tokens of each prompt.
        steps, rounds: the median of the rounds' mean step times counts.
        layers: of the model; None is all.
        expert_parallel: ranks have whole experts of a mixture.
        rollouts: (prompts, samples of each, tokens of each), generated once to warm up and once to be timed.
        replicas: as many groups of ranks do the same.
        options: fields of `EngineConfig`.

    Returns:
        plain data, on every rank.
    """
    config = SHAPES[name]()
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    if parallel is None:
        place = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        model = random_model(config, dtype, place)
        if quantization is not None:
            quantized(model, quantization)
    else:
        model = random_part(config, dtype, parallel, quantization, expert_parallel=expert_parallel)
    device = next(model.parameters()).device
    most = max(*batches, rollouts[0] * rollouts[1] // replicas if rollouts else 1)
    hf_paged.wrap(model, **{"max_num_seqs": min(most, 1024)} | (options or {}))
    draw = random.Random(0)
    prompts = [[draw.randrange(config.vocab_size) for _ in range(context)] for _ in range(max(batches))]
    rows = []
    for batch in batches:
        times = _time_decodes(model.engine, prompts[:batch], steps, rounds, device)
        row: dict[str, Any] = {"batch": batch, "step_s": statistics.median(times), "rounds_s": times}
        row["tokens_per_s"] = batch / row["step_s"]
        if parallel is not None and parallel.size > 1:
            row["all_reduce_us"] = time_sums(parallel, batch, config.hidden_size, dtype)
        rows.append(row)
    result = {
        "model": name,
        "layers": config.num_hidden_layers,
        "tensor_parallel_size": 1 if parallel is None else parallel.size,
        "pipeline_parallel_size": 1 if parallel is None or parallel.pipeline is None else parallel.pipeline.size,
        "expert_parallel": expert_parallel,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "quantization": quantization,
        "context": context,
        "sums_per_step": 0 if parallel is None or parallel.size == 1 else 2 * config.num_hidden_layers + 1,
        "weight_bytes_per_rank": sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]),
        "pages": model.engine.scheduler.num_pages,
        "data_parallel_size": replicas,
        "decode": rows,
    }
    if rollouts is not None:
        result["rollouts"] = _time_rollouts(model, config.vocab_size, context, rollouts, replicas)
    hf_paged.unwrap(model)
    return result


def _time_decodes(
    engine: Engine, prompts: list[list[int]], steps: int, rounds: int, device: torch.device
) -> list[float]:
    """Mean seconds of a step that only decodes, per round."""
    parts = min(engine.executor.micro_batches, len(prompts))
    sampling = hf_paged.SamplingParams(
        temperature=0.0, max_tokens=len(prompts[0]) + (steps * rounds + WARM_STEPS) * 2, ignore_eos=True
    )
    engine.reset_prefix_cache()
    ids = [engine.add_request(prompt, sampling) for prompt in prompts]
    decoding: list[int] = []
    engine.observers.append(lambda record: decoding.append(len(record.decodes)))
    try:
        while sum(decoding[-parts:]) < len(prompts):
            engine.step()
        for _ in range(WARM_STEPS * parts):
            engine.step()
        times = []
        for _ in range(rounds):
            _synchronize(device)
            start = time.perf_counter()
            for _ in range(steps * parts):
                engine.step()
            _synchronize(device)
            times.append((time.perf_counter() - start) / steps)
        return times
    finally:
        engine.observers.pop()
        engine.abort(ids)
        while engine.has_unfinished():
            engine.step()


def _time_rollouts(
    model: Any, vocab_size: int, context: int, rollouts: tuple[int, int, int], replicas: int
) -> dict[str, Any]:
    """Seconds and tokens per second of all replicas together, each of which has its share of the prompts."""
    count, samples, tokens = rollouts
    draw = random.Random(1)
    sampling = hf_paged.SamplingParams(temperature=1.0, n=samples, max_tokens=tokens, ignore_eos=True, seed=1)
    seconds = 0.0
    for _ in range(2):  # the first one captures graphs
        prompts = [[draw.randrange(vocab_size) for _ in range(context)] for _ in range(count // replicas)]
        if replicas > 1:
            dist.barrier()
        start = time.perf_counter()
        outputs = model.generate_many(prompts, sampling, progress=False)
        seconds = time.perf_counter() - start
        assert (
            sum(len(one.token_ids) for output in outputs for one in output.outputs) == len(prompts) * samples * tokens
        )
    if replicas > 1:
        slowest = torch.tensor(seconds)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        seconds = float(slowest)
    made = count // replicas * replicas * samples * tokens
    return {"prompts": count, "samples": samples, "tokens": tokens, "seconds": seconds, "tokens_per_s": made / seconds}


def time_sums(parallel: TensorParallel, rows: int, width: int, dtype: torch.dtype) -> dict[str, float | str]:
    """Microseconds of one sum of `[rows, width]` across ranks, by method; why not, where one failed.

    "own" is what the model's layers use. On a GPU sums are timed in a CUDA graph, as a decode step has them.
    """
    x = torch.zeros(rows, width, dtype=dtype, device=parallel.device)
    methods: dict[str, Callable[[Tensor], Tensor]] = {"own": lambda x: all_reduce(x, parallel.name)}

    def backends(x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=parallel.group)
        return total

    methods["nccl" if x.is_cuda else "gloo"] = backends
    if x.is_cuda:
        from torch.distributed import _symmetric_memory

        buffer = _symmetric_memory.empty(x.numel(), dtype=dtype, device=x.device)
        _symmetric_memory.rendezvous(buffer, parallel.group)

        def two_shot(x: Tensor) -> Tensor:
            buffer.copy_(x.view(-1))
            return torch.ops.symm_mem.two_shot_all_reduce_(buffer, "sum", parallel.name)

        copy = torch.ops.symm_mem.one_shot_all_reduce_copy
        if x.nbytes <= 8 * pushed_bytes(parallel.size):
            methods["one-shot"] = lambda x: copy(buffer, x.view(-1), "sum", parallel.name)
        methods["two-shot"] = two_shot
    found: dict[str, float | str] = {}
    for name, sum_up in methods.items():
        try:
            found[name] = 1e6 * _time_one(sum_up, x)
        except RuntimeError as error:
            found[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
    return found


def _time_one(sum_up: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Seconds of one sum, the median of some dozens."""

    def many() -> None:
        for _ in range(SUMS):
            sum_up(x)

    run: Callable[[], None] = many
    if x.is_cuda:
        stream = torch.cuda.Stream(x.device)
        with torch.cuda.stream(stream):
            many()
        torch.cuda.synchronize(x.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            many()
        run = graph.replay
    times = []
    for _ in range(5 if not x.is_cuda else 20):
        _synchronize(x.device)
        start = time.perf_counter()
        run()
        _synchronize(x.device)
        times.append((time.perf_counter() - start) / SUMS)
    return statistics.median(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def as_text(result: dict[str, Any]) -> str:
    """A table for people."""
    kind = result["quantization"] or result["dtype"]
    sizes = result["tensor_parallel_size"], result["pipeline_parallel_size"]
    whole = ", whole experts" if result["expert_parallel"] else ""
    where = f"{result['device']}, tensor parallel {sizes[0]}, pipeline parallel {sizes[1]}{whole}"
    where += f", data parallel {result['data_parallel_size']}" if result["data_parallel_size"] > 1 else ""
    lines = [
        f"{result['model']} ({result['layers']} layers), {kind}, {where}: "
        f"{result['weight_bytes_per_rank'] / 2**30:.2f} GiB of weights per rank, {result['pages']} pages, prompts of "
        f"{result['context']} tokens",
        f"{'batch':>6} {'ms/step':>9} {'tokens/s':>10}  microseconds of each of {result['sums_per_step']} sums",
    ]
    for row in result["decode"]:
        sums = ", ".join(
            f"{name} {value:.1f}" if isinstance(value, float) else f"{name}: {value}"
            for name, value in row.get("all_reduce_us", {}).items()
        )
        lines.append(f"{row['batch']:>6} {row['step_s'] * 1e3:>9.3f} {row['tokens_per_s']:>10.1f}  {sums}")
    if (told := result.get("rollouts")) is not None:
        lines.append(
            f"rollouts, {told['prompts']} prompts x {told['samples']} samples x {told['tokens']} tokens: "
            f"{told['seconds']:.2f} s, {told['tokens_per_s']:.0f} tokens/s"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """The command; rank 0 prints."""
    parser = argparse.ArgumentParser(prog="python -m hf_paged.bench.parallel", description=__doc__.partition("\n")[0])
    parser.add_argument("model", choices=list(SHAPES))
    parser.add_argument("--tp", type=int, default=1, help="ranks that share every layer")
    parser.add_argument("--pp", type=int, default=1, help="groups of such ranks, each with some of the layers")
    parser.add_argument("--ep", action="store_true", help="ranks of --tp have whole experts of a mixture")
    parser.add_argument("--dp", type=int, default=1, help="replicas of all that")
    parser.add_argument("--rollouts", help="PROMPTSxSAMPLESxTOKENS, to be timed too: 64x8x256, say")
    parser.add_argument("--batches", default="1,128", help="sequences that decode at once, several by commas")
    parser.add_argument("--context", type=int, default=900, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=20, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--quantization", choices=QUANTIZATIONS)
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for a quick look")
    parser.add_argument("--device", choices=["cuda", "cpu"])
    parser.add_argument("--log", action="store_true", help="show the library's log")
    given = parser.parse_args(arguments)
    try:
        check_expert_parallel(given.ep, given.tp)
    except ValueError as error:
        parser.error(str(error))
    logging.basicConfig(level=logging.INFO if given.log else logging.WARNING)
    parts = given.rollouts.split("x") if given.rollouts else []
    if given.rollouts and (len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts)):
        parser.error(f"--rollouts is PROMPTSxSAMPLESxTOKENS, got {given.rollouts!r}")
    if parts and int(parts[0]) % given.dp:
        parser.error(f"--dp {given.dp} does not divide the {parts[0]} prompts of --rollouts")
    started = int(os.environ.get("WORLD_SIZE", 1))
    if given.tp * given.pp * given.dp != started:
        parser.error(f"--tp, --pp and --dp need {given.tp * given.pp * given.dp} processes, and {started} were started")
    parallel = join(given.tp, given.device, stages=given.pp) if given.tp * given.pp > 1 else None
    if parallel is None and given.dp > 1:
        dist.init_process_group("gloo")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    result = run_parallel(
        given.model,
        [int(batch) for batch in given.batches.split(",")],
        parallel,
        context=given.context,
        steps=given.steps,
        rounds=given.rounds,
        dtype=getattr(torch, given.dtype),
        quantization=given.quantization,
        layers=given.layers,
        expert_parallel=given.ep,
        rollouts=(int(parts[0]), int(parts[1]), int(parts[2])) if parts else None,
        replicas=given.dp,
    )
    if int(os.environ.get("RANK", 0)) == 0:
        sys.stdout.write(f"{as_text(result)}\n{json.dumps(result)}\n")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
