"""Models with bitsandbytes' layers: through from_pretrained and wrap, through load, and trained with adapters."""

from __future__ import annotations

import builtins
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models.families import make_prompts, stock_greedy
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from quantization.writers import awq, tiny_llama, write_checkpoint
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import hf_paged
from hf_paged.model import introspect, selfcheck
from hf_paged.model.fuse import find_groups
from hf_paged.quantization.bitsandbytes import computes_coarsely, why_uncapturable

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
from bitsandbytes.nn import Linear4bit, Linear8bitLt  # noqa: E402

PROMPTS = make_prompts([5, 9, 17])
GREEDY = hf_paged.SamplingParams(temperature=0.0, max_tokens=12)
float32, bfloat16 = torch.float32, torch.bfloat16
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": float32}
CONFIGS: dict[str, dict[str, Any]] = {
    "nf4": NF4,
    "nf4, double": NF4 | {"bnb_4bit_use_double_quant": True},
    "fp4": NF4 | {"bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
    "int8, no outliers": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """LLM.int8() warns in every layer's forward that it casts."""
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def from_pretrained(folder: Path, name: str, **changes: Any) -> Any:
    """In training mode: in eval mode a stock forward on some CPUs packs weights, and computes otherwise from then."""
    config = BitsAndBytesConfig(**(CONFIGS[name] | changes))
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=float32, device_map="cpu")
    return model.train() if "4bit" in str(CONFIGS[name]) else model


def greedy_tokens(model: Any, *, together: bool = True) -> list[list[int]]:
    batches = [PROMPTS] if together else [[prompt] for prompt in PROMPTS]
    outputs = [output for prompts in batches for output in model.generate_many(prompts, GREEDY)]
    return [list(output.outputs[0].token_ids) for output in outputs]


def stock_tokens(model: Any) -> list[list[int]]:
    return [stock_greedy(model, prompt, 12) for prompt in PROMPTS]


def layers_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Linear4bit | Linear8bitLt)]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_the_stock_models(name: str, plain: Path) -> None:
    model = from_pretrained(plain, name)
    expected = stock_tokens(model)
    kinds = [type(layer) for layer in layers_of(model)]
    wrapped = hf_paged.wrap(model)
    # What is an outlier to LLM.int8() depends on all rows of a batch.
    assert greedy_tokens(wrapped, together=name != "int8") == expected
    assert [type(layer) for layer in layers_of(wrapped)] == kinds and len(kinds) == 14
    ids = torch.tensor(PROMPTS[:1])
    found = wrapped.generate(ids, max_new_tokens=12, do_sample=False)
    assert found[0, 5:].tolist() == expected[0]
    hf_paged.unwrap(wrapped)
    assert stock_tokens(model) == expected


def test_fusing_leaves_the_layers_alone(plain: Path) -> None:
    """All but what stays an ordinary layer: of those none has another one beside it here."""
    for name in ("nf4", "int8"):
        model = from_pretrained(plain, name)
        assert find_groups(model, lambda model=model: introspect.dry_forward(model)) == []
        expected = stock_tokens(model)
        assert greedy_tokens(hf_paged.wrap(model, fuse_linear=True), together=False) == expected


# ---- what must be known of the layers --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_outliers_keep_steps_from_being_captured(name: str, plain: Path) -> None:
    reason = why_uncapturable(from_pretrained(plain, name))
    if name == "int8":
        assert reason is not None and "llm_int8_threshold" in reason
    else:
        assert reason is None
    assert why_uncapturable(tiny_llama()) is None


def test_coarse_arithmetic_is_known(plain: Path) -> None:
    found = {name: computes_coarsely(from_pretrained(plain, name)) for name in CONFIGS}
    assert found == {name: "int8" in name for name in CONFIGS}
    assert computes_coarsely(from_pretrained(plain, "nf4", bnb_4bit_compute_dtype=bfloat16))
    assert not computes_coarsely(tiny_llama())


