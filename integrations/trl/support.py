"""Which trainers and settings can be served, said before any work starts; how to build an engine beside training."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from hf_paged.config import EngineConfig
from hf_paged.model.introspect import causal_lm, refuse, why_unpageable

logger = logging.getLogger(__name__)

SUPPORTED = ("GRPOTrainer", "RLOOTrainer", "DistillationTrainer")

ACTIVATIONS_SHARE = 0.1
"""Of a GPU's memory, kept free of the page pool for whatever training holds on to beside its weights' companions."""


def check_trainer(trainer: Any) -> None:
    """Raises `TypeError` or `ValueError` for a trainer that cannot be attached to; the message says what to do."""
    names = {base.__name__ for base in type(trainer).__mro__}
    if not names.intersection(SUPPORTED):
        raise TypeError(f"attach() takes TRL's {', '.join(SUPPORTED)}, got {type(trainer).__name__}")
    args = trainer.args
    refuse_vllm(args)
    if getattr(args, "vllm_structured_outputs_regex", None):
        raise ValueError("vllm_structured_outputs_regex is vLLM's own and cannot be applied: leave it out")
    if distributed_type(trainer) == "FSDP" and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1:
        raise ValueError(
            "FSDP 1 gathers parameters anew in every forward, in lock step over all ranks: set fsdp_version to 2"
        )
    if is_zero3(trainer) and not args.ds3_gather_for_generation:
        raise ValueError(
            "ds3_gather_for_generation=False leaves the parameters in pieces, and a rollout needs whole ones: "
            "leave it out, or use ZeRO-2"
        )
    if reason := why_unpageable(trainer.model):
        raise refuse(trainer.model, reason)


def refuse_vllm(args: Any) -> None:
    """Raises `ValueError` for a trainer's configuration that asks for vLLM."""
    if getattr(args, "use_vllm", False):
        raise ValueError("the trainer is to use vLLM: build it with use_vllm=False, hf_paged takes vLLM's place")


def distributed_type(trainer: Any) -> str:
    """accelerate's name for how training is distributed: "NO", "MULTI_GPU", "FSDP", "DEEPSPEED"..."""
    return str(trainer.accelerator.distributed_type.value)


def is_sharded(trainer: Any) -> bool:
    """Whether a strategy owns the parameters' memory."""
    return distributed_type(trainer) in ("FSDP", "DEEPSPEED")


def autocast_dtype(trainer: Any) -> torch.dtype | None:
    """What the trainer's autocast computes in, if it trains under one."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(str(trainer.accelerator.mixed_precision))


def is_zero3(trainer: Any) -> bool:
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3


def engine_config(trainer: Any, config: EngineConfig, options: dict[str, Any]) -> EngineConfig:
    """`config` with `options`. What neither sets suits training: an engine that leaves room for it, and parameters
    where a sharding optimizer expects them.

    Raises:
        ValueError, TypeError: an option that does not exist, or makes no sense here.
    """
    kind, device = distributed_type(trainer), trainer.accelerator.device
    suited: dict[str, Any] = {}
    if is_sharded(trainer):
        suited["fuse_linear"] = False  # their parameters are views of memory that they own
    if kind == "FSDP":
        suited |= {"compile": "off", "cuda_graphs": False}  # its hooks run in every layer
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        share = 1.0 - ACTIVATIONS_SHARE - training_bytes(trainer.model) / total
        suited["gpu_memory_utilization"] = max(share, 0.3)
    usual = EngineConfig()
    unset = {name: value for name, value in suited.items() if getattr(config, name) == getattr(usual, name)}
    chosen = config.with_changes(**(unset | options))
    if "fuse_linear" in suited and chosen.fuse_linear:
        raise ValueError(f"fuse_linear=True would move parameters out of memory that {kind} owns: leave it out")
    return chosen


def training_bytes(model: nn.Module) -> int:
    """Bytes that gradients and two optimizer states (Adam's) take beside the weights, for what is trained."""
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return sum(3 * parameter.numel() * parameter.element_size() for parameter in trained)


def warn_about_dropout(trainer: Any) -> None:
    """A rollout is sampled without dropout and scored with it, so that the two differ; says so."""
    active = sorted(
        name for name, module in trainer.model.named_modules() if isinstance(module, nn.Dropout) and module.p > 0
    )
    config = causal_lm(trainer.model).config.get_text_config()
    if getattr(config, "attention_dropout", 0.0):
        active.append("attention_dropout")
    if active:
        logger.warning(
            "the model trains with dropout (%s%s): the trainer scores completions with it, rollouts are sampled "
            "without, and their log-probabilities will differ. Set lora_dropout=0.0, or disable_dropout=True in the "
            "trainer's config",
            active[0],
            f" and {len(active) - 1} more" if len(active) > 1 else "",
        )
