"""Drawing tokens: counter-based noise, so that a seed means the same alone and in a crowd, and inverse-CDF sampling.

A row's draw depends on its own logits, parameters, seed and position, never on its place in the batch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BLOCK = 256
"""The cumulative sum is taken over blocks first, then inside one block: two short scans instead of one over the
vocabulary."""

NUCLEUS = 1024
"""Top-p looks among this many likeliest tokens first, and sorts the whole vocabulary only for rows where they hold too
little."""


TIES = 16
"""How many more tokens than top-k are looked at, for those that tie with the last one (common in half precision)."""


def absorb(state: np.ndarray, key: np.ndarray) -> np.ndarray:
    """One round of a counter-based hash: the splitmix64 finaliser (Steele, Lea & Flood, OOPSLA 2014).

    Args:
        state, key: uint64 [R]; the state of the rounds before (0 before the first), and what this round adds.

    Returns:
        uint64 [R]: the new state.
    """
    with np.errstate(over="ignore"):
        state = (state ^ key) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))


def row_keys(seeds: np.ndarray, streams: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """64 bits per row that all of its noise comes from, a function of (seed, stream, position) alone.

    Args:
        seeds, streams, positions: uint64 [R]; the stream is the sample's index in its request, the position the number
            of tokens that it has generated.

    Returns:
        uint64 [R].
    """
    return absorb(absorb(absorb(np.zeros(len(seeds), dtype=np.uint64), seeds), streams), positions)


def uniforms(seeds: np.ndarray, streams: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One number in (0, 1) per row out of its `row_keys`.

    Args:
        seeds, streams, positions: uint64 [R].

    Returns:
        float64 [R].
    """
    return ((row_keys(seeds, streams, positions) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """The index at which each row's running sum passes `u` of its total.

    Args:
        weights: float32 `[R, V]`, not negative, a positive sum per row.
        u: float64 `[R]` in (0, 1).

    Returns:
        int64 `[R]`; a weight of 0 is never chosen.
    """
    rows, size = weights.shape
    padded = torch.nn.functional.pad(weights, (0, -size % BLOCK)).view(rows, -1, BLOCK)
    sums = padded.sum(-1, dtype=torch.float64).cumsum(-1)
    target = (u * sums[:, -1])[:, None]
    block = torch.searchsorted(sums, target, right=True).clamp_(max=sums.shape[1] - 1)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inside = padded.gather(1, block[..., None].expand(-1, 1, BLOCK))[:, 0]
    running = inside.double().cumsum(-1)
    index = torch.searchsorted(running, target - before, right=True)
    # Rounding can put the target at a block's very end: then its last possible token is meant.
    last = BLOCK - 1 - (inside.flip(-1) > 0).to(torch.uint8).argmax(-1, keepdim=True)
    return (block * BLOCK + torch.minimum(index, last))[:, 0]


def draw(logits: Tensor, u: Tensor, top_k: np.ndarray, top_p: np.ndarray, min_p: np.ndarray) -> Tensor:
    """Samples every row after top-k, then top-p of what is left, then min-p: transformers' order and meaning.

    Args:
        logits: float32 `[R, V]`, temperature applied.
        u: float64 `[R]`.
        top_k: int64 [R], 0 for all; top_p, min_p: float64 [R].

    Returns:
        int64 `[R]`.
    """
    vocab = logits.shape[1]
    width = np.where(top_k > 0, np.minimum(top_k + TIES, vocab), np.where(top_p < 1.0, min(NUCLEUS, vocab), 0))
    tokens = torch.empty(len(u), dtype=torch.int64, device=logits.device)
    # Rows are grouped by their own parameters only, so that no row's arithmetic depends on its neighbours.
    for k in np.unique(width):
        where = torch.from_numpy(np.flatnonzero(width == k)).to(logits.device)
        chosen = logits if len(where) == len(u) else logits[where]
        p = torch.from_numpy(top_p[width == k]).to(logits.device, torch.float32)
        m = torch.from_numpy(min_p[width == k]).to(logits.device, torch.float32)
        if k == 0:
            weights = torch.softmax(chosen, -1)
            if bool((m > 0).any()):
                weights = weights.masked_fill(weights < m[:, None] * weights.amax(-1, keepdim=True), 0.0)
            tokens[where] = inverse_cdf(weights, u[where])
            continue
        limits = torch.from_numpy(np.minimum(top_k[width == k], vocab)).to(logits.device)
        tokens[where] = _draw_sorted(chosen, u[where], int(k), limits, p, m)
    return tokens


def _draw_sorted(logits: Tensor, u: Tensor, k: int, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """As `draw`, among the `k` likeliest tokens in order; rows with a `top_k` of 0 need enough mass in k."""
    values, ids = logits.topk(k, sorted=True)
    limited = top_k > 0
    lowest = values.gather(1, torch.where(limited, top_k, k)[:, None] - 1)
    values = values.masked_fill(values < lowest, -torch.inf)  # as in transformers, ties at the last place all stay
    whole = torch.where(limited[:, None], values.logsumexp(-1, keepdim=True), logits.logsumexp(-1, keepdim=True))
    weights = (values - whole).exp()
    before = weights.double().cumsum(-1) - weights
    short = ~limited & (before[:, -1] + weights[:, -1] < top_p) if k < logits.shape[1] else torch.zeros_like(limited)
    weights = weights.masked_fill((before >= top_p[:, None]) & (top_p[:, None] < 1.0), 0.0)
    weights = weights.masked_fill(weights < min_p[:, None] * weights[:, :1], 0.0)
    tokens = ids.gather(1, inverse_cdf(weights, u)[:, None])[:, 0]
    if bool(short.any()):
        again = short.nonzero()[:, 0]
        tokens[again] = _draw_sorted(logits[again], u[again], logits.shape[1], top_k[again], top_p[again], min_p[again])
    return tokens


def filter_logits(logits: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """One row `[V]` with everything that cannot be drawn at -inf: what `draw` samples from, where it has to be
    shown."""
    ordered, ids = logits.sort(descending=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if 0 < top_k < len(ordered):
        keep &= ordered >= ordered[top_k - 1]
    weights = torch.softmax(ordered.masked_fill(~keep, -torch.inf), -1)
    if top_p < 1.0:  # at 1 rounding alone would decide where the sum ends
        keep &= weights.double().cumsum(-1) - weights < top_p
    keep &= weights >= min_p * weights[0]
    return logits.masked_fill(~torch.zeros_like(keep).scatter_(0, ids, keep), -torch.inf)
