"""quantize(): whole checkpoints of tiny models, and what is refused before any work."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models.families import make_model, make_prompts
from quantization.writers import AWQ_CONFIG, change_config, tiny_llama
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

import hf_paged
from hf_paged.cli import app
from hf_paged.quantization.formats.base import QuantizedLinear
from hf_paged.quantization.fp8 import FP8Linear
from hf_paged.quantization.w4 import W4Linear
from hf_paged.quantization.writers import layers as writing

TOKENS = torch.tensor(make_prompts([24] * 6))
RECIPES: dict[str, dict[str, Any]] = {
    "awq": {"to": "awq", "group_size": 32},
    "awq, one group": {"to": "awq", "group_size": -1},
    "awq, nearest": {"to": "awq", "group_size": 64, "method": "rtn"},
    "gptq": {"to": "gptq", "group_size": 32},
    "gptq, asymmetric": {"to": "gptq", "group_size": 64, "symmetric": False},
    "gptq, act-order": {"to": "gptq", "group_size": 32, "desc_act": True},
    "gptq, one group": {"to": "gptq", "group_size": -1},
    "gptq, awq's scales": {"to": "gptq", "group_size": 32, "method": "awq"},
    "w4a16": {"to": "w4a16", "group_size": 32},
    "w4a16, asymmetric, act-order": {"to": "w4a16", "group_size": 32, "symmetric": False, "desc_act": True},
    "w4a16, nearest": {"to": "w4a16", "group_size": -1, "method": "rtn"},
    "w4a16, awq's scales": {"to": "w4a16", "group_size": 32, "symmetric": False, "method": "awq"},
    "fp8": {"to": "fp8"},
    "fp8-block": {"to": "fp8-block"},
}


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Tensor]]:
    """The weights that quantize() chose, by layer, noted where it chose them."""
    found: dict[str, Tensor] = {}
    own = writing._quantize_layer

    def noting(path: str, *args: Any) -> dict[str, QuantizedLinear]:
        layers = own(path, *args)
        found.update({f"{path}.{name}": layer.dequantize(torch.float32) for name, layer in layers.items()})
        return layers

    monkeypatch.setattr(writing, "_quantize_layer", noting)
    yield found


def write(model: Any, out: Path, **options: Any) -> Path:
    return hf_paged.quantize(model, out=out, **({"calibration": TOKENS, "progress": False} | options))


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", RECIPES)
def test_loaded_weights_are_those_that_were_decided(name: str, decided: dict[str, Tensor], tmp_path: Path) -> None:
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    out = write(model, tmp_path / "out", **RECIPES[name])
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    loaded = hf_paged.load(out, device="cpu")
    assert len(decided) == 14 and type(loaded.lm_head) is nn.Linear
    for path, weight in decided.items():
        layer = loaded.get_submodule(path)
        assert isinstance(layer, W4Linear | FP8Linear)
        assert torch.equal(layer.dequantize(torch.float32), weight)
    plain = hf_paged.load(out, device="cpu", quantization=None)
    torch.testing.assert_close(logits_of(loaded), logits_of(plain), rtol=1e-3, atol=1e-3)
    assert relative(logits_of(loaded), logits_of(model)) < (0.2 if "fp8" in name else 0.5)
    (output,) = loaded.generate_many([[5, 6, 7]], hf_paged.SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def with_outliers(model: Any) -> Any:
    """What makes rounding to nearest bad: a few channels of large activations."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter[::16] *= 12
    return model


@pytest.mark.parametrize("recipe", ["awq", "gptq", "w4a16, asymmetric, act-order", "w4a16, awq's scales"])
def test_calibrated_codes_beat_round_to_nearest(recipe: str, tmp_path: Path) -> None:
    model = with_outliers(tiny_llama())
    options = RECIPES[recipe]
    nearest = {key: value for key, value in options.items() if key != "desc_act"} | {"method": "rtn"}
    losses = []
    for name, each in (("own", options), ("nearest", nearest)):
        loaded = hf_paged.load(write(model, tmp_path / name, **each), device="cpu")
        losses.append(relative(logits_of(loaded), logits_of(model)))
    assert losses[0] < 0.8 * losses[1]


