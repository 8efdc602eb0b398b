"""Keys and values in FP8, divided by scales: measured ones, and those of checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models.families import make_model, make_prompts
from quantization.writers import CHECKPOINTS, change_config, change_tensors, write_checkpoint

import hf_paged
from hf_paged.model import kv_scales

PROMPTS = make_prompts([20, 9, 17])
GREEDY = hf_paged.SamplingParams(temperature=0.0, max_tokens=16)
FP8 = {"kv_cache_dtype": "fp8", "num_pages": 64, "page_size": 8}
KV_HEADS, DIM = 2, 16


def make(family: str = "Llama") -> Any:
    """Less sharp in its attention than other tests have it, so that FP8 costs it no more than it does a real one."""
    return make_model(family, initializer_range=0.1)


def scaled_model(family: str = "Llama", *, keys: list[float], values: list[float]) -> Any:
    """A model whose keys and values are larger per KV head by these, and which computes the same all the same."""
    model = make(family)
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            groups = model.config.num_attention_heads // KV_HEADS
            for into, out_of, factors in (
                (attention.k_proj.weight, attention.q_proj.weight.unflatten(0, (KV_HEADS, groups * DIM)), keys),
                (attention.v_proj.weight, attention.o_proj.weight.T.unflatten(0, (KV_HEADS, groups * DIM)), values),
            ):
                column = torch.tensor(factors)[:, None, None]
                into.unflatten(0, (KV_HEADS, DIM)).mul_(column)
                out_of.div_(column)
    return model


def error(model: Any, **options: Any) -> float:
    """How far log-probabilities of given tokens are from the float32 model's, in the mean over 30 tokens, some of which
    are computed in later steps than those that they attend to."""
    given = make_prompts([10, 10, 10], seed=5)
    expected = torch.cat(hf_paged.wrap(hf_paged.unwrap(model), num_pages=64, page_size=8).score(PROMPTS, given))
    hf_paged.wrap(hf_paged.unwrap(model), **(FP8 | options), max_num_batched_tokens=16, max_num_seqs=4)
    return float((torch.cat(model.score(PROMPTS, given)) - expected).abs().mean())


def scales_of(model: Any) -> list[tuple[float, float]]:
    return [(layer.key_scale, layer.value_scale) for layer in model.engine.executor.layout.layers]


# ---- without -------------------------------------------------------------------------------------------------------


def test_fp8_without_scales() -> None:
    model = make()
    assert 0 < error(model) < 0.1
    storage = model.engine.executor.storage
    assert {pool.dtype for pool in (*storage.keys, *storage.values)} == {torch.float8_e4m3fn}
    assert set(scales_of(model)) == {(1.0, 1.0)}


@pytest.mark.parametrize("factors", [[1e5, 1e5], [1e-5, 1e-5]])
def test_what_fp8_cannot_hold_is_noticed(factors: list[float]) -> None:
    """And not generated with: the model does not pass its check."""
    model = hf_paged.wrap(scaled_model(keys=factors, values=factors), **FP8)
    with pytest.raises(hf_paged.UnsupportedModelError, match="differ from its own forward's"):
        model.generate_many(PROMPTS, GREEDY)


# ---- measured ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factors", [[1e5, 1e5], [1.0, 1.0], [1e-5, 1e-5], [3e3, 7e3]])
def test_measured_scales_are_as_good_at_any_magnitude(factors: list[float]) -> None:
    best = error(make())
    model = scaled_model(keys=factors, values=factors[::-1])
    assert error(model, calculate_kv_scales=True) < 1.5 * best
    for key, value in scales_of(model):
        assert all(math.log2(scale).is_integer() for scale in (key, value))


@pytest.mark.parametrize("family", ["Gemma2", "GptOss", "DeepseekV3"])
def test_other_families(family: str) -> None:
    """With windows, soft caps, sinks, and keys and values of different sizes."""
    model = make(family)
    unscaled = error(model)
    assert error(model, calculate_kv_scales=True) < 1.2 * unscaled < 0.1
    assert set(scales_of(model)) != {(1.0, 1.0)}


def test_a_scale_leaves_room_for_the_largest_and_no_more() -> None:
    model = hf_paged.wrap(make(), **FP8, calculate_kv_scales=True)
    largest: list[float] = []
    projection = model.model.layers[0].self_attn.v_proj
    hook = projection.register_forward_hook(lambda module, args, out: largest.append(out.abs().max().item()))
    model(torch.tensor(PROMPTS[:1]))
    hook.remove()
    model.generate_many(PROMPTS[:1], GREEDY)
    scale = scales_of(model)[0][1]
    assert scale / 2 < kv_scales.MARGIN * largest[0] / 448 <= scale


def test_scales_are_of_the_first_prompts_and_stay() -> None:
    def run(prompts: list[list[int]], **options: Any) -> tuple[Any, list[list[int]]]:
        model = hf_paged.wrap(make(), **(FP8 | options), calculate_kv_scales=True)
        return model, [list(output.outputs[0].token_ids) for output in model.generate_many(prompts, GREEDY)]

    model, tokens = run(PROMPTS)
    first = scales_of(model)
    again, same = run(PROMPTS, max_num_seqs=8)
    assert same == tokens and scales_of(again) == first
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(64)
    model.generate_many(make_prompts([30], seed=9), GREEDY)
    model.engine.sleep()
    model.generate_many(PROMPTS, GREEDY)
    assert scales_of(model) == first


def test_only_so_many_tokens_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several prompts, cut off in the last."""
    monkeypatch.setattr(kv_scales, "MEASURED_TOKENS", 25)
    model = make()
    lengths: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: lengths.append(out.shape[1]))
    assert hf_paged.wrap(model, **FP8, calculate_kv_scales=True).engine is not None
    lengths.clear()
    model.generate_many(PROMPTS, hf_paged.SamplingParams(temperature=0.0, max_tokens=1))
    assert lengths[:2] == [25, sum(map(len, PROMPTS))]


