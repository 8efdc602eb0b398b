"""What a server is asked in `hf-paged bench serve`: prompts and how much of an answer each wants."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_paged.text_file import read_text

COMMON = (
    "about act add after again air all also an and animal any are as ask at back be been before big boy build but "
    "by call came can cause change come could day did differ do does down each earth end even every father find "
    "first follow for form from get give go good great had hand has have help her here high him his home hot house "
    "how if in is it just kind know land large light like line little live long look low made make man many may me "
    "mean men more most mother move much must my name near need new no now number of off old on one only or other "
    "our out over part people picture place play point port put read right round said same say see self sentence "
    "set she show side small so some sound spell such take tell than that the their them then there these they "
    "thing think this three through time to too try turn two under up us use very want was water way we well went "
    "were what when where which who why will with word work world would write year your"
)
WORDS = COMMON.split()
"""Common enough to be one token each, nearly always, in every tokenizer."""

SHAREGPT_LONGEST_PROMPT = 1024
SHAREGPT_LONGEST = 2048
SHAREGPT_SHORTEST = 4
"""Tokens: what vLLM's benchmark leaves out of ShareGPT."""

PROMPT_MEAN, PROMPT_SIGMA = 161.0, 1.2
OUTPUT_MEAN, OUTPUT_SIGMA = 338.0, 0.9
"""ShareGPT's mean lengths, as vLLM's paper has them, and spreads of log-normals with tails about as long."""


@dataclass(frozen=True)
class BenchRequest:
    """One request to time."""

    prompt: str | list[int]
    prompt_len: int
    """Tokens, as far as they can be told without the server's tokenizer."""
    output_len: int
    """Tokens to ask for at most."""


class Lengths:
    """Text of given lengths, and lengths of given text.

    Args:
        tokenizer: None goes by words and characters: then the server's own count is the one to believe.
        as_ids: make prompts of token ids, where there is a tokenizer: their length is exact.
    """

    def __init__(self, tokenizer: Any, as_ids: bool) -> None:
        self._tokenizer, self._as_ids = tokenizer, as_ids
        special = set(tokenizer.all_special_ids) if tokenizer is not None else set()
        self._ids = [id for id in range(tokenizer.vocab_size) if id not in special] if tokenizer is not None else []

    def count(self, text: str) -> int:
        if self._tokenizer is None:
            return max(1, len(text) // 4)
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def make(self, draw: random.Random, length: int) -> str | list[int]:
        """A prompt of so many tokens, none like another."""
        if self._tokenizer is None:
            return " ".join(draw.choices(WORDS, k=length))
        ids = draw.choices(self._ids, k=length)
        return ids if self._as_ids else self._tokenizer.decode(ids)


def random_lengths(
    lengths: Lengths, count: int, seed: int, *, input_len: int, output_len: int, range_ratio: float, prefix_len: int
) -> list[BenchRequest]:
    """Uniform lengths around the given ones, up to `range_ratio` of them away; all prompts begin with `prefix_len`
    tokens that are the same."""
    draw = random.Random(seed)
    prefix = lengths.make(draw, prefix_len) if prefix_len else None

    def around(length: int) -> int:
        return draw.randint(max(1, math.floor(length * (1 - range_ratio))), math.ceil(length * (1 + range_ratio)))

    made = []
    for _ in range(count):
        size = around(input_len)
        prompt = lengths.make(draw, size)
        made.append(BenchRequest(_joined(prefix, prompt), prefix_len + size, around(output_len)))
    return made


def _joined(prefix: str | list[int] | None, prompt: str | list[int]) -> str | list[int]:
    if prefix is None:
        return prompt
    return f"{prefix} {prompt}" if isinstance(prefix, str) else [*prefix, *prompt]


def lognormal_lengths(lengths: Lengths, count: int, seed: int) -> list[BenchRequest]:
    """Lengths like ShareGPT's, drawn and not downloaded; within the limits that vLLM's benchmark has for it."""
    draw = random.Random(seed)

    def length(mean: float, sigma: float, most: int) -> int:
        while True:
            drawn = round(draw.lognormvariate(math.log(mean) - sigma**2 / 2, sigma))
            if SHAREGPT_SHORTEST <= drawn <= most:
                return drawn

    made = []
    for _ in range(count):
        size = length(PROMPT_MEAN, PROMPT_SIGMA, SHAREGPT_LONGEST_PROMPT)
        output = length(OUTPUT_MEAN, OUTPUT_SIGMA, SHAREGPT_LONGEST - size)
        made.append(BenchRequest(lengths.make(draw, size), size, output))
    return made


def sharegpt(lengths: Lengths, count: int, seed: int, file: Path, output_len: int | None) -> list[BenchRequest]:
    """Conversations' first questions, and answers as long as theirs were; repeated where there are too few.

    Args:
        file: JSON, a list of {"conversations": [{"value": text}, ...]}.
        output_len: of all answers, instead.

    Raises:
        FileNotFoundError, ValueError: no such file, or not that.
    """
    entries = _read_json(file)
    if not isinstance(entries, list):
        raise ValueError(f'{file} is not ShareGPT\'s: a list of {{"conversations": [{{"value": ...}}, ...]}} is')

    def turns() -> Iterator[BenchRequest]:
        for entry in entries:
            said = [turn.get("value") for turn in _conversation(entry)[:2] if isinstance(turn, dict)]
            values = [value for value in said if isinstance(value, str)]
            if len(values) < 2:
                continue
            size, answer = lengths.count(values[0]), output_len or lengths.count(values[1])
            short = min(size, answer) < SHAREGPT_SHORTEST and output_len is None
            if not short and size <= SHAREGPT_LONGEST_PROMPT and size + answer <= SHAREGPT_LONGEST:
                yield BenchRequest(values[0], size, answer)

    random.Random(seed).shuffle(entries)
    return _first(turns, count, f"{file} has no conversation of a question and an answer of 4 to 1024 tokens")


def _conversation(entry: Any) -> list[Any]:
    found = entry.get("conversations", entry.get("conversation")) if isinstance(entry, dict) else None
    return found if isinstance(found, list) else []


def custom(lengths: Lengths, count: int, seed: int, file: Path, output_len: int) -> list[BenchRequest]:
    """A file of one JSON object a line, {"prompt": text}, with "output_tokens" where an answer has a length of its
    own.

    Raises:
        FileNotFoundError, ValueError: no such file, or a line that is not that.
    """
    made = []
    for number, line in enumerate(read_text(file, "data set").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            prompt, output = entry["prompt"], int(entry.get("output_tokens", output_len))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'{file}, line {number}: {{"prompt": "..."}} is wanted, got {line[:80]!r}') from error
        if not isinstance(prompt, str) or not prompt or output < 1:
            raise ValueError(f"{file}, line {number}: prompt must be text, and output_tokens positive")
        made.append(BenchRequest(prompt, lengths.count(prompt), output))
    random.Random(seed).shuffle(made)
    return _first(lambda: iter(made), count, f"{file} has no prompts")


def _first(again: Callable[[], Iterator[BenchRequest]], count: int, none: str) -> list[BenchRequest]:
    found: list[BenchRequest] = []
    for request in again():
        found.append(request)
        if len(found) == count:
            return found
    if not found:
        raise ValueError(none)
    return [found[i % len(found)] for i in range(count)]


def _read_json(file: Path) -> Any:
    content = read_text(file, "data set")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
