"""What `LLM(...)` and `hf-paged serve` take, in vLLM's words, and a wrapped model made of it."""

from __future__ import annotations

import difflib
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_paged.config import EngineConfig
from hf_paged.distributed.groups import check_expert_parallel, join
from hf_paged.distributed.launch import Ranks, load_on_ranks
from hf_paged.quantization.load import load
from hf_paged.wrap import wrap

if TYPE_CHECKING:
    from hf_paged.llm.replicas import ReplicatedModel

logger = logging.getLogger(__name__)

PLAIN: dict[str, tuple[Any, ...]] = {
    "swap_space": (),
    "disable_log_stats": (),
    "fully_sharded_loras": (False, None),
    "lora_dtype": (None, "auto"),
    "lora_extra_vocab_size": (),
    "enable_lora_bias": (False, None),
    "default_mm_loras": (None,),
    "compilation_config": (),
    "max_seq_len_to_capture": (),
    "distributed_executor_backend": (),
    "disable_custom_all_reduce": (),
    "enable_chunked_prefill": (True, None),
    "max_num_partial_prefills": (),
    "worker_cls": (),
    "config_format": (),
    "ignore_patterns": (),
    "download_dir": (None,),
    "use_v2_block_manager": (),
    "preemption_mode": (),
    "scheduling_policy": (),
    "scheduler_cls": (),
    "enable_sleep_mode": (),
    "disable_sliding_window": (False,),
    "disable_cascade_attn": (),
    "calculate_kv_scales": (),
    "safetensors_load_strategy": (),
    "model_impl": (),
    "task": (None, "auto", "generate"),
    "runner": (None, "auto", "generate"),
    "convert": (None, "auto", "none"),
    "cpu_offload_gb": (0, None),
    "limit_mm_per_prompt": (None,),
    "mm_processor_kwargs": (None,),
    "allowed_local_media_path": (None, ""),
    "override_pooler_config": (None,),
    "logits_processors": (None, []),
    "tokenizer_pool_size": (),
    "allow_deprecated_quantization": (),
    "max_logprobs": (),
    "disable_async_output_proc": (),
    "guided_decoding_backend": (),
    "structured_outputs_config": (),
    "data_parallel_backend": ("mp", None),
    "data_parallel_rank": (None,),
    "data_parallel_size_local": (None,),
    "data_parallel_address": (None,),
    "data_parallel_rpc_port": (),
}
"""vLLM's arguments that have nothing to set here, with the values that can be had; () is any."""

PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


