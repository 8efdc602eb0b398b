"""EngineConfig: its defaults and what it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from hf_paged.config import EngineConfig

NAN = float("nan")


def test_defaults() -> None:
    """Those that vLLM has too are vLLM's."""
    config = EngineConfig()
    assert config.gpu_memory_utilization == 0.92
    assert config.enable_prefix_caching is True
    assert config.logprobs_mode == "raw_logprobs"
    assert (config.max_num_batched_tokens, config.max_model_len, config.kv_cache_memory_bytes) == (None, None, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in ("page_size", "num_pages", "kv_cache_memory_bytes", "max_num_batched_tokens", "max_model_len")
        for value in (0, -16, 16.0, "16", True)
    ]
    + [("max_num_seqs", value) for value in (0, -1, 2.0, None, True)]
    + [("page_size", value) for value in (3, 12, 48)]
    + [("gpu_memory_utilization", value) for value in (0.0, -0.5, 1.01, NAN)]
    + [("logprobs_mode", value) for value in ("raw", "", None, "raw_logits")],
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
