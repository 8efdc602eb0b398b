"""Which layers of a model attend, and how: read off a dry forward, so that no architecture needs code of its own."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_paged.attention import interface
from hf_paged.attention.backend import LayerSpec

logger = logging.getLogger(__name__)

PAGEABLE_LAYER_TYPES = {"full_attention", "sliding_attention"}


class UnsupportedModelError(ValueError):
    """A model that cannot be paged; the message names its class, the reason, and what still works."""


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """What the engine needs to know of a model."""

    layers: list[LayerSpec]
    modules: list[nn.Module]
    """The attending modules, in the layers' order. Holding them keeps their ids from being given away."""
    structure: tuple[Any, ...]
    """Of the model when the layout was made (see `structure`): when that differs, the layout is out of date."""
    kv_dtype: torch.dtype
    device: torch.device
    vocab_size: int
    max_model_len: int
    takes_logits_to_keep: bool


def causal_lm(model: Any) -> Any:
    """The transformers model inside DDP, `torch.compile` and PEFT wrappers; the model itself when there are none."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            model = model.get_base_model()
        else:
            return model


def why_unpageable(model: nn.Module) -> str | None:
    """Why a model (wrappers included) cannot be paged, as far as its config tells; None when nothing speaks against
    it."""
    peft = getattr(model, "peft_config", None) or {}
    if any(getattr(config, "is_prompt_learning", False) for config in peft.values()):
        return "its PEFT adapter works by virtual tokens (prompt learning), which live in a cache of its own"
    lm = causal_lm(model)
    config = getattr(lm, "config", None)
    if config is None or not hasattr(lm, "generate"):
        return "it is not a transformers model that generates"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder: its cross-attention reads an encoder's output, not pages"
    if getattr(lm, "_is_stateful", False):
        return "it keeps recurrent or linear-attention state between tokens, which pages cannot hold"
    if not getattr(lm, "_supports_attention_backend", False):
        return "its attention does not go through transformers' attention interface"
    types = set(getattr(config.get_text_config(), "layer_types", None) or ())
    if types - PAGEABLE_LAYER_TYPES:
        odd = ", ".join(sorted(types - PAGEABLE_LAYER_TYPES))
        return f"it has layers of type {odd}, which are not attention over pages"
    devices = {parameter.device for parameter in lm.parameters()}
    if torch.device("meta") in devices:
        return "some of its weights are not loaded (device meta)"
    if len(devices) > 1:
        return f"its weights are spread over {len(devices)} devices ({', '.join(sorted(map(str, devices)))})"
    return None


def refuse(model: nn.Module, reason: str) -> UnsupportedModelError:
    """The error for a model that cannot be paged."""
    return UnsupportedModelError(
        f"{type(causal_lm(model)).__name__} cannot be paged: {reason}. It still works without hf_paged, "
        "with its own generate() as before."
    )


def inspect_model(model: nn.Module) -> ModelLayout:
    """Runs a dry forward of two tokens and writes down how each layer attends.

    Raises:
        UnsupportedModelError: the model cannot be paged.
    """
    if reason := why_unpageable(model):
        raise refuse(model, reason)
    lm = causal_lm(model)
    device = next(lm.parameters()).device
    recorder = _Recorder(lm.config.get_text_config()._attn_implementation)
    with trial(model):
        logits = _dry_forward(lm, recorder)
    if recorder.problem is not None:
        raise refuse(model, recorder.problem)
    if not recorder.layers:
        raise refuse(model, "none of its layers called transformers' attention interface")
    modules = [module for module, _ in recorder.layers.values()]
    return ModelLayout(
        layers=[layer for _, layer in recorder.layers.values()],
        modules=modules,
        structure=structure(lm, modules),
        kv_dtype=recorder.dtype,
        device=device,
        # A pipeline's stages before the last make no logits, and know how many there are.
        vocab_size=getattr(lm.get_output_embeddings(), "num_logits", logits.shape[-1]),
        max_model_len=_max_model_len(lm.config.get_text_config()),
        takes_logits_to_keep="logits_to_keep" in inspect.signature(lm.forward).parameters,
    )


def dry_forward(lm: nn.Module) -> None:
    """A forward of two tokens that touches no pages: for those who watch which modules are called with what."""
    _dry_forward(lm, _Recorder(lm.config.get_text_config()._attn_implementation))  # type: ignore[operator, union-attr]


def _dry_forward(lm: nn.Module, recorder: _Recorder) -> Tensor:
    device = next(lm.parameters()).device
    with (
        torch.no_grad(),
        evaluation_mode(lm),
        interface.use_paged_attention(interface.attention_configs(lm), interface.PROBE),
    ):
        ids = torch.zeros(2, dtype=torch.long, device=device)
        return forward(lm, ids, torch.arange(2, device=device), recorder, attention_mask=None)


@contextmanager
def trial(model: nn.Module) -> Iterator[None]:
    """Around a trial run: a model that fails in it cannot be paged. Lack of memory is no verdict, and goes on as it
    is."""
    try:
        yield
    except (UnsupportedModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise refuse(model, f"it failed in a trial run ({type(error).__name__}: {error})") from error


def forward(lm: nn.Module, token_ids: Tensor, positions: Tensor, paged: Any, **options: Any) -> Tensor:
    """One packed forward through a transformers causal LM: `[T]`, `[T]` -> logits `[R, V]`."""
    output = lm(
        input_ids=token_ids[None],
        position_ids=positions[None],
        use_cache=False,
        return_dict=True,
        paged=paged,
        **options,
    )
    return output.logits[0]


class evaluation_mode:
    """Within it every module is in eval mode; after it each is as it was, exceptions included."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._training: list[nn.Module] = []

    def __enter__(self) -> None:
        self._training = [module for module in self._model.modules() if module.training]
        for module in self._training:
            module.training = False

    def __exit__(self, *_: object) -> None:
        for module in self._training:
            module.training = True


