"""hf_paged inside TRL: GRPO, RLOO and distillation trainers whose rollouts come from the engine, over the weights they
train.

    trainer = GRPOTrainer(model, reward_funcs, args=GRPOConfig(...), train_dataset=dataset)
    hf_paged.integrations.trl.attach(trainer)
    trainer.train()

TRL has no interface for generation backends, but asks an object for completions when it is told to use vLLM. `attach`
puts one of ours in that place, after construction; nothing of TRL is patched or imported for it. What TRL then does for
vLLM it does for us: it compares the sampler's log-probabilities with its own, logs the difference, and corrects for it
(`vllm_importance_sampling_correction`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from hf_paged.config import EngineConfig
from hf_paged.integrations.trl.exact import check_exact, exact_forwards
from hf_paged.integrations.trl.generation import TrainerGeneration
from hf_paged.integrations.trl.support import check_trainer, engine_config, refuse_vllm, warn_about_dropout
from hf_paged.model.introspect import causal_lm
from hf_paged.state import PagedState
from hf_paged.wrap import wrap

__all__ = ["attach", "detach"]

_BASES = {
    "HFPagedGRPOTrainer": "GRPOTrainer",
    "HFPagedRLOOTrainer": "RLOOTrainer",
    "HFPagedDistillationTrainer": "DistillationTrainer",
}
_INJECTED = ("use_vllm", "vllm_mode", "vllm_generation", "_last_loaded_step")


def attach(
    trainer: Any,
    config: EngineConfig | None = None,
    *,
    sleep: bool | None = None,
    shadow: bool | None = None,
    **engine_options: Any,
) -> Any:
    """Makes a TRL trainer generate its rollouts with hf_paged, from the weights that it trains.

    Args:
        trainer: a `GRPOTrainer`, `RLOOTrainer` or `DistillationTrainer` (or a subclass), built with `use_vllm=False`.
            How it samples is its own configuration's to say, `generation_kwargs` included.
        config: how to build the engine.
        sleep: give the page pool's memory back after every rollout, for the backward pass. None: on a GPU.
        shadow: where float32 weights train under autocast, keep copies of linear layers' weights in its dtype for
            rollouts, brought up to date before each. They compute the same bits as casting anew in every step, which
            a decode step takes four times as long for. None: on a GPU.
        engine_options: fields of `EngineConfig` to change. Some have other defaults than elsewhere: memory is left for
            gradients and optimizer states, and parameters stay where a sharding optimizer expects them. With
            `exact=True` the trainer's own forwards (the reference model's too) and the engine compute the same bits, so
            that the log-probabilities which TRL compares do not differ at all; see docs/grpo.md for what it costs.

    Returns:
        the trainer. Attaching again replaces the engine.

    Raises:
        TypeError: not a trainer that this knows, or an engine option that does not exist.
        ValueError: the trainer asks for something that paged generation cannot do; the message names it. The trainer is
            unchanged.
    """
    check_trainer(trainer)
    state = _state(trainer, config, engine_options)
    if state.config.exact:
        check_exact(trainer)
    generation = TrainerGeneration(trainer, state, sleep=sleep, shadow=shadow)
    generation.sampling_params(prompt_tokens=1, n=1)  # raises now what every rollout would
    detach(trainer)
    warn_about_dropout(trainer)
    if state.config.exact:
        generation.exact = exact_forwards(trainer)
    generation.replaced = {name: trainer.__dict__[name] for name in _INJECTED if name in trainer.__dict__}
    # "colocate" is the mode in which TRL asks the generation, and not a server, how long a sequence may be.
    trainer.use_vllm, trainer.vllm_mode, trainer._last_loaded_step = True, "colocate", -1
    trainer.vllm_generation = generation
    return trainer


def detach(trainer: Any) -> None:
    """Undoes `attach`: the trainer generates as it did before, and the engine's memory is given back. A trainer that
    nothing is attached to is left alone."""
    generation = getattr(trainer, "vllm_generation", None)
    if not isinstance(generation, TrainerGeneration):
        return
    generation.close()
    for name in _INJECTED:
        trainer.__dict__.pop(name, None)
    trainer.__dict__.update(generation.replaced)


def _state(trainer: Any, config: EngineConfig | None, options: dict[str, Any]) -> PagedState:
    """Where the engine comes from. A model that was wrapped keeps its one engine, with the options that are given."""
    lm = causal_lm(trainer.model)
    wrapped = getattr(lm, "_hf_paged", None)
    chosen = engine_config(trainer, config or (wrapped.config if wrapped else EngineConfig()), options)
    if wrapped is None:
        processor = trainer.processing_class
        return PagedState(chosen, getattr(processor, "tokenizer", processor))
    if chosen != wrapped.config:
        wrap(lm, chosen)
    return lm._hf_paged


class _AttachedMixin:
    """A TRL trainer that attaches itself when it is constructed.

    Takes one argument more than its base: `engine_options`, a mapping with what `attach` takes by keyword.
    """

    def __init__(self, *args: Any, engine_options: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        for value in (*args, *kwargs.values()):
            refuse_vllm(value)
        super().__init__(*args, **kwargs)
        attach(self, **(engine_options or {}))


@functools.cache
def _trainer_class(name: str) -> type:
    base_name = _BASES[name]
    try:
        import trl
    except ImportError as error:
        raise ImportError(f"{name} needs TRL: pip install 'hf_paged[trl]' ({error})") from error
    base = getattr(trl, base_name, None)
    if base is None:
        raise ImportError(f"{name} needs trl.{base_name}, which TRL {trl.__version__} does not have: upgrade trl")
    members = {"__module__": __name__, "__doc__": f"`trl.{base_name}` with hf_paged attached. {_AttachedMixin.__doc__}"}
    return type(name, (_AttachedMixin, base), members)


def __getattr__(name: str) -> Any:  # TRL is imported when one of its trainers is asked for
    if name in _BASES:
        return _trainer_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
