"""A trainer's sampling as SamplingParams."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import GenerationConfig

from hf_paged.sampling_params import SamplingParams

OURS = {"n", "ignore_eos", "logprobs", "logprobs_mode", "prompt_logprobs", "detokenize", "output_kind"}
"""SamplingParams fields that the rollout sets."""


def sampling_params(trainer: Any, lm: Any, *, prompt_tokens: int, n: int) -> SamplingParams:
    """What the stock path would do with the trainer's configuration now, in our words.

    `generation_kwargs` may name fields of transformers' GenerationConfig, as on the stock path, and such fields of
    `SamplingParams` as that has no name for (`stop`, `seed`, `logit_bias`...).

    Args:
        trainer: a TRL trainer that was built with `use_vllm=False`.
        lm: the transformers model, whose own generation config fills in what the trainer leaves open.
        prompt_tokens: the prompt's length.
        n: completions.

    Raises:
        ValueError, TypeError: a setting that is unknown or cannot be applied; the message names it.
    """
    further = _further(trainer.args.generation_kwargs or {})
    config, _ = lm._prepare_generation_config(trainer.generation_config)
    try:
        sampling = SamplingParams.from_generation_config(config, prompt_tokens=prompt_tokens)
    except ValueError as error:
        raise ValueError(f"the trainer's generation cannot be paged: {error}") from error
    if sampling.n != 1:
        raise ValueError(f"num_return_sequences is {sampling.n} in generation_kwargs: num_generations says how many")
    return sampling.clone(
        n=n,
        ignore_eos=True,  # which ids end a sequence is the config's to say
        logprobs=0,
        logprobs_mode="scaled_logprobs",  # what the trainer computes: filters and penalties are not in it
        detokenize=bool(sampling.stop or further.get("stop")),
        **further,
    )


def _further(given: dict[str, Any]) -> dict[str, Any]:
    """Those of `generation_kwargs` that are fields of SamplingParams and not of GenerationConfig."""
    known = vars(GenerationConfig())
    names = {field.name for field in fields(SamplingParams)} - OURS
    further = {name: value for name, value in given.items() if name not in known}
    if unknown := sorted(set(further) - names):
        raise ValueError(f"generation_kwargs name nothing that hf_paged knows or may be told: {', '.join(unknown)}")
    return further
