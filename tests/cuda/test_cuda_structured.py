"""Structured output on a GPU: masks are made while the device computes, beside CUDA graphs and speculation."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from cuda.gpu_models import make
from sampling.bytewise import EOS, VOCAB, byte_tokenizer

import hf_paged
from hf_paged import SamplingParams, StructuredOutputsParams

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FORM = StructuredOutputsParams(regex="[0-9]{3}-[a-f]{2}")
PROMPTS = ["The sea", "The sky", "The hill", "The road", "A ship", "A lamp"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    pytest.importorskip("xgrammar")
    return byte_tokenizer()


def wrapped(tokenizer: Any, **options: Any) -> Any:
    model = make(vocab_size=VOCAB, initializer_range=0.1, eos_token_id=EOS)
    return hf_paged.wrap(model, num_pages=256, max_num_seqs=8, tokenizer=tokenizer, compile="off", **options)


def params(**options: Any) -> list[SamplingParams]:
    """Free requests between formed ones."""
    free = SamplingParams(max_tokens=12, ignore_eos=True, **options)
    formed = free.clone(structured_outputs=FORM, stop_token_ids=[EOS])
    few = free.clone(allowed_token_ids=[5, 9, 33, 63])
    return [each.clone(seed=i) for i, each in enumerate([free, formed, few, formed, free, formed])]


def test_forms_beside_free_requests(tokenizer: Any) -> None:
    model = wrapped(tokenizer)
    outputs = model.generate_many(PROMPTS, [each.clone(n=3) for each in params(logprobs=0)])
    for place in (1, 3, 5):
        assert all(re.fullmatch(FORM.regex, sample.text) for sample in outputs[place].outputs)
    assert all(set(sample.token_ids) <= {5, 9, 33, 63} for sample in outputs[2].outputs)
    captured = model.engine.executor._graphs._captured
    assert not all(kind.draws for kind in captured), "steps with masks run in graphs"
    (alone,) = model.generate_many(PROMPTS[:1], params(logprobs=0)[0].clone(n=3))
    assert [s.token_ids for s in alone.outputs] == [s.token_ids for s in outputs[0].outputs]
    hf_paged.unwrap(model)


def test_nothing_waits_for_masks(tokenizer: Any) -> None:
    """A step is launched before the tokens before it are known, and the same comes out as one by one."""
    model = wrapped(tokenizer)
    engine = model.engine
    depth = []
    engine.observers.append(lambda _: depth.append(len(engine._flights)))
    ahead = [output.outputs[0].token_ids for output in model.generate_many(PROMPTS, params())]
    assert not engine._held and depth.count(1) > 5
    hf_paged.unwrap(model)
    model = wrapped(tokenizer, async_scheduling=False, cuda_graphs=False)
    assert [output.outputs[0].token_ids for output in model.generate_many(PROMPTS, params())] == ahead
    hf_paged.unwrap(model)


def test_with_drafts(tokenizer: Any) -> None:
    model = wrapped(tokenizer)
    expected = [output.outputs[0].token_ids for output in model.generate_many(PROMPTS, params())]
    hf_paged.unwrap(model)
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}
    model = wrapped(tokenizer, speculative_config=speculation)
    assert [output.outputs[0].token_ids for output in model.generate_many(PROMPTS, params())] == expected
    hf_paged.unwrap(model)


def test_what_the_host_samples_runs_in_graphs(tokenizer: Any) -> None:
    """Penalties need the host; the forward before them does not."""
    model = wrapped(tokenizer)
    penalised = [each.clone(repetition_penalty=1.3) for each in params(temperature=0.0)]
    outputs = model.generate_many(PROMPTS, penalised)
    assert any(not kind.draws for kind in model.engine.executor._graphs._captured)
    hf_paged.unwrap(model)
    model = wrapped(tokenizer, cuda_graphs=False)
    plain = model.generate_many(PROMPTS, penalised)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in plain]
    hf_paged.unwrap(model)


@pytest.mark.parametrize("count", [1, 5])
def test_what_is_forced_is_drafted(tokenizer: Any, count: int) -> None:
    """Looking ahead is left for it, and taken up again."""
    form = StructuredOutputsParams(regex="(red|blue) and then the long way round [0-9]{2}[a-z]{9}, the end")
    each = [SamplingParams(max_tokens=80, seed=i, structured_outputs=form, stop_token_ids=[EOS]) for i in range(count)]
    found, steps = [], []
    for jumps in (True, False):
        model = wrapped(tokenizer)
        model.engine.speculator._jumps = jumps
        found.append([output.outputs[0].text for output in model.generate_many(PROMPTS[:count], each)])
        steps.append(model.engine.stats.steps)
        if jumps:
            assert model.engine.speculator.stats["forced"].acceptance_rate == 1
        hf_paged.unwrap(model)
    assert found[0] == found[1] and all(re.fullmatch(form.regex, text) for text in found[0])
    assert steps[0] < 0.6 * steps[1]
