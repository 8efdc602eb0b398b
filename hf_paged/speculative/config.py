"""SpeculativeConfig: what users write as `speculative_config={"method": ..., ...}`, checked."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DEFAULT_TOKENS = {"ngram": 5, "suffix": 24, "draft_model": 5, "eagle3": 3}
"""Tokens drafted per step, by method, where nothing is said."""

_SUFFIX = "suffix_decoding_"
_NO_HISTORY = _SUFFIX + "max_cached_requests"
"""May be 0: then nothing is kept of earlier calls."""
_PROBABILITY = _SUFFIX + "min_token_prob"
_COUNTS: dict[str, tuple[str, ...]] = {
    "ngram": ("prompt_lookup_max", "prompt_lookup_min"),
    "suffix": (_SUFFIX + "max_tree_depth", _NO_HISTORY),
    "draft_model": (),
    "eagle3": (),
}
_NUMBERS: dict[str, tuple[str, ...]] = {
    "ngram": (),
    "suffix": (_SUFFIX + "max_spec_factor", _PROBABILITY),
    "draft_model": (),
    "eagle3": (),
}
_MODELS = {
    "draft_model": "a path or a loaded causal LM",
    "eagle3": "the path of an EAGLE-3 head or a loaded one (hf_paged.speculative.eagle)",
}
"""What `model` is, for the methods that draft with one."""


@dataclass(frozen=True)
class SpeculativeConfig:
    """How tokens are drafted. Two that are equal share a drafter."""

    method: str
    """"ngram", "suffix", "draft_model" or "eagle3"."""
    num_speculative_tokens: int
    """The most that are drafted for a sequence in a step."""
    model: Any = None
    """For "draft_model": a causal LM of transformers with the target's vocabulary, or the path to one. For "eagle3": an
    `Eagle3Head`, or the path to one."""
    options: tuple[tuple[str, int | float], ...] = ()
    """What else the method's drafter takes."""

    def __hash__(self) -> int:
        return hash((self.method, self.num_speculative_tokens, self.options))  # a model need not have a hash

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> SpeculativeConfig:
        """Out of vLLM's dict.

        Raises:
            TypeError: not a dict, or a name that no method has.
            ValueError: a method that is not known, a value that makes no sense, or a name of another method.
        """
        if not isinstance(given, Mapping):
            raise TypeError(f'speculative_config must be a dict like {{"method": "ngram"}}, got {given!r}')
        method, model = given.get("method"), given.get("model")
        if isinstance(model, str) and model in ("ngram", "[ngram]") and method in (None, "ngram"):
            method, model = "ngram", None
        if method is None and model is not None:
            method = "draft_model"
        if not isinstance(method, str) or method not in DEFAULT_TOKENS:
            raise ValueError(f"speculative_config: method must be one of {', '.join(DEFAULT_TOKENS)}; got {method!r}")
        known = {"method", "model", "num_speculative_tokens", *_COUNTS[method], *_NUMBERS[method]}
        for name in given:
            if name not in known:
                raise _unknown(name, method)
        if method in _MODELS and model is None:
            raise ValueError(f'speculative_config: method "{method}" needs model=, {_MODELS[method]}')
        if method not in _MODELS and model is not None and model != method:
            raise ValueError(f'speculative_config: method "{method}" drafts without a model, got model={model!r}')
        count = given.get("num_speculative_tokens")
        count = DEFAULT_TOKENS[method] if count is None else _count("num_speculative_tokens", count)
        options: dict[str, int | float] = {
            name: _count(name, given[name], 0 if name == _NO_HISTORY else 1)
            for name in _COUNTS[method]
            if given.get(name) is not None
        }
        options |= {name: _number(name, given[name]) for name in _NUMBERS[method] if given.get(name) is not None}
        if options.get(_PROBABILITY, 0) > 1:
            raise ValueError(f"speculative_config: {_PROBABILITY} is a probability, got {options[_PROBABILITY]}")
        shortest, longest = options.get("prompt_lookup_min"), options.get("prompt_lookup_max")
        if shortest is not None and longest is not None and shortest > longest:
            raise ValueError(
                f"speculative_config: prompt_lookup_min ({shortest}) must not exceed prompt_lookup_max ({longest})"
            )
        cut = {name.removeprefix(_SUFFIX): value for name, value in options.items()}
        return cls(method, count, model if method in _MODELS else None, tuple(sorted(cut.items())))


def speculation_of(
    config: Mapping[str, Any] | None, model: Any = None, num_tokens: int | None = None
) -> SpeculativeConfig | None:
    """Out of `speculative_config=`, or the older pair `speculative_model=`, `num_speculative_tokens=`.

    Raises:
        TypeError, ValueError: as `SpeculativeConfig.parse`, or both are given.
    """
    if config is not None:
        if model is not None or num_tokens is not None:
            raise ValueError(
                "give speculative_config, or the older speculative_model and num_speculative_tokens, not both"
            )
        return SpeculativeConfig.parse(config)
    if model is None:
        if num_tokens is not None:
            raise ValueError(
                "num_speculative_tokens says how much is drafted, and nothing says how: give speculative_config "
                '({"method": "ngram"}, say) or speculative_model'
            )
        return None
    return SpeculativeConfig.parse({"model": model, "num_speculative_tokens": num_tokens})


def _unknown(name: Any, method: str) -> Exception:
    others = [other for other in DEFAULT_TOKENS if name in _COUNTS[other] + _NUMBERS[other]]
    if others:
        return ValueError(f'speculative_config: {name} belongs to method "{others[0]}", not to "{method}"')
    known = ["method", "model", "num_speculative_tokens", *_COUNTS[method], *_NUMBERS[method]]
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f'With "{method}" it has: {", ".join(known)}.'
    return TypeError(f"speculative_config has no option {name!r}. {hint}")


def _count(name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        what = "a positive integer" if least else "an integer of 0 or more"
        raise ValueError(f"speculative_config: {name} must be {what}, got {value!r}")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"speculative_config: {name} must be a number of 0 or more, got {value!r}")
    return float(value)
