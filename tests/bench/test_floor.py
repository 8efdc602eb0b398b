"""The floor's arithmetic, on numbers that can be checked by hand and on those of known models."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from hf_paged.bench.floor import ModelCost, Rates, measure_rates, step_floor, workload_floor
from hf_paged.bench.models import SHAPES
from hf_paged.bench.workloads import Workload, make_workload

H100 = Rates(bytes_per_s=3e12, flops_per_s=700e12)


def config(tied: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=10,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=2,
        tie_word_embeddings=tied,
    )


BODY = 3 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16 + 2 * 8) + 8
"""Per layer: q, k and v, o, the MLP's three, two norms; and the last norm."""


@pytest.mark.parametrize("tied", [True, False])
def test_cost_of_a_model(tied: bool) -> None:
    """A tied embedding is read as the output layer; another one is not read; neither is among the body's parameters."""
    cost = ModelCost.of(config(tied), torch.bfloat16)
    assert cost.body_params == BODY
    assert cost.weight_bytes == 2 * (BODY + 80)
    assert cost.kv_bytes == 2 * 3 * 2 * 2 * 2
    assert cost.attention_flops == 2 * 2 * 3 * 4 * 2


def test_floor_by_hand() -> None:
    """Prompts of 10 and 20 tokens; outputs of 3, and of 2 and 4 tokens."""
    cost = ModelCost(weight_bytes=1000, body_params=7, kv_bytes=5, attention_flops=2)
    work = Workload("by hand", [[0] * 10, [0] * 20], [[3, 3], [2, 4]])
    floor = workload_floor(cost, work, Rates(bytes_per_s=100.0, flops_per_s=10.0))
    assert floor.weights_s == pytest.approx(1000 * 4 / 100)
    own = (1 + 2) * 2 + 1 + (1 + 2 + 3)
    assert floor.kv_s == pytest.approx(5 * (10 * 2 * 2 + 20 * (1 + 3) + own) / 100)
    assert floor.shared_kv_s == pytest.approx(5 * (10 * 2 + 20 * 3 + own) / 100)
    assert floor.prefill_s == pytest.approx((2 * 7 * 30 + 2 * (55 + 210)) / 10)
    assert floor.total_s == pytest.approx(floor.weights_s + floor.kv_s + floor.prefill_s)
    assert floor.shared_total_s == pytest.approx(floor.weights_s + floor.shared_kv_s + floor.prefill_s)


def test_step_floor_by_hand() -> None:
    cost = ModelCost(weight_bytes=1000, body_params=7, kv_bytes=5, attention_flops=2)
    assert step_floor(cost, 4, 10.5, Rates(100.0, 10.0)) == pytest.approx((1000 + 4 * 10.5 * 5) / 100)


@pytest.mark.parametrize(
    ("model", "workload", "seconds"),
    [("qwen3-0.6b", "nano", 5.22), ("llama-3.1-8b", "nano", 13.29), ("llama-3.1-8b", "single", 1.29)],
)
def test_floors_of_known_models(model: str, workload: str, seconds: float) -> None:
    shape = SHAPES[model]()
    floor = workload_floor(ModelCost.of(shape, torch.bfloat16), make_workload(workload, shape.vocab_size), H100)
    assert floor.total_s == pytest.approx(seconds, abs=0.01)
    assert floor.shared_total_s == floor.total_s


def test_known_models_have_their_parameters() -> None:
    small = ModelCost.of(SHAPES["qwen3-0.6b"](), torch.bfloat16)
    assert small.body_params == 440_467_456 and small.weight_bytes == 2 * (440_467_456 + 151_936 * 1024)
    large = ModelCost.of(SHAPES["llama-3.1-8b"](), torch.bfloat16)
    assert large.body_params == 6_979_588_096 and large.weight_bytes == 2 * (6_979_588_096 + 128_256 * 4096)


def test_rates_are_measured() -> None:
    rates = measure_rates(torch.device("cpu"), torch.float32, copy_bytes=1 << 20, matmul_size=64)
    assert 1e6 < rates.bytes_per_s < 1e14
    assert 1e6 < rates.flops_per_s < 1e16
