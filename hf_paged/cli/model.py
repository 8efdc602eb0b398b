"""`hf-paged demo` and `hf-paged quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_paged.cli.terminal import console, friendly


def demo(
    out: Annotated[Path, typer.Option(help="Where to draw the timeline and the page pool.")] = Path("demo.png"),
    compare: Annotated[bool, typer.Option(help="Also run stock generate on the same work.")] = True,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens per answer at most.")] = 96,
) -> None:
    """Answer a batch of chats with SmolLM2-135M, four samples each, one streamed live, and show what the engine did."""
    from hf_paged.demo import run_demo

    friendly(lambda: run_demo(console, out, compare=compare, max_tokens=max_tokens))


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
    from hf_paged.quantization.writers.calibration import read_texts
    from hf_paged.quantization.writers.quantize import quantize as write

    def run() -> None:
        texts = None if calibration is None else read_texts(calibration)
        subject: Any = model
        tokenizer = None
        if model == "smollm2":
            from hf_paged.bench.models import load_smollm2

            subject, tokenizer = load_smollm2()
        write(
            subject, to, out, tokenizer=tokenizer, method=method, group_size=group_size, symmetric=symmetric,
            desc_act=desc_act, calibration=texts, samples=samples, sequence_length=sequence_length, dtype=dtype,
            device=device, seed=seed,
        )  # fmt: skip
        console.print(f"written: {out}")

    friendly(run, ValueError, FileExistsError)
