"""Structured output on a GPU: masks there are applied by another kernel."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_paged
from hf_paged import SamplingParams, StructuredOutputsParams

pytestmark = pytest.mark.cuda


def test_forms_beside_free_requests(tiny_checkpoint: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16).cuda().eval()
    hf_paged.wrap(model, num_pages=256)
    form = StructuredOutputsParams(regex="[0-9]{3}-[a-f]{2}")
    free = SamplingParams(max_tokens=20, seed=1, ignore_eos=True)
    params = [free, free.clone(structured_outputs=form, ignore_eos=False, n=3)] * 2
    outputs = model.generate_many(["The sea", "The sky", "The hill", "The road"], params)
    for output in outputs[1::2]:
        assert all(re.fullmatch("[0-9]{3}-[a-f]{2}", sample.text) for sample in output.outputs)
    (alone,) = model.generate_many(["The sea"], free)
    assert alone.outputs[0].token_ids == outputs[0].outputs[0].token_ids
