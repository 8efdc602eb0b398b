"""wrap() and unwrap(): a transformers model that generates through pages, and back. The same object throughout."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

from torch import Tensor, nn

from hf_paged import many
from hf_paged.config import EngineConfig
from hf_paged.distributed.groups import join
from hf_paged.distributed.shard import parallel_of, shard
from hf_paged.distributed.spread import generate_spread
from hf_paged.engine.engine import Engine
from hf_paged.engine.intake import Prompt
from hf_paged.generate import PagedSampling
from hf_paged.lora.request import LoRARequest
from hf_paged.model.introspect import causal_lm, refuse, why_unpageable
from hf_paged.observe.perfetto import trace as write_trace
from hf_paged.outputs import RequestOutput
from hf_paged.quantization.bitsandbytes import pack_for_cpu
from hf_paged.quantization.linear import QuantizedLinear
from hf_paged.sampling_params import RequestOutputKind
from hf_paged.score import Completion, score
from hf_paged.state import PagedState

Model = TypeVar("Model", bound=nn.Module)


def wrap(model: Model, config: EngineConfig | None = None, *, tokenizer: Any = None, **overrides: Any) -> Model:
    """Gives a model paged generation, in place.

    The object, its parameters, its training forward, its state dict and what `save_pretrained` writes stay as they are.
    The engine, with the page pool's memory, is made at the first generation.

    Args:
        model: a transformers causal LM, or a PEFT, DDP or `torch.compile` wrapper around one. One that transformers
            has spread over processes (`tp_plan="auto"`) is taken over; it is for inference then.
        config: how to build the engine.
        tokenizer: for prompts and outputs as text. Found beside the model by its name or path when not given; False is
            none at all.
        overrides: fields of `EngineConfig` to change.

    Returns:
        the same object, now also a `PagedGenerationMixin`.

    Raises:
        UnsupportedModelError: the model cannot be paged; it says why, and the model is unchanged.
        TypeError: not a module, or an option that does not exist.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"wrap() takes a transformers model, got {type(model).__name__}")
    if reason := why_unpageable(model):
        raise refuse(model, reason)
    lm = causal_lm(model)
    ranks = getattr(lm, "_tp_size", None) or 1
    whole_experts = any(getattr(module, "_is_expert_parallel", False) for module in lm.modules())
    if whole_experts and ranks == 1 and parallel_of(lm) is None:
        reason = "its experts are spread over ranks that have tokens of their own each: take a tp_size like its ep_size"
        raise refuse(model, reason)
    already = model.__dict__.get("_hf_paged")
    base = config or (already.config if already else EngineConfig())
    if tokenizer is None and already is not None:
        tokenizer = already.tokenizer
    state = PagedState(base.with_changes(**overrides), tokenizer)
    if already is not None:
        already.drop_engine()
    if ranks > 1 and parallel_of(lm) is None:  # transformers has cut it up
        shard(lm, join(ranks, next(lm.parameters()).device), enable_expert_parallel=whole_experts)
    for part in {id(lm): lm, id(model): model}.values():
        if not isinstance(part, PagedGenerationMixin):
            part.__class__ = _paged_class(type(part), part is not lm)  # type: ignore[arg-type]
        part.__dict__["_hf_paged"] = state
    pack_for_cpu(lm, False)
    return model


def unwrap(model: Model) -> Model:
    """Undoes `wrap`: the original class, and the pool's memory given back. A model that is not wrapped is left
    alone."""
    lm = causal_lm(model)
    for part in {id(lm): lm, id(model): model}.values():
        state = part.__dict__.pop("_hf_paged", None)
        try:
            if state is not None:
                state.drop_engine()
        finally:
            original = getattr(type(part), "_hf_paged_original", None)
            if original is not None:
                part.__class__ = original
                pack_for_cpu(lm, True)
    return model


