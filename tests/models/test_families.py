"""Every family's greedy output through pages equals transformers' own, token for token, in float32."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from families import FAMILIES, WINDOW, WINDOWED, left_pad, make_model, make_prompts, stock_greedy

import hf_paged
from hf_paged import SamplingParams

PAGE = 8
NEW = 32
LENGTHS = [1, 7, 8, 9, 16, 17, WINDOW - 1, WINDOW, WINDOW + 1, 40]
"""Around page and window boundaries; with NEW more tokens each crosses several of both."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)


@dataclass
class Case:
    """A family's stock model, prompts and what it says to them."""

    family: str
    model: Any
    prompts: list[list[int]]
    expected: list[list[int]]

    def wrapped(self, **options: Any) -> Any:
        options = {"page_size": PAGE, "num_pages": 160, "max_num_seqs": 16} | options
        return hf_paged.wrap(copy.deepcopy(self.model), **options)


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request: pytest.FixtureRequest) -> Case:
    model = make_model(request.param)
    prompts = make_prompts(LENGTHS)
    return Case(request.param, model, prompts, [stock_greedy(model, prompt, NEW) for prompt in prompts])


def tokens_of(outputs: list[hf_paged.RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def test_outputs_are_worth_comparing(case: Case) -> None:
    """A model that says the same thing whatever it is told would pass every other test here."""
    assert len({tuple(tokens) for tokens in case.expected}) == len(case.expected)
    assert sum(len(set(tokens)) for tokens in case.expected) / len(case.expected) > 6


def test_generate_on_a_padded_batch(case: Case) -> None:
    batch = left_pad([case.prompts[i] for i in (1, 4, 6, 9)])
    free = case.model.generate(**batch, do_sample=False, max_new_tokens=NEW)[:, batch["input_ids"].shape[1] :]
    # An id that ends some rows, early or late, and lets others go on.
    counts = {int(t): int((free == t).any(1).sum()) for t in free[:, 3:].unique()}
    eos = next(t for t, rows in sorted(counts.items()) if 0 < rows < len(free) and not (free[:, :2] == t).any())
    for options in ({}, {"eos_token_id": eos}):
        expected = case.model.generate(**batch, do_sample=False, max_new_tokens=NEW, **options)
        model = case.wrapped()
        found = model.generate(**batch, do_sample=False, max_new_tokens=NEW, **options)
        assert torch.equal(found, expected)
        assert model.engine.stats.generation_tokens > 0, "it went through the stock loop"
        assert model.engine.scheduler.num_active_pages == 0


def test_generate_many(case: Case) -> None:
    model = case.wrapped()
    outputs = model.generate_many(case.prompts, GREEDY)
    assert tokens_of(outputs) == case.expected
    assert all(output.outputs[0].finish_reason == "length" for output in outputs)


def test_chunked_prefill_and_preemption(case: Case) -> None:
    model = case.wrapped(num_pages=14, max_num_seqs=6, max_num_batched_tokens=6, enable_prefix_caching=False)
    chunks: list[int] = []
    model.engine.observers.append(lambda record: chunks.extend(size for _, _, size in record.chunks))
    assert tokens_of(model.generate_many(case.prompts, GREEDY)) == case.expected
    assert max(chunks) <= 6
    assert model.engine.scheduler.stats.num_preemptions > 0
    assert model.engine.scheduler.num_active_pages == 0


def test_preemption_with_the_prefix_cache(case: Case) -> None:
    model = case.wrapped(num_pages=14, max_num_seqs=6, max_num_batched_tokens=16)
    assert tokens_of(model.generate_many(case.prompts, GREEDY)) == case.expected
    assert model.engine.scheduler.stats.num_preemptions > 0


def test_a_second_call_hits_the_prefix_cache(case: Case) -> None:
    model = case.wrapped()
    model.generate_many(case.prompts, GREEDY)
    again = model.generate_many(case.prompts, GREEDY)
    assert tokens_of(again) == case.expected
    cached = [output.num_cached_tokens for output in again]
    assert cached == [(length - 1) // PAGE * PAGE for length in LENGTHS]


def test_the_model_is_left_as_it_was(case: Case) -> None:
    model = copy.deepcopy(case.model).train()
    model.model.layers[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    implementation = model.config._attn_implementation
    training = {name: module.training for name, module in model.named_modules()}
    batch = left_pad([case.prompts[3], case.prompts[6]])
    model.eval()
    expected = model(**batch).logits
    for name, module in model.named_modules():
        module.training = training[name]
    hf_paged.wrap(model, page_size=PAGE, num_pages=64)
    model.generate_many(case.prompts[:3], GREEDY)
    model.generate(**batch, do_sample=False, max_new_tokens=4)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.config._attn_implementation == implementation
    assert {name: module.training for name, module in model.named_modules()} == training
    model.eval()
    assert torch.equal(model(**batch).logits, expected)


FEATURES: list[tuple[str, dict[str, Any]]] = [
    ("Mistral", {"sliding_window": None}),
    ("Phi3", {"sliding_window": None}),
    ("Gemma2", {"sliding_window": 400}),
    ("Gemma3", {"sliding_window": 400}),
    ("GptOss", {"sliding_window": 400}),
    ("Gemma2", {"attn_logit_softcapping": None}),
    ("SmolLM3", {"no_rope_layers": [1, 1, 1, 1]}),
    ("Granite", {"attention_multiplier": 0.25}),
]


@pytest.mark.parametrize(("family", "change"), FEATURES, ids=lambda value: value if isinstance(value, str) else "")
def test_features_matter(family: str, change: dict[str, Any]) -> None:
    """Without the feature the same weights say something else, so a paged path that lost it would be found out."""
    prompt = make_prompts([40])[0]
    assert stock_greedy(make_model(family), prompt, NEW) != stock_greedy(make_model(family, **change), prompt, NEW)


def test_sinks_matter() -> None:
    prompt = make_prompts([40])[0]
    model = make_model("GptOss")
    with_sinks = stock_greedy(model, prompt, NEW)
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(-1e4)
    assert stock_greedy(model, prompt, NEW) != with_sinks


@pytest.mark.parametrize("family", sorted(WINDOWED))
def test_windows_are_found(family: str) -> None:
    layers = hf_paged.wrap(make_model(family), num_pages=16).engine.executor.layout.layers
    windows = [layer.window for layer in layers]
    assert WINDOW in windows
    assert set(windows) <= {WINDOW, None}


MASK_ONLY: list[tuple[str, dict[str, Any]]] = [
    ("Phimoe", {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2}),
    ("Olmoe", {"sliding_window": WINDOW, "num_experts": 4, "num_experts_per_tok": 2}),
]
"""Where the attention call and the mask say different things about a window; stock sdpa goes by the mask."""


@pytest.mark.parametrize(("family", "options"), MASK_ONLY, ids=["Phimoe", "Olmoe"])
def test_a_window_that_only_the_mask_knows(family: str, options: dict[str, Any]) -> None:
    """PhiMoE's window stands in its mask and in no argument; OLMoE's in an argument and in no mask."""
    model = make_model(family, **options)
    prompts = make_prompts([9, 25, 40])
    batch = [torch.tensor([prompt]) for prompt in prompts]
    expected = [model(ids, use_cache=False).logits[0, -1].argmax().item() for ids in batch]
    try:
        hf_paged.wrap(model, page_size=PAGE, num_pages=64)
        found = tokens_of(model.generate_many(prompts, SamplingParams(temperature=0.0, max_tokens=1)))
    except hf_paged.UnsupportedModelError:
        return  # saying no is fine; a wrong token is not
    assert [tokens[0] for tokens in found] == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_stays_close(dtype: torch.dtype) -> None:
    """No token-for-token promise here, but the log-probabilities must be the model's, up to the rounding."""
    model = make_model("Llama").to(dtype)
    prompts = make_prompts([9, 40])
    hf_paged.wrap(model, page_size=PAGE, num_pages=64)
    outputs = model.generate_many(prompts, SamplingParams(temperature=0.0, max_tokens=8, logprobs=0, ignore_eos=True))
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = output.outputs[0].token_ids
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids]), use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        found = torch.tensor(
            [entry[token].logprob for entry, token in zip(output.outputs[0].logprobs, ids, strict=True)]
        )
        assert (found - expected).abs().max() < 0.25


def test_a_soft_cap_that_the_own_forward_leaves_out_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """Gemma 2 under sdpa runs without its cap, in training as in stock generate: pages agree, and it is said."""
    model = make_model("Gemma2")
    model.config._attn_implementation = "sdpa"  # what transformers 5.17 picks by itself, and 5.23 refuses
    prompt = make_prompts([20])[0]
    try:
        expected = stock_greedy(model, prompt, 12)
    except ValueError as refused:
        pytest.skip(f"this transformers does not run it: {refused}")
    hf_paged.wrap(model, num_pages=64)
    greedy = hf_paged.SamplingParams(temperature=0.0, max_tokens=12, detokenize=False)
    assert model.generate_many([prompt], greedy)[0].outputs[0].token_ids == expected
    assert "soft cap" in caplog.text
