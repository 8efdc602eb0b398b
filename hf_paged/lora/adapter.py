"""Adapters as PEFT saves them: adapter_config.json and adapter_model.safetensors, read without PEFT.

The tensors say which layers are adapted, the config how strongly. Whatever PEFT can do beside plain LoRA on linear
layers is refused by name: an adapter that is half understood would answer, and answer wrongly.
"""

from __future__ import annotations

import itertools
import json
import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_paged.lora.request import LoRARequest

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT writes before the names of a model's own modules."""

BEYOND = (
    "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication",
    "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "monteclora_config", "kasa_config",
    "velora_config",
)  # fmt: skip
"""Fields of PEFT's LoraConfig that make an adapter something else than two matrices per layer."""

_generations = itertools.count(1)


@dataclass(frozen=True, slots=True)
class TargetShape:
    """What an adapter must fit: a linear layer."""

    inputs: int
    outputs: int


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter in the host's memory. A copy in another process has a generation of that one's."""

    request: LoRARequest
    generation: int
    """Another one each time that any adapter is read, from 1: what was computed with one is of no use to another."""
    layers: dict[str, tuple[Tensor, Tensor]]
    """By the layer's name in the model: A `[r, inputs]` and B `[outputs, r]`, B with the adapter's scaling in it."""

    def pinned(self) -> Adapter:
        """The same one, where a GPU can copy it from while the host goes on."""
        return replace(self, layers={name: (a.pin_memory(), b.pin_memory()) for name, (a, b) in self.layers.items()})

    def __reduce__(self) -> tuple[Any, ...]:
        # As bytes: a connection would leave tensors in memory that only a process and its own children share.
        return _arrived, (self.request, pickle.dumps(self.layers))


def _arrived(request: LoRARequest, layers: bytes) -> Adapter:
    return Adapter(request, next(_generations), pickle.loads(layers))


def read_adapter(
    request: LoRARequest, targets: Mapping[str, TargetShape], *, max_rank: int, dtype: torch.dtype
) -> Adapter:
    """Reads an adapter; all names and shapes are checked before a tensor is.

    Args:
        targets: the model's layers that can be adapted, by name.
        max_rank: the highest rank that there is room for.
        dtype: of the tensors that are made of the file's.

    Raises:
        FileNotFoundError: no such folder or files.
        ValueError: the adapter is of another kind, of another model, too large, or damaged; the message says which.
    """
    folder = _folder(request.lora_path)
    where = f"adapter {request.lora_name!r} ({folder})"
    config = _read_config(folder, where)
    file = folder / TENSORS
    if not file.is_file():
        raise FileNotFoundError(
            f"{where} has no {TENSORS}: save it with PEFT's save_pretrained(..., safe_serialization=True)"
        )
    try:
        layers = _read_layers(file, config, targets, max_rank, dtype)
    except _NotSafetensors as error:
        raise ValueError(f"{where}: {TENSORS} cannot be read ({error})") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return Adapter(request, next(_generations), layers)


class _NotSafetensors(Exception):
    pass


def _folder(path: str) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
        raise FileNotFoundError(f"there is no folder with an adapter at {path}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=[CONFIG, TENSORS]))
    except Exception as error:  # offline, no such repository, no right to it: the hub's errors are of many kinds
        raise FileNotFoundError(
            f"there is no folder with an adapter at {path}, and the hub does not give one of that name "
            f"({type(error).__name__})"
        ) from error


def _read_config(folder: Path, where: str) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{where} has no {CONFIG}: is it a folder that PEFT's save_pretrained wrote?")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{where}: {CONFIG} is no JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{where}: {CONFIG} must be an object")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{where}: peft_type must be LORA, got {kind!r}; merge other adapters into the model")
    beyond = [name for name in BEYOND if config.get(name)]
    if config.get("bias", "none") != "none":
        beyond.append("bias")
    if beyond:
        raise ValueError(
            f"{where}: {', '.join(f'{name}={config[name]!r:.60}' for name in beyond)} cannot be had by request, only "
            "plain LoRA of linear layers. Merge the adapter into the model (PEFT's merge_and_unload), or wrap the "
            "PEFT model itself"
        )
    return config


def _read_layers(
    file: Path, config: dict[str, Any], targets: Mapping[str, TargetShape], max_rank: int, dtype: torch.dtype
) -> dict[str, tuple[Tensor, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            keys = _pairs(shapes)
            _check_complete(config, keys)
            scalings = {}
            for layer, (key_a, key_b) in keys.items():
                scalings[layer] = _scaling(config, layer, shapes[key_a], shapes[key_b], targets, max_rank)
            found = {}
            for layer, (key_a, key_b) in keys.items():
                a, b = opened.get_tensor(key_a).float(), opened.get_tensor(key_b).float()
                found[layer] = _finite(layer, a.to(dtype), (b * scalings[layer]).to(dtype))
            return found
    except (SafetensorError, OSError) as error:
        raise _NotSafetensors(error) from error


def _pairs(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, str]]:
    """The names of A and B in the file, by layer."""
    found: dict[str, dict[str, str]] = {}
    for key in shapes:
        layer, _, part = key.removeprefix(PREFIX).rpartition(".lora_")
        if part not in ("A.weight", "B.weight"):
            raise ValueError(
                f"it has a tensor {key!r}, which is not of plain LoRA on a decoder layer (embeddings, the output "
                "head, biases, whole modules and DoRA cannot be had by request): merge the adapter into the model"
            )
        found.setdefault(layer, {})[part[0]] = key
    if not found:
        raise ValueError("it has no tensors")
    for layer, parts in found.items():
        if len(parts) < 2:
            raise ValueError(f"of {layer} it has lora_{min(parts)} and not the other matrix: the file is incomplete")
    return {layer: (parts["A"], parts["B"]) for layer, parts in found.items()}


def _check_complete(config: dict[str, Any], layers: Mapping[str, Any]) -> None:
    """Raises ValueError where a module that the config names has no tensors at all."""
    named = config.get("target_modules")
    for target in named if isinstance(named, list) else []:
        if not any(layer == target or layer.endswith(f".{target}") for layer in layers):
            raise ValueError(f"target_modules names {target!r}, of which there are no tensors: the file is incomplete")


def _scaling(
    config: dict[str, Any],
    layer: str,
    shape_a: tuple[int, ...],
    shape_b: tuple[int, ...],
    targets: Mapping[str, TargetShape],
    max_rank: int,
) -> float:
    """What the product of a layer's matrices is multiplied by, once it is known that they fit."""
    target = targets.get(layer)
    if target is None:
        raise ValueError(f"it adapts {layer}, which is no linear layer in one of this model's decoder layers")
    rank = _by_pattern(config, "rank_pattern", layer, config.get("r"))
    alpha = _by_pattern(config, "alpha_pattern", layer, config.get("lora_alpha"))
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1 or not isinstance(alpha, int | float):
        raise ValueError(f"{CONFIG} has no rank and lora_alpha that make sense for {layer}: r={rank!r}, {alpha!r}")
    expected = (rank, target.inputs), (target.outputs, rank)
    if (shape_a, shape_b) != expected:
        raise ValueError(
            f"{layer} has matrices of {list(shape_a)} and {list(shape_b)}, and rank {rank} on this model's layer needs "
            f"{list(expected[0])} and {list(expected[1])}: was it trained on another model?"
        )
    if rank > max_rank:
        raise ValueError(f"{layer} has rank {rank}, and there is room for {max_rank}: raise max_lora_rank")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _by_pattern(config: dict[str, Any], name: str, layer: str, default: Any) -> Any:
    """As PEFT: a pattern is a regular expression for the end of a name."""
    for pattern, value in (config.get(name) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default


def _finite(layer: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError(f"{layer} has values that are not finite in {str(a.dtype).removeprefix('torch.')}")
    return a, b
