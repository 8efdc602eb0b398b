"""Adapters on top of quantised layers, single and fused, and beside what else requests ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora.adapters import GREEDY, NEW, OPTIONS, assert_idle, tokens
from models.families import make_prompts, stock_greedy
from peft import LoraConfig, PeftModel, get_peft_model
from quantization.writers import CHECKPOINTS, write_checkpoint

import hf_paged
from hf_paged import LoRARequest
from hf_paged.quantization.linear import QuantizedLinear

PROMPTS = make_prompts([5, 9, 17, 12])
NAMES = ["awq", "compressed fp8, a scale per output"]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_adapters_on_quantised_layers(name: str, fused: bool, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    write_checkpoint(checkpoint, *CHECKPOINTS[name])
    requests: dict[str, LoRARequest] = {}
    for number, key in enumerate("ab", start=1):
        targets: Any = "all-linear" if key == "a" else ["q_proj", "down_proj"]
        adapted = get_peft_model(
            hf_paged.load(checkpoint, device="cpu"), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
        )
        torch.manual_seed(number)
        with torch.no_grad():
            for label, parameter in adapted.named_parameters():
                if "lora_" in label:
                    parameter.normal_(std=0.1)
        adapted.save_pretrained(tmp_path / key)
        requests[key] = LoRARequest(key, number, str(tmp_path / key))

    names = ["a", "b", None, "a"]
    expected = []
    for prompt, key in zip(PROMPTS, names, strict=True):
        base = hf_paged.load(checkpoint, device="cpu")
        own = base if key is None else PeftModel.from_pretrained(base, requests[key].lora_path)
        expected.append(stock_greedy(hf_paged.unwrap(own), prompt, NEW))
    model = hf_paged.load(checkpoint, device="cpu", **OPTIONS, fuse_linear=fused)
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    outputs = model.generate_many(PROMPTS, GREEDY, lora_request=[requests.get(key) for key in names])
    assert tokens(outputs) == expected
    assert bool(model.engine.executor._fused) == fused
    assert_idle(model)


def test_structured_output_with_adapters(smollm2_tokenizer: Any, tiny_checkpoint: str, tmp_path: Path) -> None:
    pytest.importorskip("xgrammar")
    from lora.adapters import save_adapter
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    adapter = LoRARequest("a", 1, str(save_adapter(tmp_path, base, r=4, target_modules="all-linear")))
    model = hf_paged.wrap(AutoModelForCausalLM.from_pretrained(tiny_checkpoint), **OPTIONS)
    form = hf_paged.StructuredOutputsParams(json={"type": "object", "properties": {"n": {"enum": [1, 2]}}})
    sampling = hf_paged.SamplingParams(max_tokens=40, temperature=0.0, structured_outputs=form)
    for output in model.generate_many(["a", "b"], sampling, lora_request=[adapter, None]):
        text = output.outputs[0].text
        assert output.outputs[0].finish_reason == "length" or isinstance(json.loads(text), dict)
        assert text.lstrip().startswith("{")
