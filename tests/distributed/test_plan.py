"""Plans in numbers: which rank holds what, and what cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_model
from transformers import GPT2Config, GPT2LMHeadModel

import hf_paged
from hf_paged.bench.models import SHAPES
from hf_paged.distributed.groups import join
from hf_paged.distributed.plan import Cut, PlanError, make_plan, spread
from hf_paged.distributed.shard import cut_model


def test_spread() -> None:
    assert spread(161, 2) == [(0, 81), (81, 161)]
    assert spread(5, 4) == [(0, 2), (2, 4), (4, 5), (5, 5)]


def test_cut() -> None:
    assert Cut(1, ((1, 2), (3, 5))).of(torch.arange(6).expand(2, 6)).tolist() == [[1, 3, 4]] * 2


@pytest.mark.parametrize(("name", "gib"), [("llama-3.1-8b", 7.5), ("qwen2.5-32b", 30.6), ("llama-3.1-70b", 65.8)])
def test_shares_of_large_models(name: str, gib: float) -> None:
    """Half of all weights but the norms, worked out without any."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(SHAPES[name](), dtype=torch.bfloat16)
    plan = make_plan(model, 1, 2)
    held = 0
    for name, parameter in model.named_parameters():
        cut = plan.cut_of(name)
        held += parameter.nbytes if cut is None else parameter.nbytes * cut.width // parameter.shape[cut.dim]
    assert held / 2**30 == pytest.approx(gib, abs=0.1)
    assert not [name for name, p in model.named_parameters() if p.ndim > 1 and plan.cut_of(name) is None]


def test_key_heads_on_several_ranks() -> None:
    model = make_model("Llama")  # 4 heads of 16, 2 key heads
    cuts = [make_plan(model, rank, 4).linears["model.layers.0.self_attn.k_proj"].outputs for rank in range(4)]
    assert cuts == [((0, 16),), ((0, 16),), ((16, 32),), ((16, 32),)]
    assert make_plan(model, 0, 4).key_value_groups["model.layers.0.self_attn"] == 1


def test_a_tied_tensor_stays_one() -> None:
    model = make_model("Llama", tie_word_embeddings=True)
    cut_model(model, make_plan(model, 0, 2), 0)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.weight.shape == (80, 64)


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({}, 3, r"self_attn.q_proj has 4 heads, which 3 ranks cannot share"),
        (
            {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3},
            2,
            r"k_proj has 3 heads, which 2 ranks",
        ),
        ({"intermediate_size": 97}, 2, r"mlp.gate_proj has 97 outputs, which 2 ranks cannot share evenly"),
    ],
)
def test_sizes_that_do_not_divide(changes: dict[str, int], size: int, message: str) -> None:
    model = make_model("Llama", **changes)
    before = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    with pytest.raises(PlanError, match=message):
        make_plan(model, 0, size)
    assert {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} == before


def test_a_model_without_a_plan() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64))
    with pytest.raises(PlanError, match="GPT2LMHeadModel has no tensor-parallel plan"):
        make_plan(model, 0, 2)


def test_a_style_that_is_not_known() -> None:
    model = make_model("Llama")
    model._tp_plan |= {"model.layers.*.mlp.up_proj": "diagonal"}
    with pytest.raises(PlanError, match=r"layers.0.mlp.up_proj \(Linear\): the style 'diagonal'"):
        make_plan(model, 0, 2)


def test_one_process() -> None:
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2"):
        join(2)
    with pytest.raises(ValueError, match="positive integer"):
        join(0)
    with pytest.raises(ValueError, match="torchrun"):
        hf_paged.load("nowhere", tensor_parallel_size=2)


@pytest.mark.slow
def test_benchmark() -> None:
    command = ["-m", "hf_paged.bench.parallel", "tiny", "--tp", "2", "--batches", "1,3", "--context", "20"]
    command += ["--steps", "2", "--rounds", "2", "--dtype", "float32", "--device", "cpu"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([*torchrun, *command], cwd=root, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tokens/s" in done.stdout and '"tensor_parallel_size": 2' in done.stdout
