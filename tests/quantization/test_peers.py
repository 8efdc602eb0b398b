"""What other packages make of our checkpoints: they must find the weights that we meant."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from models.families import make_prompts
from quantization.writers import tiny_llama
from safetensors.torch import load_file
from torch import Tensor

import hf_paged
from hf_paged.quantization.writers.recipe import make_recipe

TOKENS = torch.tensor(make_prompts([24] * 4))
LAYER = "model.layers.1.mlp.gate_proj"
INPUTS, OUTPUTS = 64, 128


def require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def write(out: Path, **options: Any) -> tuple[dict[str, Tensor], Tensor]:
    """(the tensors of one layer of a checkpoint, its weight as hf_paged reads it)."""
    hf_paged.quantize(tiny_llama(), out=out, calibration=TOKENS, **options)
    tensors = load_file(out / "model.safetensors")
    layer = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{LAYER}.")}
    weight = hf_paged.load(out, device="cpu", quantization=None).get_submodule(LAYER).weight
    return layer, weight.detach()


COMPRESSED: dict[str, dict[str, Any]] = {
    "w4a16": {"to": "w4a16", "group_size": 32},
    "a scale per output": {"to": "w4a16", "group_size": -1},
    "asymmetric": {"to": "w4a16", "group_size": 32, "symmetric": False},
    "act-order": {"to": "w4a16", "group_size": 32, "desc_act": True},
    "awq's scales": {"to": "w4a16", "group_size": 32, "symmetric": False, "method": "awq"},
    "fp8": {"to": "fp8"},
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors_decompresses_our_layers(name: str, tmp_path: Path) -> None:
    require("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    options = COMPRESSED[name]
    layer, weight = write(tmp_path / "out", **options)
    recipe = make_recipe(**options)
    config = QuantizationConfig.model_validate(recipe.quantization_config(["lm_head"]))
    compressor = BaseCompressor.get_value_from_registry(config.format)
    found = compressor.decompress(layer, config.config_groups["group_0"])["weight"]
    torch.testing.assert_close(found.float(), weight, rtol=2e-3, atol=0)  # it multiplies in the scales' dtype


@pytest.mark.parametrize("name", ["w4a16", "a scale per output", "act-order", "fp8"])
def test_transformers_loads_our_compressed_tensors(name: str, tmp_path: Path) -> None:
    """Not the asymmetric ones: it expects zeros that are not packed (5.23)."""
    require("compressed_tensors")
    from transformers import AutoModelForCausalLM

    write(tmp_path / "out", **COMPRESSED[name])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
    ours = hf_paged.load(tmp_path / "out", device="cpu", quantization=None)
    with torch.no_grad():
        found, expected = model(TOKENS).logits.float(), ours(TOKENS).logits
    # It rounds activations to FP8 too.
    assert (found - expected).norm() <= (0.25 if name == "fp8" else 1e-3) * expected.norm()
    weight = model.get_submodule(LAYER).weight
    torch.testing.assert_close(weight.float(), ours.get_submodule(LAYER).weight, rtol=2e-3, atol=0)


def test_transformers_loads_our_fp8_blocks(tmp_path: Path) -> None:
    """Without a GPU it dequantises them."""
    from transformers import AutoModelForCausalLM

    _, weight = write(tmp_path / "out", to="fp8-block")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
    torch.testing.assert_close(model.get_submodule(LAYER).weight.float(), weight, rtol=2**-8, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"to": "gptq", "group_size": 32},
        {"to": "gptq", "group_size": 64, "symmetric": False},
        {"to": "gptq", "group_size": 32, "desc_act": True},
        {"to": "gptq", "group_size": -1, "symmetric": False, "desc_act": True},
    ],
    ids=["symmetric", "asymmetric", "act-order", "one group"],
)
def test_gptqmodel_reads_our_gptq(options: dict[str, Any], tmp_path: Path) -> None:
    require("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    layer, weight = write(tmp_path / "out", **options)
    recipe = make_recipe(**options)
    linear = TorchLinear(4, options["group_size"], recipe.symmetric, recipe.desc_act, INPUTS, OUTPUTS)
    linear.load_state_dict(layer, strict=True)
    convert_gptq_v1_to_v2_format_module(linear, bits=4, pack_dtype=torch.int32)
    linear.post_init()
    found = linear.dequantize_weight().T
    torch.testing.assert_close(found.float(), weight, rtol=2e-3, atol=0)  # it multiplies in float16


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_gptqmodel_reads_our_awq(group_size: int, tmp_path: Path) -> None:
    require("gptqmodel")
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    layer, weight = write(tmp_path / "out", to="awq", group_size=group_size)
    size = INPUTS if group_size == -1 else group_size
    found = dequantize_gemm(layer["qweight"], layer["qzeros"], layer["scales"], bits=4, group_size=size).T
    torch.testing.assert_close(found.float(), weight, rtol=2e-3, atol=0)
