"""What the benchmarks run, the same for every engine: prompts as token ids, fixed output lengths, no end token."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Workload:
    """Prompts as token ids, and how many tokens to generate for each of their samples."""

    name: str
    prompts: list[list[int]]
    lengths: list[list[int]]
    """Tokens to generate: per prompt one number for each sample, as many samples for every prompt."""
    temperature: float = 0.0
    """0 is greedy; above it, tokens are drawn from the whole vocabulary."""

    @property
    def n(self) -> int:
        """Samples per prompt."""
        return len(self.lengths[0])

    @property
    def tokens_out(self) -> int:
        return sum(map(sum, self.lengths))

    @property
    def tokens_in(self) -> int:
        """Tokens of the prompts, each counted once however many samples it has."""
        return sum(map(len, self.prompts))

    def requests(self) -> list[tuple[list[int], int, int]]:
        """(prompt, samples, tokens per sample) of each request, in the order of prompts and samples.

        A request has one length for all its samples. A prompt whose samples differ in length is therefore one request
        per sample, and its tokens are computed once only where an engine caches prefixes. (Real samples differ because
        they meet an end token, which one request with n samples serves; here no token ends anything.)
        """
        found = []
        for prompt, lengths in zip(self.prompts, self.lengths, strict=True):
            if len(set(lengths)) == 1:
                found.append((prompt, len(lengths), lengths[0]))
            else:
                found += [(prompt, 1, length) for length in lengths]
        return found


def mixed(vocab_size: int, requests: int = 64) -> Workload:
    """Prompts of 16-256 tokens, outputs of 16-256 tokens, greedy."""
    draw = random.Random(0)
    prompts = [[draw.randrange(vocab_size) for _ in range(draw.randint(16, 256))] for _ in range(requests)]
    return Workload("mixed", prompts, [[draw.randint(16, 256)] for _ in range(requests)])


def samples(vocab_size: int, requests: int = 1, n: int = 16, prompt: int = 512, tokens: int = 64) -> Workload:
    """n samples of one prompt, all of one length, temperature 1."""
    draw = random.Random(0)
    prompts = [[draw.randrange(vocab_size) for _ in range(prompt)] for _ in range(requests)]
    return Workload("samples", prompts, [[tokens] * n for _ in prompts], temperature=1.0)


def nano(vocab_size: int, requests: int = 256) -> Workload:
    """nano-vllm's bench.py: prompts and outputs of 100-1,024 tokens, temperature 0.6, in its order of draws.

    Token ids go up to 10,000 whatever the vocabulary.
    """
    draw = random.Random(0)
    prompts = [[draw.randint(0, 10000) for _ in range(draw.randint(100, 1024))] for _ in range(requests)]
    return Workload("nano", prompts, [[draw.randint(100, 1024)] for _ in range(requests)], temperature=0.6)


def rollout(vocab_size: int, requests: int = 32) -> Workload:
    """Prompts of 512 tokens with 16 samples each, of 1-1,024 tokens drawn per sample, temperature 1."""
    return _rollout("rollout", vocab_size, requests, prompt=512, longest=1024)


def rollout_long(vocab_size: int, requests: int = 32) -> Workload:
    """Prompts of 2,048 tokens with 16 samples each, of 1-512 tokens drawn per sample, temperature 1."""
    return _rollout("rollout-long", vocab_size, requests, prompt=2048, longest=512)


def grpo(vocab_size: int, requests: int = 64) -> Workload:
    """The rollouts of one GRPO step: prompts of 256 tokens with 16 samples each, all of 512 tokens, temperature 1."""
    work = samples(vocab_size, requests, n=16, prompt=256, tokens=512)
    return replace(work, name="grpo")


def _rollout(name: str, vocab_size: int, requests: int, *, prompt: int, longest: int) -> Workload:
    draw = random.Random(0)
    lengths = [[draw.randint(1, longest) for _ in range(16)] for _ in range(requests)]
    prompts = [[draw.randrange(vocab_size) for _ in range(prompt)] for _ in range(requests)]
    return Workload(name, prompts, lengths, temperature=1.0)


def single(vocab_size: int, requests: int = 1) -> Workload:
    """One prompt of 128 tokens, 256 tokens out, greedy."""
    draw = random.Random(0)
    prompts = [[draw.randrange(vocab_size) for _ in range(128)] for _ in range(requests)]
    return Workload("single", prompts, [[256] for _ in prompts])


WORKLOADS: dict[str, Callable[..., Workload]] = {
    "mixed": mixed,
    "samples": samples,
    "nano": nano,
    "rollout": rollout,
    "rollout-long": rollout_long,
    "grpo": grpo,
    "single": single,
}


def make_workload(name: str, vocab_size: int, requests: int | None = None) -> Workload:
    """A workload by its name.

    Args:
        requests: prompts; None is the workload's own number.
    """
    options: dict[str, Any] = {} if requests is None else {"requests": requests}
    return WORKLOADS[name](vocab_size, **options)
