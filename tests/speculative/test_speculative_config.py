"""What users write about drafting: taken as vLLM's users write it, and refused with what is wrong and what to do."""

from __future__ import annotations

from typing import Any

import pytest
from models.families import make_model, make_prompts

import hf_paged
from hf_paged import EngineConfig, SamplingParams
from hf_paged.speculative.config import SpeculativeConfig

NGRAM = {"method": "ngram"}


def test_what_is_taken() -> None:
    assert EngineConfig().speculation is None
    assert EngineConfig(speculative_config=NGRAM).speculation == SpeculativeConfig("ngram", 5)
    given = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    options = (("prompt_lookup_max", 4), ("prompt_lookup_min", 2))
    assert EngineConfig(speculative_config=given).speculation == SpeculativeConfig("ngram", 3, options=options)
    suffix = {"method": "suffix", "suffix_decoding_max_tree_depth": 8}
    assert EngineConfig(speculative_config=suffix).speculation.options == (("max_tree_depth", 8),)
    older = EngineConfig(speculative_model="some/model", num_speculative_tokens=4).speculation
    assert (older.method, older.model, older.num_speculative_tokens) == ("draft_model", "some/model", 4)
    assert EngineConfig(speculative_model="[ngram]", num_speculative_tokens=4).speculation.method == "ngram"
    assert EngineConfig(speculative_config={"model": "some/model"}).speculation.method == "draft_model"


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"speculative_config": "ngram"}, TypeError, "must be a dict like"),
        ({"speculative_config": {}}, ValueError, "method must be one of ngram, suffix, draft_model, eagle3; got None"),
        ({"speculative_config": {"method": "ngrm"}}, ValueError, "got 'ngrm'"),
        ({"speculative_config": NGRAM | {"prompt_lookup_mx": 3}}, TypeError, "Did you mean 'prompt_lookup_max'"),
        ({"speculative_config": NGRAM | {"suffix_decoding_min_token_prob": 0.1}}, ValueError, 'belongs to method "suf'),
        (
            {"speculative_config": NGRAM | {"num_speculative_tokens": 0}},
            ValueError,
            "a positive integer, got 0",
        ),
        ({"speculative_config": NGRAM | {"num_speculative_tokens": True}}, ValueError, "positive integer, got True"),
        ({"speculative_config": NGRAM | {"model": "x"}}, ValueError, "drafts without a model"),
        (
            {"speculative_config": NGRAM | {"prompt_lookup_min": 4, "prompt_lookup_max": 2}},
            ValueError,
            "must not exceed",
        ),
        ({"speculative_config": {"method": "draft_model"}}, ValueError, "needs model="),
        (
            {"speculative_config": {"method": "suffix", "suffix_decoding_min_token_prob": 3}},
            ValueError,
            "is a probability, got 3",
        ),
        ({"speculative_config": NGRAM, "speculative_model": "x"}, ValueError, "not both"),
        ({"num_speculative_tokens": 3}, ValueError, "nothing says how"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        EngineConfig(**options)


@pytest.mark.parametrize("method", ["draft_model", "eagle3"])
def test_a_model_that_is_not_there(method: str) -> None:
    model = hf_paged.wrap(make_model("Llama"), speculative_config={"method": method, "model": "/no/such/folder"})
    with pytest.raises(FileNotFoundError, match="/no/such/folder"):
        model.generate_many(make_prompts([4]), SamplingParams(max_tokens=2))
    hf_paged.unwrap(model)
