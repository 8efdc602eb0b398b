"""What all commands share at the terminal: where they print, and how they end."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partialmethod
from typing import Any, TypeVar

import typer
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm
from transformers.utils import logging

T = TypeVar("T")

NO_BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")
"""What transformers, huggingface_hub and tqdm read when they are imported."""

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


@contextmanager
def bars_at_a_terminal() -> Iterator[None]:
    """While standard error is none, other libraries and processes that are started show no progress bars: a log has no
    use for them. All settings are then as they were."""
    if sys.stderr.isatty():
        yield
        return
    ours, hubs, make = logging.is_progress_bar_enabled(), not are_progress_bars_disabled(), tqdm.__init__
    environment = {name: os.environ.get(name) for name in NO_BARS}
    logging.disable_progress_bar()
    # The bar of transformers' GGUF reader has no switch. None is for a terminal alone; who says otherwise is heard.
    tqdm.__init__ = partialmethod(make, disable=None)
    os.environ.update(dict.fromkeys(NO_BARS, "1"))
    try:
        yield
    finally:
        tqdm.__init__ = make
        if ours:
            logging.enable_progress_bar()
        (enable_progress_bars if hubs else disable_progress_bars)()
        for name, value in environment.items():
            os.environ.pop(name)
            os.environ.update({} if value is None else {name: value})


def friendly(run: Callable[[], T], *errors: type[Exception], status: int = 1) -> T:
    """Runs a command, or a part of one; what is missing, and `errors`, are said in a line, and Ctrl-C ends it without a
    traceback. Progress bars are shown at a terminal alone.

    Args:
        status: the program's, after an error.
    """
    said: tuple[type[Exception], ...] = (ImportError, FileNotFoundError, *errors)
    try:
        with bars_at_a_terminal():
            return run()
    except typer.Exit:  # a RuntimeError, and no error
        raise
    except said as error:
        notes.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(status) from error
    except KeyboardInterrupt:
        notes.print("\nstopped")
        raise typer.Exit(130) from None