FOLDED = {
    # (layers of a decoder layer that scales are found for)
    "Llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "Qwen2": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},  # biases
    "Gemma2": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},  # norms of 1 + weight
    "Cohere": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},  # one norm for all
    "Phi3": {"qkv_proj", "gate_up_proj"},  # fused: what feeds the others is half of a layer
    "Olmo2": {"o_proj", "down_proj"},  # norms behind the layers
}


@pytest.mark.parametrize("family", FOLDED)
def test_awq_folds_scales_where_the_model_does_not_notice(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With rounding taken away, what is written computes what the model computes."""
    model = with_outliers(make_model(family))
    scaled: set[str] = set()

    def exact(weight: Tensor, size: int, **_: Any) -> Any:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight.clone())
        layer.dequantize = lambda dtype: layer.weight.data  # type: ignore[attr-defined]
        return layer

    class Plain:
        def specs(self, inputs: int, outputs: int) -> dict[str, Any]:
            return {}

        def write(self, layer: nn.Linear) -> dict[str, Tensor]:
            return {"weight": layer.weight.data}

    monkeypatch.setattr(writing, "round_to_nearest", exact)
    monkeypatch.setattr("hf_paged.quantization.writers.recipe.Recipe.format", lambda recipe: Plain())
    with caplog.at_level(logging.INFO, logger="hf_paged"):
        out = write(model, tmp_path / "out", to="awq", group_size=32)
    change_config(out, quantization_config=None)
    tensors = load_file(out / "model.safetensors")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers." in name:
            ratio = tensors[f"{name}.weight"] / module.weight
            columns = ratio / ratio[:1]  # a scale per row may come from what the layer itself feeds
            if ratio[0].std() > 1e-3 and (columns - columns[:, :1]).abs().max() < 1e-3 * columns.abs().max():
                scaled.add(name.rpartition(".")[2])
    assert scaled == FOLDED[family]
    said = " ".join(
        record.getMessage() for record in caplog.records if "only rounded to nearest" in record.getMessage()
    )
    left = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    assert all((leaf in said) == (leaf not in FOLDED[family]) for leaf in left)
    torch.testing.assert_close(logits_of(hf_paged.load(out, device="cpu")), logits_of(model), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("family", ["Qwen3", "Gemma3", "Mistral", "Glm4", "Granite", "SmolLM3"])
def test_other_families(family: str, tmp_path: Path) -> None:
    """With windows, layers of different kinds, and masks and positions of their own."""
    model = make_model(family)
    loaded = hf_paged.load(write(model, tmp_path / "out", to="gptq", group_size=32), device="cpu")
    assert relative(logits_of(loaded), logits_of(model)) < 0.5


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Gemma3"])
def test_models_in_bfloat16(family: str, tmp_path: Path, decided: dict[str, Tensor]) -> None:
    model = make_model(family).bfloat16()
    out = write(model, tmp_path / "out", to="awq", group_size=32)
    loaded = hf_paged.load(out, device="cpu")
    assert loaded.dtype is torch.bfloat16 and relative(logits_of(loaded).float(), logits_of(model).float()) < 0.5
    for path, weight in decided.items():  # scales were rounded before codes were chosen
        assert torch.equal(loaded.get_submodule(path).dequantize(torch.float32), weight)


def test_layers_get_what_the_model_gives_them() -> None:
    """Run one by one, with a window in some, they end at the model's own hidden states."""
    model = make_model("Gemma3")
    hidden = model.model(TOKENS, output_hidden_states=True, use_cache=False).hidden_states
    recorded, calls = writing.record_calls(model, list(model.model.layers), TOKENS)
    for place, sample in enumerate(recorded):
        for layer, call in zip(model.model.layers, calls, strict=True):
            sample = call(layer, sample)
        torch.testing.assert_close(model.model.norm(sample), hidden[-1][place : place + 1], rtol=1e-4, atol=1e-4)


# ---- the folder ----------------------------------------------------------------------------------------------------


def test_shards_tied_weights_and_dtype(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    out = write(model, tmp_path / "deep" / "out", to="gptq", group_size=32, dtype="bfloat16", max_shard_bytes=20_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert sorted(path.name for path in out.glob("*.safetensors")) == files
    tensors = {name: tensor for file in files for name, tensor in load_file(out / file).items()}
    assert tensors.keys() == index["weight_map"].keys() and "lm_head.weight" not in tensors
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = hf_paged.load(out, device="cpu")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight and loaded.dtype is torch.bfloat16


def test_config_says_what_was_done(tmp_path: Path) -> None:
    model = tiny_llama()
    model.generation_config.temperature = 0.3
    out = write(model, tmp_path / "out", to="w4a16", group_size=32, desc_act=True)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    quantization = config["quantization_config"]
    assert quantization["ignore"] == ["lm_head"] and quantization["format"] == "pack-quantized"
    assert quantization["config_groups"]["group_0"]["weights"]["actorder"] == "weight"
    assert hf_paged.load(out, device="cpu").generation_config.temperature == 0.3
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_of_a_failure(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, own, calls = tiny_llama(), writing._quantize_layer, []

    def failing(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise error("here")
        return own(*args)

    monkeypatch.setattr(writing, "_quantize_layer", failing)
    with pytest.raises(error):
        write(model, tmp_path / "out", to="gptq", group_size=32, max_shard_bytes=1000)
    assert not list(tmp_path.iterdir())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    monkeypatch.undo()
    (tmp_path / "out").mkdir()  # an empty one may be there
    write(model, tmp_path / "out", to="gptq", group_size=32)


def test_a_path_with_its_tokenizer_and_a_text(smollm2_tokenizer: Any, tmp_path: Path) -> None:
    tiny_llama(vocab_size=len(smollm2_tokenizer)).save_pretrained(tmp_path / "plain")
    smollm2_tokenizer.save_pretrained(tmp_path / "plain")
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"It rained for {n} days. " * 9}) for n in range(9)))
    command = ["quantize", str(tmp_path / "plain"), "--to", "gptq", "--group-size", "32", "--device", "cpu"]
    command += ["--samples", "4", "--sequence-length", "32", "--calibration", str(text), "--asymmetric"]
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["sym"] is False
    (output,) = hf_paged.load(tmp_path / "out", device="cpu").generate_many(["It rained"])
    assert output.outputs[0].text
    again = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out")])
    assert again.exit_code == 1 and "not empty" in again.output
    again = CliRunner().invoke(app, ["quantize", str(tmp_path / "out"), "--to", "fp8", "--out", str(tmp_path / "2")])
    assert again.exit_code == 1 and "quantised already" in " ".join(again.output.split())


def test_the_models_own_words(tmp_path: Path) -> None:
    model = tiny_llama()
    options: dict[str, Any] = {"to": "gptq", "group_size": 32, "calibration": None, "samples": 3, "sequence_length": 16}
    first = write(model, tmp_path / "first", **options)
    again = write(model, tmp_path / "again", **options)
    other = write(model, tmp_path / "other", **options, seed=1)
    files = [load_file(out / "model.safetensors") for out in (first, again, other)]
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
    assert not all(torch.equal(tensor, files[2][name]) for name, tensor in files[0].items())
    assert not isinstance(model, hf_paged.PagedGenerationMixin)


# ---- what is refused -----------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "another format": ({"to": "gguf"}, ValueError, "awq, gptq, w4a16, fp8, fp8-block, got 'gguf'"),
    "another method": ({"to": "awq", "method": "gptq"}, ValueError, "method must be one of awq, rtn for awq"),
    "groups that do not fit": ({"to": "gptq", "group_size": 48}, ValueError, r"layers\.0\..*64 inputs.*group size 48"),
    "the default groups": ({"to": "gptq"}, ValueError, "group size 128.*Choose another group_size"),
    "odd groups": ({"to": "gptq", "group_size": 12}, ValueError, "group_size must be a multiple of 8"),
    "groups of fp8": ({"to": "fp8", "group_size": 32}, ValueError, "fp8 has no groups"),
    "symmetric awq": ({"to": "awq", "symmetric": True}, ValueError, "asymmetric"),
    "an order without gptq": ({"to": "gptq", "method": "rtn", "desc_act": True}, ValueError, "the method is rtn"),
    "no samples": ({"to": "gptq", "samples": 0}, ValueError, "samples"),
    "too long samples": (
        {"to": "gptq", "group_size": 32, "calibration": None, "sequence_length": 999},
        ValueError,
        "256 positions",
    ),
    "a dtype": ({"to": "fp8", "dtype": "int8"}, ValueError, "dtype must be"),
    "text without a tokenizer": ({"to": "awq", "group_size": 32, "calibration": ["a"]}, ValueError, "tokenizer="),
    "no text": ({"to": "awq", "group_size": 32, "calibration": [""]}, ValueError, "no text"),
    "no such text": ({"to": "awq", "calibration": "nowhere.txt"}, FileNotFoundError, r"nowhere\.txt"),
    "tokens of another shape": ({"to": "awq", "group_size": 32, "calibration": TOKENS[0]}, ValueError, r"\[24\]"),
    "tokens beyond the vocabulary": (
        {"to": "awq", "group_size": 32, "calibration": TOKENS + 900},
        ValueError,
        "from 0 to 159",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_options_are_named_before_any_work(what: str, tmp_path: Path) -> None:
    options, error, message = REFUSED[what]
    with pytest.raises(error, match=message):
        write(tiny_llama(), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_quantised(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mixtures of experts"):
        write(make_model("Mixtral"), tmp_path / "out", to="fp8")
    with pytest.raises(ValueError, match="unwrap"):
        write(hf_paged.wrap(tiny_llama()), tmp_path / "out", to="fp8")
    with pytest.raises(TypeError, match="Linear"):
        write(nn.Linear(8, 8), tmp_path / "out", to="fp8")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        write(tmp_path / "nowhere", tmp_path / "out", to="fp8")
    tiny_llama().save_pretrained(tmp_path / "plain")
    change_config(tmp_path / "plain", quantization_config=AWQ_CONFIG)
    with pytest.raises(ValueError, match="quantised already, with awq"):
        write(tmp_path / "plain", tmp_path / "out", to="fp8")
    loaded = hf_paged.unwrap(hf_paged.load(write(tiny_llama(), tmp_path / "fp8", to="fp8"), device="cpu"))
    with pytest.raises(ValueError, match="quantised already"):
        write(loaded, tmp_path / "out", to="fp8")


def test_texts_are_cut_and_spread(smollm2_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from hf_paged.quantization.writers.calibration import cut_texts, read_texts

    ids = smollm2_tokenizer("word " * 100, add_special_tokens=False)["input_ids"]
    cut = cut_texts(["word " * 100], smollm2_tokenizer, 3, 10)
    assert cut.shape == (3, 10) and cut[0].tolist() == ids[:10]
    assert cut[2].tolist() == ids[len(ids) // 10 * 10 - 10 : len(ids) // 10 * 10]
    assert len(cut_texts(["word " * 100], smollm2_tokenizer, 99, 10)) == len(ids) // 10
    assert "not 99" in caplog.text
    with pytest.raises(ValueError, match=r"has \d+ tokens, less than one sample of 512"):
        cut_texts(["word"], smollm2_tokenizer, 3, 512)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"txt": "b"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3"):
        read_texts(tmp_path / "a.jsonl")