class PagedGenerationMixin(PagedSampling):
    """Paged generation for a transformers causal LM: `wrap` mixes it in, and so may a class of your own.

    `generate` is transformers' own, run through the engine wherever it can be. `class MyModel(PagedGenerationMixin,
    LlamaForCausalLM)` needs no `wrap`.
    """

    @property
    def engine(self) -> Engine:
        """The engine, made when first needed: `add_request`, `step`, `abort`, `has_unfinished`."""
        return self._state().engine(self)  # type: ignore[arg-type]

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        sampling: many.Sampling | Sequence[many.Sampling] = None,
        *,
        lora_request: many.Lora = None,
        progress: bool | None = None,
        spread: bool = False,
        trace: str | os.PathLike[str] | None = None,
    ) -> list[RequestOutput]:
        """Generates for many prompts at once, by continuous batching.

        Args:
            prompts: strings, token-id lists and chat message lists, mixed as you like.
            sampling: one `SamplingParams` or `GenerationConfig` for all, or a list with one per prompt. None: the
                model's
                own generation config, with `SamplingParams`' max_tokens where that names no length.
            lora_request: an adapter for all, or a list with one, or None, per prompt; needs `enable_lora=True`.
            progress: a progress bar; None shows one on a terminal.
            trace: a file to write a Perfetto trace of the run to; see `hf_paged.trace`.
            spread: under torchrun or accelerate, where every process has a replica (or a part of one): all of them
                give the same prompts, each replica computes a share, and every process gets all outputs. What is drawn
                does not depend on their number.

        Returns:
            one output per prompt, in their order. A request whose own processor or criterion raised has finish_reason
            "error" and the exception in `error`; the others are not affected.

        Raises:
            ValueError, TypeError, FileNotFoundError: a bad prompt, parameter or adapter, before any work starts.
            OSError: the trace cannot be written.
            ParallelError: with `spread`: another process failed, is gone, or has other prompts.
        """
        engine = self.engine
        lm = causal_lm(self)
        requests = many.make_requests(engine, lm, prompts, sampling, RequestOutputKind.FINAL_ONLY, lora_request)
        with nullcontext() if trace is None else write_trace(trace, self):
            if spread:
                return generate_spread(self, engine, requests, progress)
            return many.generate_many(engine, requests, progress)

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion | Sequence[Completion]],
        *,
        temperature: float = 1.0,
        lora_request: many.Lora = None,
        progress: bool | None = None,
    ) -> list[Tensor]:
        """Log-probabilities of given completions, token by token; nothing is sampled.

        All pairs go through the pages in packed batches, and a prompt that several completions share is computed once,
        up to its last full page (with `enable_prefix_caching`). It serves reference models, importance ratios and the
        comparison of rewards; a sequence classifier, whose head is not a language model's, is not paged: call such a
        reward model itself.

        Args:
            prompts: as `generate_many` takes them.
            completions: per prompt one, or a list of several. A completion is text (tokenized by itself, no special
                token added, so end it with one if it ended so) or token ids; it may be empty.
            temperature: what logits are divided by first; 0 counts as 1. As `logprobs_mode="scaled_logprobs"` reports
                them for sampled tokens.
            lora_request: as `generate_many` takes it.
            progress: a progress bar; None shows one on a terminal.

        Returns:
            one float32 tensor `[tokens of the completion]` on the CPU per pair, in order.

        Raises:
            ValueError, TypeError, FileNotFoundError: a bad prompt, completion, temperature or adapter, before any work
                starts.
            RuntimeError: the model's logits are not finite, another thread aborted the work, or this one has paused
                the engine.
        """
        return score(self.engine, prompts, completions, temperature, progress, lora_request)

    def stream(
        self, prompt: Prompt, sampling: many.Sampling = None, *, lora_request: LoRARequest | None = None
    ) -> Iterator[str]:
        """The text of one sample, piece by piece as it is generated. The pieces joined are the final text.

        Leaving the loop early aborts the request.

        Raises:
            ValueError, TypeError, FileNotFoundError: a bad prompt, parameter or adapter, no tokenizer, or n > 1; raised
                by the call itself.
        """
        engine = self.engine
        lm = causal_lm(self)
        requests = many.make_requests(engine, lm, [prompt], sampling, RequestOutputKind.DELTA, lora_request)
        if requests[0].sampling.n > 1:
            raise ValueError(f"stream() follows one sample, got n={requests[0].sampling.n}")
        if engine.intake.tokenizer is None:
            raise ValueError("stream() yields text and needs a tokenizer: give one with wrap(model, tokenizer=...)")
        return many.stream_text(engine, requests[0])

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, of a model that `hf_paged.load` has not read from a quantised checkpoint.

        Raises:
            ValueError: it has layers in a form that no checkpoint format has; adapters alone can be saved.
        """
        adapters = getattr(self, "_hf_peft_config_loaded", False)  # by `add_adapter`: those are what is written
        if not adapters and any(isinstance(module, QuantizedLinear) for module in causal_lm(self).modules()):
            raise ValueError(
                f"this {type(self).__name__} has quantised layers in a form that nobody could load again: keep the "
                "checkpoint that it was read from, or load that with quantization=None to save it dequantised"
            )
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def _state(self) -> PagedState:
        state = self.__dict__.get("_hf_paged")
        if state is None:  # a class of one's own that was never wrapped
            state = self.__dict__["_hf_paged"] = PagedState(EngineConfig())
        return state

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class that `wrap` makes has no name to be found by: copies and pickles name the original and wrap again.
        reduced = super().__reduce_ex__(protocol)
        original = getattr(type(self), "_hf_paged_original", None)
        if original is None:
            return reduced
        wrapper = isinstance(self, _WrapperMixin)
        return (_new_paged, (original, wrapper), *reduced[2:])


class _WrapperMixin(PagedGenerationMixin):
    """For a wrapper around a causal LM (PEFT, DDP, `torch.compile`): what it does not do itself, the model inside
    does."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As the wrapped model's `generate`."""
        own = getattr(super(PagedSampling, self), "generate", None)
        return (own or causal_lm(self).generate)(*args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As the wrapper's `save_pretrained`, which for PEFT writes the adapters alone, or the wrapped model's."""
        own = getattr(super(PagedGenerationMixin, self), "save_pretrained", None)
        return (own or causal_lm(self).save_pretrained)(*args, **kwargs)


@functools.cache
def _paged_class(original: type, wrapper: bool) -> type:
    """The class of a wrapped `original`, under the same name: that name is what `save_pretrained` writes."""
    mixin = _WrapperMixin if wrapper else PagedGenerationMixin
    names = ("__module__", "__qualname__", "__doc__")
    members = {name: getattr(original, name) for name in names} | {"_hf_paged_original": original}
    return type(original.__name__, (mixin, original), members)


def _new_paged(original: type, wrapper: bool) -> Any:
    paged: Any = _paged_class(original, wrapper)
    return paged.__new__(paged)
