"""PagedState: what wrapping adds to a model, and the engine once there is one."""

from __future__ import annotations

import functools
import logging
import threading
from collections import ChainMap
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_paged.config import EngineConfig
from hf_paged.distributed.groups import TensorParallel
from hf_paged.distributed.lockstep import (
    LeadingEngine,
    ParallelEngine,
    ParallelExecutor,
    common_seeds,
    read_for_all,
)
from hf_paged.distributed.shard import parallel_of
from hf_paged.engine.engine import Engine
from hf_paged.engine.intake import Intake
from hf_paged.engine.model_executor import ModelExecutor
from hf_paged.engine.scheduler import Scheduler
from hf_paged.lora.cache import AdapterCache
from hf_paged.lora.layers import LoraLayers
from hf_paged.model.introspect import causal_lm
from hf_paged.speculative.config import SpeculativeConfig
from hf_paged.speculative.drafter import Drafter
from hf_paged.speculative.speculator import Speculator

logger = logging.getLogger(__name__)

PROMPT_LOGITS_BYTES = 512 << 20
"""Of logits of prompts that a step may hold, where log-probabilities of their tokens are wanted."""


class PagedState:
    """Lives in a wrapped model's `__dict__`. Copies and pickles carry the configuration, never the engine."""

    def __init__(self, config: EngineConfig, tokenizer: Any = None) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._assistant: SpeculativeConfig | None = None
        """A draft model that a call of `generate` brought along."""
        self.said: set[str] = set()
        """Reasons for leaving work to the stock path that were logged already."""

    def engine(self, model: nn.Module, speculation: SpeculativeConfig | None = None) -> Engine:
        """The model's engine, made at the first call, and again when the model has moved to another device or dtype.

        Args:
            speculation: what it must be able to draft with, beside what the configuration says. A draft model that
                it does not have makes it anew.

        Raises:
            UnsupportedModelError: the model cannot be paged.
            ValueError: the draft model does not go with the model, or with one that the configuration names.
        """
        with self._lock:
            if speculation is not None and speculation.model is not None:
                self._take_assistant(model, speculation)
            if self._engine is not None and self._outdated(self._engine):
                self._engine.close()
                self._engine = None
            if self._engine is None:
                assistant, self._assistant = self._assistant, None  # one that does not fit is not tried again
                with torch.inference_mode(False):  # the pools outlive the caller's mode
                    self._engine = build_engine(model, self.config, self._find_tokenizer(model), assistant)
                self._assistant = assistant
            return self._engine

    @property
    def made(self) -> Engine | None:
        """The engine, if there is one by now."""
        return self._engine

    def _take_assistant(self, model: nn.Module, speculation: SpeculativeConfig) -> None:
        own = self.config.speculation
        if speculation in (own, self._assistant):
            return
        if parallel_of(causal_lm(model)) is not None:  # seen before the engine goes, which no rank can make anew alone
            raise ValueError("an assistant model cannot be had with tensor or pipeline parallelism yet")
        if own is not None and own.model is not None:
            raise ValueError("the model was wrapped with a draft model of its own")
        if self._engine is not None and self._engine.has_unfinished():
            raise ValueError("an assistant model needs an engine of its own, and this one has unfinished requests")
        if self._engine is not None:
            self._engine.close()
        self._engine, self._assistant = None, speculation

    def drop_engine(self) -> None:
        """Aborts what is unfinished and gives the engine's memory back; the next generation makes a new engine."""
        with self._lock:
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()  # waits for a step of another thread, which may itself ask for the lock

    def _outdated(self, engine: Engine) -> bool:
        executor = engine.executor
        return isinstance(executor, ModelExecutor) and executor.outdated() and not engine.has_unfinished()

    def _find_tokenizer(self, model: nn.Module) -> Any:
        if self.tokenizer is None:
            self.tokenizer = find_tokenizer(getattr(causal_lm(model).config, "_name_or_path", ""))
        return None if self.tokenizer is False else self.tokenizer

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedState:
        return PagedState(self.config, self.tokenizer)

    def __reduce__(self) -> tuple[Any, ...]:
        return PagedState, (self.config, self.tokenizer)


