"""Reasoning apart from answers, as the text comes in."""

from __future__ import annotations

from hf_paged.structured_outputs import StructuredOutputsParams


class ReasoningParser:
    """Splits a growing text at a model's marks, `<think>` and `</think>` as a rule.

    Args:
        open: in the middle of reasoning from the first character on, as where the prompt has the opening mark.
    """

    start, end = "<think>", "</think>"

    def __init__(self, *, open: bool) -> None:
        self._inside = open
        self._begun = open
        self._pending = ""
        self._strip = False

    def feed(self, text: str, *, last: bool = False) -> tuple[str, str]:
        """What a new piece of text adds, as (reasoning, answer). What may be the beginning of a mark is held back until
        it is known, or `last`."""
        self._pending += text
        found = ["", ""]
        while True:
            mark = self.end if self._inside else self.start if not self._begun else None
            at = self._pending.find(mark) if mark else -1
            if at > 0 and not self._begun and self._pending[:at].strip():
                at, mark = -1, None  # it answers without reasoning
            if mark is None or at < 0:
                break
            self._take(self._pending[:at], found)
            self._pending = self._pending[at + len(mark) :]
            self._inside = not self._inside
            self._begun = self._strip = True
        held = 0 if last or mark is None else overlap(self._pending, mark)
        keep = len(self._pending) - held
        if not last and not self._begun and not self._pending[:keep].strip():
            return found[0], found[1]  # blanks before the mark are no answer yet
        self._take(self._pending[:keep], found)
        self._pending = self._pending[keep:]
        return found[0], found[1]

    def _take(self, text: str, found: list[str]) -> None:
        if self._strip:  # newlines around the marks belong to neither side
            text = text.lstrip("\n")
            self._strip = not text
        if not self._inside and not self._begun and text.strip():
            self._begun = True  # it answers without reasoning
        if self._inside or self._begun:
            found[0 if self._inside else 1] += text
        elif text and not text.isspace():
            found[1] += text


class MistralReasoning(ReasoningParser):
    start, end = "[THINK]", "[/THINK]"


class GraniteReasoning(ReasoningParser):
    start, end = "Here is my thought process:", "Here is my response:"


class SeedReasoning(ReasoningParser):
    start, end = "<seed:think>", "</seed:think>"


REASONING_PARSERS: dict[str, type[ReasoningParser]] = {
    "think": ReasoningParser,
    "deepseek_r1": ReasoningParser,
    "qwen3": ReasoningParser,
    "glm45": ReasoningParser,
    "mistral": MistralReasoning,
    "granite": GraniteReasoning,
    "seed_oss": SeedReasoning,
}

ALWAYS_OPEN = ("deepseek_r1",)
"""Parsers of models that reason from the first token on, whether the prompt opens the mark or not."""


def reasoning_parser(
    name: str | None, prompt: str, form: StructuredOutputsParams | None = None
) -> ReasoningParser | None:
    """A parser for one answer to a prompt; None where there is no reasoning.

    Args:
        form: of the answer. JSON or a choice from its first token on leaves no room for reasoning.
    """
    if name is None or (form is not None and form.kind in ("json", "json_object", "choice")):
        return None
    kind = REASONING_PARSERS[name]
    opened = prompt.rstrip().endswith(kind.start)
    closed = prompt.rstrip().endswith(kind.end)
    return kind(open=opened or (name in ALWAYS_OPEN and not closed))


def overlap(text: str, mark: str) -> int:
    """Characters at the end of a text that may be the beginning of a mark."""
    for size in range(min(len(mark) - 1, len(text)), 0, -1):
        if mark.startswith(text[-size:]):
            return size
    return 0
