"""ModelExecutor: computes batches with a transformers model. Puts the rooms `model`, `attention` and `sampling` to
work."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_paged.attention.select import choose_backend
from hf_paged.cache.storage import KVStorage, choose_num_pages
from hf_paged.config import EngineConfig
from hf_paged.engine.batch import Batch, Chunk
from hf_paged.engine.executor import Executor, StepResult
from hf_paged.engine.request import Request, Sequence
from hf_paged.model.compile import CompiledLayers, decoder_layers
from hf_paged.model.fuse import FusedLinears, find_groups
from hf_paged.model.graphs import CaptureFailed, DecodeGraphs
from hf_paged.model.inputs import InputBuilder, StepInputs
from hf_paged.model.introspect import causal_lm, dry_forward, inspect_model, structure
from hf_paged.model.linear import LeanLinears
from hf_paged.model.memory import measure_activations
from hf_paged.model.runner import ModelRunner
from hf_paged.model.selfcheck import check_model
from hf_paged.model.weights import WeightWatch
from hf_paged.sampling.device import DeviceSampler, Landing
from hf_paged.sampling.logprobs import TokenLogprobs, token_logprobs
from hf_paged.sampling.sampler import Sampler

logger = logging.getLogger(__name__)

CPU_PAGE_SIZE, GPU_PAGE_SIZE = 32, 16
TOKEN_BUDGET, LARGE_TOKEN_BUDGET = 2048, 16384
"""Tokens per step; the larger on GPUs of 70 GiB and more. What a step of prefill costs the host is then well hidden
behind the device's work, for small models too."""


