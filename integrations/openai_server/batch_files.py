"""Files of `hf-paged run-batch`: OpenAI's request lines in, answer lines out, each exactly once whatever happens.

The output file is the only state. A line is there whole, newline included, or it does not count: what a kill cuts in
half is removed at the next start and asked again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_paged.integrations.openai_server.guard import GENERATING


@dataclass(frozen=True)
class BatchLine:
    """A line of the input that is not empty."""

    number: int
    """From 1."""
    custom_id: str | None
    """None where the line has none that could be read."""
    url: str = ""
    body: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None
    """Why it cannot be asked."""

    @property
    def key(self) -> str | int:
        """What tells it from all others, in the output too."""
        return self.number if self.custom_id is None else self.custom_id


def read_batch(file: Path) -> Iterator[BatchLine]:
    """A batch's lines, one at a time: bad ones come with their problem.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no input file {file}")
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _read_line(number, line)


def check_batch(file: Path) -> set[str | int]:
    """Reads a batch to its end and returns the keys of its lines.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, or two lines have the same custom_id.
    """
    lines: dict[str | int, int] = {}
    for line in read_batch(file):
        if line.key in lines:
            raise ValueError(
                f"{file}: lines {lines[line.key]} and {line.number} have the same custom_id {line.key!r:.200}; each "
                "must have one of its own, since it is all that says which answer is whose"
            )
        lines[line.key] = line.number
    if not lines:
        raise ValueError(f"{file} has no requests")
    return set(lines)


def _read_line(number: int, line: bytes) -> BatchLine:
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BatchLine(number, None, problem=f"line {number} is no JSON: {error}")
    if not isinstance(given, dict):
        return BatchLine(number, None, problem=f"line {number} is no JSON object")
    custom_id, url, body = given.get("custom_id"), given.get("url"), given.get("body")
    if not isinstance(custom_id, str):
        return BatchLine(number, None, problem=f"line {number} has no custom_id, which must be text")
    problem = None
    if given.get("method") != "POST":
        problem = f'method must be "POST", got {given.get("method")!r:.80}'
    elif url not in GENERATING:
        problem = f"url must be {' or '.join(GENERATING)}, got {url!r:.80}"
    elif not isinstance(body, dict):
        problem = f"body must be a JSON object, the request; got {type(body).__name__}"
    elif body.get("stream"):
        problem = "a batch has whole answers: leave stream out of the body"
    if problem is not None:
        return BatchLine(number, custom_id, problem=f"line {number}: {problem}")
    return BatchLine(number, custom_id, str(url), body)  # type: ignore[arg-type]


class BatchOutput:
    """A file of answers, opened to go on with it; nobody else can meanwhile. Close it, or use it in `with`.

    Raises:
        BlockingIOError: another run writes it.
        ValueError: it holds something else than a batch's answers.
        OSError: it cannot be written.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        new = not file.exists()
        self._handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BlockingIOError(f"another run writes {file}: wait for its end, or name another file") from error
            self.done = self._read()
            if new:
                _sync_folder(file.parent)
        except BaseException:
            os.close(self._handle)
            raise

    def append(self, entries: Sequence[dict[str, Any]]) -> None:
        """Writes answers and returns when they are on the disk, out of reach of a crash."""
        data = b"".join(json.dumps(entry, ensure_ascii=True).encode() + b"\n" for entry in entries)
        while data:
            data = data[os.write(self._handle, data) :]
        os.fsync(self._handle)

    def close(self) -> None:
        os.close(self._handle)

    def __enter__(self) -> BatchOutput:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> set[str | int]:
        """The keys of the lines that are there; half a line at the end is cut off."""
        done: set[str | int] = set()
        whole = 0
        with open(self._file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    if not whole and not b'{"id": "batch_req_'.startswith(line[:18]):
                        raise ValueError(self._foreign(number))  # not ours to cut
                    break
                key = _key(line)
                if key is None:
                    raise ValueError(self._foreign(number))
                if key in done:
                    raise ValueError(f"{self._file}, line {number}: {key!r:.200} has an answer already further up")
                done.add(key)
                whole += len(line)
        os.ftruncate(self._handle, whole)
        return done

    def _foreign(self, number: int) -> str:
        return f"{self._file}, line {number}: this is no answer of a batch. Name another output file"


def _key(line: bytes) -> str | int | None:
    """Whose answer a line is; None if it is none."""
    with suppress(ValueError, RecursionError, KeyError, TypeError):
        entry = json.loads(line)
        key = entry["error"]["line"] if entry["custom_id"] is None else entry["custom_id"]
        return key if isinstance(key, str | int) else None
    return None


def _sync_folder(folder: Path) -> None:
    """A new file's name is on the disk only when its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
