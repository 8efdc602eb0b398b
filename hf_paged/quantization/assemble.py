"""A model on the meta device and a checkpoint become a model: what goes where is settled before a tensor is read."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_paged.distributed.plan import ShardPlan
from hf_paged.distributed.shard import check_cut, cut_quantised
from hf_paged.quantization.checkpoint import Checkpoint, Entry, TensorSpec
from hf_paged.quantization.experts import Piece, plan_experts, read_experts
from hf_paged.quantization.formats.base import Format
from hf_paged.quantization.kv_scales import find_kv_scales
from hf_paged.quantization.layers import layer_specs, read_layer

logger = logging.getLogger(__name__)

NAMES_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """What is read from a checkpoint, and where it goes."""

    layers: dict[str, list[str]]
    """The quantised linear layers by name, and the last parts of their tensors' names, "bias" among them."""
    tensors: list[str]
    """Parameters and buffers of everything else."""
    tied: set[str]
    """Parameters that the checkpoint lacks because they are others."""
    experts: dict[str, list[Piece]]
    """Parameters that are stacked from layers of experts."""


def plan_loading(model: Any, checkpoint: Checkpoint, format: Format) -> Plan:
    """Decides by the checkpoint's tensors which layers are quantised, and checks all names, shapes and dtypes.

    Args:
        model: a transformers model, on the meta device.

    Raises:
        ValueError: tensors are missing or of another shape or dtype, or no layer is quantised.
    """
    by_module = _by_module(checkpoint)
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    layers: dict[str, list[str]] = {}
    missing: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and format.holds(found := by_module[name]):
            specs = layer_specs(name, module.in_features, module.out_features, format, checkpoint)
            # Some writers give every layer a bias, of zeros where the model has none.
            specs["bias"] = TensorSpec(((module.out_features,),), required=module.bias is not None)
            missing += [f"{name}.{part}" for part, spec in specs.items() if spec.required and part not in found]
            layers[name] = [part for part in specs if part in found]
            for part in layers[name]:
                specs[part].check(found[part])
            if f"{name}.weight" in {*ties, *ties.values()}:
                raise ValueError(
                    f"{checkpoint.folder}: {name} is quantised, and by config.json its weight is tied to another: set "
                    "tie_word_embeddings to false there"
                )
    stacking = plan_experts(model, by_module, checkpoint, format)
    missing += stacking.missing
    if not layers and not any(piece.quantized for pieces in stacking.pieces.values() for piece in pieces):
        raise ValueError(
            f"{checkpoint.folder}: config.json says that it is quantised, and none of the model's linear layers has "
            "tensors of the format that it names"
        )
    expected = {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[0] not in layers}
    tensors = [name for name in expected if name in checkpoint.entries]
    for name in tensors:
        TensorSpec((tuple(expected[name].shape),), _alike(expected[name])).check(checkpoint.entries[name])
    present = set(tensors)
    tied = {end for pair in ties.items() for end in pair if end not in present and not present.isdisjoint(pair)}
    found_elsewhere = tied | stacking.pieces.keys()
    missing += [name for name in expected if name not in present and name not in found_elsewhere]
    used = present | find_kv_scales(checkpoint.entries).keys()
    used |= {f"{name}.{part}" for name, parts in layers.items() for part in parts}
    used |= {f"{piece.layer}.{part}" for pieces in stacking.pieces.values() for piece in pieces for part in piece.parts}
    unexpected = [name for name in checkpoint.entries if name not in used and not _is_ignored(model, name)]
    if missing:
        also = f"; tensors without a place in the model: {_some(unexpected)}" if unexpected else ""
        if any(".experts." in name for name in missing):
            also += ". Experts are read where a checkpoint has them as linear layers, one by one"
        raise ValueError(f"{checkpoint.folder} lacks tensors of {type(model).__name__}: {_some(missing)}{also}")
    if unexpected:
        logger.warning(
            "%s: tensors without a place in the model are left out: %s", checkpoint.folder, _some(unexpected)
        )
    return Plan(layers, tensors, tied, stacking.pieces)


def plan_plain(model: Any, checkpoint: Checkpoint) -> Plan | None:
    """What is read of a checkpoint that is not quantised, where its tensors are the model's, name by name, or experts
    that the model has stacked; None where they must be converted in another way first, as transformers knows to."""
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: entry.shape for name, entry in checkpoint.entries.items()}
    present = [name for name, shape in expected.items() if found.get(name) == shape]
    tied = {end for pair in ties.items() for end in pair if end not in present and not set(pair).isdisjoint(present)}
    if not (absent := expected.keys() - set(present) - tied):
        return Plan({}, present, tied, {})
    stacking = plan_experts(model, _by_module(checkpoint), checkpoint, None)
    whole = absent == stacking.pieces.keys() and not stacking.missing
    return Plan({}, present, tied, stacking.pieces) if whole else None


