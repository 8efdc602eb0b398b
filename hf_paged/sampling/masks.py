"""Which tokens may come next, as bits: made on the host, perhaps while a device computes the logits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hf_paged.engine.request import Sequence
from hf_paged.sampling.errors import NothingToSample
from hf_paged.sampling.processors import forbidden
from hf_paged.sampling.structured import fill_forms


def masks_of(
    sequences: list[Sequence], vocab_size: int, *, pinned: bool = False
) -> tuple[Tensor | None, dict[int, Exception]]:
    """What forms, bad_words, min_tokens and allowed_token_ids leave, after the tokens that are known.

    Args:
        pinned: in memory that a GPU copies from on its own.

    Returns:
        int32 `[R, ceil(V / 32)]` on the CPU, a bit per token, the lowest first; rows of which nothing is asked, and
        those of sequences that have ended, allow everything. None where all rows do. And by row, what went wrong with
        one; its token means nothing.
    """
    errors: dict[int, Exception] = {}
    places = [
        row
        for row, sequence in enumerate(sequences)
        if sequence.request.masked and sequence.origin.finish_reason is None
    ]
    if not places:
        return None, errors
    mask = torch.empty(
        len(sequences), -(-vocab_size // 32), dtype=torch.int32, device="cpu", pin_memory=pinned
    )  # fmt: skip
    words = mask.numpy().view(np.uint32)
    words.fill(0xFFFFFFFF)  # torch would wake up its threads
    fill_forms(mask, sequences, places, errors)
    for row in places:
        _forbid(words[row], sequences[row])
        if row not in errors and not words[row].any():
            errors[row] = NothingToSample(
                f"request {sequences[row].request.request_id!r}: nothing can be sampled after "
                f"{sequences[row].num_generated} tokens, every token is forbidden"
            )
    return mask, errors


def _forbid(words: np.ndarray, sequence: Sequence) -> None:
    """bad_words, min_tokens and allowed_token_ids, in place on one row of bits."""
    if ids := forbidden(sequence):
        words &= ~_bits(ids, len(words))
    if (allowed := sequence.request.sampling.allowed_token_ids) is not None:
        words &= _bits(allowed, len(words))


def _bits(ids: list[int], count: int) -> np.ndarray:
    """uint32 `[count]`: ones for these tokens."""
    tokens = np.array(ids, dtype=np.uint32)
    bits = np.zeros(count, dtype=np.uint32)
    np.bitwise_or.at(bits, tokens >> 5, np.uint32(1) << (tokens & 31))
    return bits
