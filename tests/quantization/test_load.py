"""hf_paged.load: whole checkpoints of a tiny Llama, and what is wrong with them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models.families import make_model, make_prompts, stock_greedy
from quantization import writers
from quantization.writers import (
    AWQ_CONFIG,
    DEEPSEEK_CONFIG,
    GPTQ_CONFIG,
    WriteLayer,
    fp8_config,
    fp8_writer,
    layer_writer,
    save_tensors,
    w4_config,
    write_checkpoint,
)
from safetensors.torch import load_file

import hf_paged
from hf_paged.quantization.fp8 import FP8Linear
from hf_paged.quantization.w4 import W4Linear

PROMPTS = make_prompts([5, 9, 17])
load = functools.partial(hf_paged.load, device="cpu")
GREEDY = hf_paged.SamplingParams(temperature=0.0, max_tokens=12)


def greedy_tokens(model: Any) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in model.generate_many(PROMPTS, GREEDY)]


def awq(size: int = 32, **options: bool) -> tuple[WriteLayer, dict[str, Any]]:
    return layer_writer(writers.awq, size, **options), AWQ_CONFIG | {"group_size": size}


def gptq(size: int = 32, version: int = 1, **options: bool) -> tuple[WriteLayer, dict[str, Any]]:
    config = {"group_size": size, "checkpoint_format": "gptq_v2" if version == 2 else "gptq"}
    config["desc_act"] = options.get("act_order", False)
    return layer_writer(lambda weight: writers.gptq(weight, version), size, **options), GPTQ_CONFIG | config


def packed(size: int = 32, *, symmetric: bool = True, act_order: bool = False) -> tuple[WriteLayer, dict[str, Any]]:
    def write(weight: writers.Weight) -> writers.Layer:
        return writers.pack_quantized(weight, symmetric=symmetric, act_order=act_order)

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
    plain = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
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
        assert layer.weight.element_size() == 1 and layer.scales.shape == (layer.out_features, 1)
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


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("name", ["awq", "fp8 in blocks"])
def test_adapters_on_quantised_layers_are_trained_and_generate(name: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.layer import Linear

    write_checkpoint(tmp_path, *CHECKPOINTS[name])
    options = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    options._register_custom_module({W4Linear: Linear, FP8Linear: Linear})
    model = hf_paged.wrap(get_peft_model(load(tmp_path), options))
    before = greedy_tokens(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    ids = torch.tensor(PROMPTS[2:])
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert losses[-1] < losses[0]
    after = greedy_tokens(model)
    assert after != before and after == [stock_greedy(model, prompt, 12) for prompt in PROMPTS]


# ---- what is wrong -------------------------------------------------------------------------------------------------


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_tensors(folder, tensors)


DOWN = "model.layers.1.mlp.down_proj"

WRONG_TENSORS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a shape": (
        lambda t: t.update({f"{DOWN}.qweight": t[f"{DOWN}.qweight"][:-1]}),
        rf"model\.safetensors: the tensor {DOWN}\.qweight must have the shape \[16, 64\].*and has \[15, 64\]",
    ),
    "a dtype": (
        lambda t: t.update({f"{DOWN}.qzeros": t[f"{DOWN}.qzeros"].long()}),
        rf"{DOWN}\.qzeros must be of dtype int32, and is int64",
    ),
    "scales": (lambda t: t.pop(f"{DOWN}.scales"), rf"lacks tensors of LlamaForCausalLM: {DOWN}\.scales$"),
    "a norm": (lambda t: t.pop("model.norm.weight"), r"lacks .*model\.norm\.weight$"),
    "a norm's shape": (
        lambda t: t.update({"model.norm.weight": torch.ones(3)}),
        r"model\.norm\.weight must have the shape \[64\].*has \[3\]",
    ),
    "another name": (
        lambda t: t.update({"model.final_norm.weight": t.pop("model.norm.weight")}),
        r"lacks .*model\.norm\.weight; tensors without a place in the model: model\.final_norm\.weight",
    ),
    "groups": (
        lambda t: t.update({f"{DOWN}.g_idx": torch.zeros(128, dtype=torch.int32)}),
        rf"model\.safetensors: the layer {DOWN} cannot be read: g_idx must name each of 4 groups 32 times",
    ),
}


@pytest.mark.parametrize("what", WRONG_TENSORS)
def test_wrong_tensors_are_named(what: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, *gptq())
    change, message = WRONG_TENSORS[what]
    change_tensors(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_quantised_experts_are_refused(tmp_path: Path) -> None:
    mixture = make_model("Mixtral")
    mixture.save_pretrained(tmp_path)
    write, config = awq()
    change_config(tmp_path, quantization_config=config)

    def quantize(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if ".w1.weight" in name or "q_proj.weight" in name]:
            outputs, inputs = tensors.pop(name).shape
            layer, _ = write(inputs, outputs, 0)
            tensors.update({name.replace("weight", part): tensor for part, tensor in layer.items()})

    change_tensors(tmp_path, quantize)
    with pytest.raises(ValueError, match=r"w1\.qweight.*Quantised experts of a mixture are not supported"):
        load(tmp_path)


def test_tensors_without_a_place_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_checkpoint(tmp_path, *gptq())
    change_tensors(tmp_path, lambda t: t.update({"more.weight": torch.ones(2)}))
    change_tensors(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load(tmp_path)
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("hf_paged")]
    assert "more.weight" in said and "inv_freq" not in said


def test_an_fp8_weight_without_its_scale_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, *CHECKPOINTS["fp8 in blocks"])
    change_tensors(tmp_path, lambda t: t.pop(f"{DOWN}.weight_scale_inv"))
    with pytest.raises(ValueError, match=rf"lacks tensors of LlamaForCausalLM: {DOWN}\.weight_scale_inv$"):
        load(tmp_path)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_truncated_file_is_named(shards: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, *awq(), shards=shards)
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{file.name} is truncated or corrupt"):
        load(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_cut_off_is_named(file: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, *awq(), shards=2)
    (tmp_path / file).write_text((tmp_path / file).read_text()[:-5])
    with pytest.raises(ValueError, match=rf"{file} is not valid JSON"):
        load(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, *awq(), shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00003\.safetensors is missing"):
        load(tmp_path)


def test_a_shard_that_lacks_what_the_index_says_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, *awq(), shards=2)
    file = tmp_path / "model-00001-of-00002.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    writers.save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    with pytest.raises(ValueError, match=f"{file.name}: the tensor {name} is missing"):
        load(tmp_path)


WRONG_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another format's words": ({"quantization_config": AWQ_CONFIG}, r"qweight must have the shape \[64, 8\]"),
    "group size": ({"quantization_config": GPTQ_CONFIG | {"group_size": 64}}, r"qzeros must have the shape \[1, 8\]"),
    "groups that do not fit": ({"quantization_config": GPTQ_CONFIG | {"group_size": 48}}, "multiple of 8 and of the"),
    "bits": ({"quantization_config": GPTQ_CONFIG | {"bits": 8}}, r"bits=8, and supported are: 4"),
    "no options": ({"quantization_config": "gptq"}, r"config\.json: quantization_config must be an object"),
    "tied": ({"tie_word_embeddings": True}, "lm_head is quantised, and by config.json its weight is tied"),
    "another model": ({"hidden_size": 32, "head_dim": 16}, r"must have the shape"),
    "fp8": ({"quantization_config": DEEPSEEK_CONFIG}, "none of the model's linear layers has tensors of the format"),
    "a quantizer of transformers": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        r"quantised with 'bitsandbytes'.*from_pretrained.*hf_paged\.wrap",
    ),
}


@pytest.mark.parametrize("what", WRONG_CONFIGS)
def test_configs_that_do_not_go_with_the_tensors(what: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, *gptq(), keep=())
    changes, message = WRONG_CONFIGS[what]
    change_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_plain_weights_under_a_quantization_config(tmp_path: Path) -> None:
    writers.tiny_llama().save_pretrained(tmp_path)
    change_config(tmp_path, quantization_config=AWQ_CONFIG)
    with pytest.raises(ValueError, match="none of the model's linear layers has tensors of the format"):
        load(tmp_path)


def test_a_plain_checkpoint_that_lacks_a_tensor(tmp_path: Path) -> None:
    writers.tiny_llama().save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"lacks tensors of LlamaForCausalLM: model\.norm\.weight"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"quantization": "gptq"}, ValueError, "is quantised with awq, and quantization='gptq' was asked for"),
        ({"quantization": "awk"}, ValueError, "quantization must be None"),
        ({"dtype": "int8"}, ValueError, "dtype must be"),
        ({"dtype": "floaty"}, ValueError, "dtype must be"),
        ({"pagesize": 8}, TypeError, "pagesize"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, *awq())
    with pytest.raises(error, match=message):
        load(tmp_path, **arguments)


def test_a_format_asked_of_a_plain_checkpoint(tmp_path: Path) -> None:
    writers.tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not quantised, and quantization='awq'"):
        load(tmp_path, quantization="awq")


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load(tmp_path / "nowhere")
