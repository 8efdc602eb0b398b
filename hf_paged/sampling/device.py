"""Sampling on a GPU without waiting for it: parameters up, tokens down, and the draw between them on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hf_paged.engine.request import Sequence
from hf_paged.model.buffers import PackedBuffer
from hf_paged.sampling.errors import NonFiniteLogits, NothingToSample
from hf_paged.sampling.fused import SamplingRows, SlotParams
from hf_paged.sampling.masks import masks_of

_PARAMETERS = {
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "keys": torch.int64,
    "wants_logprob": torch.int32,
    "logprob_scale": torch.float32,
}
_RESULTS = {"tokens": torch.int64, "logprobs": torch.float32, "ranks": torch.int32}


class TokenSampler(Protocol):
    """`sample_tokens`, or what does the same."""

    def __call__(
        self,
        logits: Tensor,
        rows: SamplingRows,
        *,
        tokens: Tensor,
        logprobs: Tensor,
        ranks: Tensor,
        mask: Tensor | None = None,
    ) -> None: ...


def token_sampler(exact: bool) -> TokenSampler:
    """What draws tokens on a GPU.

    Args:
        exact: with log-probabilities in a trainer's arithmetic (`exact_logprobs`).
    """
    if exact:
        from hf_paged.kernels.triton.exact_logprobs import sample_tokens_exactly

        return sample_tokens_exactly
    from hf_paged.kernels.triton.sampling import sample_tokens

    return sample_tokens


def parameter_fields(rows: int) -> dict[str, tuple[torch.dtype, int]]:
    """What of a `PackedBuffer` holds the sampling parameters of so many rows."""
    return {name: (dtype, rows) for name, dtype in _PARAMETERS.items()}


def result_fields(rows: int) -> dict[str, tuple[torch.dtype, int]]:
    """What of a `PackedBuffer` holds the results."""
    return {name: (dtype, rows) for name, dtype in _RESULTS.items()}


def sampling_rows(device: dict[str, Tensor], count: int) -> SamplingRows:
    """The first `count` rows of the parameters in a buffer."""
    return SamplingRows(**{name: device[name][:count] for name in _PARAMETERS})


def fill_parameters(arrays: dict[str, np.ndarray], sequences: list[Sequence], params: SlotParams) -> None:
    """Writes one row of parameters per sequence into a buffer's host arrays, for its next token."""
    positions = np.array([sequence.num_generated + sequence.num_pending for sequence in sequences], dtype=np.int64)
    params.fill(sequences, positions, **{name: arrays[name] for name in _PARAMETERS})


@dataclass(frozen=True, slots=True)
class Drawn:
    """Per sequence, in order."""

    tokens: list[int]
    errors: dict[int, Exception]
    """Which sequences (by place) could not be sampled, and why; their tokens mean nothing."""
    logprobs: tuple[list[float], list[int]] | None
    """The tokens' log-probabilities and ranks, for those who asked; None when nobody did."""


@dataclass(frozen=True, slots=True)
class Landing:
    """Sampled tokens on their way to the host."""

    results: dict[str, np.ndarray]
    landed: torch.cuda.Event
    tokens_on_device: Tensor
    """int64, in the order of the sequences."""

    def wait(self, sequences: list[Sequence]) -> Drawn:
        """Waits for them, and says which rows could not be sampled."""
        self.landed.synchronize()
        count = len(sequences)
        tokens = self.results["tokens"][:count]
        errors = {int(row): _failure(sequences[row], int(tokens[row])) for row in np.flatnonzero(tokens < 0)}
        logprobs = None
        if any(sequence.request.sampling.logprobs is not None for sequence in sequences):
            logprobs = self.results["logprobs"][:count].tolist(), self.results["ranks"][:count].tolist()
        return Drawn(tokens.tolist(), errors, logprobs)


