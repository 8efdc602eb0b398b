"""ToolParser: calls out of a model's text, as they are written. Which model writes them how is in `tools`."""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from hf_paged.integrations.openai_server.reasoning import overlap

Reading = Generator[None, None, bool]
"""Goes past something, and yields whenever it needs more text. Returns whether it was there."""

BLANKS = " \t\r\n"
ARGUMENTS = ("arguments", "parameters")
_WORD = re.compile(r"[\w.+-]+")
_IN_STRING = re.compile(r'"|\\.?', re.DOTALL)
_OUT_OF_STRING = re.compile(r'["{}\[\]<]')


@dataclass(frozen=True)
class CallPiece:
    """What is new of a call."""

    index: int
    """Of the call among those of its answer."""
    name: str | None
    """In the first piece of a call, which has no arguments yet; None in all others."""
    arguments: str


class ToolParser:
    """Takes calls out of a growing text.

    A call is told as soon as it has a name and its arguments begin, and is one from then on: its arguments are what
    the model wrote, letter by letter, up to the bracket that closes them; whether they are JSON is for the client to
    see. Arguments that are written as a string, or before the name, are told when they are whole. What turns out to be
    no call before stays text, and so does what follows a call and is none.

    What is told does not depend on how the text is cut: the methods read it like one that is whole, and wait (`yield`)
    where it ends too early. A subclass says what begins a call and reads it.
    """

    marks: tuple[str, ...] = ()
    """What begins a call anywhere."""
    opening = ""
    """A character that does so where there was nothing but `between` since the beginning or the last call."""
    special = False
    """The marks are special tokens, so these must not be left out of the text."""
    between = " \n"
    """Characters that are no text where nothing else stands before or after a call."""

    def __init__(self) -> None:
        self._text = ""
        """What is not done with."""
        self._at = 0
        """How far in it the reading has come."""
        self._told: int | None = None
        """Within arguments: how far in the text they have been told."""
        self._last = False
        self._num_calls = 0
        self._only_between = True
        """Since the beginning or the last call."""
        self._shown: list[str] = []
        self._pieces: list[CallPiece] = []
        self._reading = self._read()

    def feed(self, text: str, *, last: bool = False) -> tuple[str, list[CallPiece]]:
        """What a new piece of text adds: (text for the user, news of calls)."""
        self._text += text
        self._last = last
        next(self._reading, None)
        news = "".join(self._shown), self._pieces
        self._shown, self._pieces = [], []
        return news

    def _call(self) -> Reading:
        """From a mark on: tells one or several calls. Returns False if there is none; nothing was told then."""
        raise NotImplementedError

    def _read(self) -> Generator[None, None, None]:
        """The whole text."""
        while (yield from self._next_mark()):
            start = self._at
            if (yield from self._call()):
                self._text, self._at = self._text[self._at :], 0
            else:
                # The mark is text. What only the end of the text has left unfinished is text to that end.
                unfinished = not (yield from self._peek())
                self._show(len(self._text) if unfinished else start + 1)

    def _next_mark(self) -> Reading:
        """Goes to the next mark, and shows the text before it. What is nothing but `between` waits for what comes."""
        while True:
            found = self._find_mark()
            held = max((overlap(self._text, mark) for mark in self.marks if not self._last), default=0)
            end = len(self._text) - held if found is None else found
            if not self._only_between or self._text[:end].strip(self.between):
                self._show(end)
                end = 0
            if found is not None:
                self._at = end
                return True
            if self._last:
                if not self._num_calls:
                    self._show(len(self._text))
                return False
            yield

    def _find_mark(self) -> int | None:
        found = [at for mark in self.marks if (at := self._text.find(mark)) >= 0]
        if self.opening and self._only_between:
            rest = self._text.lstrip(self.between)
            if rest.startswith(self.opening):
                found.append(len(self._text) - len(rest))
        return min(found, default=None)

    def _show(self, end: int) -> None:
        """The text up to a place is for the user."""
        if self._text[:end].strip(self.between):
            self._only_between = False
        self._shown.append(self._text[:end])
        self._text, self._at = self._text[end:], 0

    def _begin(self, name: str) -> None:
        """There is a call: its first piece."""
        self._pieces.append(CallPiece(self._num_calls, name, ""))
        self._num_calls += 1
        self._only_between = True

    def _tell(self, arguments: str) -> None:
        self._pieces.append(CallPiece(self._num_calls - 1, None, arguments))

    def _tell_read(self) -> None:
        """Within arguments, tells what of them was read."""
        if self._told is not None and self._told < self._at:
            self._tell(self._text[self._told : self._at])
            self._text, self._at, self._told = self._text[self._at :], 0, 0

    def _stream(self, name: str) -> Reading:
        """A call whose arguments are the object that begins here. Returns whether they end."""
        self._begin(name)
        self._told = self._at
        whole = yield from self._value()
        self._tell_read()
        self._told = None
        return whole

    def _object(self) -> Reading:
        """A call as an object that begins here, `{"name": ..., "arguments": {...}}`; its members may have any order."""
        name: str | None = None
        early: str | None = None  # arguments before the name
        told = False
        self._at += 1
        while (yield from self._skip()) == '"':
            key = yield from self._string()
            if (yield from self._skip()) != ":":
                return told
            self._at += 1
            first, start = (yield from self._skip()), self._at
            if key == "name" and name is None:
                name = (yield from self._string()) if first == '"' else None
                if name is None:
                    return False
            elif key in ARGUMENTS and name is not None and first == "{" and not told:
                told = True
                if not (yield from self._stream(name)):
                    return True
            elif not (yield from self._value()):
                return told
            elif key in ARGUMENTS and not told:
                early = _as_object(self._text[start : self._at])
                if early is None:
                    return False
            if name is not None and early is not None and not told:
                self._begin(name)
                self._tell(early)
                told = True
            if (yield from self._skip()) != ",":
                break
            self._at += 1
        if (yield from self._skip()) != "}" or name is None:
            return told
        self._at += 1
        if not told:
            self._begin(name)
            self._tell("{}")
        return True

    def _array(self) -> Reading:
        """Calls as an array of objects that begins here."""
        told = False
        self._at += 1
        while (yield from self._skip()) == "{":
            start = self._at
            if not (yield from self._object()):
                if told:
                    self._at = start
                return told
            told = True
            if (yield from self._skip()) != ",":
                break
            self._at += 1
        if told:
            yield from self._take("]")
        return told

    def _value(self) -> Reading:
        """A JSON value; of objects and arrays the brackets are counted, and nothing else is looked at. What no JSON has
        and every other mark begins with, "<" outside of strings, ends it too early."""
        if (yield from self._peek()) not in ('"', "{", "["):
            return bool((yield from self._word()))
        depth, in_string = 0, False
        while (yield from self._peek()):
            found = (_IN_STRING if in_string else _OUT_OF_STRING).search(self._text, self._at)
            if found is None:
                self._at = len(self._text)
                continue
            mark = found.group()
            if mark == "\\" and not self._last:  # what it escapes is still to come
                self._at = found.start()
                yield from self._wait()
                continue
            if mark == "<":
                self._at = found.start()
                return False
            self._at = found.end()
            if mark == '"':
                in_string = not in_string
            elif mark in ("{", "["):
                depth += 1
            elif mark in ("}", "]"):
                depth -= 1
            if not in_string and depth == 0:
                return True
        return False

    def _string(self) -> Generator[None, None, str | None]:
        """What a JSON string that begins here says; None if it is malformed."""
        start = self._at
        whole = yield from self._value()
        said = parse_json(self._text[start : self._at]) if whole else None
        return said if isinstance(said, str) else None

    def _word(self) -> Generator[None, None, str]:
        start = self._at
        while (yield from self._peek()) and (found := _WORD.match(self._text, self._at)):
            self._at = found.end()
        return self._text[start : self._at]

    def _take(self, mark: str) -> Reading:
        """A mark, if it is there."""
        while not self._last and mark.startswith(here := self._text[self._at : self._at + len(mark)]) and here != mark:
            yield from self._wait()
        if not self._text.startswith(mark, self._at):
            return False
        self._at += len(mark)
        return True

    def _skip(self) -> Generator[None, None, str]:
        """Goes past blanks. Returns the character after them; "" is the end of the text."""
        while (here := (yield from self._peek())) and here in BLANKS:
            self._at += 1
        return here

    def _peek(self) -> Generator[None, None, str]:
        """The next character; "" is the end of the text."""
        while self._at == len(self._text) and not self._last:
            yield from self._wait()
        return self._text[self._at : self._at + 1]

    def _wait(self) -> Generator[None, None, None]:
        self._tell_read()
        yield


def parse_json(text: str) -> Any:
    """None if it is malformed."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None


def _as_object(value: str) -> str | None:
    """The object that a JSON value is; some models write it into a string."""
    if value.startswith("{"):
        return value
    said = parse_json(value)
    return said if isinstance(said, str) and isinstance(parse_json(said), dict) else None