def build_engine(
    model: nn.Module, config: EngineConfig, tokenizer: Any = None, assistant: SpeculativeConfig | None = None
) -> Engine:
    """An engine for a model, its page pool included.

    Args:
        assistant: a draft model for requests that ask for it, where the configuration has none.
    """
    drafting = assistant or config.speculation
    parallel = parallel_of(causal_lm(model))
    executor = (
        ModelExecutor(model, config, drafting)
        if parallel is None
        else ParallelExecutor(model, config, drafting, parallel)
    )
    num_pages = executor.num_pages
    scheduler = Scheduler(
        num_pages=num_pages,
        page_size=executor.page_size,
        max_num_seqs=executor.max_num_seqs,
        max_num_batched_tokens=executor.max_num_batched_tokens,
        enable_prefix_caching=config.enable_prefix_caching,
        micro_batches=executor.micro_batches,
        max_prompt_logits=max(
            1, PROMPT_LOGITS_BYTES // (executor.layout.vocab_size * executor.layout.kv_dtype.itemsize)
        ),
        max_adapters=config.max_loras,
    )
    intake = Intake(
        tokenizer,
        vocab_size=executor.layout.vocab_size,
        max_model_len=executor.max_model_len,
        pool_tokens=num_pages * executor.page_size,
        eos_token_ids=functools.partial(_eos_token_ids, causal_lm(model), tokenizer),
        logprobs_mode=config.logprobs_mode,
        speculation=config.speculation,
        seed=config.seed,
        draw_seed=None if parallel is None or config.seed is not None else common_seeds(parallel),
        adapters=None if executor.adapters is None else _adapter_cache(executor.adapters.layers, config, parallel),
    )
    drafters: dict[SpeculativeConfig, Drafter] = {}
    if drafting is not None and executor.drafter is not None:
        drafters[drafting] = executor.drafter
    verify_rows = executor.max_verify_rows if executor.micro_batches == 1 else 0  # stages verify nothing yet
    # Forms reach other ranks without the tokenizer that says what is forced.
    jumps = parallel is None and not drafters and not config.exact
    speculator = Speculator(verify_rows, drafters, steady=parallel is not None, jumps=jumps)
    if isinstance(executor, ParallelExecutor):
        leads = executor.parallel.led and executor.parallel.link.rank == 0
        return (LeadingEngine if leads else ParallelEngine)(executor, scheduler, intake, speculator)
    return Engine(executor, scheduler, intake, speculator)


def _adapter_cache(layers: LoraLayers, config: EngineConfig, parallel: TensorParallel | None) -> AdapterCache:
    targets = layers.targets
    if parallel is not None:  # a stage has some of the layers, and an adapter is for all
        targets = dict(ChainMap(*parallel.link.exchange("what can be adapted", targets)))
    return AdapterCache(
        targets,
        max_adapters=config.max_cpu_loras or config.max_loras,
        max_rank=config.max_lora_rank,
        dtype=layers.dtype,
        pin=layers.device.type == "cuda",
        share=None if parallel is None or parallel.led else read_for_all(parallel),
    )


def find_tokenizer(name_or_path: str) -> Any:
    """The tokenizer that lies beside a model, by its name or path, in a GGUF file too; None when there is none."""
    if not name_or_path:
        return None
    from transformers import AutoTokenizer

    options = {}
    ggufs = list(Path(name_or_path).glob("*.gguf")) if Path(name_or_path).is_dir() else []
    if len(ggufs) == 1:
        options["gguf_file"] = ggufs[0].name
    try:
        return AutoTokenizer.from_pretrained(name_or_path, **options)
    except (
        Exception
    ) as error:  # whatever is wrong with it, prompts of token ids still work, and text says what it needs
        logger.info("no tokenizer found for %r (%s): prompts must be token ids", name_or_path, error)
        return None


def _eos_token_ids(lm: Any, tokenizer: Any) -> frozenset[int]:
    config = getattr(lm, "generation_config", None)
    sources = [lm.config.get_text_config(), tokenizer] if config is None else [config]
    for source in sources:
        eos = getattr(source, "eos_token_id", None)
        if eos is not None:
            return frozenset([int(eos)] if isinstance(eos, int) else [int(e) for e in eos])
    return frozenset()
