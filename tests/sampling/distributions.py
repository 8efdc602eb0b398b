"""What the sampler must do, said in transformers' words; and the statistics to compare with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_paged.engine.request import Hooks, Request, Sequence
from hf_paged.sampling_params import SamplingParams

MARGIN = 1e-5
"""How far cumulative probabilities stay from a threshold, where two roundings of the same sum are compared."""


def warp(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """transformers' warpers in transformers' order on `[V]`."""
    scores, ids = logits[None], torch.zeros(1, 1, dtype=torch.long)
    if temperature != 1.0:
        scores = TemperatureLogitsWarper(temperature)(ids, scores)
    if top_k > 0:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1.0:
        scores = TopPLogitsWarper(top_p)(ids, scores)
    if min_p > 0.0:
        scores = MinPLogitsWarper(min_p)(ids, scores)
    return scores[0]


def probabilities(logits: Tensor, **options: Any) -> Tensor:
    """float64 `[V]`: the exact distribution after `warp`."""
    return torch.softmax(warp(logits, **options).double(), -1)


def clear_of_thresholds(logits: Tensor, top_k: int, top_p: float, min_p: float) -> bool:
    """Whether no token lies so near a threshold that rounding decides about it; `logits` with temperature applied."""
    scores = warp(logits, top_k=top_k).double()
    ascending = torch.softmax(scores, -1).sort().values.cumsum(-1)
    if top_p < 1.0 and bool(((ascending - (1 - top_p)).abs() < MARGIN).any()):
        return False
    relative = torch.softmax(scores, -1) / torch.softmax(scores, -1).max()
    return min_p in (0.0, 1.0) or not bool(((relative - min_p).abs() < MARGIN).any())


def chi_square_p(counts: Tensor, expected: Tensor) -> float:
    """The p-value of Pearson's test; cells that expect fewer than 5 are put together, impossible ones must be empty."""
    assert int(counts[expected == 0].sum()) == 0, "drew what has probability 0"
    counts, expected = counts[expected > 0].double(), expected[expected > 0].double()
    rare = expected < 5
    if bool(rare.any()):
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    if len(counts) < 2:
        return 1.0
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, statistic / 2))


def make_sequence(
    sampling: SamplingParams,
    *,
    prompt: list[int] | None = None,
    generated: list[int] | None = None,
    seed: int | None = None,
    slot: int = 0,
    stop_token_ids: frozenset[int] = frozenset(),
    bad_words: list[list[int]] | None = None,
    hooks: Hooks | None = None,
    name: str = "test",
) -> Sequence:
    """A running sequence as the engine would have it; its seed is that of `sampling` unless another is given."""
    request = Request(
        name,
        prompt if prompt is not None else [0],
        sampling,
        seed=seed if seed is not None else (sampling.seed or 0),
        stop_token_ids=stop_token_ids,
        bad_words=bad_words,
        hooks=hooks,
    )
    sequence = request.sequences[0]
    sequence.tokens.extend(generated or [])
    sequence.slot = slot
    return sequence


def adjusted(logits: Tensor, sequence: Sequence) -> Tensor:
    """`[V]` after all that SamplingParams puts before the caller's processors: the formulas, one token at a time."""
    params, request = sequence.request.sampling, sequence.request
    scores = logits.clone()
    for token, value in (params.logit_bias or {}).items():
        scores[token] += value
    if params.repetition_penalty != 1.0:
        processor = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
        scores = processor(torch.tensor([sequence.tokens]), scores[None])[0]
    for token in range(
        len(scores)
    ):  # as in OpenAI's and vLLM's documentation: of what was generated, not of the prompt
        count = sequence.generated.count(token)
        scores[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
    for word in request.bad_words:
        if (
            len(sequence.tokens) >= len(word) - 1
            and sequence.tokens[len(sequence.tokens) - len(word) + 1 :] == word[:-1]
        ):
            scores[word[-1]] = -torch.inf
    for token in range(len(scores)):
        too_early = sequence.num_generated < params.min_tokens and token in request.stop_token_ids
        outside = params.allowed_token_ids is not None and token not in params.allowed_token_ids
        if too_early or outside:
            scores[token] = -torch.inf
    return scores
