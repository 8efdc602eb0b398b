"""`hf-paged`: the program. Each group of commands is a module; what they run is imported when it is called."""

from __future__ import annotations

import typer

from hf_paged.cli import bench_serve
from hf_paged.cli.batch import OTHERS_PASSED_ON, run_batch
from hf_paged.cli.bench import bench
from hf_paged.cli.chat import chat, complete
from hf_paged.cli.model import demo, quantize
from hf_paged.cli.serve import PASSED_ON, serve

app = typer.Typer(no_args_is_help=True, add_completion=True, help="Paged generation for Hugging Face models.")
app.command(context_settings=PASSED_ON, add_help_option=False)(serve)
app.command()(chat)
app.command()(complete)
app.command("run-batch", context_settings=OTHERS_PASSED_ON)(run_batch)
app.command()(demo)
app.command()(quantize)
bench.command()(bench_serve.serve)
bench.command()(bench_serve.server_overhead)
bench.command()(bench_serve.structured)
app.add_typer(bench, name="bench")


@app.callback()
def _root() -> None:
    """Keeps `hf-paged COMMAND` a group, however many commands there are."""


def main() -> None:
    """The `hf-paged` program."""
    app()
