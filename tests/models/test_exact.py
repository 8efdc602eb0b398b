"""Exact mode end to end, on a CPU in Triton's interpreter: what the engine reports is what a forward with gradients
computes, to the bit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from exactly import ON_GPU, bits, ordered_products  # noqa: F401
from families import make_model, make_prompts
from test_graphs_on_cpu import Landed, Replays

pytest.importorskip("triton")

import hf_paged
from hf_paged import EngineConfig, SamplingParams
from hf_paged.attention.interface import attention_configs
from hf_paged.kernels.triton.exact_logprobs import exact_logprobs
from hf_paged.model import graphs, mixed_graphs
from hf_paged.model.exact import InexactOperator, exact_arithmetic
from hf_paged.model.exact_forward import ExactForward
from hf_paged.sampling import device

pytestmark = pytest.mark.skipif(ON_GPU, reason="tests/cuda holds these for a GPU")

HEAT = 0.7
PROMPTS = make_prompts([3, 9, 18])
SAMPLING = SamplingParams(
    n=2, temperature=HEAT, seed=4, max_tokens=3, ignore_eos=True, logprobs=0, logprobs_mode="scaled_logprobs"
)


def small(family: str = "Llama", **changes: Any) -> Any:
    """With sizes that torch's vectorised loops on a CPU divide, whose ends are computed by other functions."""
    return make_model(family, **({"head_dim": 32, "num_hidden_layers": 1} | changes))


def own_logprobs(model: Any, rows: list[tuple[list[int], list[int]]], heat: float = HEAT) -> list[list[float]]:
    """Of completions, by the model's own forward over a batch that is padded on the left and on the right."""
    left, right = max(len(p) for p, _ in rows), max(len(c) for _, c in rows)
    ids = torch.tensor([[0] * (left - len(p)) + p + c + [0] * (right - len(c)) for p, c in rows])
    mask = torch.tensor([[0] * (left - len(p)) + [1] * len(p + c) + [0] * (right - len(c)) for p, c in rows])
    forward = ExactForward(model)
    try:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, left - 1 : -1].detach()
    finally:
        forward.remove()
    scales = torch.full((right,), 1 / heat)
    return [
        exact_logprobs(row, ids[i, left:], scales)[: len(c)].tolist()
        for i, (row, (_, c)) in enumerate(zip(logits, rows, strict=True))
    ]


def reported(outputs: list[Any]) -> tuple[list[tuple[list[int], list[int]]], list[list[float]]]:
    """(prompt, completion) of all samples, and the log-probabilities that came with them."""
    samples = [(output.prompt_token_ids, c) for output in outputs for c in output.outputs]
    values = [[e[t].logprob for t, e in zip(c.token_ids, c.logprobs, strict=True)] for _, c in samples]
    return [(prompt, c.token_ids) for prompt, c in samples], values


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", {}),
        ("Llama", {"page_size": 4, "num_pages": 10, "max_num_seqs": 6}),
        ("Llama", {"page_size": 16, "max_num_batched_tokens": 7, "max_num_seqs": 5}),
        ("Qwen3", {"page_size": 8}),
        pytest.param("Qwen2", {}, marks=pytest.mark.slow),
        pytest.param("Olmo2", {}, marks=pytest.mark.slow),
    ],
    ids=["Llama", "preemption", "chunks", "Qwen3", "Qwen2", "Olmo2"],
)
def test_reported_log_probabilities_are_the_models_own(family: str, options: dict[str, int]) -> None:
    model = hf_paged.wrap(small(family), exact=True, **({"num_pages": 64} | options))
    outputs = model.generate_many(PROMPTS, SAMPLING)
    rows, values = reported(outputs)
    assert own_logprobs(model, rows) == values
    assert own_logprobs(model, rows[3:5]) == values[3:5], "another batch, the same bits"
    stats = model.engine.scheduler.stats
    assert ("num_pages" not in options) or stats.num_preemptions > 0


