"""The time below which a workload cannot go on a machine: bytes that must be read and sums that must be done, at the
rates that this machine reaches."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hf_paged.bench.models import empty_model
from hf_paged.bench.workloads import Workload

MIB = 1 << 20


@dataclass(frozen=True)
class Rates:
    """How fast a machine moves bytes and multiplies matrices."""

    bytes_per_s: float
    """Of memory, reads and writes counted."""
    flops_per_s: float
    """Of a large matrix product, an addition and a multiplication counted as two."""


def synchronize(device: torch.device) -> None:
    """Waits until the device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_rates(
    device: torch.device, dtype: torch.dtype, *, copy_bytes: int | None = None, matmul_size: int | None = None
) -> Rates:
    """Times a large copy within the device's memory and a large matrix product.

    Args:
        dtype: of the matrix product.
        copy_bytes: None is 2 GiB on a GPU and 256 MiB on a CPU.
        matmul_size: rows and columns of both matrices; None is 8,192 on a GPU and 2,048 on a CPU.
    """
    gpu = device.type == "cuda"
    return Rates(
        _copy_rate(device, copy_bytes or (2048 if gpu else 256) * MIB),
        _matmul_rate(device, dtype, matmul_size or (8192 if gpu else 2048)),
    )


def _copy_rate(device: torch.device, count: int) -> float:
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * count / _best_seconds(lambda: target.copy_(source), device)


def _matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    product = torch.empty_like(a)
    return 2 * size**3 / _best_seconds(lambda: torch.mm(a, b, out=product), device)


def _best_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, in the best of some rounds after one that does not count."""
    calls = 10 if device.type == "cuda" else 1
    times = []
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        times.append((time.perf_counter() - start) / calls)
    return min(times[1:])


@dataclass(frozen=True)
class ModelCost:
    """What a model's steps read and compute."""

    weight_bytes: int
    """Read by every step: all weights but an input embedding that is not also the output's, of which a step reads a few
    rows."""
    body_params: int
    """Parameters that every token is multiplied with: all but embeddings and the output layer."""
    kv_bytes: int
    """Keys and values of one token in all layers."""
    attention_flops: int
    """Of one query and one key in all layers: their product, and the value's part in the sum."""

    @classmethod
    def of(cls, config: Any, dtype: torch.dtype) -> ModelCost:
        """The cost of a causal LM by its config, if all its layers attend to everything."""
        model = empty_model(config, dtype, "meta")
        text = config.get_text_config()
        total = sum(parameter.numel() for parameter in model.parameters())
        embedding = model.get_input_embeddings().weight
        head = model.get_output_embeddings().weight
        tied = head is embedding
        heads, layers = text.num_attention_heads, text.num_hidden_layers
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        return cls(
            weight_bytes=(total - (0 if tied else embedding.numel())) * dtype.itemsize,
            body_params=total - embedding.numel() - (0 if tied else head.numel()),
            kv_bytes=2 * layers * text.num_key_value_heads * head_dim * dtype.itemsize,
            attention_flops=4 * layers * heads * head_dim,
        )


@dataclass(frozen=True)
class Floor:
    """Seconds of a workload's unavoidable parts, one after the other."""

    weights_s: float
    """Reading the weights once per step, in as few steps as there can be."""
    kv_s: float
    """Every sequence reading its own context in each step."""
    shared_kv_s: float
    """The same if the prompt of a group of samples is read once per step for all of them."""
    prefill_s: float
    """Computing every prompt once."""

    @property
    def total_s(self) -> float:
        return self.weights_s + self.kv_s + self.prefill_s

    @property
    def shared_total_s(self) -> float:
        return self.weights_s + self.shared_kv_s + self.prefill_s


def workload_floor(cost: ModelCost, work: Workload, rates: Rates) -> Floor:
    """The floor of a workload whose sequences all run at once: as many steps as the longest output has tokens.

    The first token of an output comes with its prompt, and each later one reads the keys and values of all tokens
    before it: m tokens after a prompt of p read (m - 1) p of the prompt and m (m - 1) / 2 of their own.
    """
    prompt_tokens = shared_prompt_tokens = own_tokens = 0
    prefill_flops = 0.0
    for prompt, lengths in zip(work.prompts, work.lengths, strict=True):
        count = len(prompt)
        prompt_tokens += count * sum(length - 1 for length in lengths)
        shared_prompt_tokens += count * (max(lengths) - 1)
        own_tokens += sum(length * (length - 1) // 2 for length in lengths)
        prefill_flops += 2.0 * cost.body_params * count + cost.attention_flops * count * (count + 1) / 2
    steps = max(map(max, work.lengths))
    return Floor(
        weights_s=cost.weight_bytes * steps / rates.bytes_per_s,
        kv_s=cost.kv_bytes * (prompt_tokens + own_tokens) / rates.bytes_per_s,
        shared_kv_s=cost.kv_bytes * (shared_prompt_tokens + own_tokens) / rates.bytes_per_s,
        prefill_s=prefill_flops / rates.flops_per_s,
    )


def step_floor(cost: ModelCost, batch: int, context: float, rates: Rates) -> float:
    """Seconds of a decode step of `batch` sequences of `context` tokens: the weights and their contexts read."""
    return (cost.weight_bytes + batch * context * cost.kv_bytes) / rates.bytes_per_s
