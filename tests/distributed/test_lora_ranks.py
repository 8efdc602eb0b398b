"""Adapters by request on a model that is spread over ranks: each has its part of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jobs
import lora_jobs
import pytest
import ranks
import torch.distributed as dist
import writers
from transformers import AutoModelForCausalLM

import hf_paged
from hf_paged import LLM, LoRARequest, SamplingParams

pytest.importorskip("peft")

from lora.adapters import CONFIGS, save_adapter

QUERIES_AND_VALUES = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
MERGED = {"r": 4, "lora_alpha": 16, "target_modules": ["qkv_proj"]}
OF_LATENTS = {"r": 4, "lora_alpha": 16, "target_modules": ["q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]}
SUMMED = {"r": 5, "lora_alpha": 10, "target_modules": ["o_proj", "down_proj"]}
"""Layers that are cut by inputs."""
OWN: dict[str, dict[str, dict[str, Any]]] = {
    "Phi3": {"a": MERGED, "b": CONFIGS["b"], "c": SUMMED},
    "DeepseekV3": {"a": OF_LATENTS, "b": OF_LATENTS | {"r": 2}, "c": {"r": 3, "target_modules": ["o_proj"]}},
}
USUAL = {"a": QUERIES_AND_VALUES, "b": CONFIGS["b"], "c": SUMMED}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("adapters")
    for family in lora_jobs.FAMILIES:
        for seed, (name, config) in enumerate(OWN.get(family, USUAL).items()):
            save_adapter(folder / family / name, jobs.family_model(family), seed, **config)
    for seed, (name, config) in enumerate(USUAL.items()):
        save_adapter(folder / "gptq" / name, writers.tiny_llama(), seed, **config)
    writers.write_checkpoint(folder / "gptq", *writers.CHECKPOINTS["gptq"])
    return str(folder)


def alone(family: str) -> Any:
    return hf_paged.wrap(jobs.family_model(family), **lora_jobs.ADAPTED)


def run(job: str, out: Path, folder: str) -> list[dict[str, Any]]:
    found = ranks.finish(ranks.start(job, 2, out, folder), out)
    assert all(result is not None for result in found), ranks.logs(out, 2)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, folder: str) -> list[dict[str, Any]]:
    return run("adapted", tmp_path_factory.mktemp("adapted"), folder)


@pytest.mark.parametrize("family", lora_jobs.FAMILIES)
def test_as_in_one_process(found: list[dict[str, Any]], folder: str, family: str) -> None:
    model = alone(family)
    expected = lora_jobs.said(model, lora_jobs.adapters_of(family, folder))
    plain = jobs.tokens(model.generate_many(lora_jobs.PROMPTS, lora_jobs.GREEDY))
    changed = [mine != other for mine, other in zip(expected, plain, strict=True)]
    assert changed == [name is not None for name in lora_jobs.MIX], "adapters must matter"
    for rank in found:
        assert rank[family] == expected
        assert rank[f"{family}, plain"] == plain
        assert family != "Llama" or rank["stages"] == rank["spread"] == expected


def test_on_quantised_layers(found: list[dict[str, Any]], folder: str) -> None:
    model = hf_paged.load(Path(folder, "gptq"), device="cpu", **lora_jobs.ADAPTED)
    expected = lora_jobs.said(model, lora_jobs.adapters_of("gptq", folder))
    assert expected != jobs.tokens(model.generate_many(lora_jobs.PROMPTS, lora_jobs.GREEDY))
    assert [rank["gptq"] for rank in found] == [expected] * 2


def test_missing_changing_going(found: list[dict[str, Any]], folder: str) -> None:
    """All ranks have what rank 0 reads, and its errors."""
    model, adapters = alone("Llama"), lora_jobs.adapters_of("Llama", folder)
    of_a, of_b = (
        jobs.tokens(model.generate_many(lora_jobs.PROMPTS, lora_jobs.GREEDY, lora_request=adapters[name]))
        for name in "ab"
    )
    for rank in found:
        kind, told, _ = rank["nowhere"]
        assert kind == "FileNotFoundError" and "no folder with an adapter at /nowhere" in told
        assert (rank["before"], rank["changed"]) == (of_a, of_b)
        assert 9 in rank["known"] and rank["removed"] == (True, False, rank["known"] - {9})


def test_ranks_that_ask_for_different_ones(found: list[dict[str, Any]]) -> None:
    for kind, told, _ in (rank["divergence"] for rank in found):
        assert kind == "Divergence" and "do not do the same" in told


@pytest.mark.slow
def test_compiled_and_fused(tmp_path: Path, folder: str) -> None:
    expected = lora_jobs.said(alone("Llama"), lora_jobs.adapters_of("Llama", folder))
    assert [rank["Llama"] for rank in run("adapted_compiled", tmp_path, folder)] == [expected] * 2


def test_started_from_within(tiny_checkpoint: str, tmp_path: Path) -> None:
    """Rank 0 alone is called, and the other one is sent what it reads."""
    options = {"num_pages": 128, "block_size": 16, "max_num_seqs": 8, "dtype": "float32", "enable_lora": True}
    texts, greedy = [f"The {n} seas are" for n in range(6)], SamplingParams(temperature=0, max_tokens=8)
    adapters: list[LoRARequest | None] = [None]
    for number, config in enumerate((QUERIES_AND_VALUES, CONFIGS["b"]), start=1):
        base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
        adapters.append(
            LoRARequest(str(number), number, str(save_adapter(tmp_path / str(number), base, number, **config)))
        )
    requests = [*adapters, *adapters]

    def said(llm: LLM) -> list[list[int]]:
        return [output.outputs[0].token_ids for output in llm.generate(texts, greedy, False, requests)]

    expected = said(LLM(tiny_checkpoint, **options))
    llm = LLM(tiny_checkpoint, tensor_parallel_size=2, **options)
    try:
        assert said(llm) == expected
        with pytest.raises(FileNotFoundError, match="prompt 1: there is no folder"):
            llm.generate(texts[:2], greedy, False, [None, LoRARequest("none", 9, "/nowhere")])
        assert llm.engine.remove_lora(2) and llm.engine.list_loras() <= {1}
        assert said(llm) == expected
        jobs.at_step(llm.model, 2, jobs.fail)
        with pytest.raises(jobs.Broken):
            said(llm)
        assert llm.engine.scheduler.num_active_pages == 0
        assert said(llm) == expected
    finally:
        llm.shutdown()
    assert not dist.is_initialized()
