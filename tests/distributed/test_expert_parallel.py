"""Mixtures whose ranks have whole experts compute what they compute in one process."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import expert_jobs
import jobs
import pytest
import ranks
import torch
from families import make_model
from quantization.test_experts import write_mixture
from test_parallel import assert_same, run
from transformers import AutoModelForCausalLM

import hf_paged
from hf_paged.bench import parallel as bench
from hf_paged.bench.models import SHAPES
from hf_paged.distributed.groups import check_expert_parallel
from hf_paged.distributed.layers import OwnExperts
from hf_paged.distributed.plan import PlanError, make_plan
from hf_paged.llm.arguments import EngineArgs
from hf_paged.quantization.assemble import assemble, plan_plain
from hf_paged.quantization.checkpoint import Checkpoint, open_checkpoint
from hf_paged.quantization.experts import rename

FAMILIES = list(expert_jobs.FAMILIES)


def alone(family: str) -> dict[str, Any]:
    return expert_jobs.generate_and_weigh(hf_paged.wrap(expert_jobs.mixture(family), **jobs.OPTIONS))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run("expert_families", 2, tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("family", expert_jobs.VARIANTS)
def test_families(found: list[dict[str, Any]], family: str) -> None:
    expected = alone(family)
    assert expected["modules"] >= 3 and len({tuple(ids) for ids in expected["greedy"]}) > 1
    for rank in found:
        assert_same(rank[family, 1], expected)
        assert rank[family, 1]["bytes"] == expected["bytes"] / 2


@pytest.mark.slow
def test_four_ranks(tmp_path: Path) -> None:
    """With an expert each, and as two stages of two ranks."""
    results = run("expert_families", 4, tmp_path)
    for family in expert_jobs.VARIANTS:
        expected = alone(family)
        for rank in results:
            assert_same(rank[family, 1], expected)
            assert_same(rank[family, 2], expected)
            assert rank[family, 1]["bytes"] == expected["bytes"] / 4
            assert rank[family, 2]["bytes"] in (0, expected["bytes"] / 2)
        assert any(rank[family, 2]["modules"] < expected["modules"] for rank in results)


@pytest.mark.slow
def test_compiled(tmp_path: Path) -> None:
    expected = alone("Qwen3Moe")
    for rank in run("expert_compiled", 2, tmp_path):
        assert_same(rank, expected)


@pytest.mark.slow
def test_benchmark(tmp_path: Path) -> None:
    first, second = run("expert_benchmark", 2, tmp_path)
    assert "tensor parallel 2, pipeline parallel 1, whole experts" in first and '"expert_parallel": true' in first
    assert second == "", "rank 0 prints"
    with pytest.raises(SystemExit):
        bench.main(["qwen3-30b-a3b", "--ep"])


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("checkpoints")
    for family in FAMILIES:
        expert_jobs.mixture(family).save_pretrained(folder / family)
    write_mixture(folder / "quantised", "Qwen3Moe", "gptq")
    write_mixture(folder / "quantised Mixtral", "Mixtral", "compressed fp8, one scale")
    make_model("Llama").save_pretrained(folder / "dense")
    make_model("Qwen3Moe", num_experts=3).save_pretrained(folder / "three experts")
    make_model("Qwen3Moe", mlp_only_layers=[0, 1, 2]).save_pretrained(folder / "no experts")
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out: Path = tmp_path_factory.mktemp("out")
    results = ranks.finish(ranks.start("expert_checkpoints", 2, out, str(folder)), out)
    assert all(result is not None for result in results), ranks.logs(out, 2)
    return results


@pytest.mark.parametrize("name", expert_jobs.CHECKPOINTS)
def test_checkpoints(folder: Path, loaded: list[dict[str, Any]], name: str) -> None:
    quantization = expert_jobs.CHECKPOINTS[name]
    whole = hf_paged.load(folder / name, quantization=quantization, device="cpu", **jobs.OPTIONS)
    expected = expert_jobs.generate_and_weigh(whole)
    for rank in loaded:
        assert rank[name]["greedy"] == expected["greedy"] and rank[name]["sampled"] == expected["sampled"]
        assert rank[name]["bytes"] == expected["bytes"] / 2


@pytest.mark.parametrize("family", FAMILIES[:3])
def test_a_rank_reads_its_own_experts(folder: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[str] = set()
    stock = Checkpoint.read

    def record(checkpoint: Checkpoint, names: list[str], device: torch.device) -> dict[str, torch.Tensor]:
        read.update(names)
        return stock(checkpoint, names, device)

    monkeypatch.setattr(Checkpoint, "read", record)
    whole = expert_jobs.mixture(family)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(whole.config, dtype=torch.float32)
    checkpoint = rename(model, open_checkpoint(folder / family))
    plan = plan_plain(model, checkpoint)
    assert plan is not None
    shards = make_plan(model, 1, 2, expert_parallel=True)
    assemble(
        model, checkpoint, plan, None, torch.float32, torch.device("cpu"), dequantized=False, shards=shards, rank=1
    )
    assert {found[1] for name in read if (found := re.search(r"experts\.(\d)\.", name))} == {"2", "3"}
    for name in plan.experts:
        assert torch.equal(model.get_parameter(name), whole.get_parameter(name)[2:])


def test_a_model_whose_experts_transformers_has_spread(loaded: list[dict[str, Any]]) -> None:
    for rank in loaded:
        assert_same(rank["transformers' own"], rank["Mixtral"])
        assert rank["transformers' own"]["bytes"] == rank["Mixtral"]["bytes"]


def test_ranks_started_from_within(folder: Path, loaded: list[dict[str, Any]]) -> None:
    options = {"tensor_parallel_size": 2, "enable_expert_parallel": True, "device": "cpu"} | jobs.OPTIONS
    args = EngineArgs.parse(str(folder / "Mixtral"), options | {"skip_tokenizer_init": True})
    model, group = args.load()
    assert group is not None
    with group:
        assert jobs.generate(model)["greedy"] == loaded[0]["Mixtral"]["greedy"]
        assert model.model.layers[0].mlp.experts.num_experts == 2


def test_experts_of_ranks_with_other_tokens() -> None:
    """transformers hands tokens from rank to rank where `ep_size` is larger than `tp_size`."""
    model = make_model("Mixtral")
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(hf_paged.UnsupportedModelError, match="take a tp_size like its ep_size"):
        hf_paged.wrap(model)
    assert type(model).__name__ == "MixtralForCausalLM", "it is as it was"


def test_refused_checkpoints(loaded: list[dict[str, Any]]) -> None:
    for rank in loaded:
        for name, message in {
            "dense": "LlamaForCausalLM has no expert-parallel plan",
            "three experts": "layers.0.mlp.experts has 3 experts, which 2 ranks cannot share evenly",
            "no experts": "this Qwen3MoeForCausalLM has no experts",
            "parts of biased experts": "GptOssForCausalLM has no tensor-parallel plan",
        }.items():
            kind, said, _ = rank[name]
            assert kind == "PlanError" and message in said


# ---- plans ---------------------------------------------------------------------------------------------------------


def test_shares_of_a_large_mixture() -> None:
    """Half of all weights but the norms and routers, worked out without any."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(SHAPES["qwen3-30b-a3b"](), dtype=torch.bfloat16)
    plan = make_plan(model, 1, 2, expert_parallel=True)
    cuts = {name: plan.cut_of(name) for name, _ in model.named_parameters()}
    held = sum(p.nbytes * cut.width // p.shape[cut.dim] if (cut := cuts[name]) else p.nbytes
               for name, p in model.named_parameters())  # fmt: skip
    assert held / 2**30 == pytest.approx(28.4, abs=0.1)
    whole = [name for name, p in model.named_parameters() if p.ndim > 1 and cuts[name] is None]
    assert len(whole) == 48 and all(name.endswith("mlp.gate.weight") for name in whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_cuts_what_it_can(family: str) -> None:
    """Experts by their number, and everything else as without them."""
    model = make_model(family)
    plan = make_plan(model, 1, 2, expert_parallel=True)
    assert set(plan.experts.values()) == {(2, 4)}
    experts = {name: cut for name, cut in plan.tensors.items() if ".experts." in name}
    assert len(experts) == len(plan.experts) * (4 if family == "GptOss" else 2)
    assert {(cut.dim, cut.ranges) for cut in experts.values()} == {(0, ((2, 4),))}
    assert plan.gathers and plan.lookups
    if family != "GptOss":
        parts = make_plan(model, 1, 2)
        assert plan.linears == parts.linears and sorted(plan.sums) == sorted(parts.sums)


def test_a_plan_of_transformers_5_17() -> None:
    model = make_model("Mixtral")
    expected = make_plan(model, 1, 2, expert_parallel=True)
    changed = {name.replace("experts", "gate"): "ep_router" for name in model._ep_plan if name.endswith("experts")}
    model._ep_plan = changed | {name: style.replace("ep_dispatch", "moe_tp") for name, style in model._ep_plan.items()}
    assert "moe_tp_experts" in model._ep_plan.values()
    assert make_plan(model, 1, 2, expert_parallel=True) == expected


def test_own_experts() -> None:
    ids, weights = torch.tensor([[0, 3], [2, 1]]), torch.tensor([[0.5, 0.25], [0.125, 1.0]])
    hidden = torch.ones(2, 3)
    same, local, own = OwnExperts(2, 4)(torch.nn.Identity(), (hidden, ids, weights))
    assert same is hidden
    assert local.tolist() == [[2, 1], [0, 2]]
    assert own.tolist() == [[0, 0.25], [0.125, 0]]
    assert ids.tolist() == [[0, 3], [2, 1]] and weights[0, 0] == 0.5, "the router's are as they were"


def test_experts_that_are_not_stacked() -> None:
    model = make_model("Mixtral")
    model.model.layers[1].mlp.experts.odd = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(PlanError, match=r"layers.1.mlp.experts \(MixtralExperts\) is not made of stacked experts"):
        make_plan(model, 0, 2, expert_parallel=True)


def test_biased_experts_one_after_the_other() -> None:
    model = make_model("GptOss", experts_implementation="eager")
    with pytest.raises(PlanError, match='experts_implementation="eager" cannot be had'):
        make_plan(model, 0, 2, expert_parallel=True)


def test_one_rank() -> None:
    with pytest.raises(ValueError, match="tensor_parallel_size to more"):
        hf_paged.load("nowhere", enable_expert_parallel=True)
    with pytest.raises(ValueError, match="tensor_parallel_size to more"):
        EngineArgs.parse("nowhere", {"enable_expert_parallel": True, "pipeline_parallel_size": 2})
    with pytest.raises(ValueError, match="must be True or False, got 'yes'"):
        check_expert_parallel("yes", 2)  # type: ignore[arg-type]
