"""Exact mode for a trainer: the forwards it scores completions with compute what the engine computed."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from hf_paged.attention.select import exact_backend
from hf_paged.integrations.trl.support import distributed_type
from hf_paged.model.exact import why_inexact
from hf_paged.model.exact_forward import ExactForward, replaced_forward
from hf_paged.model.introspect import causal_lm, inspect_model


def check_exact(trainer: Any) -> None:
    """Raises `ValueError` or `ImportError` for a trainer that cannot have exact mode; the message says what to do."""
    lm, args = causal_lm(trainer.model), trainer.args
    if distributed_type(trainer) in ("FSDP", "DEEPSPEED"):
        raise _refuse(f"{distributed_type(trainer)} keeps parameters in forms that its kernels were not tried with")
    if reason := why_inexact(lm):
        raise _refuse(f"{type(lm).__name__}: {reason}")
    exact_backend(trainer.accelerator.device)
    for name in ("torch_compile", "use_liger_kernel", "cast_lm_head_to_fp32"):
        if getattr(args, name, False):
            raise _refuse(f"{name} computes the trainer's forward by other kernels: leave it out")
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in trainer.model.modules()) or getattr(
        lm.config.get_text_config(), "attention_dropout", 0.0
    ):
        raise _refuse("a trainer with dropout scores another model than the one it sampled: set disable_dropout=True")
    if not _has_fused_head(lm):
        raise _refuse(
            "this trainer does not compute log-probabilities by TRL's fused language-model head, whose arithmetic it "
            "matches: upgrade trl, and use GRPOTrainer or RLOOTrainer"
        )
    _check_head(lm)
    _check_layers(trainer.model)


def exact_forwards(trainer: Any) -> list[ExactForward]:
    """Makes the forwards of the trained model, and of the reference model if there is one, exact."""
    models = [trainer.model, getattr(trainer, "ref_model", None)]
    return [ExactForward(causal_lm(model)) for model in models if model is not None]


def _has_fused_head(lm: Any) -> bool:
    forward = replaced_forward(lm.__dict__.get("_original_forward", lm.forward))
    return "fused_lm_head" in inspect.signature(forward, follow_wrapped=False).parameters


def _check_head(lm: Any) -> None:
    """The fused head scales and caps logits in float32, a model's own forward in its own dtype."""
    config = lm.config.get_text_config()
    for name in ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise _refuse(f"{type(lm).__name__} changes its logits by {name}={getattr(config, name)}")


def _check_layers(model: nn.Module) -> None:
    for layer in inspect_model(model).layers:
        for what, there in (("a sliding window", layer.window), ("a soft cap", layer.softcap), ("sinks", layer.sinks)):
            if there:
                raise _refuse(f"{type(causal_lm(model)).__name__} attends with {what}, and its exact backward does not")


def _refuse(reason: str) -> ValueError:
    return ValueError(f"exact=True cannot be had here: {reason}")