def _by_module(checkpoint: Checkpoint) -> dict[str, dict[str, Entry]]:
    """A checkpoint's tensors by module and the last part of their names."""
    found: dict[str, dict[str, Entry]] = defaultdict(dict)
    for name, entry in checkpoint.entries.items():
        module, _, part = name.rpartition(".")
        found[module][part] = entry
    return found


def assemble(
    model: Any,
    checkpoint: Checkpoint,
    plan: Plan,
    format: Format | None,
    dtype: torch.dtype,
    device: torch.device,
    *,
    dequantized: bool,
    shards: ShardPlan | None = None,
    rank: int = 0,
) -> None:
    """Reads what the plan says into the model, tensor by tensor, so that nothing is in memory twice for long.

    Args:
        format: None where the checkpoint is not quantised.
        dtype: of activations and of dequantised weights.
        dequantized: put ordinary linear layers in the places of the quantised ones.
        shards, rank: which part of the model to read, and for whom; None is all of it.

    Raises:
        ValueError: a quantised layer's tensors cannot be what they are; the model is then of no use.
    """
    for name, parts in plan.layers.items():
        assert format is not None
        layer = read_layer(name, parts, checkpoint, format, dtype, device)
        if shards is not None and name in shards.linears:
            check_cut(name, layer, shards.linears[name])
            layer = cut_quantised(layer, shards.linears[name], rank)  # type: ignore[arg-type]
        model.set_submodule(name, plain_linear(layer.dequantize(dtype), layer.bias) if dequantized else layer)
    for name, pieces in plan.experts.items():
        cut = shards.cut_of(name) if shards is not None else None
        place(model, name, read_experts(model.get_parameter(name), pieces, checkpoint, format, device, cut), None)
    if any(piece.quantized for pieces in plan.experts.values() for piece in pieces) and not dequantized:
        logger.info("%s: quantised experts are dequantised to %s", checkpoint.folder, str(dtype).removeprefix("torch."))
    # Kept in float32, as transformers itself does.
    kept = list(getattr(model, "_keep_in_fp32_modules_strict", None) or ()) if dtype.itemsize == 2 else []
    kept += list(getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype is torch.float16 else []
    for name in plan.tensors:
        cut = shards.cut_of(name) if shards is not None else None
        tensor = checkpoint.read_part(name, cut, device) if cut is not None else checkpoint.read([name], device)[name]
        if shards is not None and rank and shards.empties(name):
            tensor.zero_()
        place(model, name, tensor, torch.float32 if any(re.search(pattern, name) for pattern in kept) else None)
    model.tie_weights(missing_keys=set(plan.tied), recompute_mapping=False)
    compute_buffers(model, device)


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An ordinary linear layer over `[N, K]` and `[N]`, which become its parameters."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias)
    return linear


def place(model: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype | None) -> None:
    """Puts a tensor where one on the meta device was, in `dtype` or in that one's."""
    path, _, leaf = name.rpartition(".")
    parent = model.get_submodule(path)
    old = getattr(parent, leaf)
    tensor = tensor.to(dtype or old.dtype)
    if isinstance(old, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # what transformers initialises no more
    setattr(parent, leaf, tensor)


def compute_buffers(model: Any, device: torch.device) -> None:
    """Buffers that no checkpoint holds, such as the frequencies of rotary embeddings.

    transformers computes them where it initialises the module that has them.

    Raises:
        ValueError: it left one out.
    """
    computed = []
    for name, module in model.named_modules():
        own = [leaf for leaf in sorted(module._non_persistent_buffers_set) if module._buffers[leaf] is not None]
        for leaf in own:
            buffer = torch.empty_like(module._buffers[leaf], device=device)
            module._buffers[leaf] = buffer.fill_(torch.nan) if buffer.is_floating_point() else buffer.zero_()
            computed.append((f"{name}.{leaf}", module, leaf))
        module._is_hf_initialized = not own
    model.initialize_weights()
    for name, module, leaf in computed:
        if module._buffers[leaf].isnan().any():
            raise ValueError(f"transformers does not say what the buffer {name} of {type(model).__name__} holds")


def _alike(tensor: Tensor) -> frozenset[torch.dtype]:
    """The dtypes that may be converted to a tensor's own."""
    return TensorSpec(()).dtypes if tensor.is_floating_point() else frozenset({tensor.dtype})


def _is_ignored(model: Any, name: str) -> bool:
    """Whether the model says of a tensor that checkpoints may hold it for nothing."""
    patterns: Iterable[str] = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in (*patterns, r"rotary_emb\.inv_freq$"))


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"
