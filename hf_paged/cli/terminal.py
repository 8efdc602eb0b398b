"""What all commands share at the terminal: where they print, and how they end."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

console = Console()
"""For what a command is asked for."""

notes = Console(stderr=True)
"""For what is said about it: a pipe gets none of that."""


def log(quiet: bool) -> Callable[[str], None]:
    return lambda text: None if quiet else console.print(text, style="dim")


def show(result: dict[str, Any], as_table: Callable[[dict[str, Any]], Table], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        console.print(as_table(result))


def friendly(run: Callable[[], None], *errors: type[Exception]) -> None:
    """Runs a command; what is missing, and `errors`, are said in a line, and Ctrl-C ends it without a traceback."""
    said: tuple[type[Exception], ...] = (ImportError, FileNotFoundError, *errors)
    try:
        run()
    except typer.Exit:  # a RuntimeError, and no error
        raise
    except said as error:
        notes.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        notes.print("\nstopped")
        raise typer.Exit(130) from None