def structure(lm: nn.Module, attending: list[nn.Module]) -> tuple[Any, ...]:
    """What a layout depends on: device, dtypes of weights and attention, which layers there are, the size of the
    vocabulary."""
    first = next(lm.parameters())
    kinds = {type(module) for module in attending}
    layers = frozenset(id(module) for module in lm.modules() if type(module) in kinds)
    head = lm.get_output_embeddings()  # type: ignore[operator]
    dtypes = first.dtype, interface.compute_dtype(first.device, first.dtype)
    return first.device, dtypes, layers, getattr(getattr(head, "weight", None), "shape", None)


class _Recorder:
    """Rides along with the dry forward: notes each layer's shapes and options, and lets every row see itself only."""

    def __init__(self, own_implementation: str) -> None:
        self._own_implementation = own_implementation
        self.layers: dict[int, tuple[nn.Module, LayerSpec]] = {}
        self.dtype = torch.float32
        self.problem: str | None = None

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float, options: dict[str, Any]
    ) -> Tensor:
        if id(module) in self.layers:
            self.problem = "one of its layers attends more than once per forward"
        mask = options.get("attention_mask")
        if isinstance(mask, interface.ProbedMask):
            # What the stock forward obeys is the mask; the argument is for kernels that take no mask.
            window, self.problem = mask.window, self.problem or mask.problem
        else:
            window = options.get("sliding_window")
        self.dtype = key.dtype
        spec = LayerSpec(
            index=len(self.layers),
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            key_dim=key.shape[2],
            value_dim=value.shape[2],
            scaling=float(scaling),
            window=int(window) if window else None,
            softcap=self._softcap(options.get("softcap")),
            sinks=options.get("s_aux") is not None,
        )
        self.layers[id(module)] = module, spec
        return value.repeat_interleave(query.shape[1] // key.shape[1], dim=1)

    def _softcap(self, softcap: float | None) -> float | None:
        """The soft cap as far as the model's own forward obeys it, so that it and the engine agree."""
        if softcap is None or self._own_implementation != "sdpa":
            return softcap
        if not self.layers:
            logger.warning(
                "the model runs under attn_implementation='sdpa', which leaves out its soft cap of %s; so do pages. "
                "Load it with attn_implementation='eager' to have the cap in both",
                softcap,
            )
        return None


def _max_model_len(config: Any) -> int:
    limit = getattr(config, "max_position_embeddings", None) or 32768
    rope = getattr(config, "rope_parameters", None) or {}
    per_type = [r for r in rope.values() if isinstance(r, dict)] or [rope]
    for parameters in per_type:
        if parameters.get("rope_type") in ("longrope", "dynamic"):
            original = parameters.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            if original and original < limit:
                # Beyond it the rotation of *all* positions depends on the longest sequence of the forward, so that
                # neighbours in a batch would change each other's meaning.
                logger.warning(
                    "rope type %r rescales all positions once a sequence is longer than %d tokens, which sequences "
                    "in one batch cannot share: max_model_len is %d instead of %d",
                    parameters["rope_type"], original, original, limit,
                )  # fmt: skip
                limit = original
    return int(limit)
