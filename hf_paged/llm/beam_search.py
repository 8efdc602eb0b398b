"""Beam search, by transformers' own loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_paged.engine.intake import Intake, Prompt
from hf_paged.sampling_params import BeamSearchParams


@dataclass
class BeamSearchSequence:
    """A hypothesis."""

    tokens: list[int]
    """Prompt and continuation."""
    cum_logprob: float
    """Of the continuation."""
    text: str | None = None
    finish_reason: str | None = None
    """"stop" or "length"."""


@dataclass
class BeamSearchOutput:
    """A prompt's hypotheses, best first."""

    sequences: list[BeamSearchSequence] = field(default_factory=list)


def beam_search(
    model: Any, intake: Intake, prompts: Sequence[Prompt], params: BeamSearchParams
) -> list[BeamSearchOutput]:
    """See `LLM.beam_search`."""
    tokenized = [intake.tokenize(prompt)[1] for prompt in prompts]
    for place, ids in enumerate(tokenized):
        if not ids or len(ids) + params.max_tokens > intake.max_model_len:
            raise ValueError(
                f"prompt {place}: {len(ids)} tokens and max_tokens={params.max_tokens} together must fit the "
                f"model's length of {intake.max_model_len}, and a prompt has at least one token"
            )
    return [_search(model, intake, ids, params) for ids in tokenized]


def _search(model: Any, intake: Intake, ids: list[int], params: BeamSearchParams) -> BeamSearchOutput:
    eos = [] if params.ignore_eos else sorted(intake.eos_token_ids())
    found = model.generate(
        torch.tensor([ids], device=model.device),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=model.device),
        num_beams=params.beam_width,
        num_return_sequences=params.beam_width,
        max_new_tokens=params.max_tokens,
        min_new_tokens=None,
        length_penalty=params.length_penalty,
        do_sample=False,
        eos_token_id=eos or None,
        pad_token_id=eos[0] if eos else 0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    scores = found.sequences_scores.tolist() if params.beam_width > 1 else [_greedy_logprob(found, len(ids), eos)]
    sequences = []
    for row, score in zip(found.sequences.tolist(), scores, strict=True):
        new, reason = _until_eos(row[len(ids) :], eos)
        total = score * len(new) ** params.length_penalty if params.beam_width > 1 else score
        text = intake.tokenizer.decode(ids + new, skip_special_tokens=True) if intake.tokenizer is not None else None
        sequences.append(BeamSearchSequence(ids + new, total, text, reason))
    return BeamSearchOutput(sequences)


def _until_eos(new: list[int], eos: list[int]) -> tuple[list[int], str]:
    for place, token in enumerate(new):
        if token in eos:
            return new[: place + 1], "stop"
    return new, "length"


def _greedy_logprob(found: Any, num_prompt: int, eos: list[int]) -> float:
    """One beam is greedy search, which tells scores step by step."""
    new, _ = _until_eos(found.sequences[0, num_prompt:].tolist(), eos)
    return sum(float(step[0].float().log_softmax(-1)[token]) for step, token in zip(found.scores, new, strict=False))
