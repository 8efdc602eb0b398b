"""Quantised checkpoints of tiny models, written nibble by nibble from what the formats say, with the weights they mean.

Nothing here is shared with what reads them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

Layer = dict[str, Tensor]
WriteLayer = Callable[[int, int, int], tuple[Layer, Tensor]]
"""(inputs, outputs, seed) -> (a layer's tensors, the weight that they mean)."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble i of a word belongs to this one of its eight outputs."""


def word(nibbles: list[int]) -> int:
    """Eight nibbles, the first in the lowest bits, as a signed number of 32 bits."""
    assert len(nibbles) == 8 and all(0 <= nibble < 16 for nibble in nibbles)
    value = int("".join(f"{nibble:04b}" for nibble in reversed(nibbles)), 2)
    return value - (1 << 32) if value >> 31 else value


def pack_rows(values: list[list[int]], order: tuple[int, ...] = tuple(range(8))) -> list[list[int]]:
    """Words along the second dimension."""
    return [[word([row[start + place] for place in order]) for start in range(0, len(row), 8)] for row in values]


def transposed(values: list[list[int]]) -> list[list[int]]:
    return [list(column) for column in zip(*values, strict=True)]


def int32(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass(frozen=True)
class Weight:
    """A quantised weight before anybody packs it; `[K, N]`, groups of inputs."""

    codes: list[list[int]]
    scales: Tensor
    """float16 `[groups, N]`."""
    zeros: list[list[int]]
    """`[groups, N]`."""
    groups: list[int]
    """Of every input."""

    def dequantized(self) -> Tensor:
        """float32 `[N, K]`, number by number."""
        scales = self.scales.tolist()
        rows = []
        for codes, group in zip(self.codes, self.groups, strict=True):
            each = zip(codes, self.zeros[group], scales[group], strict=True)
            rows.append([(code - zero) * scale for code, zero, scale in each])
        return torch.tensor(rows).T.contiguous()


def random_weight(
    inputs: int, outputs: int, group_size: int, seed: int, *, symmetric: bool = False, act_order: bool = False
) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    size = inputs if group_size == -1 else group_size
    count = inputs // size
    zeros = torch.randint(0, 16, (count, outputs), generator=generator)
    groups = torch.arange(inputs) // size
    return Weight(
        codes=torch.randint(0, 16, (inputs, outputs), generator=generator).tolist(),
        scales=(0.01 + 0.03 * torch.rand(count, outputs, generator=generator)).half(),
        zeros=(torch.full_like(zeros, 8) if symmetric else zeros).tolist(),
        groups=(groups[torch.randperm(inputs, generator=generator)] if act_order else groups).tolist(),
    )


# ---- layers --------------------------------------------------------------------------------------------------------


def write_awq(weight: Weight) -> dict[str, Tensor]:
    return {
        "qweight": int32(pack_rows(weight.codes, AWQ_ORDER)),
        "qzeros": int32(pack_rows(weight.zeros, AWQ_ORDER)),
        "scales": weight.scales,
    }


def write_gptq(weight: Weight, version: int) -> dict[str, Tensor]:
    zeros = weight.zeros if version == 2 else [[(zero - 1) % 16 for zero in row] for row in weight.zeros]
    return {
        "qweight": int32(transposed(pack_rows(transposed(weight.codes)))),
        "qzeros": int32(pack_rows(zeros)),
        "scales": weight.scales,
        "g_idx": int32(weight.groups),
    }


def pack_quantized(weight: Weight, *, symmetric: bool, act_order: bool = False) -> dict[str, Tensor]:
    outputs, inputs = len(weight.codes[0]), len(weight.codes)
    layer = {
        "weight_packed": int32(pack_rows(transposed(weight.codes))),
        "weight_scale": weight.scales.T,
        "weight_shape": torch.tensor([outputs, inputs]),
    }
    if not symmetric:
        layer["weight_zero_point"] = int32(transposed(pack_rows(weight.zeros)))
    return layer | ({"weight_g_idx": int32(weight.groups)} if act_order else {})


def e4m3(bits: int) -> float:
    """What a byte means: a sign, four bits of exponent and three of mantissa; 0x7f and 0xff are NaN."""
    sign, exponent, mantissa = bits >> 7, bits >> 3 & 15, bits & 7
    assert bits & 127 != 127
    size = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6
    return -size if sign else size


def fp8_writer(
    scale_name: str, block: tuple[int, int] | None, scale_shape: tuple[int, ...] | None = None
) -> WriteLayer:
    """Weights of random bytes.

    Args:
        scale_name: of the tensor of scales.
        block: that share one; None: an output, or everything where `scale_shape` says so.
        scale_shape: of a single scale.
    """

    def write_layer(inputs: int, outputs: int, seed: int) -> tuple[Layer, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        octets = torch.randint(0, 127, (outputs, inputs), generator=generator)
        octets += 128 * torch.randint(0, 2, (outputs, inputs), generator=generator)
        height, width = block or ((1, inputs) if scale_shape is None else (outputs, inputs))
        scales = 1e-3 * (1 + torch.rand(-(-outputs // height), -(-inputs // width), generator=generator))
        table, factors = [e4m3(bits) if bits & 127 != 127 else 0.0 for bits in range(256)], scales.tolist()
        rows = [
            [table[bits] * factors[n // height][k // width] for k, bits in enumerate(row)]
            for n, row in enumerate(octets.tolist())
        ]
        layer = {
            "weight": octets.to(torch.uint8).view(torch.float8_e4m3fn),
            scale_name: scales if scale_shape is None else scales.reshape(scale_shape),
        }
        return layer, torch.tensor(rows)

    return write_layer


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def layer_writer(write: Callable[[Weight], Layer], group_size: int, **options: bool) -> WriteLayer:
    def write_layer(inputs: int, outputs: int, seed: int) -> tuple[Layer, Tensor]:
        weight = random_weight(inputs, outputs, group_size, seed, **options)
        return write(weight), weight.dequantized()

    return write_layer


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    values = {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(values | changes))).eval()


def write_checkpoint(
    folder: Path,
    write_layer: WriteLayer,
    quantization: dict[str, Any],
    *,
    model: Any = None,
    keep: tuple[str, ...] = ("lm_head",),
    shards: int = 1,
    **changes: Any,
) -> Any:
    """Writes a quantised tiny model.

    Args:
        quantization: `quantization_config`.
        model: float32, to be quantised in place; None makes a Llama.
        keep: linear layers that are not quantised, by a part of their name.
        shards: files.
        changes: of the Llama's config.

    Returns:
        the float32 model that the checkpoint means.
    """
    model = tiny_llama(**changes) if model is None else model
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for seed, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and not any(part in name for part in keep):
            layer, weight = write_layer(module.in_features, module.out_features, seed)
            module.weight.data.copy_(weight)
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{part}": tensor for part, tensor in layer.items()}
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    save_tensors(folder, tensors, shards)
    return model


def save_tensors(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    names = sorted(tensors)
    where = {name: f"model-{index % shards + 1:05}-of-{shards:05}.safetensors" for index, name in enumerate(names)}
    for file in sorted(set(where.values())):
        save_file({name: tensors[name] for name in names if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}


def compressed_config(
    format: str, weights: dict[str, Any], activations: dict[str, Any] | None = None
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def w4_config(group_size: int, symmetric: bool) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "dynamic": False}
    grouped = {"strategy": "channel", "group_size": None} if group_size == -1 else {"strategy": "group"}
    return compressed_config("pack-quantized", {"group_size": group_size} | weights | grouped)


def fp8_config(strategy: str, **options: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": strategy}
    activations = {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}
    return compressed_config("float-quantized", weights | options, activations)


DEEPSEEK_CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


# ---- formats by name -----------------------------------------------------------------------------------------------


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_tensors(folder, tensors)


def awq(size: int = 32, **options: bool) -> tuple[WriteLayer, dict[str, Any]]:
    return layer_writer(write_awq, size, **options), AWQ_CONFIG | {"group_size": size}


def gptq(size: int = 32, version: int = 1, **options: bool) -> tuple[WriteLayer, dict[str, Any]]:
    config = {"group_size": size, "checkpoint_format": "gptq_v2" if version == 2 else "gptq"}
    config["desc_act"] = options.get("act_order", False)
    return layer_writer(lambda weight: write_gptq(weight, version), size, **options), GPTQ_CONFIG | config


def packed(size: int = 32, *, symmetric: bool = True, act_order: bool = False) -> tuple[WriteLayer, dict[str, Any]]:
    def write(weight: Weight) -> Layer:
        return pack_quantized(weight, symmetric=symmetric, act_order=act_order)

    return layer_writer(write, size, symmetric=symmetric, act_order=act_order), w4_config(size, symmetric)


CHECKPOINTS: dict[str, tuple[WriteLayer, dict[str, Any]]] = {
    "awq": awq(),
    "awq, groups of 64": awq(64),
    "awq, one group": awq(-1),
    "gptq": gptq(),
    "gptq, symmetric": gptq(64, symmetric=True),
    "gptq, act-order": gptq(act_order=True),
    "gptq, one group": gptq(-1),
    "gptq v2": gptq(64, version=2),
    "gptq v2, act-order": gptq(version=2, act_order=True),
    "compressed": packed(),
    "compressed, asymmetric": packed(64, symmetric=False),
    "compressed, a scale per output": packed(-1),
    "compressed, act-order": packed(symmetric=False, act_order=True),
    "compressed fp8, a scale per output": (fp8_writer("weight_scale", None), fp8_config("channel")),
    "compressed fp8, one scale": (fp8_writer("weight_scale", None, (1,)), fp8_config("tensor")),
    "fp8 in blocks": (fp8_writer("weight_scale_inv", (128, 128)), DEEPSEEK_CONFIG),
    "fp8 in small blocks": (
        fp8_writer("weight_scale_inv", (48, 32)),
        DEEPSEEK_CONFIG | {"weight_block_size": [48, 32]},
    ),
    "fp8, one scale": (fp8_writer("weight_scale", None, ()), DEEPSEEK_CONFIG | {"weight_block_size": None}),
}
