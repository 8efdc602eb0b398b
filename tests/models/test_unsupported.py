"""Models that cannot be paged are refused in words, and left as they were; generate() serves them its own way."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers
from families import VOCAB, make_model, make_prompts, stock_greedy

import hf_paged
from hf_paged import SamplingParams, UnsupportedModelError
from hf_paged.model import selfcheck

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def t5() -> Any:
    config = transformers.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config)


def mamba() -> Any:
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, state_size=4, num_hidden_layers=2)
    )


def qwen3_next() -> Any:
    config = transformers.Qwen3NextConfig(
        **SMALL | {"layer_types": ["linear_attention", "full_attention"]},
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    return transformers.Qwen3NextForCausalLM(config)


def lfm2() -> Any:
    return transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**SMALL, full_attn_idxs=[1]))


def minimax() -> Any:
    return transformers.MiniMaxForCausalLM(
        transformers.MiniMaxConfig(**SMALL, head_dim=8, num_local_experts=2, block_size=8)
    )


def bloom() -> Any:
    return transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)
    )


def falcon() -> Any:
    return transformers.FalconForCausalLM(
        transformers.FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    )


def stablelm() -> Any:
    return transformers.StableLmForCausalLM(transformers.StableLmConfig(**SMALL))


def llama4() -> Any:
    config = transformers.Llama4TextConfig(
        **SMALL, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=16
    )
    return transformers.Llama4ForCausalLM(config)


REFUSED = [
    (t5, "T5ForConditionalGeneration", "encoder-decoder"),
    (mamba, "MambaForCausalLM", "state"),
    (qwen3_next, "Qwen3NextForCausalLM", "state"),
    (lfm2, "Lfm2ForCausalLM", "conv"),
    (minimax, "MiniMaxForCausalLM", "linear_attention"),
    (bloom, "BloomForCausalLM", "attention interface"),
    (falcon, "FalconForCausalLM", "attention interface"),
    (stablelm, "StableLmForCausalLM", "attention interface"),
    (llama4, "Llama4ForCausalLM", "chunked_attention"),
]


@pytest.mark.parametrize(("make", "name", "reason"), REFUSED, ids=[name for _, name, _ in REFUSED])
def test_wrap_refuses(make: Any, name: str, reason: str) -> None:
    model = make().eval()
    kind, contents = type(model), set(model.__dict__)
    with pytest.raises(UnsupportedModelError, match=name) as raised:
        hf_paged.wrap(model)
    assert reason in str(raised.value)
    assert "generate()" in str(raised.value), "it must say what still works"
    assert type(model) is kind
    assert set(model.__dict__) == contents
    model.generate(torch.tensor([[5, 6, 7]]), do_sample=False, max_new_tokens=2)


def test_the_error_is_a_value_error() -> None:
    assert issubclass(UnsupportedModelError, ValueError)


def test_wrap_refuses_prompt_learning() -> None:
    peft = pytest.importorskip("peft")
    base = make_model("Llama")
    model = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    kinds = type(model), type(base)
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM.*virtual tokens"):
        hf_paged.wrap(model)
    assert (type(model), type(base)) == kinds
    assert "_hf_paged" not in model.__dict__
    assert "_hf_paged" not in base.__dict__


def test_prompt_learning_added_to_a_wrapped_model_is_not_ignored() -> None:
    peft = pytest.importorskip("peft")
    base = hf_paged.wrap(make_model("Llama"), num_pages=64)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    twin_base = make_model("Llama")
    torch.manual_seed(0)
    twin = peft.get_peft_model(twin_base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    with torch.no_grad():
        for prompt in (model.prompt_encoder, twin.prompt_encoder):
            prompt["default"].embedding.weight.copy_(torch.linspace(-3, 3, 4 * 64).view(4, 64))
    ids = torch.tensor(make_prompts([9]))
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 12}
    expected = twin.generate(**call)
    assert not torch.equal(expected, twin_base.generate(**call)), "the virtual tokens must matter"
    assert torch.equal(model.generate(**call), expected)


def test_inputs_prepared_in_a_way_of_their_own_are_not_ignored() -> None:
    """A subclass may feed the model something else than its input ids; the engine would not know."""

    class Backwards(transformers.LlamaForCausalLM):
        def prepare_inputs_for_generation(self, input_ids: Any, **kwargs: Any) -> Any:
            prepared = super().prepare_inputs_for_generation(input_ids, **kwargs)
            prepared["input_ids"] = (prepared["input_ids"] + 1) % VOCAB
            return prepared

    def make() -> Any:
        torch.manual_seed(0)
        model = Backwards(make_model("Llama").config).eval()
        model.generation_config.eos_token_id = None
        return model

    prompt = make_prompts([9])[0]
    expected = stock_greedy(make(), prompt, 8)
    assert stock_greedy(hf_paged.wrap(make(), num_pages=64), prompt, 8) == expected


@pytest.mark.parametrize("value", [None, 3, "gpt2", torch.nn.Parameter(torch.zeros(2))])
def test_wrap_takes_modules_only(value: Any) -> None:
    with pytest.raises(TypeError, match="transformers model"):
        hf_paged.wrap(value)


def test_wrap_refuses_a_module_that_does_not_generate() -> None:
    module = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match="Linear"):
        hf_paged.wrap(module)
    assert type(module) is torch.nn.Linear


def test_wrap_refuses_weights_on_the_meta_device() -> None:
    config = make_model("Llama").config
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    with pytest.raises(UnsupportedModelError, match="meta"):
        hf_paged.wrap(model)


# ---- what no config tells ----------------------------------------------------------------------------------


class RunningMean(torch.nn.Module):
    """A layer that adds the mean of all hidden states so far: a state between tokens that is not keys and values."""

    def __init__(self, layer: torch.nn.Module, weight: float) -> None:
        super().__init__()
        self.layer, self.weight = layer, weight

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        count = torch.arange(1, hidden_states.shape[1] + 1)[None, :, None]
        mean = hidden_states.cumsum(1) / count
        return self.layer(hidden_states + self.weight * mean, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)


class Sideways(torch.nn.Module):
    """A layer that shows each token its right neighbour: what no causal generation can page."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.layer(hidden_states + hidden_states.roll(-1, 1), *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)


