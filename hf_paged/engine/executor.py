"""Executor: computes scheduled batches. The engine knows nothing else of tensors, so a fake one makes a simulator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hf_paged.engine.batch import Batch
from hf_paged.engine.logprobs import TokenLogprobs
from hf_paged.engine.request import Request


@dataclass(slots=True)
class StepResult:
    """What a step computed."""

    tokens: list[int]
    """Per sequence of `Batch.sampled()`."""
    logprobs: list[TokenLogprobs | None] | None = None
    """Likewise; None when nobody asked, or `drawn` has them."""
    errors: dict[int, Exception] = field(default_factory=dict)
    """By place in `Batch.sampled()`: sequences whose sampling failed; their tokens mean nothing."""
    prompt_logprobs: list[list[TokenLogprobs]] | None = None
    """Per chunk, for the prompt tokens that follow its rows; None when nobody asked."""
    drawn: tuple[list[float], list[int]] | None = None
    """Log-probabilities and ranks, likewise, of tokens that a device drew; they mean something where they were asked
    for. None when nobody asked."""
    drafted: list[list[int]] | None = None
    """What of `Batch.drafts` only the device knew, all of it in order; None when nothing was."""
    scores: list[list[float]] | None = None
    """Per chunk, the log-probabilities of those of `Request.scored` that follow its rows; None when nobody asked."""


class Executor:
    """Computes batches in the order they were launched."""

    most_in_flight = 2
    """Steps that may be launched before the first of them has landed."""
    micro_batches = 1
    """Steps over which running sequences are spread, each being in one at a time, so that pipeline stages compute
    different ones at once."""

    def lost(self) -> str | None:
        """Why no step can be computed ever again, where that is known; None else. Any thread may ask, at any time."""
        return None

    def launch(self, batch: Batch) -> Callable[[], StepResult]:
        """Starts a step. What it returns waits for its results; steps land in the order of their launch.

        Raises:
            torch.OutOfMemoryError: the step is too large for the device; a smaller one may be launched after that.
        """
        raise NotImplementedError

    def settle(self) -> None:
        """Called whenever a step has landed, before the next one is launched: what the last one launched waits for to
        know can be done.

        Raises:
            torch.OutOfMemoryError: that step is lost; a smaller one may be launched after that.
        """

    def looks_ahead(self, request: Request) -> bool:
        """Whether the step after one that samples for this request may be launched before its token is known here."""
        return False

    def warm_up(self) -> None:
        """Does now what would otherwise be done when it is first needed: compiles, captures graphs."""

    def prepare(self) -> bool:
        """Called before the first step after a time without any: what depends on where things lie in memory is looked
        over. Returns whether running sequences, if there are any, must be computed again."""
        return False

    def weights_changed(self) -> bool:
        """Whether the weights differ from those at the last call; True at the first. May read all of them."""
        return False

    def optimizer_stepped(self) -> bool:
        """Whether an optimizer took a step since the last look. Costs nothing."""
        return False

    def wipe(self, pages: list[int]) -> None:
        """Overwrites pages with zeros."""

    def sleep(self) -> None:
        """Gives the memory of the pages back, with all that is in them. Nothing is in flight."""

    def close(self) -> None:
        """Gives everything back for good."""

    def wake_up(self) -> None:
        """Takes the memory again, if it was given back; `prepare` does so too."""
