"""What adapters by request cost: decode steps of a batch with none, one and several, against an engine without room.

`python -m hf_paged.bench.lora --help`
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

import hf_paged
from hf_paged.bench.engines import start_engine, warm_up
from hf_paged.bench.latency import DecodeClock
from hf_paged.bench.models import free_memory, make_subject
from hf_paged.lora.adapter import CONFIG, PREFIX, TENSORS, TargetShape

COUNTS = (0, 1, 8)


def run_lora(
    model_name: str | None = None,
    batches: Sequence[int] = (8, 64),
    counts: Sequence[int] = COUNTS,
    *,
    rank: int = 16,
    context: int = 256,
    steps: int = 20,
    rounds: int = 5,
    dtype: str | None = None,
    device: str | None = None,
    quantization: str | None = None,
    options: dict[str, Any] | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Times decode steps.

    Args:
        model_name, dtype, device, quantization: as `make_subject` takes them.
        batches: sequences that decode at once.
        counts: different adapters among a batch's sequences, which take turns; 0 is none.
        rank: of the adapters, which are random and on every linear layer.
        context: tokens of each prompt.
        steps, rounds: the median of the rounds counts.
        options: fields of `EngineConfig`.

    Returns:
        per batch the seconds of a step: "base_s" of an engine without `enable_lora`, and by count of one with it; and
        the kernels of a step, "base_launches" and by count "launches", None without a GPU.

    Raises:
        ValueError: a name that is not known, or what does not fit the engine.
    """
    subject = make_subject(model_name, dtype, device, quantization)
    model, draw = subject.model, random.Random(0)
    most = max(batches)
    prompts = [[draw.randrange(subject.config.vocab_size) for _ in range(context)] for _ in range(most)]
    options = {"max_num_seqs": max(most, 8)} | (options or {})
    room = {"enable_lora": True, "max_loras": max(*counts, 1), "max_lora_rank": rank}
    rows: list[dict[str, Any]] = [{"batch": batch, "adapters": {}, "launches": {}} for batch in batches]

    def measure(batch: int, adapters: list[hf_paged.LoRARequest | None] | None = None) -> tuple[float, int | None]:
        clock = DecodeClock(model.engine, prompts[:batch], 0.0, adapters)
        seconds = float(clock.measure(steps, rounds, subject.device)["step_s"])
        return seconds, clock.count_launches(subject.device)

    with tempfile.TemporaryDirectory() as folder:
        try:
            log("without room for adapters ...")
            start_engine(model, options, prompts[0])
            warm_up(model, prompts, 0.0)
            for row in rows:
                row["base_s"], row["base_launches"] = measure(row["batch"])
            hf_paged.unwrap(model)
            free_memory()
            log("with room for adapters ...")
            start_engine(model, options | room, prompts[0])
            warm_up(model, prompts, 0.0)
            targets = model.engine.executor.adapters.layers.targets
            made = [_write(Path(folder), number, rank, targets) for number in range(1, max(counts) + 1)]
            for row in rows:
                for count in counts:
                    log(f"{row['batch']} sequences, {count} adapters ...")
                    turns = [made[place % count] if count else None for place in range(row["batch"])]
                    row["adapters"][str(count)], row["launches"][str(count)] = measure(row["batch"], turns)
        finally:
            hf_paged.unwrap(model)
    return {
        "model": subject.name,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "device": str(subject.device),
        "quantization": quantization,
        "rank": rank,
        "context": context,
        "options": options,
        "decode": rows,
    }


def _write(folder: Path, number: int, rank: int, targets: Mapping[str, TargetShape]) -> hf_paged.LoRARequest:
    """An adapter of small random weights on every layer."""
    path = folder / str(number)
    path.mkdir()
    generator = torch.Generator().manual_seed(number)
    tensors = {}
    for name, target in targets.items():
        for part, shape in (("A", (rank, target.inputs)), ("B", (target.outputs, rank))):
            tensor = torch.randn(shape, generator=generator) * 0.01
            tensors[f"{PREFIX}{name}.lora_{part}.weight"] = tensor.to(torch.bfloat16)
    save_file(tensors, path / TENSORS)
    (path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))
    return hf_paged.LoRARequest(f"adapter-{number}", number, str(path))


def as_table(result: dict[str, Any]) -> Table:
    """The same for people."""
    title = f"{result['model']}, {result['quantization'] or result['dtype']}: decode steps in ms, rank {result['rank']}"
    counts = list(result["decode"][0]["adapters"])
    table = Table(title=title, caption="in brackets: of the time without room, and kernels of a step on a GPU")
    for column in ("batch", "no room", *(f"{count} adapters" for count in counts)):
        table.add_column(column, justify="right")
    for row in result["decode"]:
        base = row["base_s"]
        times = [
            _cell(row["adapters"][count], f"{row['adapters'][count] / base:.2f}x", row["launches"][count])
            for count in counts
        ]
        table.add_row(str(row["batch"]), _cell(base, None, row["base_launches"]), *times)
    return table


def _cell(seconds: float, ratio: str | None, launches: int | None) -> str:
    notes = [note for note in (ratio, None if launches is None else f"{launches} kernels") if note is not None]
    return f"{seconds * 1e3:.3f}" + (f" ({', '.join(notes)})" if notes else "")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m hf_paged.bench.lora", description=__doc__)
    parser.add_argument("--model", help="smollm2, qwen3-0.6b, llama-3.1-8b, tiny, ...")
    parser.add_argument("--batches", default="8,64", help="sequences that decode at once, with commas")
    parser.add_argument("--adapters", default="0,1,8", help="different adapters in a batch, with commas")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--context", type=int, default=256, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=20, help="decode steps per round")
    parser.add_argument("--rounds", type=int, default=5, help="the median counts")
    parser.add_argument("--dtype")
    parser.add_argument("--device")
    parser.add_argument("--quantization", help="w4 or fp8")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    given = parser.parse_args(arguments)
    console = Console(stderr=given.json)
    result = run_lora(
        given.model,
        [int(batch) for batch in given.batches.split(",")],
        [int(count) for count in given.adapters.split(",")],
        rank=given.rank,
        context=given.context,
        steps=given.steps,
        rounds=given.rounds,
        dtype=given.dtype,
        device=given.device,
        quantization=given.quantization,
        log=lambda text: console.print(text, style="dim"),
    )
    if given.json:
        print(json.dumps(result, indent=2))
    else:
        console.print(as_table(result))


if __name__ == "__main__":
    main()
