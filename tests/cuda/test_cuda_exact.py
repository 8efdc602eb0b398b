"""Exact mode on a GPU, in bfloat16 and at a realistic size: the difference is not small, it is zero."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gpu_models import DEVICE, assert_idle, captured, needs_gpu
from transformers import Qwen3Config, Qwen3ForCausalLM

import hf_paged
from hf_paged import SamplingParams
from hf_paged.model.exact_forward import ExactForward

pytestmark = needs_gpu

SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 2048,
    "initializer_range": 0.05,
}
HEAT = 0.9
SAMPLING = SamplingParams(
    n=4, temperature=HEAT, seed=1, max_tokens=64, ignore_eos=True, logprobs=0, logprobs_mode="scaled_logprobs"
)


def prompts(lengths: tuple[int, ...] = (1, 15, 16, 17, 64, 130, 333, 90)) -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(3, SIZES["vocab_size"], (length,), generator=draw).tolist() for length in lengths]


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    torch.manual_seed(0)
    yield Qwen3ForCausalLM(Qwen3Config(**SIZES)).to(DEVICE, torch.bfloat16)


def padded(rows: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Token ids and mask as TRL makes them (prompts padded on the left, completions on the right); where these
    begin."""
    left, right = max(len(p) for p, _ in rows), max(len(c) for _, c in rows)
    ids = [[0] * (left - len(p)) + p + c + [0] * (right - len(c)) for p, c in rows]
    mask = [[0] * (left - len(p)) + [1] * len(p + c) + [0] * (right - len(c)) for p, c in rows]
    return torch.tensor(ids, device=DEVICE), torch.tensor(mask, device=DEVICE), left


def own_logprobs(model: Any, rows: list[tuple[list[int], list[int]]], head: Any) -> torch.Tensor:
    """`[B, T]` of the completions, through the model's own forward and TRL's fused head; with gradients."""
    ids, mask, start = padded(rows)
    hidden = model.model(
        input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False
    ).last_hidden_state[:, start - 1 : -1]
    weight, tokens = model.lm_head.weight, ids[:, start:].reshape(-1)
    found = head.apply(hidden.flatten(0, 1), weight, None, tokens, HEAT, 32768, None, 1.0, ("entropy",))[0]
    return found.view(hidden.shape[:2])


class TrlModel(torch.nn.Module):
    """The model with TRL's fused head as its forward."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner, self.config = model, model.config

    def forward(self, rows: Any) -> torch.Tensor:
        from trl.kernels import ChunkedLogProbFunction

        return own_logprobs(self.inner, rows, ChunkedLogProbFunction)


def reported(outputs: list[Any]) -> tuple[list[tuple[list[int], list[int]]], torch.Tensor]:
    samples = [(output.prompt_token_ids, c) for output in outputs for c in output.outputs]
    values = [[e[t].logprob for t, e in zip(c.token_ids, c.logprobs, strict=True)] for _, c in samples]
    return [(p, c.token_ids) for p, c in samples], torch.tensor(values, device=DEVICE)


@pytest.mark.parametrize(
    ("autocast", "options"),
    [
        (False, {}),
        (False, {"cuda_graphs": False}),
        (False, {"num_pages": 90, "max_num_seqs": 7, "max_num_batched_tokens": 100}),
        (False, {"page_size": 32}),
        (True, {}),
    ],
    ids=["graphs", "no graphs", "preemption and chunks", "pages of 32", "float32 weights under autocast"],
)
def test_the_difference_is_zero(model: Any, autocast: bool, options: dict[str, Any]) -> None:
    pytest.importorskip("trl.kernels.chunked_logprob")
    lm = model.float() if autocast else model.bfloat16()
    hf_paged.wrap(lm, exact=True, **({"num_pages": 2048} | options))
    trl_model = TrlModel(lm)
    forward = ExactForward(trl_model)
    try:
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
            lm.generate_many(prompts()[:3], SAMPLING)  # so that graphs of steps with prefill are captured below
            outputs = lm.generate_many(prompts(), SAMPLING)
            rows, values = reported(outputs)
            assert bool(captured(lm)) == options.get("cuda_graphs", True)
            with torch.no_grad():
                for start, end in ((0, 32), (5, 6), (3, 17)):
                    own = trl_model(rows[start:end])
                    assert float((own - values[start:end]).abs().max()) == 0.0, (start, end)
        assert_idle(lm)
    finally:
        forward.remove()
        hf_paged.unwrap(lm)


def test_without_it_the_difference_is_not_zero(model: Any) -> None:
    """What the tests above would see, were the kernels torch's."""
    pytest.importorskip("trl.kernels.chunked_logprob")
    lm = hf_paged.wrap(model.bfloat16(), num_pages=2048)
    try:
        rows, values = reported(lm.generate_many(prompts(), SAMPLING))
        with torch.no_grad():
            assert float((TrlModel(lm)(rows) - values).abs().max()) > 0.0
    finally:
        hf_paged.unwrap(lm)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_close_to_the_stock_ones(model: Any, checkpointing: bool) -> None:
    pytest.importorskip("trl.kernels.chunked_logprob")
    lm = model.bfloat16().train()
    rows = [(prompt, prompts()[4][:40]) for prompt in prompts()[3:6]]
    trl_model, grads = TrlModel(lm), []
    if checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        for exact in (False, True):
            lm.zero_grad()
            forward = ExactForward(trl_model) if exact else None
            try:
                trl_model(rows).mean().backward()
            finally:
                if forward is not None:
                    forward.remove()
            grads.append({name: p.grad.float() for name, p in lm.named_parameters()})
    finally:
        lm.gradient_checkpointing_disable()
        lm.zero_grad()
        lm.eval()
    stock, exact_grads = grads
    assert all(grad.isfinite().all() for grad in exact_grads.values())
    whole = torch.cat([grad.flatten() for grad in stock.values()])
    difference = torch.cat([grad.flatten() for grad in exact_grads.values()]) - whole
    assert float(difference.norm() / whole.norm()) < 0.1
