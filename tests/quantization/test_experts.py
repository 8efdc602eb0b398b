"""Mixtures of experts, whose checkpoints have linear layers where transformers has stacked parameters."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from models.families import make_model, make_prompts, stock_greedy
from quantization.writers import CHECKPOINTS, change_tensors, write_checkpoint
from torch import Tensor

import hf_paged
from hf_paged.quantization.linear import QuantizedLinear

PROMPTS = make_prompts([5, 9, 17])
GREEDY = hf_paged.SamplingParams(temperature=0.0, max_tokens=12)
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"moe_intermediate_size": 64},
    "DeepseekV3": {},
    "Mixtral": {},
}
NAMES = ["awq", "gptq, act-order", "compressed, asymmetric", "fp8 in small blocks", "compressed fp8, one scale"]
CASES = [("Qwen3Moe", name) for name in NAMES] + [
    ("Mixtral", NAMES[0]),
    ("Mixtral", NAMES[3]),
    ("DeepseekV3", NAMES[3]),
]


def write_mixture(folder: Path, family: str, name: str, keep: tuple[str, ...] = ("lm_head",)) -> Any:
    """Writes a quantised mixture, its experts under the names that its family's checkpoints have, but for those of
    `keep`. Returns the model that it means."""
    model = make_model(family, **FAMILIES[family])
    write_layer, quantization = CHECKPOINTS[name]
    write_checkpoint(folder, write_layer, quantization, model=model)
    projections = ("w1", "w3", "w2") if family == "Mixtral" else ("gate_proj", "up_proj", "down_proj")

    def unstack(tensors: dict[str, Tensor]) -> None:
        for stacked in [name for name in tensors if name.endswith((".gate_up_proj", ".down_proj"))]:
            experts, _, _ = stacked.rpartition(".")
            del tensors[stacked]
            parameter = model.get_parameter(stacked).data
            names = projections[:2] if stacked.endswith("gate_up_proj") else projections[2:]
            for expert, weights in enumerate(parameter):
                for projection, weight in zip(names, weights.chunk(len(names)), strict=True):
                    layer = f"{experts}.{expert}.{projection}"
                    if any(part in layer for part in keep):
                        tensors[f"{layer}.weight"] = weight.clone()
                        continue
                    found, meant = write_layer(weight.shape[1], weight.shape[0], expert)
                    weight.copy_(meant)
                    tensors |= {f"{layer}.{part}": tensor for part, tensor in found.items()}
        if family == "Mixtral":
            for old in [name for name in tensors if ".mlp." in name]:
                tensors[old.replace(".mlp.", ".block_sparse_moe.")] = tensors.pop(old)

    with torch.no_grad():
        change_tensors(folder, unstack)
    return model


def greedy_tokens(model: Any) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in model.generate_many(PROMPTS, GREEDY)]


def check(folder: Path, meant: Any, **options: Any) -> Any:
    model = hf_paged.load(folder, device="cpu", **options)
    ids = torch.tensor(PROMPTS[:1])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, meant(ids).logits, rtol=1e-3, atol=1e-3)
    assert greedy_tokens(model) == [stock_greedy(meant, prompt, 12) for prompt in PROMPTS]
    return model


@pytest.mark.parametrize(("family", "name"), CASES)
def test_greedy_tokens_are_the_dequantised_models(family: str, name: str, tmp_path: Path, caplog: Any) -> None:
    meant = write_mixture(tmp_path, family, name)
    with caplog.at_level(logging.INFO, logger="hf_paged"):
        model = check(tmp_path, meant)
    said = [record for record in caplog.records if "quantised experts are dequantised to float32" in record.message]
    assert len(said) == 1 and "left out" not in caplog.text
    layers = [path for path, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    assert any("self_attn" in path for path in layers) and not any(".experts." in path for path in layers)
    for parameter_name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, meant.get_parameter(parameter_name), rtol=1e-5, atol=1e-6)


def test_experts_that_are_not_quantised(tmp_path: Path) -> None:
    check(tmp_path, write_mixture(tmp_path, "Qwen3Moe", "gptq", keep=("lm_head", ".1.up_proj", ".2.down_proj")))


@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral"])
def test_none_dequantises_all(family: str, tmp_path: Path) -> None:
    meant = write_mixture(tmp_path, family, "fp8 in small blocks")
    model = check(tmp_path, meant, quantization=None)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    model.save_pretrained(tmp_path / "plain")
    check(tmp_path / "plain", meant)


def drop(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("model.layers.1.mlp.experts.2.up_proj.qweight"), r"lacks tensors.*experts\.2\.up_proj\.qweight"),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.0.mlp.experts.3.down_proj" in name],
            r"lacks tensors.*layers\.0\.mlp\.experts\.down_proj \(1 of 4 layers\)",
        ),
        (
            lambda tensors: tensors.update({"model.layers.1.mlp.experts.0.gate_proj.qweight": torch.zeros(3, 3).int()}),
            r"experts\.0\.gate_proj\.qweight must have the shape",
        ),
    ],
)
def test_what_is_missing_or_of_another_shape_is_named(change: Any, message: str, tmp_path: Path) -> None:
    write_mixture(tmp_path, "Qwen3Moe", "gptq")
    change_tensors(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        hf_paged.load(tmp_path, device="cpu")
