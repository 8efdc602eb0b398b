"""Half-precision copies of weights for rollouts: the bits of autocast's own casts, and a model that is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models.families import make_model
from peft import LoraConfig, get_peft_model
from torch import nn
from trainers import OPTIONS, make_trainer

from hf_paged.integrations.trl import attach
from hf_paged.integrations.trl.shadow import Shadow

IDS = torch.tensor([[3, 9, 27, 81, 5]])


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=IDS).logits


def tied() -> Any:
    return make_model("Llama", tie_word_embeddings=True)


def lora() -> Any:
    model = get_peft_model(make_model("Qwen2"), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    return model.eval()


@pytest.mark.parametrize("make", [tied, lora, lambda: make_model("Qwen2")], ids=["tied", "LoRA", "with biases"])
def test_the_same_bits(make: Any) -> None:
    model = make()
    shadow, before = Shadow(torch.bfloat16), dict(model.named_parameters())
    for _ in range(2):
        expected = logits_of(model)
        with shadow.cast(model):
            linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
            assert {module.weight.dtype for module in linears} == {torch.bfloat16}
            assert {p.dtype for m in linears for p in m._parameters.values() if p is not None} == {torch.bfloat16}
            assert model.get_input_embeddings().weight.dtype == torch.float32
            places = [module.weight.data_ptr() for module in linears]
            assert torch.equal(logits_of(model), expected)
        after = dict(model.named_parameters())
        assert all(after[name] is parameter for name, parameter in before.items())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data.mul_(1.01)  # as fused optimizers do: no version counter tells
    with shadow.cast(model):
        assert [m.weight.data_ptr() for m in model.modules() if isinstance(m, nn.Linear)] == places


def test_parameters_come_back_after_an_exception_and_new_ones_are_taken() -> None:
    model = tied()
    shadow, before = Shadow(torch.bfloat16), model.lm_head.weight
    with pytest.raises(KeyError), shadow.cast(model):
        raise KeyError
    assert model.lm_head.weight is before is model.model.embed_tokens.weight
    model.resize_token_embeddings(90)
    expected = logits_of(model)
    with shadow.cast(model):
        assert torch.equal(logits_of(model), expected) and expected.shape[-1] == 90


def test_rollouts_are_those_without_it(tmp_path: Path) -> None:
    """Trained a little in between; the optimizer sees its own parameters."""
    completions = []
    for shadow in (False, True):
        (tmp_path / str(shadow)).mkdir()
        torch.manual_seed(0)
        trainer = make_trainer("GRPO", tmp_path / str(shadow), bf16=True, generation_kwargs={"seed": 5})
        attach(trainer, shadow=shadow, **OPTIONS)
        assert (trainer.vllm_generation._shadow is not None) == shadow
        trainer.train()
        found = trainer.vllm_generation.generate([[1, 2, 3], [1, 2, 3], [7, 8]], None, 1, None)
        completions.append(found[1:3])
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert completions[0] == completions[1]


def test_without_autocast_there_is_nothing_to_copy(tmp_path: Path) -> None:
    trainer = make_trainer("GRPO", tmp_path)
    attach(trainer, shadow=True, **OPTIONS)
    assert trainer.vllm_generation._shadow is None
