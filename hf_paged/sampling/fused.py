"""What the fused GPU sampler (`hf_paged.kernels.triton.sampling`) needs from the host: sequences' parameters and keys,
as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_paged.engine.request import Sequence
from hf_paged.sampling.draw import absorb

RECORD = np.dtype(
    [
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("wants_logprob", np.int32),
        ("logprob_scale", np.float32),
        ("noise", np.uint64),
    ]
)
"""What stays the same for a sequence: its parameters, and the state of `row_keys` after seed and stream."""


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """How to draw each of B rows; tensors on the device of the logits, contiguous."""

    temperature: Tensor
    """float32 `[B]`; 0 is greedy."""
    top_k: Tensor
    """int32 `[B]`; 0 keeps all."""
    top_p: Tensor
    """float32 `[B]`."""
    min_p: Tensor
    """float32 `[B]`."""
    keys: Tensor
    """int64 `[B]`: the bits of `row_keys`."""
    wants_logprob: Tensor
    """int32 `[B]`; where it is not 0 the token's rank is computed too."""
    logprob_scale: Tensor
    """float32 `[B]`: what logits are multiplied by before the softmax that log-probabilities are of; positive."""


class SlotParams:
    """The parameters of running sequences, a record per slot: a step gathers them without asking the requests again.

    A record is written when its slot is first seen with another sequence.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self._records = np.zeros(max_num_seqs + 1, dtype=RECORD)
        # The last is for slot -1, of samples that wait: never recorded, so always taken from the request.
        self._owners: list[Sequence | None] = [None] * (max_num_seqs + 1)

    def fill(
        self,
        sequences: list[Sequence],
        positions: np.ndarray,
        *,
        temperature: np.ndarray,
        top_k: np.ndarray,
        top_p: np.ndarray,
        min_p: np.ndarray,
        keys: np.ndarray,
        wants_logprob: np.ndarray,
        logprob_scale: np.ndarray,
    ) -> None:
        """Writes the first R entries of arrays that become `SamplingRows` for these R sequences.

        Args:
            positions: int64 [R], how many tokens each has generated, pending ones included.
            temperature, top_p, min_p, logprob_scale: float32 [at least R].
            top_k, wants_logprob: int32 [at least R].
            keys: int64 [at least R].
        """
        slots = [sequence.slot for sequence in sequences]
        owners = self._owners
        records = self._records[slots]
        new = [
            i
            for i, sequence in enumerate(sequences)
            if (owner := owners[slots[i]]) is not sequence and owner is not sequence.origin
        ]
        if new:
            fresh = _records([sequences[i] for i in new])
            records[new] = fresh
            for i, record in zip(new, fresh, strict=True):
                if slots[i] >= 0:
                    self._records[slots[i]] = record
                    owners[slots[i]] = sequences[i].origin
        count = len(sequences)
        temperature[:count] = records["temperature"]
        top_k[:count] = records["top_k"]
        top_p[:count] = records["top_p"]
        min_p[:count] = records["min_p"]
        wants_logprob[:count] = records["wants_logprob"]
        logprob_scale[:count] = records["logprob_scale"]
        keys[:count] = _keys(records, positions)


def rows_of(sequences: list[Sequence], positions: np.ndarray, device: torch.device) -> SamplingRows:
    """The same for one call, where no slots are kept.

    Args:
        positions: int64 [R].
    """
    records = _records(sequences)
    columns = {name: records[name].copy() for name in RECORD.names or () if name != "noise"}
    columns["keys"] = _keys(records, positions)
    return SamplingRows(**{name: torch.from_numpy(column).to(device) for name, column in columns.items()})


def _records(sequences: list[Sequence]) -> np.ndarray:
    """RECORD [R]."""
    params = [sequence.request.sampling for sequence in sequences]
    records = np.zeros(len(sequences), dtype=RECORD)
    records["temperature"] = [0.0 if p.greedy else p.temperature for p in params]
    records["top_k"] = [max(p.top_k, 0) for p in params]
    records["top_p"] = [p.top_p for p in params]
    records["min_p"] = [p.min_p for p in params]
    records["wants_logprob"] = [p.logprobs is not None for p in params]
    records["logprob_scale"] = [1.0 / sequence.request.logprob_temperature for sequence in sequences]
    seeds = np.array([sequence.request.seed for sequence in sequences], dtype=np.uint64)
    streams = np.array([sequence.index for sequence in sequences], dtype=np.uint64)
    records["noise"] = absorb(absorb(np.zeros_like(seeds), seeds), streams)
    return records


def _keys(records: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """int64 [R]: the bits of `row_keys`, of which the records hold two rounds."""
    return absorb(records["noise"], positions.astype(np.uint64)).view(np.int64)
