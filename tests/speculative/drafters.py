"""Drafters good and bad, for tests of what must not depend on them."""

from __future__ import annotations

import random
from collections.abc import Callable

from hf_paged.engine.request import Sequence
from hf_paged.speculative.config import SpeculativeConfig
from hf_paged.speculative.drafter import Drafter
from hf_paged.speculative.pace import Pace
from hf_paged.speculative.speculator import Speculator


class Always(Pace):
    """Drafts in every step, however slow that is."""

    def speculates(self, num_seqs: int) -> bool:
        return True


class Alternating(Pace):
    """Changes its mind every third step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def speculates(self, num_seqs: int) -> bool:
        return self.steps // 3 % 2 == 0

    def landed(self, num_seqs: int, speculated: bool, tokens: int, seconds: float) -> None:
        self.steps += 1


class Constant(Drafter):
    """The same token again and again."""

    name = "constant"

    def __init__(self, token: int = 1) -> None:
        self.token = token

    def propose(self, sequences: list[Sequence], room: list[int]) -> list[list[int]]:
        return [[self.token] * count for count in room]

    def finish(self, sequence: Sequence) -> None:
        pass

    def clear(self) -> None:
        pass


class Random(Constant):
    """Any tokens, any number of them."""

    name = "random"

    def __init__(self, vocab: int, seed: int = 0) -> None:
        self.vocab, self.draw = vocab, random.Random(seed)

    def propose(self, sequences: list[Sequence], room: list[int]) -> list[list[int]]:
        return [self.draw.choices(range(self.vocab), k=self.draw.randint(0, count)) for count in room]


class Oracle(Constant):
    """Knows what will be sampled, and says so with some probability per token.

    Args:
        future: what a sequence will have generated in the end.
    """

    name = "oracle"

    def __init__(
        self, future: Callable[[Sequence], list[int]], vocab: int, accuracy: float = 0.7, seed: int = 0
    ) -> None:
        self.future, self.vocab, self.accuracy, self.draw = future, vocab, accuracy, random.Random(seed)

    def propose(self, sequences: list[Sequence], room: list[int]) -> list[list[int]]:
        found = []
        for sequence, count in zip(sequences, room, strict=True):
            future = self.future(sequence)[sequence.num_generated :][:count]
            wrong = [self.draw.random() >= self.accuracy for _ in future]
            found.append([(t + bad) % self.vocab for t, bad in zip(future, wrong, strict=True)])
        return found


CONFIG = SpeculativeConfig(method="ngram", num_speculative_tokens=4)
"""What requests say; `speculator_of` has another drafter for it."""


def speculator_of(drafter: Drafter, *, pace: Pace | None = None, max_rows: int = 64) -> Speculator:
    speculator = Speculator(max_rows, {CONFIG: drafter})
    speculator.pace = pace or Always()
    return speculator
