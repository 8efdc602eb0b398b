"""Talking at a terminal, or through a pipe: input lines, answers as they come, Ctrl-C that stops one of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

from hf_paged.cli.answering import AnswerError, Message, Piece
from hf_paged.cli.terminal import notes

CHAT_HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer."
COMPLETE_HELP = "/exit or Ctrl-D ends it, Ctrl-C stops a completion."


@dataclass(frozen=True)
class Said:
    """An answer, whole or as far as it came."""

    text: str
    stopped: bool
    """By Ctrl-C."""


def tell(pieces: Iterator[Piece], *, stats: bool = False) -> Said:
    """Prints an answer as it comes. Ctrl-C closes it and is not raised.

    Raises:
        AnswerError: there is none, or no more of it.
    """
    start, first, tokens, text, thinking, stopped = time.perf_counter(), None, 0, [], False, False
    try:
        with closing(pieces):  # type: ignore[type-var]
            for piece in pieces:
                if first is None and (piece.text or piece.reasoning):
                    first = time.perf_counter() - start
                tokens += piece.tokens
                if piece.reasoning:
                    notes.print(piece.reasoning, end="", style="dim", markup=False, highlight=False, soft_wrap=True)
                    thinking = True
                if piece.text and thinking:
                    notes.print()
                    thinking = False
                text.append(piece.text)
                _write(piece.text)
    except KeyboardInterrupt:
        stopped = True
    finally:
        if text or stopped:
            _write("\n")
    seconds = time.perf_counter() - start
    if stats and first is not None:
        notes.print(f"TTFT {first * 1000:.1f} ms, {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s")
    return Said("".join(text), stopped)


def converse(answer: Callable[[list[Message]], Iterator[Piece]], system: str | None, *, stats: bool) -> None:
    """A chat at a terminal, until /exit or the end of input."""
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(opening)

    def take(line: str) -> None:
        asked = [*messages, {"role": "user", "content": line}]
        said = tell(answer(asked), stats=stats)
        if said.text:  # an answer that was stopped counts as far as it came
            messages[:] = [*asked, {"role": "assistant", "content": said.text}]

    def reset() -> None:
        messages[:] = opening
        notes.print("the conversation is forgotten", style="dim")

    _listen(take, {"/reset": reset}, CHAT_HELP)


def keep_completing(answer: Callable[[str], Iterator[Piece]], *, stats: bool) -> None:
    """One prompt after the other at a terminal, until /exit or the end of input."""

    def take(line: str) -> None:
        _write(line)
        tell(answer(line), stats=stats)

    _listen(take, {}, COMPLETE_HELP)


def _listen(take: Callable[[str], None], commands: dict[str, Callable[[], None]], help: str) -> None:
    with suppress(ImportError):
        import readline  # noqa: F401 - input() then has a history, and keys to edit with

    notes.print(help, style="dim")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            with suppress(KeyboardInterrupt):  # it ends as it is
                _write("\n")
            return
        except KeyboardInterrupt:
            notes.print("\n/exit or Ctrl-D ends the program", style="dim")
            continue
        if line == "/exit":
            return
        if line in commands:
            commands[line]()
        elif line.startswith("/") and " " not in line and "/" not in line[1:]:
            notes.print(help, style="dim")
        elif line:
            try:
                take(line)
            except KeyboardInterrupt:  # before the answer began, or as it ended
                _write("\n")
            except AnswerError as error:
                notes.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)


def _write(text: str) -> None:
    """To standard output as far as its encoding goes; to a terminal, nothing that would steer it."""
    out: Any = sys.stdout
    if out.isatty():
        text = "".join(char for char in text if char.isprintable() or char in "\n\t")
    encoding = out.encoding or "utf-8"
    out.write(text.encode(encoding, "replace").decode(encoding))
    out.flush()