def diffllama() -> Any:
    """Each of its layers calls attention twice."""
    return make_model("DiffLlama")


def recurrent() -> Any:
    model = make_model("Llama")
    model.model.layers[1] = RunningMean(model.model.layers[1], 1.0)
    return model


def faintly_recurrent() -> Any:
    """Enough to change tokens now and then, a hundredth of what moves the logits."""
    model = make_model("Llama")
    model.model.layers[2] = RunningMean(model.model.layers[2], 0.01)
    return model


def sideways() -> Any:
    model = make_model("Llama")
    model.model.layers[1] = Sideways(model.model.layers[1])
    return model


HIDDEN = [recurrent, faintly_recurrent, sideways, diffllama]


@pytest.mark.parametrize("make", HIDDEN, ids=[make.__name__ for make in HIDDEN])
def test_the_self_check_refuses_in_generate_many(make: Any) -> None:
    model = hf_paged.wrap(make(), num_pages=64)
    with pytest.raises(UnsupportedModelError, match="ForCausalLM cannot be paged"):
        model.generate_many([[5, 6, 7]], SamplingParams(temperature=0.0, max_tokens=2))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("make", HIDDEN, ids=[make.__name__ for make in HIDDEN])
def test_generate_serves_them_by_the_stock_path(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    prompt = make_prompts([9])[0]
    expected = stock_greedy(make(), prompt, 6)
    model = hf_paged.wrap(make(), num_pages=64)
    with caplog.at_level(logging.WARNING, logger="hf_paged"):
        assert stock_greedy(model, prompt, 6) == expected
        assert stock_greedy(model, prompt, 6) == expected
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("hf_paged")]
    assert len(lines) == 1, lines
    assert "without paging" in lines[0]


def test_a_model_that_fails_in_the_self_check_still_generates(caplog: pytest.LogCaptureFixture) -> None:
    """A forward that cannot take a packed batch at all, whatever it raises, is the stock path's business."""

    class Picky(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Any = None, position_ids: Any = None, use_cache: Any = None, **kwargs: Any) -> Any:
            if use_cache is False:
                raise RuntimeError("this model only runs with a cache")
            return super().forward(input_ids, position_ids=position_ids, use_cache=use_cache, **kwargs)

    config = make_model("Llama").config
    torch.manual_seed(0)
    model = Picky(config).eval()
    model.generation_config.eos_token_id = None
    prompt = make_prompts([9])[0]
    expected = stock_greedy(model, prompt, 6)
    hf_paged.wrap(model, num_pages=64)
    assert stock_greedy(model, prompt, 6) == expected
    with pytest.raises(UnsupportedModelError, match="Picky"):
        model.generate_many([prompt], SamplingParams(max_tokens=2))


@pytest.mark.parametrize("family", ["Llama", "Mixtral", "Gemma2", "GptOss", "DeepseekV3"])
def test_right_models_pass_the_self_check_with_room_to_spare(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 they differ by a millionth."""
    monkeypatch.setattr(selfcheck, "FLOAT32_LIMIT", 1e-5)
    model = hf_paged.wrap(make_model(family), num_pages=64)
    assert model.engine.executor.layout.layers


@pytest.mark.parametrize("family", ["DeepseekV3", "GptOss", "Mixtral"])
@pytest.mark.parametrize("seed", range(12))
def test_half_precision_routers_are_not_taken_for_state(family: str, seed: int) -> None:
    """A rounding can send a token to another expert, which changes that row's logits and says nothing of the model."""
    model = hf_paged.wrap(make_model(family, seed=seed).to(torch.bfloat16), num_pages=64)
    assert model.engine.executor.layout.layers


@pytest.mark.parametrize("make", [recurrent, sideways], ids=["recurrent", "sideways"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_self_check_refuses_in_half_precision(make: Any, dtype: torch.dtype) -> None:
    model = hf_paged.wrap(make().to(dtype), num_pages=64)
    with pytest.raises(UnsupportedModelError, match="cannot be paged"):
        _ = model.engine


def test_a_model_of_nan_is_told_so() -> None:
    model = make_model("Llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(UnsupportedModelError, match="not finite: look for NaN"):
        hf_paged.wrap(model).generate_many([[1, 2, 3]], SamplingParams(max_tokens=2))
