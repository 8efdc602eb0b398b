"""Executor: computes scheduled batches. The engine knows nothing else of tensors, so a fake one makes a simulator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from hf_paged.attention.torch_backend import TorchBackend
from hf_paged.cache.storage import KVStorage, choose_num_pages
from hf_paged.config import EngineConfig
from hf_paged.engine.batch import Batch, Chunk
from hf_paged.engine.request import Request
from hf_paged.model.inputs import InputBuilder
from hf_paged.model.introspect import causal_lm, inspect_model, structure
from hf_paged.model.runner import ModelRunner
from hf_paged.model.selfcheck import check_model
from hf_paged.model.weights import WeightWatch
from hf_paged.sampling.logprobs import TokenLogprobs, token_logprobs
from hf_paged.sampling.sampler import Sampler

CPU_PAGE_SIZE, GPU_PAGE_SIZE = 32, 16


@dataclass(slots=True)
class StepResult:
    """What a step computed."""

    tokens: list[int]
    """Per sequence of `Batch.sampled()`."""
    logprobs: list[TokenLogprobs | None] | None = None
    """Likewise; None when nobody asked."""
    errors: dict[int, Exception] = field(default_factory=dict)
    """By place in `Batch.sampled()`: sequences whose sampling failed; their tokens mean nothing."""
    prompt_logprobs: list[list[TokenLogprobs]] | None = None
    """Per chunk, for the prompt tokens that follow its rows; None when nobody asked."""


class Executor(Protocol):
    """Computes batches in the order they were launched."""

    def launch(self, batch: Batch) -> Callable[[], StepResult]:
        """Starts a step. What it returns waits for its results; steps land in the order of their launch."""

    def looks_ahead(self, request: Request) -> bool:
        """Whether the step after one that samples for this request may be launched before its token is known here."""

    def weights_changed(self) -> bool:
        """Whether the weights differ from those at the last call; True at the first. May read all of them."""

    def optimizer_stepped(self) -> bool:
        """Whether an optimizer took a step since the last look. Costs nothing."""

    def wipe(self, pages: list[int]) -> None:
        """Overwrites pages whose contents are not finite numbers."""


class ModelExecutor:
    """The real one: a transformers model, its page storage, and a sampler.

    Raises:
        UnsupportedModelError: the model cannot be paged.
        ValueError: the memory for the pool does not hold a page, or max_model_len exceeds what the model can do.
    """

    def __init__(self, model: nn.Module, config: EngineConfig) -> None:
        self.layout = layout = inspect_model(model)
        backend = TorchBackend(layout.device)
        check_model(model, layout, backend)
        self.max_model_len = config.max_model_len or layout.max_model_len
        if self.max_model_len > layout.max_model_len:
            raise ValueError(
                f"max_model_len ({self.max_model_len}) exceeds the model's own limit of {layout.max_model_len}"
            )
        self.page_size = config.page_size or (CPU_PAGE_SIZE if layout.device.type == "cpu" else GPU_PAGE_SIZE)
        num_pages = choose_num_pages(
            config, layout.layers, self.page_size, layout.kv_dtype, layout.device, self.max_model_len
        )
        self.storage = KVStorage(
            layout.layers, num_pages, self.page_size, dtype=layout.kv_dtype, device=layout.device, layout=backend.layout
        )
        self._inputs = InputBuilder(self.page_size, config.max_num_seqs, -(-self.max_model_len // self.page_size) + 1)
        self._runner = ModelRunner(model, layout, backend, self.storage)
        processed = config.logprobs_mode == "processed_logprobs"
        self._sampler = Sampler(layout.vocab_size, layout.device, processed_logprobs=processed)
        self._lm = causal_lm(model)
        self._watch = WeightWatch(self._lm)

    def execute(self, batch: Batch) -> StepResult:
        inputs = self._inputs.build(batch)
        logits = self._runner.forward(inputs, batch.copies)
        prompt_logprobs = None
        if any(first < end for first, end in inputs.prompt_rows):
            prompt_logprobs = [
                self._prompt_logprobs(chunk, logits[first:end])
                for chunk, (first, end) in zip(batch.chunks, inputs.prompt_rows, strict=True)
            ]
        sequences = batch.sampled()
        if not sequences:
            return StepResult([], prompt_logprobs=prompt_logprobs)
        if inputs.sample_rows != list(range(len(logits))):
            logits = logits[torch.tensor(inputs.sample_rows, device=logits.device)]
        sampled = self._sampler.sample(logits, sequences)
        return StepResult(sampled.tokens, sampled.logprobs, sampled.errors, prompt_logprobs)

    def _prompt_logprobs(self, chunk: Chunk, logits: torch.Tensor) -> list[TokenLogprobs]:
        sequence, sampling = chunk.sequence, chunk.sequence.request.sampling
        following = sequence.tokens[chunk.start + 1 : min(chunk.start + chunk.length + 1, sequence.num_prompt)]
        if not len(logits) or not following:
            return []
        counts = [sampling.prompt_logprobs or 0] * len(following)
        return token_logprobs(logits[: len(following)].float(), following, counts)

    def weights_changed(self) -> bool:
        return self._watch.changed()

    def optimizer_stepped(self) -> bool:
        return self._watch.optimizer_stepped()

    def wipe(self, pages: list[int]) -> None:
        self.storage.zero_pages(pages)

    def outdated(self) -> bool:
        """Whether the model moved, or layers were replaced, so that everything here must be made anew."""
        return structure(self._lm, self.layout.modules) != self.layout.structure
