"""Arguments that several commands take, checked before any work starts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import typer

MODEL_HELP = (
    "smollm2, or with random weights qwen3-0.6b, llama-3.1-8b or tiny. Default: smollm2 on a CPU, qwen3-0.6b on a GPU."
)
DTYPE_HELP = "float32, bfloat16 or float16. Default: float32 on a CPU, bfloat16 on a GPU."
DEVICE_HELP = "cpu or cuda. Default: the GPU where there is one."
OPTION_HELP = "A field of EngineConfig for hf_paged, as key=value; may be given several times."


def numbers(what: str, given: list[str], count: int | None = None) -> list[int]:
    if not all(number.isdecimal() and int(number) for number in given) or len(given) != (count or len(given)):
        raise typer.BadParameter(f"{what} must be positive numbers, got {given}")
    return [int(number) for number in given]


def choose(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    from hf_paged.bench.run import check_names

    try:
        check_names(what, given, known)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def check_model(model: str | None, dtype: str | None, device: str | None) -> None:
    from hf_paged.bench.models import DTYPES, MODELS

    choose("model", [model] if model else [], MODELS)
    choose("dtype", [dtype] if dtype else [], DTYPES)
    choose("device", [device] if device else [], ["cpu", "cuda"])


def key_values(given: list[str]) -> dict[str, Any]:
    """key=value pairs: numbers, true, false and null are read as JSON, the rest is text."""
    options: dict[str, Any] = {}
    for pair in given:
        key, sign, value = pair.partition("=")
        if not sign:
            raise typer.BadParameter(f"an option is key=value, got {pair!r}")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return options


def engine_options(given: list[str]) -> dict[str, Any]:
    """key=value pairs as fields of EngineConfig."""
    from hf_paged.config import EngineConfig

    options = key_values(given)
    try:
        EngineConfig().with_changes(**options)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    return options
