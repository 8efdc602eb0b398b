"""transformers' own `generate`, with its sampling loop replaced.

`generate` prepares everything as always: the generation config and its defaults, inputs and masks, processors, stopping
criteria. Then it calls `_sample`, and that is the one method we override, so that every argument means what it always
meant. Whatever the engine does not do stays with the stock loop, said once in the log.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, logits_process
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from hf_paged.engine.engine import Engine
from hf_paged.engine.request import Hooks, Request, Sequence
from hf_paged.model.introspect import UnsupportedModelError, why_unpageable
from hf_paged.sampling.structured import StructuredLogitsProcessor
from hf_paged.sampling_params import RequestOutputKind, SamplingParams
from hf_paged.speculative.config import DEFAULT_TOKENS, SpeculativeConfig
from hf_paged.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from hf_paged.state import PagedState

logger = logging.getLogger(__name__)

IGNORED_INPUTS = {"attention_mask", "position_ids", "use_cache", "past_key_values", "logits_to_keep", "cache_position"}
"""Arguments of the model's forward that the engine has its own values for (checked to be the usual ones)."""

WARPERS = {
    logits_process.TemperatureLogitsWarper: "temperature",
    logits_process.TopKLogitsWarper: "top_k",
    logits_process.TopPLogitsWarper: "top_p",
    logits_process.MinPLogitsWarper: "min_p",
}
"""What the sampler does itself, in this order."""

ROW_BY_ROW = {
    "RepetitionPenaltyLogitsProcessor", "NoRepeatNGramLogitsProcessor", "SequenceBiasLogitsProcessor",
    "NoBadWordsLogitsProcessor", "MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor",
    "ForcedBOSTokenLogitsProcessor", "ForcedEOSTokenLogitsProcessor", "InfNanRemoveLogitsProcessor",
    "ExponentialDecayLengthPenalty", "LogitNormalization", "SuppressTokensLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor", "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper",
    "MinPLogitsWarper", "TopHLogitsWarper", "TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper",
    "WatermarkLogitsProcessor", "PrefixConstrainedLogitsProcessor",
}  # fmt: skip
"""transformers' processors that treat each row by itself; the others need the whole batch in lock step."""


class StockPath(Exception):
    """The engine does not do this; the message says what."""