@dataclass(frozen=True, slots=True)
class Undrawn:
    """A step's logits on the device, and all that drawing its tokens takes, but for masks."""

    logits: Tensor
    """`[R, V]`."""
    rows: SamplingRows
    outputs: PackedBuffer
    """Gets the results; see `result_fields`."""
    sample: TokenSampler

    def draw(self, mask: Tensor | None = None) -> Landing:
        """Enqueues the draw.

        Args:
            mask: as in `masks_of`.
        """
        if mask is not None:
            mask = mask.to(self.logits.device, non_blocking=True)
        results = {name: array[: len(self.logits)] for name, array in self.outputs.device.items()}
        self.sample(self.logits, self.rows, mask=mask, **results)
        host = self.outputs.next()
        self.outputs.download()
        return Landing(host, record(), self.outputs.device["tokens"])


class Draw:
    """The draw of a step's tokens, to be enqueued as soon as the host knows what comes before them, if anything has to
    be masked.

    Args:
        sequences: a row of the logits each.
    """

    def __init__(self, undrawn: Undrawn, sequences: list[Sequence]) -> None:
        self._undrawn, self._sequences = undrawn, sequences
        self._landing: Landing | None = None
        self._errors: dict[int, Exception] = {}

    @property
    def waits(self) -> bool:
        """Whether tokens that masks depend on are still on their way."""
        return any(sequence.request.masked and sequence.num_pending for sequence in self._sequences)

    def enqueue(self) -> Tensor:
        """Makes the masks and enqueues the draw. Returns the tokens to come, int64, in the order of the sequences."""
        logits = self._undrawn.logits
        mask, self._errors = masks_of(self._sequences, logits.shape[1], pinned=logits.is_cuda)
        self._landing = self._undrawn.draw(mask)
        return self._landing.tokens_on_device

    def wait(self) -> Drawn:
        """Waits for the tokens; they must have been enqueued."""
        assert self._landing is not None
        drawn = self._landing.wait(self._sequences)
        return replace(drawn, errors=self._errors | drawn.errors)


def _failure(sequence: Sequence, token: int) -> Exception:
    """What a negative token says; see `sample_tokens`."""
    start = f"request {sequence.request.request_id!r}: nothing can be sampled after {sequence.num_generated} tokens, "
    if token == -1:
        return NonFiniteLogits(start + "its logits are not finite")
    return NothingToSample(start + "the model gives nothing that is allowed a chance")


class DeviceSampler:
    """Samples steps that run without a graph.

    Args:
        max_num_seqs: sequences that run at once.
        exact: as in `token_sampler`.
        in_flight: draws that may be enqueued before the first of them is read.
    """

    def __init__(self, max_num_seqs: int, device: torch.device, *, exact: bool = False, in_flight: int = 2) -> None:
        self._device = device
        self._exact = exact
        self._in_flight = in_flight
        self.params = SlotParams(max_num_seqs)
        self._make_buffers(max_num_seqs)

    def _make_buffers(self, rows: int) -> None:
        self._rows = rows
        self._inputs = PackedBuffer(parameter_fields(rows), self._device, self._in_flight)
        self._outputs = PackedBuffer(result_fields(rows), self._device, self._in_flight)

    def stage(self, logits: Tensor, sequences: list[Sequence]) -> Undrawn:
        """Has all ready for the draw of one token per sequence from logits `[R, V]`, bfloat16, float16 or float32: it
        comes before the next call. Its results are overwritten by the draw `in_flight` calls later.
        """
        count = len(sequences)
        if count > self._rows:  # samples of one prompt that wait for a slot may be many
            torch.cuda.current_stream(self._device).synchronize()
            self._make_buffers(2 * count)
        fill_parameters(self._inputs.next(), sequences, self.params)
        self._inputs.upload()
        return Undrawn(logits, sampling_rows(self._inputs.device, count), self._outputs, token_sampler(self._exact))


def split_when_landed(values: Tensor, counts: list[int]) -> Callable[[], list[list[Any]]]:
    """Sends `[N]` on its way to the host. What it returns waits for it, and no longer, and cuts it into lists
    of so many."""
    landed = None
    if values.is_cuda:
        host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
        values = host.copy_(values, non_blocking=True)
        landed = record()

    def wait() -> list[list[Any]]:
        if landed is not None:
            landed.synchronize()
        return [part.tolist() for part in values.split(counts)]

    return wait


def record() -> torch.cuda.Event:
    """An event at the current end of the current stream."""
    event = torch.cuda.Event()
    event.record()
    return event