def test_a_cached_prefix_does_not_matter() -> None:
    model = hf_paged.wrap(small(), exact=True, page_size=4, num_pages=64)
    first = model.generate_many([PROMPTS[2]], SAMPLING)
    second = model.generate_many([PROMPTS[2]], SAMPLING)
    assert second[0].num_cached_tokens > 0
    assert reported(first) == reported(second)


def test_scores_and_penalties_are_exact_too() -> None:
    """What runs on the host, and what is not sampled at all."""
    model = hf_paged.wrap(small(), exact=True, num_pages=64)
    rows, values = reported(model.generate_many(PROMPTS, SAMPLING.clone(repetition_penalty=1.3)))
    assert own_logprobs(model, rows) == values
    scores = model.score([p for p, _ in rows], [c for _, c in rows], temperature=HEAT)
    assert [list(map(float, score)) for score in scores] == values


@pytest.mark.parametrize("lookahead", [pytest.param(False, marks=pytest.mark.slow), True])
def test_steps_in_graphs(monkeypatch: pytest.MonkeyPatch, lookahead: bool) -> None:
    """Decodes alone, and prefill beside decodes, from the device's buffers."""
    for module in (graphs, device):
        monkeypatch.setattr(module, "record", Landed)
    options = {"max_num_seqs": 4, "page_size": 4, "num_pages": 64, "async_scheduling": lookahead, "exact": True}
    model = hf_paged.wrap(small(), **options)
    executor: Any = model.engine.executor
    executor._device_sampler = device.DeviceSampler(4, torch.device("cpu"), exact=True)
    recorder, shape = Replays(), (4, executor._max_pages, 4, 4)
    executor._graphs = graphs.DecodeGraphs(executor._runner, executor._backend, *shape, recorder=recorder, exact=True)
    executor._mixed = mixed_graphs.MixedGraphs(executor._runner, executor._backend, executor._graphs, 10**6)
    executor._mixed._seen = set(itertools.product(executor._mixed.sizes, executor._mixed._sampled, [False], [True]))
    rows, values = reported(model.generate_many(PROMPTS, SAMPLING))
    assert recorder.count > 5 and executor._mixed._captured
    assert own_logprobs(model, rows) == values


# ---- the model's forward -----------------------------------------------------------------------------------


