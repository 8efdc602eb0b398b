"""What the benchmarks run. Every workload is the same for every engine: greedy, fixed output lengths, no end token."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """Prompts as token ids, and how many tokens to generate for each."""

    name: str
    prompts: list[list[int]]
    max_tokens: list[int]
    n: int = 1
    """Samples per prompt; more than one are drawn at temperature 1."""

    @property
    def tokens_out(self) -> int:
        return self.n * sum(self.max_tokens)

    @property
    def tokens_in(self) -> int:
        return sum(map(len, self.prompts))


def mixed(vocab_size: int, requests: int = 64, seed: int = 0) -> Workload:
    """Prompts of 16-256 tokens, outputs of 16-256 tokens."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(vocab_size) for _ in range(draw.randint(16, 256))] for _ in range(requests)]
    return Workload("mixed", prompts, [draw.randint(16, 256) for _ in range(requests)])


def samples(vocab_size: int, n: int = 16, prompt: int = 512, tokens: int = 64, seed: int = 0) -> Workload:
    """n samples of one prompt."""
    draw = random.Random(seed)
    return Workload("samples", [[draw.randrange(vocab_size) for _ in range(prompt)]], [tokens], n=n)