def test_the_self_check_allows_for_coarse_arithmetic_only(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 8 bits a row depends on its neighbours' outliers: more than float32 models may differ."""
    monkeypatch.setattr(selfcheck, "FLOAT32_LIMIT", -1.0)
    assert all(greedy_tokens(hf_paged.wrap(from_pretrained(plain, "int8"))))
    with pytest.raises(hf_paged.UnsupportedModelError):
        greedy_tokens(hf_paged.wrap(from_pretrained(plain, "nf4")))


def test_weights_are_not_packed_by_our_forwards(plain: Path, tmp_path: Path) -> None:
    """On CPUs where bitsandbytes packs them in eval mode, gradients and checkpoints would be wrong from then on."""
    model = from_pretrained(plain, "nf4").eval()
    flags = [layer.support_avx512bf16_for_cpu for layer in layers_of(model)]
    before = [layer.weight.data.clone() for layer in layers_of(model)]
    for layer in layers_of(model):
        layer.support_avx512bf16_for_cpu = True  # as on such a CPU
    assert all(greedy_tokens(hf_paged.wrap(model)))
    assert all(torch.equal(layer.weight.data, weight) for layer, weight in zip(layers_of(model), before, strict=True))
    hf_paged.unwrap(model)
    assert [layer.support_avx512bf16_for_cpu for layer in layers_of(model)] == flags


# ---- load ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["bitsandbytes", BitsAndBytesConfig(**CONFIGS["int8, no outliers"])])
def test_load_quantises_on_the_fly(how: Any, plain: Path) -> None:
    model = hf_paged.load(plain, quantization=how, device="cpu", max_num_seqs=3).train()
    layers = layers_of(model)
    assert len(layers) == 14 and type(model.lm_head) is torch.nn.Linear
    if how == "bitsandbytes":
        state = layers[0].weight.quant_state
        assert state.quant_type == "nf4" and state.nested and layers[0].compute_dtype is float32
    else:
        assert isinstance(layers[0], Linear8bitLt)
        model.eval()  # which LLM.int8() computes in another way
    assert model.engine.executor.max_num_seqs == 3
    assert greedy_tokens(model) == stock_tokens(model)


def test_load_computes_in_the_dtype_asked_for(plain: Path) -> None:
    model = hf_paged.load(plain, "bfloat16", "bitsandbytes", "cpu")
    assert {layer.compute_dtype for layer in layers_of(model)} == {bfloat16}
    assert model.lm_head.weight.dtype is bfloat16


@pytest.mark.parametrize("name", CONFIGS)
def test_load_reads_what_bitsandbytes_saved(name: str, plain: Path, tmp_path: Path) -> None:
    """Also after we have generated."""
    model = hf_paged.wrap(from_pretrained(plain, name))
    expected = greedy_tokens(model)
    model.save_pretrained(tmp_path)
    for quantization in ("auto", "bitsandbytes"):
        assert greedy_tokens(hf_paged.load(tmp_path, quantization=quantization, device="cpu")) == expected


@pytest.mark.parametrize("name", ["nf4, double", "int8, no outliers"])
def test_none_dequantises_what_bitsandbytes_saved(name: str, plain: Path, tmp_path: Path) -> None:
    model = from_pretrained(plain, name)
    model.save_pretrained(tmp_path)
    dequantised = hf_paged.load(tmp_path, quantization=None, device="cpu")
    assert not layers_of(dequantised) and dequantised.model.layers[0].mlp.up_proj.weight.dtype is float32
    ids = torch.tensor(PROMPTS[:1])
    with torch.no_grad():
        limit = {"rtol": 1e-3, "atol": 1e-3}
        torch.testing.assert_close(dequantised(ids).logits, model.train()(ids).logits, **limit)
    dequantised.save_pretrained(tmp_path / "plain")
    again = hf_paged.load(tmp_path / "plain", device="cpu")
    assert all(torch.equal(again.get_parameter(name), weight) for name, weight in dequantised.named_parameters())


@pytest.mark.parametrize("quantization", ["bitsandbytes", BitsAndBytesConfig(load_in_4bit=True)])
def test_another_quantization_is_refused(quantization: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, *awq())
    with pytest.raises(ValueError, match="is quantised with awq, and quantization="):
        hf_paged.load(tmp_path, quantization=quantization, device="cpu")


def test_a_config_for_what_is_quantised_already_is_refused(plain: Path, tmp_path: Path) -> None:
    from_pretrained(plain, "nf4").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is quantised with bitsandbytes, and quantization="):
        hf_paged.load(tmp_path, quantization=BitsAndBytesConfig(load_in_8bit=True), device="cpu")


@pytest.mark.parametrize("missing", ["bitsandbytes", "accelerate"])
def test_a_missing_package_is_named(missing: str, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name == missing else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with pytest.raises(ImportError, match=rf"needs {missing}: pip install 'hf_paged\[bitsandbytes\]'"):
        hf_paged.load(plain, quantization="bitsandbytes", device="cpu")


def test_nothing_imports_it_unasked(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without its layers generates where it is not installed."""
    real = builtins.__import__

    def no_bitsandbytes(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "bitsandbytes":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_bitsandbytes)
    assert all(greedy_tokens(hf_paged.load(plain, device="cpu")))


# ---- QLoRA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nf4, double", "fp4", "int8, no outliers"])
def test_adapters_are_trained_between_generations(name: str, plain: Path) -> None:
    model = prepare_model_for_kbit_training(from_pretrained(plain, name), use_gradient_checkpointing=False)
    options = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = hf_paged.wrap(get_peft_model(model, options)).eval()
    before = greedy_tokens(adapted)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.tensor(PROMPTS[2:])
    losses = []
    adapted.train()
    for _ in range(6):
        loss = adapted(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        for parameter_name, parameter in adapted.named_parameters():
            assert parameter.grad is not None or not parameter.requires_grad, parameter_name
        optimizer.step()
    assert losses[-1] < losses[0]
    adapted.eval()
    version = adapted.engine.weight_version
    after = greedy_tokens(adapted)
    assert after != before and adapted.engine.weight_version > version
    assert after == stock_tokens(adapted)
    with adapted.disable_adapter():
        assert greedy_tokens(adapted) == before == stock_tokens(adapted)


def test_training_computes_in_bfloat16_while_the_rest_is_float32(plain: Path) -> None:
    """As QLoRA does: `prepare_model_for_kbit_training` casts what is not quantised."""
    model = AutoModelForCausalLM.from_pretrained(
        plain,
        quantization_config=BitsAndBytesConfig(**(CONFIGS["nf4"] | {"bnb_4bit_compute_dtype": bfloat16})),
        dtype=bfloat16,
        device_map="cpu",
    )
    wrapped = hf_paged.wrap(model)
    assert all(greedy_tokens(wrapped))
    prepared = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert prepared.model.embed_tokens.weight.dtype is float32
    assert all(greedy_tokens(wrapped)) and wrapped.engine.executor.layout.kv_dtype is float32