def loss_and_grads(model: Any, **options: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    ids = torch.tensor([PROMPTS[2]])
    loss = model(input_ids=ids, labels=ids, use_cache=False, **options).loss
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_gradients_are_the_stock_ones_and_checkpointing_changes_no_bit() -> None:
    model = small(num_hidden_layers=2).train()
    stock, expected = loss_and_grads(model)
    forward = ExactForward(model)
    exact, grads = loss_and_grads(model)
    assert exact == pytest.approx(stock, abs=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        again, same = loss_and_grads(model)
        assert again == exact
        assert all((bits(grad) == bits(same[name])).all() for name, grad in grads.items())
    forward.remove()
    model.gradient_checkpointing_disable()
    assert loss_and_grads(model)[0] == stock
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(config._attn_implementation == "sdpa" for config in attention_configs(model))


def test_a_forward_that_fails_leaves_the_model_as_it_was() -> None:
    model = small(num_hidden_layers=2)
    forward = ExactForward(model)
    with pytest.raises(RuntimeError, match="no luck"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.model.layers[1].mlp, "forward", lambda x: (_ for _ in ()).throw(RuntimeError("no luck")))
        model(input_ids=torch.tensor([[5, 6]]), use_cache=False)
    assert all(config._attn_implementation == "sdpa" for config in attention_configs(model))
    forward.remove()
    prompt = torch.tensor([PROMPTS[1]])
    assert torch.equal(model(prompt, use_cache=False).logits, model(prompt, use_cache=False).logits)


def test_forwards_that_cannot_be_exact_are_refused() -> None:
    model, ids = small(), torch.tensor([PROMPTS[1]])
    windowed = small("Mistral")
    forwards = [ExactForward(model), ExactForward(windowed)]
    with pytest.raises(ValueError, match="packed into one row"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), use_cache=False)
    with pytest.raises(ValueError, match="four dimensions"):
        model(ids, attention_mask=torch.ones(1, 1, 9, 9, dtype=torch.bool), use_cache=False)
    with pytest.raises(ValueError, match="sliding windows"):
        windowed(ids, use_cache=False)
    for forward in forwards:
        forward.remove()


def test_generation_by_the_model_itself_is_not_concerned() -> None:
    model = small()
    ids = torch.tensor([PROMPTS[1]])
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    forward = ExactForward(model)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
    forward.remove()


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_operators_are_torchs(context: Any) -> None:
    """Each one that is replaced, through the functions that models call."""
    F = torch.nn.functional
    x, w, b = torch.randn(2, 5, 32), torch.randn(48, 32), torch.randn(48)
    calls: dict[str, Any] = {
        "linear": lambda: F.linear(x, w),
        "linear with bias": lambda: F.linear(x, w, b),
        "matmul": lambda: x @ x.transpose(1, 2),
        "baddbmm": lambda: torch.baddbmm(torch.ones(2, 5, 5), x, x.transpose(1, 2), beta=0.5),
        "mean": lambda: x.pow(2).mean(-1, keepdim=True),
        "mean of all": lambda: x.mean(),
        "mean of two": lambda: x.mean((0, 2)),
        "sum": lambda: x.sum(1),
        "sum of all": lambda: x.sum(),
        "softmax": lambda: F.softmax(x, 1),
        "half softmax": lambda: F.softmax(x.half(), -1, dtype=torch.float32),
        "log_softmax": lambda: F.log_softmax(x, -1),
        "layer_norm": lambda: F.layer_norm(x, (32,), w[0], w[1]),
        "layer_norm without": lambda: F.layer_norm(x, (5, 32)),
        "rms_norm": lambda: F.rms_norm(x, (32,), w[0], 1e-6),
        "int sum": lambda: torch.arange(9).sum(),
    }
    with context():
        for name, call in calls.items():
            expected = call()
            with exact_arithmetic(), exact_arithmetic():
                found = call()
            assert found.dtype == expected.dtype and found.shape == expected.shape, name
            torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_gradients_of_norms_pass_through() -> None:
    F = torch.nn.functional
    grads = []
    for exact in (False, True):
        x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        w = torch.ones(32, requires_grad=True)
        if exact:
            with exact_arithmetic():
                out = F.layer_norm(x, (32,), w, w) + F.rms_norm(x, (32,), w)
        else:
            out = F.layer_norm(x, (32,), w, w) + F.rms_norm(x, (32,), w)
        out.pow(3).sum().backward()
        grads.append((x.grad, w.grad))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_operators_that_are_not_known_are_refused_by_name() -> None:
    with exact_arithmetic():
        with pytest.raises(InexactOperator, match=r"cumsum"):
            torch.randn(3, 4).cumsum(-1)
        assert torch.arange(4).cumsum(0).tolist() == [0, 1, 3, 6]
        with pytest.raises(InexactOperator, match="float64"):
            torch.ones(2, 2, dtype=torch.float64) @ torch.ones(2, 2, dtype=torch.float64)
    torch.randn(3, 4).cumsum(-1)


# ---- what cannot be exact ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"compile": "layers"}, "compile"),
        ({"fuse_linear": True}, "fuse_linear"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"attention_backend": "torch"}, "attention_backend"),
        ({"attention_backend": "flashinfer"}, "attention_backend"),
    ],
)
def test_options_that_contradict_it(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"exact.*{says}"):
        EngineConfig(exact=True, **options)


def test_models_that_cannot_be_exact() -> None:
    with pytest.raises(ValueError, match="mixture of experts"):
        _ = hf_paged.wrap(make_model("Mixtral"), exact=True).engine
    with pytest.raises(ValueError, match="float64"):
        _ = hf_paged.wrap(small().double(), exact=True).engine


def test_it_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="exact=True needs a GPU"):
        _ = hf_paged.wrap(small(), exact=True).engine
