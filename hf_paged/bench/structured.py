"""`hf-paged bench structured`: what it costs that answers follow a JSON schema."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from hf_paged.bench.child_server import ServedModel
from hf_paged.sampling.structured import check_schema
from hf_paged.sampling_params import SamplingParams
from hf_paged.structured_outputs import StructuredOutputsParams
from hf_paged.text_file import read_text

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "born": {"type": "integer"},
        "profession": {"enum": ["keeper", "sailor", "teacher", "baker", "clerk"]},
        "story": {"type": "string"},
        "friends": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
                "required": ["name", "age"],
            },
        },
    },
    "required": ["name", "born", "profession", "story", "friends"],
}
"""A record with text, numbers, a choice and a list: no part of it is long enough to be all that is measured."""

PROMPT = "Somebody who lives in harbour town number {}, as a JSON object:\n"


def read_schema(file: Path) -> dict[str, Any]:
    """A JSON schema, known to compile.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no JSON, or no schema.
        ImportError: xgrammar is not installed.
    """
    content = read_text(file, "schema")
    try:
        schema = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(schema, dict):
        raise ValueError(f"{file} is no JSON schema: an object is wanted, got {content.strip()!r:.40}")
    try:
        check_schema(schema)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return schema


def run_structured(
    served: ServedModel,
    schema: dict[str, Any] | None = None,
    *,
    streams: int = 64,
    tokens: int = 64,
    rounds: int = 3,
    log: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Answers with and without a schema, in turns: the free ones are exactly as long, so that both are the same work.

    Args:
        schema: None is `SCHEMA`.
        streams: requests at once.
        tokens: of an answer at most; the schema may end it earlier.
        rounds: the median of them counts.

    Returns:
        seconds per round of both, tokens, and `ratio`: constrained speed over free speed.

    Raises:
        ImportError: xgrammar is not installed.
        ValueError: the model has no tokenizer, or the schema is none.
    """
    log(f"loading {served.name}")
    model = served.load()
    form = StructuredOutputsParams(json=SCHEMA if schema is None else schema)
    prompts = [PROMPT.format(number) for number in range(streams)]
    constrained = [
        SamplingParams(temperature=1.0, seed=number, max_tokens=tokens, structured_outputs=form)
        for number in range(streams)
    ]

    def run(sampling: list[SamplingParams]) -> tuple[float, list[int]]:
        start = time.perf_counter()
        outputs = model.generate_many(prompts, sampling, progress=False)
        took = time.perf_counter() - start
        if error := next((output.error for output in outputs if output.error is not None), None):
            raise RuntimeError(f"a request failed: {error}") from error
        return took, [len(output.outputs[0].token_ids) for output in outputs]

    _, lengths = run(constrained)  # compiles the grammar, and says how long the answers are
    free = [
        SamplingParams(temperature=1.0, seed=number, max_tokens=length, ignore_eos=True)
        for number, length in enumerate(lengths)
    ]
    run(free)
    seconds: dict[str, list[float]] = {"constrained": [], "free": []}
    for number in range(rounds):
        both = [("constrained", constrained), ("free", free)]
        for name, sampling in both if number % 2 else reversed(both):
            seconds[name].append(run(sampling)[0])
        log(f"round {number + 1}: with {seconds['constrained'][-1]:.3f} s, without {seconds['free'][-1]:.3f} s")
    return {
        "model": served.name,
        "streams": streams,
        "tokens": sum(lengths),
        "constrained_s": seconds["constrained"],
        "free_s": seconds["free"],
        "ratio": median(seconds["free"]) / median(seconds["constrained"]),
    }


def as_table(result: dict[str, Any]) -> Table:
    """The same for people."""
    table = Table(title=f"{result['streams']} answers, {result['tokens']} tokens, {result['model']}")
    for column in ("", "seconds, each round", "tokens/s"):
        table.add_column(column, justify="right" if column else "left")
    for name, title in (("constrained", "JSON schema"), ("free", "free")):
        rounds = result[f"{name}_s"]
        speed = f"{result['tokens'] / median(rounds):,.1f}"
        table.add_row(title, ", ".join(f"{took:.3f}" for took in rounds), speed)
    table.caption = f"with a schema {result['ratio']:.2f}x the speed without"
    return table