def test_an_interrupt_while_measuring_is_overcome(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf_paged.wrap(make(), **FP8, calculate_kv_scales=True)
    executor: Any = model.engine.executor
    allocate = executor._allocate

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(executor, "_allocate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.generate_many(PROMPTS, GREEDY)
    assert model.engine.scheduler.num_active_pages == 0
    monkeypatch.setattr(executor, "_allocate", allocate)
    found = model.generate_many(PROMPTS, GREEDY)
    other = hf_paged.wrap(make(), **FP8, calculate_kv_scales=True)
    assert [o.outputs[0].token_ids for o in found] == [
        o.outputs[0].token_ids for o in other.generate_many(PROMPTS, GREEDY)
    ]


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_samples_cached_prefixes_and_drafts_change_nothing(family: str) -> None:
    """A token's keys are the same whoever computed them, in whatever step."""

    def run(prompts: list[list[int]], n: int = 1, times: int = 1, **options: Any) -> list[list[int]]:
        model = make(family)
        hf_paged.wrap(model, **(FP8 | options), calculate_kv_scales=True)
        params = hf_paged.SamplingParams(temperature=0.0, max_tokens=16, n=n)
        for _ in range(times):
            outputs = model.generate_many(prompts, params)
        assert model.engine.scheduler.num_active_pages == 0
        return [list(completion.token_ids) for output in outputs for completion in output.outputs]

    expected = run(PROMPTS, enable_prefix_caching=False)
    assert run(PROMPTS, times=2) == expected
    assert run(PROMPTS, n=3) == [tokens for tokens in expected for _ in range(3)]
    drafting = {"method": "ngram", "num_speculative_tokens": 3}
    assert run(PROMPTS, speculative_config=drafting) == expected


def test_measuring_needs_fp8() -> None:
    with pytest.raises(ValueError, match="add kv_cache_dtype='fp8'"):
        hf_paged.EngineConfig(calculate_kv_scales=True)


# ---- of checkpoints ------------------------------------------------------------------------------------------------

NAMES = {
    "of the layer": ("self_attn.k_scale", "self_attn.v_scale"),
    "of the projections": ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),
    "of the projections' outputs": ("self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale"),
}


def write_with_scales(folder: Path, names: tuple[str, str], key: torch.Tensor, value: torch.Tensor) -> None:
    write_checkpoint(folder, *CHECKPOINTS["compressed fp8, a scale per output"])

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for layer in (0, 1):
            for name, scale in zip(names, (key, value), strict=True):
                tensors[f"model.layers.{layer}.{name}"] = scale.clone()

    change_tensors(folder, add)


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_checkpoints_scales(names: str, shape: tuple[int, ...], tmp_path: Path, caplog: Any) -> None:
    write_with_scales(tmp_path, NAMES[names], torch.full(shape, 0.3), torch.full(shape, 0.07).bfloat16())
    model = hf_paged.load(tmp_path, device="cpu", **FP8)
    assert "left out" not in caplog.text
    assert error(model) < 0.5
    for key, value in scales_of(model):
        assert key == pytest.approx(0.3) and value == pytest.approx(0.07, rel=0.01)
    plain = hf_paged.load(tmp_path, device="cpu")
    assert set(scales_of(plain)) == {(1.0, 1.0)}
    measured = hf_paged.load(tmp_path, device="cpu", **FP8, calculate_kv_scales=True)
    measured.generate_many(PROMPTS, GREEDY)
    assert all(math.log2(key).is_integer() for key, _ in scales_of(measured))


def test_scales_of_another_kind_are_left_out(tmp_path: Path, caplog: Any) -> None:
    write_with_scales(tmp_path, NAMES["of the layer"], torch.tensor(0.3), torch.tensor(0.3))
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    scheme = {"type": "int", "num_bits": 8, "symmetric": True}
    change_config(tmp_path, quantization_config=config | {"kv_cache_scheme": scheme})
    model = hf_paged.load(tmp_path, device="cpu", **FP8)
    assert "left out, which are not for FP8" in caplog.text and set(scales_of(model)) == {(1.0, 1.0)}


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.tensor(0.0), "positive and finite"),
        (torch.tensor(torch.nan), "positive and finite"),
        (torch.ones(3), "one number or 2, got 3"),
        (torch.tensor(1), "floating point"),
    ],
)
def test_scales_that_make_no_sense_are_refused(scale: torch.Tensor, message: str, tmp_path: Path) -> None:
    write_with_scales(tmp_path, NAMES["of the layer"], scale, torch.tensor(1.0))
    with pytest.raises(ValueError, match=message):
        hf_paged.load(tmp_path, device="cpu", **FP8).engine  # noqa: B018


@pytest.mark.parametrize("shape", [(KV_HEADS,), (KV_HEADS, 1, 1)])
def test_scales_per_head(shape: tuple[int, ...]) -> None:
    """Heads whose magnitudes FP8 cannot hold with one scale."""
    best = error(make())
    keys, values = [3e4, 2e-4], [1e-5, 5e3]
    model = scaled_model(keys=keys, values=values)
    with pytest.raises(hf_paged.UnsupportedModelError, match="differ"):
        error(model, calculate_kv_scales=True)
    for layer in model.model.layers:
        layer.self_attn.k_scale = torch.tensor(keys).reshape(shape) / 8
        layer.self_attn.v_scale = torch.tensor(values).reshape(shape) / 8
    assert error(model) < 1.5 * best
    layers = model.engine.executor.layout.layers
    assert all(layer.key_head_scales == (4096.0, 2.0**-15) and layer.key_scale == 1.0 for layer in layers)