@dataclass
class EngineArgs:
    """A model and how to serve it; names and meanings are vLLM's. What is None is chosen, as `EngineConfig` says.

    Raises:
        ValueError, TypeError: a value makes no sense; the message names the field.
    """

    model: Any
    """A folder or the name of a checkpoint, a GGUF file, or a transformers model, which is wrapped in place."""
    tokenizer: Any = None
    """A tokenizer, or the path or name of one. None: the one beside the model."""
    tokenizer_mode: str = "auto"
    """"auto", or "slow" for the one that transformers wrote in Python."""
    skip_tokenizer_init: bool = False
    """No tokenizer: prompts are token ids, and outputs have no text."""
    tokenizer_revision: str | None = None
    trust_remote_code: bool = False
    revision: str | None = None
    hf_token: str | bool | None = None
    hf_overrides: Mapping[str, Any] | None = None
    """Fields of the model's configuration to change."""
    dtype: Any = "auto"
    """"auto" is the checkpoint's."""
    quantization: str | None = None
    """None keeps what the checkpoint is; "fp8" also quantises one that is not (see `hf_paged.load`)."""
    load_format: str = "auto"
    device: Any = None
    generation_config: str = "auto"
    """"auto": the model's own says how to sample by default; "vllm": `SamplingParams`' defaults do."""
    chat_template: str | None = None
    """A Jinja template or a file of one. None: the tokenizer's."""
    max_model_len: int | str | None = None
    block_size: int | None = None
    """Tokens per page."""
    num_gpu_blocks_override: int | None = None
    """Pages in the pool."""
    enforce_eager: bool = False
    """No CUDA graphs and nothing compiled."""
    seed: int | None = 0
    """Makes requests without seeds of their own repeatable, as long as they come in the same order."""
    spec_method: str | None = None
    spec_model: Any = None
    spec_tokens: int | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    """Replicas, each of which has an engine and, with `tensor_parallel_size`, so many GPUs."""
    enable_expert_parallel: bool = False
    """The ranks of `tensor_parallel_size` hold whole experts of a mixture each, not a part of every one."""
    engine: dict[str, Any] = field(default_factory=dict)
    """Fields of `EngineConfig` by their own names: gpu_memory_utilization, max_num_seqs, kv_cache_dtype, ..."""

    @classmethod
    def parse(cls, model: Any, options: Mapping[str, Any]) -> EngineArgs:
        """Out of keyword arguments. What has nothing to set here is logged and left out.

        Raises:
            TypeError: a name that nobody knows; the message suggests the nearest one.
            ValueError: something that cannot be had.
        """
        own = {f.name for f in fields(cls)} - {"engine"}
        engine_fields = {f.name for f in fields(EngineConfig)}
        given: dict[str, Any] = {"model": model, "engine": {}}
        for name, value in options.items():
            if name in own:
                given[name] = value
            elif name in engine_fields:
                given["engine"][name] = value
            elif name in PLAIN:
                _say_unused(name, value)
            else:
                near = difflib.get_close_matches(name, own | engine_fields | set(PLAIN), n=1)
                hint = f"Did you mean {near[0]!r}?" if near else "EngineArgs and EngineConfig list what there is."
                raise TypeError(f"there is no option {name!r}. {hint}")
        return cls(**given)

    def __post_init__(self) -> None:
        check_parallel(self)
        if self.tokenizer_mode not in ("auto", "hf", "slow"):
            raise ValueError(f'tokenizer_mode must be "auto" or "slow", got {self.tokenizer_mode!r}')
        if self.load_format not in ("auto", "hf", "safetensors", "pt", "gguf"):
            raise ValueError(f'load_format must be "auto", got {self.load_format!r}')
        if self.generation_config not in ("auto", "vllm"):
            raise ValueError(f'generation_config must be "auto" or "vllm", got {self.generation_config!r}')
        if self.skip_tokenizer_init and self.tokenizer is not None:
            raise ValueError("skip_tokenizer_init=True and a tokenizer contradict each other: give one of them")
        self.engine_config()

    def engine_config(self) -> EngineConfig:
        """The engine's part of it."""
        changes: dict[str, Any] = {"seed": self.seed}
        if self.max_model_len not in (None, "auto", -1):
            changes["max_model_len"] = self.max_model_len
        if self.block_size is not None:
            changes["page_size"] = self.block_size
        if self.num_gpu_blocks_override is not None:
            changes["num_pages"] = self.num_gpu_blocks_override
        if self.enforce_eager:
            changes |= {"cuda_graphs": False, "compile": "off"}
        if self.spec_method is not None or self.spec_model is not None:
            drafting = {
                "method": self.spec_method,
                "model": self.spec_model,
                "num_speculative_tokens": self.spec_tokens,
            }
            changes["speculative_config"] = {name: value for name, value in drafting.items() if value is not None}
        elif self.spec_tokens is not None:
            raise ValueError("spec_tokens says how much is drafted: give spec_method or spec_model with it")
        engine = {name: value for name, value in self.engine.items() if value is not None}
        if twice := sorted(changes.keys() & engine.keys()):
            raise ValueError(f"given twice, by vLLM's name and by EngineConfig's: {', '.join(twice)}")
        if engine.get("kv_cache_dtype") in ("float16", "bfloat16", "float32"):
            raise ValueError('kv_cache_dtype must be "auto" (the model\'s own) or "fp8"')
        return EngineConfig().with_changes(**changes, **engine)

    def load(self, worker_extension_cls: type | str | None = None) -> tuple[Any, Ranks | ReplicatedModel | None]:
        """The model, wrapped, and where it is spread over processes of its own, what stops these. With
        `data_parallel_size` what stands for it: a `ReplicatedModel`.

        Args:
            worker_extension_cls: of the replicas' workers, where there are any.

        Raises:
            FileNotFoundError, ValueError, UnsupportedModelError: as `hf_paged.load` and `hf_paged.wrap`.
        """
        config = self.engine_config()
        if isinstance(self.model, nn.Module):
            loaded = ("revision", "hf_overrides", "quantization", "device")
            given = [name for name in loaded if getattr(self, name) is not None]
            given += [name for name in PARALLEL if getattr(self, name) > 1]
            if given or self.dtype != "auto":
                raise ValueError(f"the model is loaded already: {(given or ['dtype'])[0]} has nothing to act on")
            return wrap(self.model, config, tokenizer=self._load_tokenizer()), None
        if self.data_parallel_size > 1 and "RANK" not in os.environ:
            from hf_paged.llm.replicas import load_replicas

            replicated = load_replicas(self, worker_extension_cls)
            return replicated, replicated
        dtype = {"auto": None, "half": "float16", "float": "float32"}.get(self.dtype, self.dtype)
        common: dict[str, Any] = {
            "config": config, "tokenizer": self._load_tokenizer(), "revision": self.revision, "token": self.hf_token,
        }  # fmt: skip
        quantization, trusted = self.quantization or "auto", self.trust_remote_code
        device = self.device
        if self.data_parallel_size > 1:
            _check_world(self)
            if self.tensor_parallel_size * self.pipeline_parallel_size == 1:
                device = join(1, device).device
        if self.tensor_parallel_size * self.pipeline_parallel_size > 1:
            options = dict(self.hf_overrides or {}) | ({"trust_remote_code": True} if trusted else {})
            return load_on_ranks(
                self.model, self.tensor_parallel_size, device=self.device, dtype=dtype, quantization=quantization,
                options=options, pipeline_parallel_size=self.pipeline_parallel_size,
                enable_expert_parallel=self.enable_expert_parallel, **common,
            )  # fmt: skip
        model = load(
            self.model, dtype, quantization, device, trust_remote_code=trusted, hf_overrides=self.hf_overrides,
            **common,
        )  # fmt: skip
        return model, None

    def _load_tokenizer(self) -> Any:
        if self.skip_tokenizer_init:
            return False
        plain = self.tokenizer_mode != "slow" and not self.trust_remote_code and self.tokenizer_revision is None
        name = self.tokenizer
        if name is None and (plain or isinstance(self.model, nn.Module)):
            return None  # found beside the model
        if name is not None and not isinstance(name, str):
            return name
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            name or self.model,
            revision=self.tokenizer_revision or (None if name else self.revision) or "main",
            token=self.hf_token,
            use_fast=self.tokenizer_mode != "slow",
            trust_remote_code=self.trust_remote_code,
        )


def _check_world(args: EngineArgs) -> None:
    world, wanted = int(os.environ.get("WORLD_SIZE", 1)), math.prod(getattr(args, name) for name in PARALLEL)
    if world != wanted:
        raise ValueError(
            f"data_parallel_size={args.data_parallel_size} replicas of {wanted // args.data_parallel_size} processes "
            f"need {wanted}, and {world} were started: run torchrun with --nproc-per-node {wanted}"
        )


def check_parallel(args: EngineArgs) -> None:
    """Raises ValueError for sizes that make no sense."""
    for name in PARALLEL:
        size = getattr(args, name)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")
    check_expert_parallel(args.enable_expert_parallel, args.tensor_parallel_size)


def _say_unused(name: str, value: Any) -> None:
    possible = PLAIN[name]
    if possible and not any(value == choice for choice in possible):
        raise ValueError(f"{name}={value!r} cannot be had here: leave it out")
    if not possible and value is not None:
        logger.info("%s has nothing to set here and is left out", name)