class ModelExecutor(Executor):
    """A transformers model, its page storage, and a sampler.

    On a GPU a step is only enqueued by `launch`: tokens are sampled on the device, where the next step finds them, and
    steps of decodes alone are CUDA graphs. Requests that need the host to sample (a penalty, a processor, ...) are
    sampled before `launch` returns.

    Raises:
        UnsupportedModelError: the model cannot be paged.
        ValueError: the memory for the pool does not hold a page, or max_model_len exceeds what the model can do.
    """

    def __init__(self, model: nn.Module, config: EngineConfig) -> None:
        start = time.monotonic()
        self._model, self._lm, self._config = model, causal_lm(model), config
        self.layout = layout = inspect_model(model)
        device = layout.device
        on_gpu = device.type == "cuda"
        self.max_model_len = config.max_model_len or layout.max_model_len
        if self.max_model_len > layout.max_model_len:
            raise ValueError(
                f"max_model_len ({self.max_model_len}) exceeds the model's own limit of {layout.max_model_len}"
            )
        self.page_size = config.page_size or (GPU_PAGE_SIZE if on_gpu else CPU_PAGE_SIZE)
        self.max_num_batched_tokens = config.max_num_batched_tokens or max(_token_budget(device), config.max_num_seqs)
        self._kv_dtype = torch.float8_e4m3fn if config.kv_cache_dtype != "auto" else layout.kv_dtype
        self._backend = choose_backend(config.attention_backend, device, layout.kv_dtype, self._kv_dtype, layout.layers)
        self.storage: KVStorage | None = None
        self._stream: torch.cuda.Stream | None = None
        """The stream of the last work: whatever comes next comes after it."""
        self._previous: Tensor | None = None
        """int64, the tokens that the last launched step sampled, on the device."""
        self._watch = WeightWatch(self._lm)
        self._fuses = config.fuse_linear or (config.fuse_linear is None and on_gpu)
        self._fused: FusedLinears | None = None
        try:
            self._build(on_gpu)
        except BaseException:
            self.close()
            raise
        logger.info("engine ready in %.1f s", time.monotonic() - start)

    def _build(self, on_gpu: bool) -> None:
        model, layout, config, device = self._model, self.layout, self._config, self.layout.device
        self._fused = self._fuse()
        self._lean = LeanLinears(self._lm) if on_gpu else None
        check_model(model, layout, self._backend, fused=self._fused, lean=self._lean, kv_dtype=self._kv_dtype)
        self._compiled: CompiledLayers | None = None
        if config.compile == "layers" or (config.compile is None and on_gpu):
            self._compiled = CompiledLayers(decoder_layers(self._lm, layout.modules))
        self._captures = on_gpu and config.cuda_graphs and hasattr(self._backend, "capture_decode")

        activations = 0
        if on_gpu and config.num_pages is None and config.kv_cache_memory_bytes is None:
            activations = measure_activations(
                model, layout, self._backend, self.max_num_batched_tokens, config.max_num_seqs
            )
        self.num_pages = choose_num_pages(
            config, layout.layers, self.page_size, self._kv_dtype, device, self.max_model_len, activations
        )
        self._max_pages = -(-self.max_model_len // self.page_size) + 1
        self._inputs = InputBuilder(self.page_size, config.max_num_seqs, self._max_pages)
        self._sampler = Sampler(layout.vocab_size, device)
        self._device_sampler = DeviceSampler(config.max_num_seqs, device) if on_gpu else None
        self._looks_ahead = on_gpu if config.async_scheduling is None else config.async_scheduling
        self._signs = self._read_signs()
        self._allocate()

    def _fuse(self) -> FusedLinears | None:
        if not self._fuses:
            return None
        groups = find_groups(self._lm, lambda: dry_forward(self._lm))
        return FusedLinears(groups) if groups else None

    def _allocate(self) -> None:
        """The pools, and what is bound to their addresses."""
        layout = self.layout
        with self._in_order():
            storage = KVStorage(
                layout.layers,
                self.num_pages,
                self.page_size,
                dtype=self._kv_dtype,
                device=layout.device,
                layout=self._backend.layout,
            )
            self._runner = ModelRunner(
                self._model,
                layout,
                self._backend,
                storage,
                fused=self._fused,
                lean=self._lean,
                compiled=self._compiled,
            )
            self._graphs = self._new_graphs()
            self.storage = storage

    def _new_graphs(self) -> DecodeGraphs | None:
        if not self._captures:
            return None
        return DecodeGraphs(
            self._runner,
            self._backend,  # type: ignore[arg-type]
            self._config.max_num_seqs,
            self._max_pages,
            self.page_size,
        )

    @contextmanager
    def _in_order(self) -> Iterator[None]:
        """Around everything that is enqueued: callers may be many threads, each on a stream of its own."""
        if self.layout.device.type != "cuda":
            yield
            return
        with torch.cuda.device(self.layout.device):
            stream = torch.cuda.current_stream()
            if self._stream is not None and stream != self._stream:
                stream.wait_stream(self._stream)
                if self._previous is not None:
                    self._previous.record_stream(stream)
            self._stream = stream
            yield

    # ---- steps ---------------------------------------------------------------------------------------------

    def launch(self, batch: Batch) -> Callable[[], StepResult]:
        with self._in_order():
            return self._launch(batch)

    def _launch(self, batch: Batch) -> Callable[[], StepResult]:
        if batch.copies:
            assert self.storage is not None
            self.storage.copy_pages(batch.copies)
        if self._graphs is not None:
            writes = self._inputs.write_pages(batch)
            fits = not batch.chunks and self._graphs.holds(len(batch.decodes)) and _all_fused(batch.decodes)
            if fits and self._prepare_graph(len(batch.decodes)):
                return self._replay(self._graphs, batch, writes)
            if writes is not None and self._graphs is not None:
                self._graphs.write_pages(writes)
        return self._compute(batch)

    def looks_ahead(self, request: Request) -> bool:
        return self._looks_ahead and request.fused

    def _prepare_graph(self, count: int) -> bool:
        """Whether there is a graph for so many decodes."""
        assert self._graphs is not None
        try:
            self._graphs.prepare(count)
        except torch.OutOfMemoryError:
            logger.warning("no memory is left for a CUDA graph of %d sequences: such steps run without", count)
            self._graphs.give_up(count)
            return False
        except CaptureFailed as error:
            logger.warning("decode runs without CUDA graphs: the model cannot be captured (%s)", error)
            self._captures, self._graphs = False, None
            return False
        return True

    def _replay(self, graphs: DecodeGraphs, batch: Batch, writes: np.ndarray | None) -> Callable[[], StepResult]:
        sources = self._inputs.sources(batch)
        if sources is not None and self._previous is not graphs.tokens:
            # The step before ran without a graph: its tokens go to where graphs look for them.
            assert self._previous is not None
            pending = sources >= 0
            chosen = self._previous[self._runner.upload(sources[pending])]
            graphs.tokens[: len(chosen)] = chosen
            sources[pending] = np.arange(len(chosen))
        assert self._device_sampler is not None
        landing = graphs.launch(batch.decodes, sources, self._device_sampler.params, writes)
        self._previous = graphs.tokens
        return lambda: _result(landing, batch.decodes)

    def _compute(self, batch: Batch) -> Callable[[], StepResult]:
        inputs = self._inputs.build(batch)
        logits = self._runner.forward(inputs, self._previous)
        sequences = batch.sampled()
        prompt_logprobs = self._prompt_logprobs(batch, inputs, logits)
        if inputs.sample_rows != list(range(len(logits))):
            logits = logits[self._runner.upload(np.array(inputs.sample_rows, dtype=np.int64))]
        if sequences and self._device_sampler is not None and _all_fused(sequences):
            landing = self._device_sampler.sample(logits, sequences)
            self._previous = landing.tokens_on_device
            return lambda: _result(landing, sequences, prompt_logprobs)
        if not sequences:
            result = StepResult([], prompt_logprobs=prompt_logprobs)
        else:
            sampled = self._sampler.sample(logits, sequences)
            result = StepResult(sampled.tokens, sampled.logprobs, sampled.errors, prompt_logprobs)
        self._previous = torch.tensor(result.tokens, dtype=torch.int64, device=self.layout.device)
        return lambda: result

    def _prompt_logprobs(self, batch: Batch, inputs: StepInputs, logits: Tensor) -> list[list[TokenLogprobs]] | None:
        if not any(first < end for first, end in inputs.prompt_rows):
            return None
        return [
            _prompt_logprobs(chunk, logits[first:end])
            for chunk, (first, end) in zip(batch.chunks, inputs.prompt_rows, strict=True)
        ]

    def warm_up(self) -> None:
        if self._graphs is not None:
            with self._in_order():
                for size in self._graphs.sizes:
                    if self._graphs is not None and self._graphs.holds(size):
                        self._prepare_graph(size)

    # ---- weights and memory --------------------------------------------------------------------------------

    def _read_signs(self) -> tuple[Any, ...]:
        """What graphs and aliases depend on beside the pools."""
        kind = self.layout.device.type
        return self._watch.signs(), torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def prepare(self) -> None:
        self.wake_up()
        if self._read_signs() == self._signs:
            return
        with self._in_order():
            if self._fused is not None and not self._fused.intact():
                logger.info("parameters moved: linear layers are fused anew")
                self._watch.forget()
                self._fused.release()
                self._fused = self._runner.fused = self._fuse()
            self._graphs = self._new_graphs()
        self._signs = self._read_signs()

    def weights_changed(self) -> bool:
        return self._watch.changed()

    def optimizer_stepped(self) -> bool:
        return self._watch.optimizer_stepped()

    def wipe(self, pages: list[int]) -> None:
        if self.storage is not None:
            with self._in_order():
                self.storage.zero_pages(pages)

    def outdated(self) -> bool:
        """Whether the model moved, or layers were replaced, so that everything here must be made anew."""
        return structure(self._lm, self.layout.modules) != self.layout.structure

    def sleep(self) -> None:
        if self.storage is None:
            return
        self.storage = self._graphs = self._previous = None
        self._runner.close()
        if self.layout.device.type == "cuda":
            torch.cuda.synchronize(self.layout.device)
            torch.cuda.empty_cache()

    def wake_up(self) -> None:
        if self.storage is None:
            self._allocate()

    def close(self) -> None:
        self.sleep()
        if self._fused is not None:
            self._watch.forget()
            self._fused.release()
            self._fused = None


def _token_budget(device: torch.device) -> int:
    if device.type != "cuda":
        return TOKEN_BUDGET
    memory = torch.cuda.get_device_properties(device).total_memory
    return LARGE_TOKEN_BUDGET if memory >= 70 << 30 else LARGE_TOKEN_BUDGET // 2


def _all_fused(sequences: list[Sequence]) -> bool:
    return all(sequence.request.fused for sequence in sequences)


def _result(
    landing: Landing, sequences: list[Sequence], prompt_logprobs: list[list[TokenLogprobs]] | None = None
) -> StepResult:
    sampled = landing.wait(sequences)
    return StepResult(sampled.tokens, sampled.logprobs, sampled.errors, prompt_logprobs)


def _prompt_logprobs(chunk: Chunk, logits: Tensor) -> list[TokenLogprobs]:
    sequence, sampling = chunk.sequence, chunk.sequence.request.sampling
    following = sequence.tokens[chunk.start + 1 : min(chunk.start + chunk.length + 1, sequence.num_prompt)]
    if not len(logits) or not following:
        return []
    counts = [sampling.prompt_logprobs or 0] * len(following)
    return token_logprobs(logits[: len(following)].float(), following, counts)
