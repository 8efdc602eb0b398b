"""Log-probabilities of tokens that were given, not sampled: those of prompts, and completions to be scored."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from hf_paged.engine.batch import Batch, Chunk
from hf_paged.engine.logprobs import TokenLogprobs
from hf_paged.model.inputs import StepInputs
from hf_paged.sampling.device import split_when_landed
from hf_paged.sampling.logprobs import chosen_logprobs, token_logprobs


def scores_of(
    batch: Batch, inputs: StepInputs, logits: Tensor, upload: Callable[[np.ndarray], Tensor], *, exact: bool
) -> Callable[[], list[list[float]] | None]:
    """Enqueues log-probabilities of scored tokens. What it returns waits for them, as in `StepResult`."""
    rows: list[int] = []
    tokens: list[int] = []
    temperature: list[float] = []
    counts = []
    for chunk, (first, end) in zip(batch.chunks, inputs.prompt_rows, strict=True):
        request, count = chunk.sequence.request, end - first
        if request.scored is None or request.logits_from is None:
            counts.append(0)
            continue
        place = max(chunk.start - request.logits_from, 0)
        rows.extend(range(first, end))
        tokens.extend(request.scored[place : place + count])
        temperature.extend([request.logprob_temperature] * count)
        counts.append(count)
    if not rows:
        return lambda: None
    where, chosen = upload(np.array(rows, dtype=np.int64)), upload(np.array(tokens, dtype=np.int64))
    if exact:
        from hf_paged.kernels.triton.exact_logprobs import exact_logprobs

        found = exact_logprobs(logits[where], chosen, upload((1.0 / np.array(temperature)).astype(np.float32)))
    else:
        found = chosen_logprobs(logits, where, chosen, upload(np.array(temperature, dtype=np.float32)))
    return split_when_landed(found, counts)


def prompt_logprobs_of(batch: Batch, inputs: StepInputs, logits: Tensor) -> list[list[TokenLogprobs]] | None:
    """As in `StepResult`, for requests that asked for their prompts' log-probabilities."""
    if all(chunk.sequence.request.sampling.prompt_logprobs is None for chunk in batch.chunks):
        return None
    return [
        _prompt_logprobs(chunk, logits[first:end])
        for chunk, (first, end) in zip(batch.chunks, inputs.prompt_rows, strict=True)
    ]


def _prompt_logprobs(chunk: Chunk, logits: Tensor) -> list[TokenLogprobs]:
    sequence, sampling = chunk.sequence, chunk.sequence.request.sampling
    following = sequence.tokens[chunk.start + 1 : min(chunk.start + chunk.length + 1, sequence.num_prompt)]
    if not len(logits) or not following or sampling.prompt_logprobs is None:
        return []
    counts = [sampling.prompt_logprobs] * len(following)
    return token_logprobs(logits[: len(following)].float(), following, counts)
