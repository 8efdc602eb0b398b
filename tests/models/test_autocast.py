"""Generation under the caller's autocast: what attention computes in, and what the pages hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.families import make_model, make_prompts

import hf_paged

OPTIONS = {"page_size": 8, "num_pages": 64, "max_num_seqs": 8}
PROMPTS = make_prompts([3, 21])


def pool_dtype(model: Any) -> torch.dtype:
    return model.engine.executor.storage.keys[0].dtype


@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
def test_the_pool_has_the_dtype_that_attention_computes_in(family: str) -> None:
    """Rotated keys are float32 under autocast, though torch's own attention rounds them: so does ours."""
    model = hf_paged.wrap(make_model(family), **OPTIONS)
    sampling = hf_paged.SamplingParams(seed=1, max_tokens=12, logprobs=0, ignore_eos=True)
    exact = model.generate_many(PROMPTS, sampling)
    assert pool_dtype(model) == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model.generate_many(PROMPTS, sampling)
        assert pool_dtype(model) == torch.bfloat16
        for output in outputs:
            ids, start = output.outputs[0].token_ids, len(output.prompt_token_ids)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([output.prompt_token_ids + ids])).logits[0, start - 1 : -1]
            expected = logits.float().log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            own = torch.tensor([entry[i].logprob for entry, i in zip(output.outputs[0].logprobs, ids, strict=True)])
            assert float((own - expected).abs().mean()) < 0.06
    again = model.generate_many(PROMPTS, sampling)
    assert pool_dtype(model) == torch.float32
    assert [o.outputs[0].token_ids for o in again] == [o.outputs[0].token_ids for o in exact]


def test_a_model_in_the_autocast_dtype_keeps_its_engine() -> None:
    model = hf_paged.wrap(make_model("Llama").to(torch.bfloat16), **OPTIONS)
    engine = model.engine
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.engine is engine
