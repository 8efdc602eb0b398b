"""hf_paged.load: whole checkpoints of tiny models, and the tokens, gradients and adapters that come of them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models.families import make_model, make_prompts, stock_greedy
from quantization import writers
from quantization.writers import CHECKPOINTS, awq, change_config, gptq, write_checkpoint
from safetensors.torch import load_file

import hf_paged
from hf_paged.quantization.fp8 import FP8Linear
from hf_paged.quantization.w4 import W4Linear

PROMPTS = make_prompts([5, 9, 17])
load = functools.partial(hf_paged.load, device="cpu")
GREEDY = hf_paged.SamplingParams(temperature=0.0, max_tokens=12)


def greedy_tokens(model: Any) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in model.generate_many(PROMPTS, GREEDY)]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_greedy_tokens_are_the_dequantised_models(name: str, tmp_path: Path) -> None:
    meant = write_checkpoint(tmp_path, *CHECKPOINTS[name])
    model = load(tmp_path)
    layers = [module for module in model.modules() if isinstance(module, W4Linear | FP8Linear)]
    assert len(layers) == 14 and type(model.lm_head) is torch.nn.Linear
    expected = [stock_greedy(meant, prompt, 12) for prompt in PROMPTS]
    assert greedy_tokens(model) == expected
    ids = torch.tensor(PROMPTS[:1])
    torch.testing.assert_close(model(ids).logits, meant(ids).logits, rtol=1e-3, atol=1e-3)


FAMILIES_OF_LINEAR_LAYERS = [
    "Qwen2",
    "Qwen3",
    "Mistral",
    "Gemma2",
    "Gemma3",
    "Phi3",
    "Olmo2",
    "Cohere",
    "Glm4",
    "Granite",
]


@pytest.mark.parametrize("family", FAMILIES_OF_LINEAR_LAYERS)
def test_other_families(family: str, tmp_path: Path) -> None:
    """With their biases, tied heads, and buffers that no checkpoint holds."""
    meant = write_checkpoint(tmp_path, *gptq(act_order=True), model=make_model(family))
    model = load(tmp_path)
    ids = torch.tensor(PROMPTS[:1])
    torch.testing.assert_close(model(ids).logits, meant(ids).logits, rtol=1e-3, atol=1e-3)
    assert {name for name, _ in model.named_buffers()} > {name for name, _ in meant.named_buffers()}
    assert all(torch.equal(buffer, model.get_buffer(name)) for name, buffer in meant.named_buffers())
    assert all(greedy_tokens(model))


def test_groups_of_128(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    meant = write_checkpoint(tmp_path, *gptq(128), **sizes)
    assert greedy_tokens(load(tmp_path)) == [stock_greedy(meant, prompt, 12) for prompt in PROMPTS]


def test_shards_tied_weights_and_biases(tmp_path: Path) -> None:
    options = {"tie_word_embeddings": True, "attention_bias": True}
    meant = write_checkpoint(tmp_path, *awq(), shards=3, **options)
    with torch.no_grad():
        for name, parameter in meant.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for file in set(index.values()):
        tensors = load_file(tmp_path / file)
        biases = {name: meant.get_parameter(name).data for name in tensors if name.endswith("bias")}
        writers.save_file(tensors | biases, tmp_path / file)
    model = load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert greedy_tokens(model) == [stock_greedy(meant, prompt, 12) for prompt in PROMPTS]


def test_layers_that_are_not_quantised_stay_as_they_are(tmp_path: Path) -> None:
    write, config = awq()
    keep = ("lm_head", "down_proj", "layers.1.self_attn.q_proj")
    meant = write_checkpoint(tmp_path, write, config | {"modules_to_not_convert": list(keep)}, keep=keep)
    model = load(tmp_path)
    plain = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert plain == {"lm_head", "model.layers.1.self_attn.q_proj"} | {
        f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)
    }
    assert greedy_tokens(model) == [stock_greedy(meant, prompt, 12) for prompt in PROMPTS]


def test_a_quantised_head(tmp_path: Path) -> None:
    meant = write_checkpoint(tmp_path, *gptq(), keep=())
    model = load(tmp_path)
    assert isinstance(model.lm_head, W4Linear)
    assert greedy_tokens(model) == [stock_greedy(meant, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("fill", [0.0, 1.5])
def test_biases_that_the_model_does_not_have(fill: float, tmp_path: Path) -> None:
    """Early GPTQ gave every layer a bias of zeros: those cost nothing. Others are meant."""
    write, config = gptq()

    def with_bias(inputs: int, outputs: int, seed: int) -> Any:
        layer, weight = write(inputs, outputs, seed)
        return layer | {"bias": torch.full((outputs,), fill, dtype=torch.float16)}, weight

    write_checkpoint(tmp_path, with_bias, config)
    down = load(tmp_path).model.layers[0].mlp.down_proj
    assert (down.bias is None) if fill == 0.0 else torch.equal(down.bias, torch.full((64,), fill))


def test_options_in_a_file_of_their_own(tmp_path: Path) -> None:
    write, config = gptq()
    meant = write_checkpoint(tmp_path, write, config)
    change_config(tmp_path, quantization_config=None)
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "desc_act": False}))
    assert greedy_tokens(load(tmp_path)) == [stock_greedy(meant, prompt, 12) for prompt in PROMPTS]


def test_none_dequantises(tmp_path: Path) -> None:
    meant = write_checkpoint(tmp_path, *gptq(act_order=True))
    model = load(tmp_path, quantization=None)
    assert not any(isinstance(module, W4Linear) for module in model.modules())
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in meant.named_parameters())
    assert model.config.quantization_config is None
    model.save_pretrained(tmp_path / "plain")
    assert greedy_tokens(load(tmp_path / "plain")) == greedy_tokens(model)


def test_none_dequantises_fp8(tmp_path: Path) -> None:
    meant = write_checkpoint(tmp_path, *CHECKPOINTS["fp8 in small blocks"])
    model = load(tmp_path, quantization=None)
    for name, weight in meant.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_on_the_fly(dtype: str, tmp_path: Path) -> None:
    """Every layer but the head, with a scale per output, to the precision that four bits of mantissa have."""
    meant = writers.tiny_llama(attention_bias=True)
    meant.save_pretrained(tmp_path)
    model = load(tmp_path, dtype=dtype, quantization="fp8")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FP8Linear)}
    assert len(layers) == 14 and type(model.lm_head) is torch.nn.Linear
    for name, layer in layers.items():
        weight = meant.get_parameter(f"{name}.weight").detach()
        assert float((layer.dequantize(torch.float32) - weight).norm()) < 0.04 * float(weight.norm())
        assert layer.codes.element_size() == 1 and layer.scales.shape == (layer.out_features, 1)
        assert (layer.bias is None) == (".mlp." in name)
    dequantised = load(tmp_path, dtype=dtype)
    for name, layer in layers.items():
        dequantised.get_submodule(name).weight.data.copy_(layer.dequantize(dequantised.dtype))
    if dtype == "float32":
        assert greedy_tokens(model) == greedy_tokens(dequantised)
    assert all(len(tokens) == 12 for tokens in greedy_tokens(model))


def test_dtype_and_buffers(tmp_path: Path) -> None:
    """Activations are in the dtype asked for; rotary frequencies are float32 and what transformers computes."""
    scaled = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
    scaled |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    meant = write_checkpoint(tmp_path, *awq(), rope_parameters=scaled)
    model = load(tmp_path, dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype is torch.bfloat16
    assert model.model.layers[0].mlp.up_proj.scales.dtype is torch.bfloat16
    for name in ("inv_freq", "original_inv_freq"):
        assert torch.equal(getattr(model.model.rotary_emb, name), getattr(meant.model.rotary_emb, name))
    assert all(len(tokens) == 12 for tokens in greedy_tokens(model))


def test_options_reach_wrap(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, *awq())
    model = load(tmp_path, page_size=8, max_num_seqs=3)
    assert model.engine.executor.page_size == 8 and model.engine.executor.max_num_seqs == 3


def test_a_generation_config_is_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, *awq())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "temperature": 0.5}))
    assert load(tmp_path).generation_config.eos_token_id == 7


def test_checkpoints_that_are_not_quantised_load_too(tmp_path: Path) -> None:
    meant = writers.tiny_llama()
    meant.save_pretrained(tmp_path)
    for quantization in ("auto", None):
        model = load(tmp_path, quantization=quantization)
        assert greedy_tokens(model) == [stock_greedy(meant, prompt, 12) for prompt in PROMPTS]


def test_gradients_come_through_quantised_layers(tmp_path: Path) -> None:
    meant = write_checkpoint(tmp_path, *gptq(act_order=True))
    model = load(tmp_path)
    ids = torch.tensor(PROMPTS[2:])
    for each in (model, meant):
        each(input_ids=ids, labels=ids).loss.backward()
    found, expected = (each.model.embed_tokens.weight.grad for each in (model, meant))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert float(expected.norm()) > 0
