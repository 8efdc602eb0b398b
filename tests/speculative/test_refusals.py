"""What users may write about drafting, and what they are told of mistakes before any work starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.families import make_model

import hf_paged
from hf_paged.config import EngineConfig
from hf_paged.speculative.config import SpeculativeConfig
from hf_paged.speculative.suffix import SuffixDrafter


@pytest.mark.parametrize(
    "given", [{"method": "ngram"}, {"model": "ngram"}, {"model": "[ngram]"}, {"method": "ngram", "model": "[ngram]"}]
)
def test_spellings_of_ngram(given: dict[str, Any]) -> None:
    found = SpeculativeConfig.parse(given | {"num_speculative_tokens": 4})
    assert found == SpeculativeConfig("ngram", 4)
    assert EngineConfig(speculative_model="[ngram]", num_speculative_tokens=4).speculation == found


def test_equal_ones_have_equal_hashes() -> None:
    one, other = (SpeculativeConfig("draft_model", 3, "-".join(["a", "path"])) for _ in range(2))
    assert one.model is not other.model
    assert one == other and hash(one) == hash(other)


def test_no_history_of_suffixes() -> None:
    found = SpeculativeConfig.parse({"method": "suffix", "suffix_decoding_max_cached_requests": 0})
    assert found.options == (("max_cached_requests", 0),)
    SuffixDrafter(**dict(found.options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("suffix_decoding_min_token_prob", 1.5, "suffix_decoding_min_token_prob is a probability, got 1.5"),
        ("suffix_decoding_max_cached_requests", -1, "must be an integer of 0 or more, got -1"),
        ("suffix_decoding_max_tree_depth", 0, "must be a positive integer, got 0"),
        ("prompt_lookup_max", 3, 'prompt_lookup_max belongs to method "ngram", not to "suffix"'),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(option: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(speculative_config={"method": "suffix", option: value})


@pytest.mark.parametrize(("tokens", "size"), [(3, -1), (3, 0), (0, 2), (-3, 2)])
def test_lookup_of_nothing_is_refused_and_the_model_goes_on(tokens: int, size: int) -> None:
    model = hf_paged.wrap(make_model("Llama"), page_size=4, num_pages=64)
    ids = torch.tensor([[5, 6, 7, 5, 6]])
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens and max_matching_ngram_size must be positive"):
        model.generate(ids, max_new_tokens=4, prompt_lookup_num_tokens=tokens, max_matching_ngram_size=size)
    assert not model.engine.has_unfinished()
    assert model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, 9)
