"""EngineConfig: its defaults and what it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from models.families import make_model, stock_greedy

import hf_paged
from hf_paged.config import EngineConfig

NAN = float("nan")


def test_defaults() -> None:
    """Those that vLLM has too are vLLM's."""
    config = EngineConfig()
    assert config.gpu_memory_utilization == 0.92
    assert config.enable_prefix_caching is True
    assert config.logprobs_mode == "raw_logprobs"
    assert (config.max_num_batched_tokens, config.max_model_len, config.kv_cache_memory_bytes) == (None, None, None)
    assert (config.kv_cache_dtype, config.attention_backend) == ("auto", "auto")
    assert config.cuda_graphs is True
    assert (config.compile, config.fuse_linear, config.async_scheduling) == (None, None, None), "as the device suggests"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in ("page_size", "num_pages", "kv_cache_memory_bytes", "max_num_batched_tokens", "max_model_len")
        + ("max_num_seqs",)
        for value in (0, -16, 16.0, "16", True)
    ]
    + [("page_size", value) for value in (3, 12, 48)]
    + [("gpu_memory_utilization", value) for value in (0.0, -0.5, 1.01, NAN)]
    + [("logprobs_mode", value) for value in ("raw", "", None, "raw_logits")]
    + [("kv_cache_dtype", value) for value in ("fp16", "fp8_e5m2", "", None, True)]
    + [("attention_backend", value) for value in ("flash", "cuda", "", None, 1)]
    + [("compile", value) for value in ("layer", "on", "", True, False)]
    + [("cuda_graphs", value) for value in (None, 1, 0, "on")]
    + [(name, value) for name in ("fuse_linear", "async_scheduling") for value in (1, 0, "auto", "")],
)
def test_bad_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        EngineConfig(**{name: value})
    with pytest.raises(ValueError, match=name):
        EngineConfig().with_changes(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("gpu_memory_utilization", "0.9"), ("gpu_memory_utilization", None), ("enable_prefix_caching", "no")],
)
def test_values_of_the_wrong_type_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        EngineConfig(**{name: value})


CHOICES: dict[str, list[Any]] = {
    "enable_prefix_caching": [True, False],
    "kv_cache_dtype": ["auto", "fp8", "fp8_e4m3"],
    "attention_backend": ["auto", "triton", "flashinfer", "torch"],
    "compile": ["layers", "off", None],
    "cuda_graphs": [True, False],
    "fuse_linear": [True, False, None],
    "async_scheduling": [True, False, None],
    "logprobs_mode": ["raw_logprobs", "processed_logprobs", "scaled_logprobs"],
}


@pytest.mark.parametrize("name", list(CHOICES))
def test_fields_with_a_few_values_take_these_and_name_them_otherwise(name: str) -> None:
    for value in CHOICES[name]:
        assert getattr(EngineConfig(**{name: value}), name) is value
    with pytest.raises(ValueError) as error:
        EngineConfig(**{name: "nonsense"})
    told = str(error.value)
    assert told.startswith(name)
    assert told.endswith("'nonsense'")
    for value in CHOICES[name]:
        assert (f'"{value}"' if isinstance(value, str) else str(value)) in told


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attention_backend": "triton"}, ValueError, "CUDA"),
        ({"attention_backend": "flashinfer"}, ValueError, "CUDA"),
    ],
    ids=str,
)
def test_what_only_a_gpu_can_do_is_refused_on_a_cpu(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = hf_paged.wrap(make_model("Llama"), num_pages=8, **options)
    with pytest.raises(error, match=message):
        model.generate_many([[5, 6, 7]])


def test_gpu_options_mean_nothing_on_a_cpu() -> None:
    """One config for both: what a CPU does not have is not missed."""
    model = make_model("Llama")
    expected = stock_greedy(model, [5, 6, 7], 8)
    options = {
        "cuda_graphs": True,
        "gpu_memory_utilization": 0.5,
        "attention_backend": "auto",
        "kv_cache_dtype": "auto",
    }
    hf_paged.wrap(model, num_pages=8, **options)
    greedy = hf_paged.SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    assert model.generate_many([[5, 6, 7]], greedy)[0].outputs[0].token_ids == expected


@pytest.mark.parametrize("fuse", [True, False, None])
@pytest.mark.parametrize("ahead", [True, False, None])
def test_what_a_cpu_can_do_too(fuse: bool | None, ahead: bool | None) -> None:
    model = make_model("Llama")
    expected = stock_greedy(model, [5, 6, 7], 8)
    hf_paged.wrap(model, num_pages=8, fuse_linear=fuse, async_scheduling=ahead)
    greedy = hf_paged.SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    assert model.generate_many([[5, 6, 7]], greedy)[0].outputs[0].token_ids == expected
    executor = model.engine.executor
    assert (executor._fused is not None) == (fuse is True)
    request = model.engine.intake.request([5, 6], greedy)
    assert executor.looks_ahead(request) == (ahead is True)


@pytest.mark.parametrize("size", [1, 2, 16, 32, 1024])
def test_page_sizes(size: int) -> None:
    assert EngineConfig(page_size=size).page_size == size


@pytest.mark.parametrize(
    ("tokens", "sequences", "fits"), [(8, 8, True), (7, 8, False), (255, 256, False), (1, 1, True)]
)
def test_every_sequence_needs_a_token_per_step(tokens: int, sequences: int, fits: bool) -> None:
    options = {"max_num_batched_tokens": tokens, "max_num_seqs": sequences}
    if fits:
        assert EngineConfig(**options).max_num_batched_tokens == tokens
    else:
        with pytest.raises(ValueError, match=r"max_num_batched_tokens.*max_num_seqs"):
            EngineConfig(**options)


def test_with_changes_is_a_copy() -> None:
    config = EngineConfig(page_size=16)
    changed = config.with_changes(num_pages=7)
    assert changed == EngineConfig(page_size=16, num_pages=7)
    assert config == EngineConfig(page_size=16)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_pages = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("pagesize", "page_size"),
        ("max_num_seq", "max_num_seqs"),
        ("gpu_memory_utilisation", "gpu_memory_utilization"),
        ("max_batched_tokens", "max_num_batched_tokens"),
        ("prefix_caching", "enable_prefix_caching"),
        ("cuda_graph", "cuda_graphs"),
        ("kv_cache_type", "kv_cache_dtype"),
        ("attention_backends", "attention_backend"),
        ("fuse_linears", "fuse_linear"),
        ("async_schedule", "async_scheduling"),
        ("compiled", "compile"),
    ],
)
def test_unknown_options_suggest_the_nearest(typo: str, meant: str) -> None:
    with pytest.raises(TypeError, match=rf"{typo!r}.*Did you mean {meant!r}"):
        EngineConfig().with_changes(**{typo: 1})


def test_options_like_none_list_them_all() -> None:
    with pytest.raises(TypeError) as error:
        EngineConfig().with_changes(zzz=1)
    for field in dataclasses.fields(EngineConfig):
        assert field.name in str(error.value)
