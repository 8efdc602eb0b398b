"""Adapters on quantised layers, and what can be saved of models that have such layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models.families import make_prompts, stock_greedy
from peft import LoraConfig, PeftModel, get_peft_model
from quantization.writers import CHECKPOINTS, write_checkpoint

import hf_paged
from hf_paged.quantization.linear import QuantizedLinear

PROMPTS = make_prompts([5, 9, 17])
GREEDY = hf_paged.SamplingParams(temperature=0.0, max_tokens=12)
NAMES = ["awq", "gptq, act-order", "compressed, asymmetric", "fp8 in blocks", "compressed fp8, a scale per output"]


def load(folder: Path, name: str) -> Any:
    write_checkpoint(folder, *CHECKPOINTS[name])
    return hf_paged.load(folder, device="cpu")


def greedy_tokens(model: Any) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in model.generate_many(PROMPTS, GREEDY)]


def train(model: Any) -> list[float]:
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
    return losses


@pytest.mark.filterwarnings("error:Unsupported layer type")
@pytest.mark.parametrize("target", [["q_proj", "down_proj"], "all-linear"])
@pytest.mark.parametrize("name", NAMES)
def test_adapters_are_trained_and_generate(name: str, target: Any, tmp_path: Path) -> None:
    model = load(tmp_path, name)
    adapted = hf_paged.wrap(get_peft_model(model, LoraConfig(r=4, target_modules=target, task_type="CAUSAL_LM")))
    on_top = sum(isinstance(getattr(module, "base_layer", None), QuantizedLinear) for module in adapted.modules())
    assert on_top == (4 if target != "all-linear" else 14)
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    before = greedy_tokens(adapted)
    losses = train(adapted)
    assert losses[-1] < losses[0]
    after = greedy_tokens(adapted)
    assert after != before and after == [stock_greedy(adapted, prompt, 12) for prompt in PROMPTS]

    with adapted.disable_adapter():
        assert greedy_tokens(adapted) == before
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(hf_paged.load(tmp_path, device="cpu"), str(tmp_path / "adapter"))
    assert greedy_tokens(hf_paged.wrap(again)) == after


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("name", ["awq", "fp8 in blocks"])
def test_merging_an_adapter_is_refused(name: str, safe: bool, tmp_path: Path) -> None:
    model = load(tmp_path, name)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    before = [layer.dequantize(torch.float32) for layer in layers]
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(RuntimeError, match="quantization=None to merge"):
        adapted.merge_and_unload(safe_merge=safe)
    assert all(torch.equal(layer.dequantize(torch.float32), w) for layer, w in zip(layers, before, strict=True))


@pytest.mark.parametrize("name", ["gptq", "fp8 in blocks"])
def test_saving_layers_that_nobody_could_load_is_refused(name: str, tmp_path: Path) -> None:
    model = load(tmp_path, name)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has quantised layers.*quantization=None"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    ids = torch.tensor(PROMPTS[:1])
    expected = model(ids).logits
    state = model.state_dict()
    other = hf_paged.load(tmp_path, device="cpu")
    other.load_state_dict(state)
    assert torch.equal(other(ids).logits, expected)


def test_adapters_that_transformers_added_can_be_saved(tmp_path: Path) -> None:
    model = load(tmp_path, "gptq")
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    assert not list((tmp_path / "adapter").glob("model*"))


def test_a_wrapper_saves_as_the_model_inside(tmp_path: Path) -> None:
    model = load(tmp_path, "gptq")
    compiled = hf_paged.wrap(torch.compile(model))
    with pytest.raises(ValueError, match="quantised layers"):
        compiled.save_pretrained(tmp_path / "saved")
