"""Log-probabilities of tokens that were sampled, and of the likeliest beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_paged.engine.logprobs import TokenLogprobs

SLICE = 1 << 24
"""Logits that `chosen_logprobs` holds in float32 at once."""


def chosen_logprobs(logits: Tensor, rows: Tensor, tokens: Tensor, temperature: Tensor) -> Tensor:
    """Log-probabilities of one token in each of R rows, under the softmax of the row over its temperature.

    Args:
        logits: `[N, V]`, any float dtype.
        rows, tokens: int64 `[R]`.
        temperature: float32 `[R]`, positive.

    Returns:
        float32 `[R]`; NaN where a row has a NaN, +inf, or nothing finite.
    """
    size = max(1, SLICE // logits.shape[1])
    found = [torch.empty(0, device=logits.device)]
    for row, token, heat in zip(rows.split(size), tokens.split(size), temperature.split(size), strict=True):
        scaled = logits[row].float().div_(heat[:, None])
        total = scaled.logsumexp(-1)
        found.append(scaled.gather(1, token[:, None])[:, 0] - total.masked_fill(total.isposinf(), torch.nan))
    return torch.cat(found)


def token_logprobs(logits: Tensor, tokens: list[int], counts: list[int]) -> list[TokenLogprobs]:
    """Log-probabilities under the softmax of each row.

    Args:
        logits: float32 `[R, V]`.
        tokens: per row, the token of interest.
        counts: per row, how many of the likeliest to report beside it; -1 is all.
    """
    vocab = logits.shape[1]
    wanted = [vocab if count < 0 else min(count, vocab) for count in counts]
    # Not log_softmax: on a CPU it adds a row up in one running sum, which drops what is improbable enough.
    log_probs = logits - logits.logsumexp(-1, keepdim=True)
    chosen = log_probs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = ((log_probs > chosen).sum(-1) + 1).tolist()
    values, ids = log_probs.topk(max(wanted), dim=-1)
    return [
        TokenLogprobs([token, *row_ids[:count]], [own, *row_values[:count]], rank)
        for token, own, row_ids, row_values, rank, count in zip(
            tokens, chosen[:, 0].tolist(), ids.tolist(), values.tolist(), ranks, wanted, strict=True
        )
    ]
