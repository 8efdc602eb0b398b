"""Drafter: proposes the tokens that a sequence may go on with. Verification owns correctness: a bad drafter can only be
slow."""

from __future__ import annotations

from typing import Protocol

from hf_paged.engine.request import Sequence


class Drafter(Protocol):
    """Called between steps, when all tokens of the sequences are known.

    A drafter keeps what it likes of a sequence under its identity (`Sequence` is hashed so). Tokens are only ever added
    to a sequence between two calls, but for one that has not been seen before any number may be there, and calls may
    leave out sequences, or skip steps.
    """

    name: str
    """As in `speculative_config={"method": ...}`."""

    def propose(self, sequences: list[Sequence], room: list[int]) -> list[list[int]]:
        """For each sequence up to `room[i]` tokens (perhaps none) that may come after `sequence.tokens`."""

    def finish(self, sequence: Sequence) -> None:
        """The sequence will not be asked about again: what is kept of it alone can go."""

    def clear(self) -> None:
        """Forgets everything."""
