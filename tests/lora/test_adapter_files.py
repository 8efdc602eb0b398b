"""Folders that PEFT wrote, or that something has happened to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora.adapters import CONFIGS, GREEDY, OPTIONS, SMALL, assert_idle, save_adapter, tokens
from models.families import make_model, make_prompts
from safetensors.torch import load_file, save_file

import hf_paged
from hf_paged import LoRARequest

PROMPTS = make_prompts([5, 9])
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model() -> Any:
    return hf_paged.wrap(make_model("Llama", **SMALL), **OPTIONS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter", make_model("Llama", **SMALL), **CONFIGS["a"])


def configured(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        found = load_file(folder / "adapter_model.safetensors")
        change(found)
        save_file(found, folder / "adapter_model.safetensors")

    return work


def write(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


BAD: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), FileNotFoundError, r"has no adapter_config\.json"),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), FileNotFoundError, "safe_serialization=True"),
    "config is no JSON": (write("adapter_config.json", "{"), ValueError, "is no JSON"),
    "config is a list": (write("adapter_config.json", "[]"), ValueError, "must be an object"),
    "not safetensors": (write("adapter_model.safetensors", "?" * 64), ValueError, "cannot be read"),
    "another kind": (configured(peft_type="IA3"), ValueError, "peft_type must be LORA, got 'IA3'"),
    "DoRA": (configured(use_dora=True), ValueError, "use_dora=True cannot be had"),
    "biases": (configured(bias="all"), ValueError, "bias='all' cannot be had"),
    "whole modules": (configured(modules_to_save=["lm_head"]), ValueError, "modules_to_save"),
    "activated": (configured(alora_invocation_tokens=[1]), ValueError, "alora_invocation_tokens"),
    "no rank": (configured(r=None), ValueError, "no rank"),
    "another rank": (configured(r=3), ValueError, "rank 3 on this model's layer needs"),
    "too high a rank": (
        lambda f: save_adapter(f, make_model("Llama", **SMALL), r=20, target_modules=["q_proj"]),
        ValueError,
        "rank 20, and there is room for 16: raise max_lora_rank",
    ),
    "of the output head": (
        lambda f: save_adapter(f, make_model("Llama", **SMALL), r=4, target_modules=["lm_head"]),
        ValueError,
        "the output head",
    ),
    "of embeddings": (
        lambda f: save_adapter(f, make_model("Llama", **SMALL), r=4, target_modules=["embed_tokens", "q_proj"]),
        ValueError,
        "embeddings",
    ),
    "of more layers": (
        lambda f: save_adapter(f, make_model("Llama"), r=4, target_modules=["q_proj"]),
        ValueError,
        r"layers\.2\.self_attn\.q_proj, which is no linear layer in one of this model",
    ),
    "of another model": (
        lambda f: save_adapter(f, make_model("Llama", hidden_size=32, **SMALL), r=4, target_modules=["q_proj"]),
        ValueError,
        "trained on another model",
    ),
    "half a pair": (tensors(lambda t: t.pop(f"{Q}.lora_B.weight")), ValueError, "lora_A and not the other"),
    "a missing module": (
        tensors(lambda t: [t.pop(name) for name in list(t) if "v_proj" in name]),
        ValueError,
        "names 'v_proj', of which there are no tensors",
    ),
    "no tensors in the file": (tensors(dict.clear), ValueError, "has no tensors"),
    "a tensor too many": (
        tensors(lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(4)})),
        ValueError,
        "lora_magnitude_vector",
    ),
    "not finite": (tensors(lambda t: t[f"{Q}.lora_A.weight"].fill_(torch.inf)), ValueError, "not finite"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders(case: str, model: Any, folder: Path) -> None:
    spoil, error, told = BAD[case]
    spoil(folder)
    request = LoRARequest("spoilt", 1, str(folder))
    with pytest.raises(error, match=told):
        model.generate_many(PROMPTS[:1], GREEDY, lora_request=request)
    with pytest.raises(error, match="prompt 1"):
        model.generate_many(PROMPTS, GREEDY, lora_request=[None, request])
    assert model.engine.list_loras() == set()
    assert_idle(model)


def test_a_bad_adapter_spoils_its_own_request_alone(model: Any, folder: Path) -> None:
    (expected,) = tokens(model.generate_many(PROMPTS[:1], GREEDY))
    engine = model.engine
    engine.add_request(PROMPTS[0], GREEDY, request_id="neighbour")
    engine.step()
    with pytest.raises(FileNotFoundError, match="no folder with an adapter at"):
        engine.add_request(PROMPTS[1], GREEDY, lora_request=LoRARequest("x", 1, str(folder / "nowhere")))
    while engine.has_unfinished():
        for output in engine.step():
            last = output
    assert last.request_id == "neighbour" and last.outputs[0].token_ids == expected


@pytest.mark.parametrize(
    ("made", "error", "told"),
    [
        (lambda: LoRARequest("a", 0, "x"), ValueError, "lora_int_id must be an integer of at least 1"),
        (lambda: LoRARequest("a", True, "x"), ValueError, "lora_int_id"),
        (lambda: LoRARequest("a", 1), ValueError, "needs a lora_name and a lora_path"),
        (lambda: LoRARequest("", 1, "x"), ValueError, "needs a lora_name"),
        (lambda: LoRARequest("a", 1, 5), TypeError, "must be strings"),  # type: ignore[arg-type]
    ],
)
def test_bad_requests(made: Callable[[], Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        made()


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        (["x"], TypeError, "must be a hf_paged.LoRARequest"),
        ("x", TypeError, "must be a hf_paged.LoRARequest"),
        ([None, None], ValueError, "2 entries for 1 prompts"),
    ],
)
def test_bad_arguments(model: Any, given: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        model.generate_many(PROMPTS[:1], GREEDY, lora_request=given)


def test_one_id_for_two_adapters(model: Any, folder: Path, tmp_path: Path) -> None:
    other = save_adapter(tmp_path / "other", make_model("Llama", **SMALL), 5, **CONFIGS["b"])
    first = model.generate_many(PROMPTS, GREEDY, lora_request=LoRARequest("first", 3, folder))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lora_int_id 3 is adapter 'first'"):
        model.generate_many(PROMPTS, GREEDY, lora_request=LoRARequest("second", 3, str(other)))
    in_place = LoRARequest("second", 3, str(other), load_inplace=True)
    second = model.generate_many(PROMPTS, GREEDY, lora_request=in_place)
    assert tokens(first) != tokens(second)
    assert model.engine.remove_lora(3) and not model.engine.remove_lora(3)


def test_an_engine_without_room(folder: Path) -> None:
    plain = hf_paged.wrap(make_model("Llama", **SMALL), **OPTIONS | {"enable_lora": False})
    with pytest.raises(ValueError, match="enable_lora=True"):
        plain.generate_many(PROMPTS, GREEDY, lora_request=LoRARequest("a", 1, str(folder)))
    with pytest.raises(ValueError, match="enable_lora=True"):
        plain.engine.add_lora(LoRARequest("a", 1, str(folder)))


def test_a_model_with_adapters_in_it(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(make_model("Llama", **SMALL), str(folder))
    with pytest.raises(ValueError, match="without adapters in it"):
        hf_paged.wrap(model, **OPTIONS).engine  # noqa: B018 - made now
