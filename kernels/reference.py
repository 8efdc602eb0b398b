"""Plain torch, one loop per sequence, float32 throughout: what every backend and kernel is held to.

Nothing here is meant to be fast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_start: int,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of one sequence's query rows over all of its keys.

    Args:
        query: `[Tq, H, Dk]`, the rows at positions `query_start ... query_start + Tq - 1`.
        key, value: `[Tk, Hkv, Dk]`, `[Tk, Hkv, Dv]` at positions 0 ... Tk - 1; head h reads KV head `h // (H // Hkv)`.
        scaling: multiplies the scores, usually `Dk ** -0.5`.
        window: a row sees this many of the latest positions, its own included (sliding window).
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2, arXiv 2408.00118).
        sinks: `[H]`, logits of a column that takes probability and gives nothing (gpt-oss; arXiv 2309.17453).

    Returns:
        `[Tq, H, Dv]` in the query's dtype.
    """
    groups = query.shape[1] // key.shape[1]
    key = key.float().repeat_interleave(groups, dim=1)
    value = value.float().repeat_interleave(groups, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query.float(), key) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    rows = torch.arange(query_start, query_start + query.shape[0], device=query.device)[:, None]
    columns = torch.arange(key.shape[0], device=query.device)[None, :]
    seen = columns <= rows
    if window is not None:
        seen &= columns > rows - window
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        column = sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : key.shape[0]]
    return torch.einsum("hqk,khd->qhd", weights, value).to(query.dtype)


def gather_pages(pool: Tensor, pages: list[int], length: int, layout: str) -> Tensor:
    """The first `length` rows `[length, Hkv, D]` that lie in `pages` of a pool in layout "NHD" or "HND"."""
    taken = pool[torch.tensor(pages, dtype=torch.long, device=pool.device)]
    if layout == "HND":  # [pages, Hkv, page, D]
        taken = taken.transpose(1, 2)
    return taken.flatten(0, 1)[:length]


def paged_attention(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    sequences: list[tuple[int, int, list[int]]],
    *,
    layout: str,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of a packed batch over pages that already hold the batch's own keys and values.

    Args:
        query: `[T, H, Dk]`, the sequences' rows one after another.
        key_pool, value_pool: `[pages, page, Hkv, D]` ("NHD") or `[pages, Hkv, page, D]` ("HND").
        sequences: per sequence, rows in this batch, tokens with keys in all (these rows included), and its pages.

    Returns:
        `[T, H, Dv]`.
    """
    outputs, start = [], 0
    for rows, length, pages in sequences:
        outputs.append(
            attention(
                query[start : start + rows],
                gather_pages(key_pool, pages, length, layout),
                gather_pages(value_pool, pages, length, layout),
                query_start=length - rows,
                scaling=scaling,
                window=window,
                softcap=softcap,
                sinks=sinks,
            )
        )
        start += rows
    return torch.cat(outputs)
