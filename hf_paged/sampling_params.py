"""SamplingParams: how to continue a prompt, in vLLM's words; and their translation from transformers'
GenerationConfig."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from hf_paged.structured_outputs import GuidedDecodingParams as GuidedDecodingParams
from hf_paged.structured_outputs import StructuredOutputsParams as StructuredOutputsParams

if TYPE_CHECKING:
    from transformers import GenerationConfig


GREEDY_BELOW = 1e-5
"""Temperatures below it divide logits into infinities; they mean greedy."""


LOGPROBS_MODES = ("raw_logprobs", "processed_logprobs", "scaled_logprobs")
"""Which distribution reported log-probabilities are of: the model's own; that which the token was drawn from, after all
adjustments; the model's own at the request's temperature (over the whole vocabulary, nothing else applied, greedy as
temperature 1), which is what trainers compute again and compare with."""


class RequestOutputKind(Enum):
    """What each output of a request carries."""

    CUMULATIVE = 0
    """Everything so far."""
    DELTA = 1
    """What is new since the last output."""
    FINAL_ONLY = 2
    """One output, at the end."""


@dataclass
class SamplingParams:
    """How to sample from a model. Field names and defaults are vLLM's; every field is checked at construction.

    The order in which they act is transformers': logit_bias, repetition_penalty, presence and frequency penalties,
    bad_words, min_tokens, allowed_token_ids, logits_processors, structured_outputs, then temperature, top_k, top_p,
    min_p.

    Raises:
        ValueError, TypeError: a field's value makes no sense; the message names the field and what it takes.
    """

    n: int = 1
    """Samples per prompt. The prompt is computed once for all of them."""
    best_of: int | None = None
    """Samples drawn, of which the n with the highest cumulative log-probability come back; at least n. None: n."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens generated before; in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted once per earlier generation of the token; in [-2, 2]."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or generated (CTRL, arXiv 1909.05858)."""
    temperature: float = 1.0
    """0 is greedy, and so is anything below 1e-5."""
    top_p: float = 1.0
    """Keeps the smallest set of likeliest tokens that holds this much probability; in (0, 1]."""
    top_k: int = 0
    """Keeps this many likeliest tokens; 0 or -1 keeps all."""
    min_p: float = 0.0
    """Keeps tokens at least this likely relative to the likeliest; in [0, 1]."""
    seed: int | None = None
    """Makes the draws repeatable, alone or in any batch. Without one, torch's global generator gives a seed."""
    stop: str | list[str] | None = None
    """Strings that end a sample; not part of the text unless `include_stop_str_in_output`."""
    stop_token_ids: list[int] | None = None
    """Token ids that end a sample, beside the model's own end-of-sequence ids. The id stays in `token_ids`."""
    ignore_eos: bool = False
    """Go on past the model's end-of-sequence ids."""
    max_tokens: int | None = 16
    """Tokens to generate at most; None is as many as the model's length allows."""
    min_tokens: int = 0
    """Before this many, neither end-of-sequence ids nor stop strings end the sample."""
    logprobs: int | None = None
    """Report the sampled token's log-probability and those of this many likeliest tokens; -1 is the whole
    vocabulary."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens, always of the model's own distribution. Such a prompt is computed in full,
    whatever is cached."""
    logprobs_mode: str | None = None
    """Which distribution `logprobs` is of, one of `LOGPROBS_MODES`. None: as `EngineConfig.logprobs_mode` says."""
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: dict[int, float] | None = None
    """Added to the logits of these token ids."""
    allowed_token_ids: list[int] | None = None
    """Only these token ids can be sampled."""
    bad_words: list[str] | None = None
    """Words that are never generated: the last token of each of their tokenizations is forbidden after the others."""
    structured_outputs: StructuredOutputsParams | None = None
    """What form the completion must have: JSON of a schema, a regular expression, one of several texts, a grammar."""
    guided_decoding: StructuredOutputsParams | None = None
    """Older name of `structured_outputs`, which it becomes."""
    logits_processors: list[Callable[..., Any]] | None = None
    """Called once per token, in order. transformers' `LogitsProcessor`s get `(input_ids [1, L], scores [1, V])`; plain
    functions get `(generated_ids, logits [V])` or, with three parameters, `(prompt_ids, generated_ids, logits [V])`."""
    priority: int = 0
    """Lower runs earlier."""
    truncate_prompt_tokens: int | None = None
    """Only this many tokens at the prompt's end are kept; -1 is as many as the model's length leaves room for."""

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_lists()
        self._check_form()

    # ---- checks --------------------------------------------------------------------------------------------

    def _check_numbers(self) -> None:
        _integer("n", self.n, low=1)
        if self.best_of is not None:
            _integer("best_of", self.best_of, low=1)
            if self.best_of < self.n:
                raise ValueError(
                    f"best_of ({self.best_of}) samples are drawn and n ({self.n}) returned: give n or more"
                )
        if self.truncate_prompt_tokens is not None:
            _integer("truncate_prompt_tokens", self.truncate_prompt_tokens, low=-1)
            if self.truncate_prompt_tokens == 0:
                raise ValueError("truncate_prompt_tokens must be positive or -1: of a prompt something must be left")
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, open_low=True)
        _number("temperature", self.temperature, 0.0, math.inf)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _integer("top_k", self.top_k, low=-1)
        _integer("min_tokens", self.min_tokens, low=0)
        _integer("priority", self.priority)
        if self.seed is not None:
            _integer("seed", self.seed)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, low=1)
            if self.min_tokens > self.max_tokens:
                raise ValueError(f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), low=-1)
        if self.logprobs_mode is not None and self.logprobs_mode not in LOGPROBS_MODES:
            told = ", ".join(f'"{mode}"' for mode in LOGPROBS_MODES)
            raise ValueError(f"logprobs_mode must be one of {told} or None, got {self.logprobs_mode!r}")
        for name in (
            "ignore_eos",
            "detokenize",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "include_stop_str_in_output",
        ):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")

    def _check_lists(self) -> None:
        if self.stop is not None and not isinstance(self.stop, str):
            _each("stop", self.stop, str)
        if any(not text for text in self.stop_strings):
            raise ValueError("stop must not contain an empty string: it would stop everything at once")
        if self.stop_strings and not self.detokenize:
            raise ValueError("stop strings are searched in the text: they need detokenize=True")
        for name in ("stop_token_ids", "allowed_token_ids"):
            if getattr(self, name) is not None:
                _each(name, getattr(self, name), int)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids must not be empty: nothing could be sampled")
        if self.bad_words is not None:
            _each("bad_words", self.bad_words, str)
            if any(not word.strip() for word in self.bad_words):
                raise ValueError("bad_words must not contain an empty word")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, dict):
                raise TypeError(f"logit_bias must be a dict of token id to bias, got {type(self.logit_bias).__name__}")
            try:  # JSON has string keys
                self.logit_bias = {int(str(token)): float(bias) for token, bias in self.logit_bias.items()}
            except (TypeError, ValueError) as error:
                raise TypeError(f"logit_bias must be a dict of token id to bias: {error}") from None
            _each("logit_bias", list(self.logit_bias), int)
            if any(math.isnan(bias) or bias == math.inf for bias in self.logit_bias.values()):
                raise ValueError("logit_bias must not contain NaN or +inf (allowed_token_ids says what may be sampled)")
        if self.logits_processors is not None:
            if not isinstance(self.logits_processors, list | tuple):
                raise TypeError(f"logits_processors must be a list of functions, got {self.logits_processors!r}")
            for processor in self.logits_processors:
                if not callable(processor):
                    raise TypeError(f"logits_processors must be callable, got {processor!r}")
        if not isinstance(self.output_kind, RequestOutputKind):
            raise TypeError(f"output_kind must be a RequestOutputKind, got {self.output_kind!r}")

    def _check_form(self) -> None:
        for name in ("structured_outputs", "guided_decoding"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, StructuredOutputsParams):
                raise TypeError(f"{name} must be StructuredOutputsParams, got {value!r:.80}")
        if self.guided_decoding is not None:
            if self.structured_outputs is not None:
                raise ValueError("guided_decoding is the older name of structured_outputs: give one of them")
            self.structured_outputs, self.guided_decoding = self.guided_decoding, None

    # ---- what follows from the fields ----------------------------------------------------------------------

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def stop_strings(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)

    def token_ids(self) -> dict[str, list[int]]:
        """Every field that names token ids, to be checked against a vocabulary."""
        return {
            "stop_token_ids": self.stop_token_ids or [],
            "allowed_token_ids": self.allowed_token_ids or [],
            "logit_bias": list(self.logit_bias or {}),
        }

    def clone(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed."""
        return replace(self, **changes)

    # ---- transformers --------------------------------------------------------------------------------------

    @classmethod
    def from_generation_config(cls, config: GenerationConfig, *, prompt_tokens: int = 0) -> SamplingParams:
        """The same sampling in our words.

        Args:
            config: transformers' GenerationConfig; what it leaves unset has transformers' defaults (a top_k of 50 when
                sampling). End-of-sequence ids become `stop_token_ids`, in place of the
                model's own; with neither
                `max_new_tokens` nor `max_length`, `max_tokens` keeps its default.
            prompt_tokens: the prompt's length, from which `max_length` and `min_length` count.

        Raises:
            ValueError: the config asks for something that is not sampling from one model token by token (beams, another
                model's help...) or for a processor that only `generate` applies; the message names the field.
        """
        refused = [name for name, off in _GENERATE_ONLY.items() if getattr(config, name, None) not in (None, *off)]
        if refused:
            raise ValueError(
                f"GenerationConfig fields that only model.generate() handles: {', '.join(sorted(refused))}. "
                "Leave them out, or call generate()."
            )
        sampled = bool(config.do_sample)
        top_k = config.top_k if config.top_k is not None else config._get_default_generation_params()["top_k"]
        given: dict[str, Any] = {
            "n": config.num_return_sequences,
            "temperature": config.temperature if sampled else 0.0,
            "top_k": top_k if sampled else None,
            "top_p": config.top_p if sampled else None,
            "min_p": config.min_p if sampled else None,
            "repetition_penalty": config.repetition_penalty,
            "stop": config.stop_strings,
        }
        eos = config.eos_token_id
        if eos is not None:
            given["stop_token_ids"] = [int(e) for e in (eos if isinstance(eos, Sequence) else [eos])]
            given["ignore_eos"] = True
        if config.max_new_tokens is not None:
            given["max_tokens"] = config.max_new_tokens
        elif config.max_length is not None:
            if config.max_length <= prompt_tokens:
                raise ValueError(
                    f"max_length ({config.max_length}) counts the prompt, which has {prompt_tokens} tokens: "
                    "nothing is left to generate. Set max_new_tokens."
                )
            given["max_tokens"] = config.max_length - prompt_tokens
        if config.min_new_tokens is not None:
            given["min_tokens"] = config.min_new_tokens
        elif config.min_length:
            given["min_tokens"] = max(0, config.min_length - prompt_tokens)
        return cls(**{name: value for name, value in given.items() if value is not None})

    def to_generation_config(self, **overrides: Any) -> GenerationConfig:
        """The same sampling in transformers' words.

        Raises:
            ValueError: a field is set that GenerationConfig cannot say; the message names it.
        """
        from transformers import GenerationConfig

        defaults = {field.name: field.default for field in fields(self)}
        lost = [
            name
            for name in ("presence_penalty", "frequency_penalty", "allowed_token_ids", "bad_words", "logit_bias")
            + ("logits_processors", "logprobs", "prompt_logprobs", "logprobs_mode", "seed", "best_of")
            + ("truncate_prompt_tokens", "structured_outputs")
            if getattr(self, name) not in (defaults[name], [], {})
        ]
        if self.max_tokens is None:  # without a length transformers would stop at its own default
            lost.append("max_tokens=None")
        if self.ignore_eos != bool(self.stop_token_ids):  # eos_token_id stands in place of the model's own ids
            lost.append("ignore_eos without stop_token_ids" if self.ignore_eos else "stop_token_ids without ignore_eos")
        if lost:
            raise ValueError(f"GenerationConfig has no words for: {', '.join(lost)}")
        said: dict[str, Any] = {
            "num_return_sequences": self.n,
            "do_sample": not self.greedy,
            "repetition_penalty": self.repetition_penalty,
            "max_new_tokens": self.max_tokens,
            "min_new_tokens": self.min_tokens or None,
            "stop_strings": self.stop,
            "eos_token_id": None if self.stop_token_ids is None else list(self.stop_token_ids),
        }
        if not self.greedy:
            said |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": max(self.top_k, 0)}
            if self.min_p:
                said["min_p"] = self.min_p
        return GenerationConfig(**(said | overrides))


@dataclass
class BeamSearchParams:
    """How `LLM.beam_search` searches. Field names and defaults are vLLM's.

    Raises:
        ValueError, TypeError: a field's value makes no sense.
    """

    beam_width: int
    """Hypotheses followed, and returned."""
    max_tokens: int
    ignore_eos: bool = False
    """Go on past the model's end-of-sequence ids."""
    temperature: float = 0.0
    """Only 0: the search takes the likeliest."""
    length_penalty: float = 1.0
    """Hypotheses are ranked by their log-probability divided by their length to this power."""

    def __post_init__(self) -> None:
        _integer("beam_width", self.beam_width, low=1)
        _integer("max_tokens", self.max_tokens, low=1)
        _number("length_penalty", self.length_penalty, -math.inf, math.inf)
        if self.temperature:
            raise ValueError(f"beam search draws nothing: temperature must be 0, got {self.temperature!r}")


_GENERATE_ONLY: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
    "assistant_early_exit": (),
    "prompt_lookup_num_tokens": (),
    "guidance_scale": (1.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "top_h": (),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "bad_words_ids": (),
    "sequence_bias": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
    "max_time": (),
}
"""GenerationConfig fields that change the tokens and that SamplingParams cannot say, with the values that switch them
off."""


def _integer(name: str, value: Any, low: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if low is not None and value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")


def _number(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    inside = (low < value if open_low else low <= value) and value <= high and not math.isinf(value)
    if not inside:  # NaN fails every comparison and ends here too
        bounds = f"{'above' if open_low else 'at least'} {low}" + ("" if math.isinf(high) else f" and at most {high}")
        raise ValueError(f"{name} must be {bounds}, got {value}")


def _each(name: str, values: Any, kind: type) -> None:
    if isinstance(values, str) or not isinstance(values, list | tuple | set | frozenset):
        raise TypeError(f"{name} must be a list of {kind.__name__}, got {values!r}")
    for value in values:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{name} must be a list of {kind.__name__}, got {value!r} in it")
        if isinstance(value, int) and value < 0:
            raise ValueError(f"{name} must hold token ids, got {value}")
