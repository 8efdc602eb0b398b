"""`hf-paged run-batch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_paged.cli.terminal import friendly, notes

OTHERS_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def run_batch(
    context: typer.Context,
    input_file: Annotated[Path, typer.Option("--input-file", "-i", help="Requests, one JSON object a line.")],
    output_file: Annotated[
        Path, typer.Option("--output-file", "-o", help="Answers, one a line in the order of their coming; appended to.")
    ],
    model: Annotated[
        str | None,
        typer.Option(help="A folder, a name on the hub, a GGUF file, or smollm2.", autocompletion=lambda: ["smollm2"]),
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Requests under way at once. Default: twice --max-num-seqs.")
    ] = None,
) -> None:
    """Answer a file of requests in OpenAI's batch format, without a server. Run it again to go on where it stopped.

    A line of the input is {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages":
    ...}}; /v1/completions and /v1/responses are served too. Whatever ends a run, Ctrl-C, a kill or a power cut: the
    same command finishes the rest, and every custom_id has exactly one answer in the end. A bad request's answer is its
    error.

    All options of `hf-paged serve` go here too: --max-model-len, --dtype, --served-model-name, --config, ...

    \b
    hf-paged run-batch -i in.jsonl -o out.jsonl --model smollm2
    """
    if model is None and not any(word.split("=")[0] == "--config" for word in context.args):
        raise typer.BadParameter("which model? Give --model: a folder, a name on the hub, a GGUF file, or smollm2")
    arguments = ([] if model is None else [model]) + context.args

    def run() -> None:
        try:
            from hf_paged.integrations.openai_server.run_batch import batch
        except ImportError as error:
            raise ImportError(f"run-batch needs {error.name}: pip install 'hf_paged[server]'") from error
        try:
            total, before, bad = batch(input_file, output_file, arguments, window)
        except KeyboardInterrupt:
            notes.print(
                f"stopped; the same command goes on with what is missing in {output_file}", markup=False, soft_wrap=True
            )
            raise typer.Exit(130) from None
        earlier = f", {before} of them from before" if before else ""
        errors = f"; {bad} of the new ones are errors" if bad else ""
        told = f"{output_file} has the answers to all {total} requests{earlier}{errors}"
        notes.print(told, markup=False, soft_wrap=True)

    friendly(run, ValueError, TypeError, OSError, RuntimeError)