class PagedSampling:
    """Overrides `GenerationMixin._sample`. Mixed in before a model's class."""

    def _state(self) -> PagedState:
        raise NotImplementedError

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """As transformers': token ids `[B, L]` -> `[B, L + new]`, or `GenerateDecoderOnlyOutput`."""
        try:
            if synced_gpus:
                raise StockPath("synced_gpus keeps ranks in lock step")
            call = _Call(
                self._paged_engine(),
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                model_kwargs,
                streamer,
            )
        except (StockPath, UnsupportedModelError) as reason:
            self._say_stock(str(reason))
            return super()._sample(  # type: ignore[misc]
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )
        return call.run()

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, structured_outputs: StructuredOutputsParams | None = None, **kwargs: Any) -> Any:
        """transformers' `generate`.

        Args:
            structured_outputs: what form the new text must have.

        Raises:
            ValueError: a form that is malformed, that nothing can have, or that could not end.
        """
        if structured_outputs is not None:
            if not isinstance(structured_outputs, StructuredOutputsParams):
                raise TypeError(f"structured_outputs must be StructuredOutputsParams, got {structured_outputs!r:.80}")
            form = self._paged_engine().intake.compile_form(structured_outputs, self._ends(kwargs))
            given = kwargs.pop("logits_processor", None) or []
            own = StructuredLogitsProcessor(structured_outputs, form)
            kwargs["logits_processor"] = LogitsProcessorList([*given, own])
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _ends(self, kwargs: dict[str, Any]) -> frozenset[int]:
        """The end-of-sequence ids that a call of `generate` has."""
        for source in (kwargs, vars(kwargs.get("generation_config") or object), vars(self.generation_config)):  # type: ignore[attr-defined]
            eos = source.get("eos_token_id")
            if eos is not None:
                return frozenset(int(token) for token in torch.as_tensor(eos).reshape(-1).tolist())
        return frozenset()

    @functools.wraps(GenerationMixin._beam_search)
    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
        self._say_stock("beam search follows many hypotheses at once")
        return super()._beam_search(*args, **kwargs)  # type: ignore[misc]

    def _assisted_decoding(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        inputs_tensor: Tensor | None = None,
        assistant_model: Any = None,
        assistant_tokenizer: Any = None,
        tokenizer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """As transformers': `prompt_lookup_num_tokens` drafts by n-grams, `assistant_model` by a draft model."""
        shared = (input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer)
        try:
            if synced_gpus:
                raise StockPath("synced_gpus keeps ranks in lock step")
            if assistant_tokenizer is not None:
                raise StockPath("the assistant has a vocabulary of its own")
            speculation = self._speculation(generation_config, assistant_model)
            call = _Call(
                self._paged_engine(speculation),
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                model_kwargs,
                streamer,
                speculation,
            )
        except (StockPath, UnsupportedModelError) as reason:
            self._say_stock(str(reason))
            assisting = (inputs_tensor, assistant_model, assistant_tokenizer, tokenizer)
            return super()._assisted_decoding(*shared, *assisting, **model_kwargs)  # type: ignore[misc]
        return call.run()

    def _speculation(self, config: GenerationConfig, assistant: Any) -> SpeculativeConfig:
        if config.prompt_lookup_num_tokens is not None:
            longest = 2 if config.max_matching_ngram_size is None else config.max_matching_ngram_size
            if config.prompt_lookup_num_tokens < 1 or longest < 1:
                raise ValueError(
                    "prompt_lookup_num_tokens and max_matching_ngram_size must be positive, got "
                    f"{config.prompt_lookup_num_tokens} and {longest}"
                )
            # As in transformers, n-grams down to single tokens.
            options = (("prompt_lookup_max", longest), ("prompt_lookup_min", 1))
            return SpeculativeConfig("ngram", config.prompt_lookup_num_tokens, options=options)
        if assistant is None:
            raise StockPath("assisted decoding by layers of the model itself has no pages")
        given = assistant.generation_config.num_assistant_tokens
        return SpeculativeConfig("draft_model", given or DEFAULT_TOKENS["draft_model"], assistant)

    def _paged_engine(self, speculation: SpeculativeConfig | None = None) -> Engine:
        if reason := why_unpageable(self) or _why_prepared_otherwise(self):  # type: ignore[arg-type]
            raise StockPath(reason)
        try:
            return self._state().engine(self, speculation)  # type: ignore[arg-type]
        except ValueError as error:
            if speculation is None:
                raise
            raise StockPath(str(error)) from error

    def _say_stock(self, reason: str) -> None:
        if reason not in self._state().said:
            self._state().said.add(reason)
            logger.warning("generate() runs through transformers' own loop, without paging: %s", reason)


def _why_prepared_otherwise(lm: Any) -> str | None:
    """Why the stock loop would not feed this model its token ids as they are: somebody prepares its inputs
    differently."""
    if not type(lm).prepare_inputs_for_generation.__module__.startswith("transformers."):
        return f"{type(lm).__name__} prepares its inputs in a way of its own"
    hooked = getattr(lm.__dict__.get("prepare_inputs_for_generation"), "__self__", None)  # PEFT puts itself there
    return why_unpageable(hooked) if hooked is not None and hasattr(hooked, "peft_config") else None


class _Call:
    """One call of `generate`, as requests. Building it changes nothing and raises StockPath for what cannot be done."""

    _order: ClassVar[list[str]] = list(WARPERS.values())

    def __init__(
        self,
        engine: Engine,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        model_kwargs: dict[str, Any],
        streamer: Any,
        speculation: SpeculativeConfig | None = None,
    ) -> None:
        self.engine, self.input_ids, self.config, self.streamer = engine, input_ids, config, streamer
        self._check(model_kwargs)
        width = input_ids.shape[1]
        padding = self._padding(model_kwargs)
        forms = [p.params for p in processors if isinstance(p, StructuredLogitsProcessor)]
        own_processors, warpers = self._split_processors(
            [p for p in processors if not isinstance(p, StructuredLogitsProcessor)]
        )
        max_length = min((c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)), default=None)
        eos = [int(i) for c in criteria if isinstance(c, EosTokenCriteria) for i in c.eos_token_id.reshape(-1).tolist()]
        own = [c for c in criteria if not isinstance(c, MaxLengthCriteria | EosTokenCriteria)]
        if own and not eos and len(input_ids) > 1:
            raise StockPath("without an end-of-sequence id, rows that met a stopping criterion go on with the others")
        max_tokens = None if max_length is None else max(1, max_length - width)
        longest = width - min(padding, default=0) + (max_tokens or 1)
        if longest > engine.intake.max_model_len:
            raise StockPath(f"{longest} tokens go beyond the model's length of {engine.intake.max_model_len}")
        keep = bool(config.return_dict_in_generate)
        self.keep_scores, self.keep_logits = keep and bool(config.output_scores), keep and bool(config.output_logits)
        needs_hooks = bool(own_processors or own or self.keep_scores or self.keep_logits)
        copies = 1 if needs_hooks else max(1, config.num_return_sequences or 1)
        sampling = SamplingParams(
            n=copies,
            max_tokens=max_tokens,
            stop_token_ids=eos,
            ignore_eos=True,  # which ids end a sequence is the criteria's to say
            detokenize=False,
            structured_outputs=forms[0] if forms else None,
            output_kind=RequestOutputKind.FINAL_ONLY if streamer is None else RequestOutputKind.DELTA,
            **warpers,
        )
        self.requests: list[Request] = []
        rows = input_ids.tolist()
        for row in range(0, len(rows), copies):
            hooks = None
            if needs_hooks:
                hooks = Hooks(
                    processors=[_for_row(processor, row) for processor in own_processors],
                    stopping_criteria=own,
                    padding=rows[row][: padding[row]],
                    keep_logits=self.keep_logits,
                    keep_scores=self.keep_scores,
                )
            ids = rows[row][padding[row] :]
            self.requests.append(engine.intake.request(ids, sampling, speculation=speculation, hooks=hooks))
        try:
            for request in self.requests:
                engine.scheduler.check(request)
        except ValueError as too_large:
            raise StockPath(str(too_large)) from too_large

    def _check(self, model_kwargs: dict[str, Any]) -> None:
        config = self.config
        cache = model_kwargs.get("past_key_values")
        if getattr(cache, "_is_user_defined", False):
            raise StockPath("the caller brings a cache object")
        if config.is_assistant:
            raise StockPath("as an assistant it keeps a cache from call to call")
        if config.cache_implementation is not None:
            raise StockPath(f"cache_implementation={config.cache_implementation!r} was asked for")
        if not model_kwargs.get("use_cache", True):
            raise StockPath("use_cache=False was asked for")
        if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
            raise StockPath("attention weights and hidden states are not kept")
        extra = sorted(
            k for k, v in model_kwargs.items() if v is not None and v is not False and k not in IGNORED_INPUTS
        )
        if extra:
            raise StockPath(f"the model takes further inputs: {', '.join(extra)}")
        if self.input_ids.shape[1] == 0:
            raise StockPath("there are no input ids")
        if self.streamer is not None and len(self.input_ids) > 1:
            raise StockPath("a streamer for several rows needs them in lock step")

    def _padding(self, model_kwargs: dict[str, Any]) -> list[int]:
        """Pad tokens left of each row."""
        mask = model_kwargs.get("attention_mask")
        rows, width = self.input_ids.shape
        places = torch.arange(width, device="cpu")  # whatever torch.set_default_device says
        if mask is None:
            padding = torch.zeros(rows, dtype=torch.long, device="cpu")
        else:
            mask = mask.to("cpu", torch.bool)
            if mask.shape != self.input_ids.shape:
                raise StockPath("the attention mask covers more than the input ids")
            padding = width - mask.sum(1)
            if not torch.equal(mask, places >= padding[:, None]) or bool((padding == width).any()):
                raise StockPath("the attention mask is not plain left padding")
        positions = model_kwargs.get("position_ids")
        if positions is not None:
            usual = places - padding[:, None]
            seen = usual >= 0
            if positions.shape[-2:] != usual.shape and positions.shape != (1, width):
                raise StockPath("position_ids of an unusual shape were given")
            if not torch.equal(positions.cpu().expand_as(usual)[seen], usual[seen]):
                raise StockPath("position_ids other than the usual ones were given")
        return [int(p) for p in padding]

    def _split_processors(self, processors: list[Any]) -> tuple[list[Any], dict[str, Any]]:
        """(processors to call row by row, sampling parameters for the warpers at the end that the sampler does
        itself)."""
        for processor in processors:
            kind = type(processor)
            if kind.__module__.startswith("transformers.") and kind.__name__ not in ROW_BY_ROW:
                raise StockPath(f"{kind.__name__} works on the whole batch in lock step")
        if not self.config.do_sample:
            return processors, {"temperature": 0.0}
        found: dict[str, Any] = {}
        while processors and type(processors[-1]) in WARPERS:
            name = WARPERS[type(processors[-1])]
            if found and self._order.index(name) >= min(self._order.index(n) for n in found):
                break
            value = getattr(processors[-1], name)
            plain = getattr(processors[-1], "filter_value", -torch.inf) == -torch.inf
            if not plain or (name in ("top_p", "min_p") and processors[-1].min_tokens_to_keep > 1):
                break
            found[name] = int(value) if name == "top_k" else float(value)
            processors = processors[:-1]
        return processors, {"temperature": 1.0, **found}

    # ---- running it ----------------------------------------------------------------------------------------

    def run(self) -> Any:
        for output in self.engine.run(self.requests):
            if output.error is not None:
                raise output.error
            if self.streamer is not None:
                for completion in output.outputs:
                    for token in completion.token_ids:
                        self.streamer.put(torch.tensor([token]))
        if self.streamer is not None:
            self.streamer.end()
        sequences = [sequence for request in self.requests for sequence in request.sequences]
        longest = max(sequence.num_generated for sequence in sequences)
        pad = getattr(self.config, "_pad_token_tensor", None)
        new = torch.full((len(sequences), longest), 0 if pad is None else int(pad.reshape(-1)[0]), dtype=torch.long)
        for row, sequence in enumerate(sequences):
            new[row, : sequence.num_generated] = torch.tensor(sequence.generated)
        ids = torch.cat([self.input_ids, new.to(self.input_ids.device, self.input_ids.dtype)], dim=1)
        if not self.config.return_dict_in_generate:
            return ids
        hooks = [request.hooks for request in self.requests if request.hooks is not None]
        return GenerateDecoderOnlyOutput(
            sequences=ids,  # type: ignore[arg-type]
            scores=_by_step([h.scores for h in hooks], sequences) if self.keep_scores else None,  # type: ignore[arg-type]
            logits=_by_step([h.logits for h in hooks], sequences) if self.keep_logits else None,  # type: ignore[arg-type]
        )


def _by_step(rows: list[list[Tensor]], sequences: list[Sequence]) -> tuple[Tensor, ...]:
    """Per-row lists of `[V]` as one `[B, V]` per step; zeros once a row has ended (what stock has there means
    nothing)."""
    blank, ends = torch.zeros_like(rows[0][0]), [sequence.num_generated for sequence in sequences]
    return tuple(
        torch.stack([row[step] if step < end else blank for row, end in zip(rows, ends, strict=True)])
        for step in range(max(ends))
    )


def _for_row(processor: Any, row: int) -> Any:
    """A processor that is told which row of the batch it serves, where it wants to know."""
    if isinstance(processor, logits_process.RepetitionPenaltyLogitsProcessor):
        ignored = processor.prompt_ignore_length  # one length, or one per row
        if isinstance(ignored, Tensor) and ignored.numel() > 1:
            return logits_process.RepetitionPenaltyLogitsProcessor(processor.penalty, ignored[row : row + 1])
    if isinstance(processor, logits_process.PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        beams = processor._num_beams
        return logits_process.PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row // beams, ids), beams)
    return processor
