"""score: log-probabilities of given completions, in packed batches through pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_paged import many
from hf_paged.engine.engine import Engine
from hf_paged.engine.intake import Prompt
from hf_paged.engine.request import Request
from hf_paged.lora.request import one_each

Completion = str | Sequence[int] | Tensor | np.ndarray
"""Text, or token ids."""


def score(
    engine: Engine,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion | Sequence[Completion]],
    temperature: float,
    progress: bool | None,
    lora_request: many.Lora = None,
) -> list[Tensor]:
    """See `PagedGenerationMixin.score`."""
    if isinstance(prompts, str | dict):
        completions = [completions]  # type: ignore[list-item]
    requests = make_requests(engine, many.list_prompts(prompts), completions, temperature, lora_request)
    wanted = [request for request in requests if request is not None]
    for output in many.generate_many(engine, wanted, progress, "score"):
        if output.error is not None:
            raise output.error
        if output.outputs[0].finish_reason == "abort":
            raise RuntimeError("scoring was aborted from elsewhere: call score() again")
    return [torch.tensor(request.scores if request else [], dtype=torch.float32, device="cpu") for request in requests]


def make_requests(
    engine: Engine,
    prompts: list[Prompt],
    completions: Sequence[Completion | Sequence[Completion]],
    temperature: float,
    lora_request: many.Lora = None,
) -> list[Request | None]:
    """A request per pair, None where the completion is empty, or an error that says which pair is wrong; nothing is
    submitted."""
    if isinstance(completions, str) or len(completions) != len(prompts):
        count = 1 if isinstance(completions, str) else len(completions)
        raise ValueError(f"{count} completions for {len(prompts)} prompts: give one, or a list of several, per prompt")
    adapters = one_each(lora_request, len(prompts))
    intake = engine.intake
    requests: list[Request | None] = []
    for place, (prompt, given, adapter) in enumerate(zip(prompts, completions, adapters, strict=True)):
        where = f"prompt {place}"
        try:
            ids = intake.tokenize(prompt)[1]
            for number, completion in enumerate(_several(given)):
                where = f"prompt {place}, completion {number}"
                tokens = intake.tokenize_completion(completion)
                if not tokens:
                    requests.append(None)
                    continue
                request = intake.scored_request(ids, tokens, temperature, adapter)
                engine.check(request)
                requests.append(request)
        except (TypeError, ValueError, FileNotFoundError) as error:
            raise type(error)(f"{where}: {error}") from error
    return requests


def _several(given: Any) -> Sequence[Any]:
    """The completions of one prompt as a list of them."""
    if isinstance(given, str | Tensor | np.ndarray):
        return [given]
    if not isinstance(given, Sequence):
        raise TypeError(f"completions must be text, token ids, or a list of these per prompt, got {given!r}")
    if all(isinstance(part, int | np.integer) for part in given):
        return [given]
    return given
