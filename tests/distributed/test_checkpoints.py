"""Each rank reads its part of a checkpoint alone, quantised or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jobs
import pytest
import ranks
import writers
from families import make_model

import hf_paged
from hf_paged.distributed.launch import load_on_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("checkpoints")
    writers.tiny_llama().save_pretrained(folder / "plain")
    writers.tiny_llama(tie_word_embeddings=True, attention_bias=True).save_pretrained(folder / "tied")
    make_model("Mixtral").save_pretrained(folder / "mixtral")
    for name in ("gptq", "gptq, act-order", "awq, one group", "compressed fp8, a scale per output"):
        writers.write_checkpoint(folder / name, *writers.CHECKPOINTS[name])
    for size in (16, 48):
        block = (size, size)
        config = writers.DEEPSEEK_CONFIG | {"weight_block_size": list(block)}
        name = f"fp8 in blocks of {size}"
        writers.write_checkpoint(folder / name, writers.fp8_writer("weight_scale_inv", block), config)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out: Path = tmp_path_factory.mktemp("out")
    results = ranks.finish(ranks.start("checkpoints", 2, out, str(folder)), out)
    assert all(result is not None for result in results), ranks.logs(out, 2)
    return results


@pytest.mark.parametrize("name", jobs.CHECKPOINTS)
def test_tokens(folder: Path, found: list[dict[str, Any]], name: str) -> None:
    where, quantization = jobs.CHECKPOINTS[name]
    alone = jobs.of_checkpoint(folder / where, quantization, 1)
    for rank in found:
        staged = rank[f"staged {name}"]
        check_logprobs(staged, alone, 1e-3)
        assert staged["greedy"] == alone["greedy"] and staged["sampled"] == alone["sampled"]
        assert staged["bytes"] < 0.8 * alone["bytes"]
        check_logprobs(rank[name], alone, 0.3 if name == "fp8 on the fly" else 1e-3)
        if name != "fp8 on the fly":  # whose rows that are cut get a scale per part
            assert rank[name]["greedy"] == alone["greedy"]
        assert rank[name]["bytes"] < 0.6 * alone["bytes"]


def test_a_model_that_transformers_has_cut_up(folder: Path, found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["transformers' own"]["greedy"] == rank["plain"]["greedy"]
        assert rank["transformers' own"]["sampled"] == rank["plain"]["sampled"]


def test_ranks_started_from_within(folder: Path, found: list[dict[str, Any]]) -> None:
    config = hf_paged.EngineConfig(**jobs.OPTIONS)
    model, group = load_on_ranks(folder / "tied", 2, device="cpu", timeout_s=60, config=config)
    assert group is not None
    with group:
        assert jobs.generate(model)["greedy"] == found[0]["tied"]["greedy"]


def check_logprobs(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    """Of the first tokens, which depend on no others."""
    for one, other in zip(ours["logprobs"], theirs["logprobs"], strict=True):
        common = one[0].keys() & other[0].keys()
        assert common
        for token in common:
            assert one[0][token] == pytest.approx(other[0][token], abs=tolerance)


def test_refusals(found: list[dict[str, Any]]) -> None:
    for rank in found:
        kind, message, _ = rank["gptq, act-order"]
        assert kind == "PlanError" and "o_proj" in message and "act-order" in message
        kind, message, _ = rank["fp8 in blocks of 48"]
        assert kind == "PlanError" and "groups of 48" in message
        kind, message, _ = rank["three ranks"]
        assert kind == "ValueError" and "does not divide the 2 processes" in message
