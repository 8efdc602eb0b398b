"""hf_paged.load: what is wrong with a checkpoint is said by name, before or while it is read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models.families import make_model
from quantization import writers
from quantization.writers import (
    AWQ_CONFIG,
    CHECKPOINTS,
    DEEPSEEK_CONFIG,
    GPTQ_CONFIG,
    awq,
    change_config,
    change_tensors,
    gptq,
    write_checkpoint,
)
from safetensors.torch import load_file

import hf_paged

load = functools.partial(hf_paged.load, device="cpu")

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


def test_experts_that_are_quantised_as_they_are_stacked_are_refused(tmp_path: Path) -> None:
    mixture = make_model("Qwen3Moe")
    write, config = awq()
    write_checkpoint(tmp_path, write, config, model=mixture)

    def quantize(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith("experts.gate_up_proj")]:
            del tensors[name]
            layer, _ = write(64, 96, 0)
            tensors.update({f"{name}.{part}": tensor for part, tensor in layer.items()})

    change_tensors(tmp_path, quantize)
    with pytest.raises(ValueError, match=r"lacks.*gate_up_proj.*Experts are read where.*one by one"):
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
        {"quantization_config": {"quant_method": "hqq", "quant_config": {}}},
        r"quantised with 'hqq'.*from_pretrained.*hf_paged\.wrap",
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
