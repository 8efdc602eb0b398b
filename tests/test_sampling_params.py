"""SamplingParams: defaults, checks, and the way to GenerationConfig and back."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LogitsProcessor

from hf_paged.sampling_params import RequestOutputKind, SamplingParams

VLLM_DEFAULTS = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "stop": None,
    "stop_token_ids": None,
    "ignore_eos": False,
    "max_tokens": 16,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "logprob_token_ids": None,
    "flat_logprobs": False,
    "detokenize": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "output_kind": RequestOutputKind.CUMULATIVE,
    "structured_outputs": None,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": None,
    "extra_args": None,
    "skip_reading_prefix_cache": None,
    "thinking_token_budget": None,
    "repetition_detection": None,
}
"""vLLM 0.33's fields; not all of them exist here."""

OURS = {
    "logits_processors": None,
    "priority": 0,
    "logprobs_mode": None,
    "truncate_prompt_tokens": None,
    "best_of": None,
    "guided_decoding": None,
}
"""What vLLM says elsewhere (its logits processors and logprobs_mode are the engine's, its priority the call's), and
what its older versions had."""


def test_defaults_are_vllms() -> None:
    params = SamplingParams()
    found = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    known = VLLM_DEFAULTS | OURS
    assert set(found) <= set(known)
    assert found == {name: known[name] for name in found}
    assert len(found) >= 26


def test_output_kinds_are_vllms() -> None:
    assert {kind.name: kind.value for kind in RequestOutputKind} == {"CUMULATIVE": 0, "DELTA": 1, "FINAL_ONLY": 2}


# ---- checks ----------------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")

BAD_VALUES: list[tuple[str, list[Any]]] = [
    ("n", [0, -1, 1.0, True, None, "1"]),
    ("best_of", [0, -1, 1.5, "2", True]),
    ("truncate_prompt_tokens", [0, -2, 1.5, "2", True]),
    ("presence_penalty", [-2.1, 2.1, NAN, "0", None, True]),
    ("frequency_penalty", [-2.1, 2.1, NAN, "0", None, True]),
    ("repetition_penalty", [0.0, -1.0, NAN, INF, "1", None]),
    ("temperature", [-0.1, NAN, INF, "1", None, False]),
    ("top_p", [0.0, -0.1, 1.1, NAN, "1", None]),
    ("top_k", [-2, 1.5, NAN, "1", None, True]),
    ("min_p", [-0.1, 1.1, NAN, "0", None]),
    ("seed", [1.5, "1", True]),
    ("stop", ["", [""], ["a", ""], [1], ["a", None], 5, b"x"]),
    ("stop_token_ids", [5, ["1"], [1.0], [True], [-1], [None], "12"]),
    ("ignore_eos", [0, None, "yes"]),
    ("max_tokens", [0, -1, 1.5, "16", True]),
    ("min_tokens", [-1, 1.5, None, "0", True]),
    ("min_tokens", [17]),
    ("logprobs", [-2, 1.5, "1", True]),
    ("prompt_logprobs", [-2, 1.5, "1", True]),
    ("logprobs_mode", ["raw", "", 0, True, "raw_logits"]),
    ("detokenize", [0, None, "yes"]),
    ("skip_special_tokens", [0, None, "yes"]),
    ("spaces_between_special_tokens", [0, None, "yes"]),
    ("include_stop_str_in_output", [0, None, "yes"]),
    ("output_kind", [0, None, "DELTA"]),
    ("logit_bias", [[1], [(1, 2.0)], 5, {1: NAN}]),
    ("allowed_token_ids", [[], 5, ["1"], [1.0], [True], [-1]]),
    ("bad_words", [[""], [" "], "word", [1], ["ok", ""]]),
    ("structured_outputs", [{"json": {}}, "json", 5]),
    ("guided_decoding", [{"json": {}}, "json", 5]),
    ("logits_processors", [[1], [None], ["f"], lambda ids, logits: logits]),
    ("priority", [1.5, None, "0", True]),
]


@pytest.mark.parametrize(
    ("name", "value"),
    [pytest.param(name, value, id=f"{name}={value!r:.20}") for name, values in BAD_VALUES for value in values],
)
def test_bad_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        SamplingParams(**{name: value})


def test_every_field_is_checked() -> None:
    assert {name for name, _ in BAD_VALUES} == {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", {1: "x"}),
        ("logit_bias", {1: None}),
        ("logit_bias", {1.7: 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logits_processors", 5),
    ],
    ids=str,
)
def test_bad_values_inside_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        SamplingParams(**{name: value})


class Processor(LogitsProcessor):
    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores

    def __repr__(self) -> str:  # a test's name, the same in every process
        return "Processor()"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("presence_penalty", -2),
        ("frequency_penalty", 2.0),
        ("repetition_penalty", 1e-3),
        ("temperature", 0),
        ("temperature", 100.0),
        ("top_p", 1),
        ("top_p", 1e-9),
        ("top_k", -1),
        ("top_k", 10**9),
        ("min_p", 1),
        ("seed", -5),
        ("seed", 2**70),
        ("stop", "a"),
        ("stop", []),
        ("stop", ["a", "b"]),
        ("stop_token_ids", [0, 5]),
        ("max_tokens", None),
        ("max_tokens", 1),
        ("min_tokens", 16),
        ("logprobs", -1),
        ("logprobs", 0),
        ("prompt_logprobs", 20),
        ("logit_bias", {}),
        ("logit_bias", {3: -float("inf")}),
        ("bad_words", []),
        ("logits_processors", [Processor(), len]),
        ("priority", -3),
    ],
    ids=str,
)
def test_values_at_the_edge_are_taken(name: str, value: Any) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value


def test_fields_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match=r"min_tokens .*max_tokens"):
        SamplingParams(min_tokens=5, max_tokens=4)
    with pytest.raises(ValueError, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)
    assert SamplingParams(min_tokens=500, max_tokens=None).max_tokens is None
    assert not SamplingParams(stop=[], detokenize=False).detokenize


def test_json_keys_of_logit_bias_become_ids() -> None:
    """JSON knows only strings as keys."""
    assert SamplingParams(logit_bias={"7": 1}).logit_bias == {7: 1.0}  # type: ignore[dict-item]


def test_what_follows_from_the_fields() -> None:
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams(temperature=0.01).greedy
    assert SamplingParams().stop_strings == []
    assert SamplingParams(stop="ab").stop_strings == ["ab"]
    assert SamplingParams(stop=["a", "b"]).stop_strings == ["a", "b"]
    ids = SamplingParams(stop_token_ids=[1], allowed_token_ids=[2, 3], logit_bias={4: 1.0}).token_ids()
    assert ids == {"stop_token_ids": [1], "allowed_token_ids": [2, 3], "logit_bias": [4]}
    assert SamplingParams().token_ids() == {"stop_token_ids": [], "allowed_token_ids": [], "logit_bias": []}


def test_clone_changes_a_copy_and_checks_it() -> None:
    params = SamplingParams(top_k=3)
    assert params.clone(top_p=0.5) == SamplingParams(top_k=3, top_p=0.5)
    assert params == SamplingParams(top_k=3)
    with pytest.raises(ValueError, match="top_p"):
        params.clone(top_p=5.0)


# ---- GenerationConfig ------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    random=st.booleans(),
    options=st.fixed_dictionaries(
        {},
        optional={
            "repetition_penalty": st.floats(0.1, 3),
            "stop": st.sampled_from(["x", ["x", "y z"]]),
            "stop_token_ids": st.lists(st.integers(0, 99), min_size=1, max_size=3),
            "max_tokens": st.integers(8, 100),
            "min_tokens": st.integers(0, 8),
        },
    ),
    sampled=st.fixed_dictionaries(
        {},
        optional={
            "n": st.integers(1, 5),
            "temperature": st.floats(0.01, 5),
            "top_p": st.floats(0.01, 1),
            "top_k": st.integers(0, 100),
            "min_p": st.floats(0, 1),
        },
    ),
)
def test_to_a_generation_config_and_back(random: bool, options: dict[str, Any], sampled: dict[str, Any]) -> None:
    """What GenerationConfig has words for comes back as it was; its eos_token_id stands in place of the model's own."""
    params = SamplingParams(
        ignore_eos="stop_token_ids" in options, **options, **(sampled if random else {"temperature": 0.0})
    )
    config = params.to_generation_config()
    assert config.do_sample is random
    assert config.max_new_tokens == params.max_tokens
    assert SamplingParams.from_generation_config(config) == params


def test_all_top_k_is_0_in_both() -> None:
    """transformers would take -1 for an error, and nothing for 50."""
    config = SamplingParams(top_k=-1).to_generation_config()
    assert config.top_k == 0
    assert SamplingParams.from_generation_config(config).top_k == 0


def test_no_limit_has_no_words_in_a_generation_config() -> None:
    """Left out, transformers would put a limit of its own."""
    with pytest.raises(ValueError, match="max_tokens=None"):
        SamplingParams(max_tokens=None).to_generation_config()


def test_stop_token_ids_as_a_set_survive() -> None:
    config = SamplingParams(ignore_eos=True, stop_token_ids={3, 4}).to_generation_config()  # type: ignore[arg-type]
    assert sorted(SamplingParams.from_generation_config(config).stop_token_ids or ()) == [3, 4]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("presence_penalty", 0.5),
        ("frequency_penalty", 0.5),
        ("allowed_token_ids", [1]),
        ("bad_words", ["x"]),
        ("logit_bias", {1: 2.0}),
        ("logits_processors", [len]),
        ("logprobs", 0),
        ("prompt_logprobs", 1),
        ("logprobs_mode", "raw_logprobs"),
        ("ignore_eos", True),
        ("stop_token_ids", [3]),
        ("seed", 0),
    ],
)
def test_what_generation_config_cannot_say_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value}).to_generation_config()


def test_overrides_win() -> None:
    config = SamplingParams(max_tokens=5).to_generation_config(max_new_tokens=7, pad_token_id=3)
    assert (config.max_new_tokens, config.pad_token_id) == (7, 3)


def read(prompt_tokens: int = 0, **options: Any) -> SamplingParams:
    return SamplingParams.from_generation_config(GenerationConfig(**options), prompt_tokens=prompt_tokens)


def test_greedy_unless_told_to_sample() -> None:
    """transformers' defaults: no sampling; when sampling, a top_k of 50."""
    assert read() == SamplingParams(temperature=0.0)
    assert read(do_sample=True) == SamplingParams(top_k=50)
    assert read(do_sample=True, top_k=0) == SamplingParams()
    assert read(temperature=0.5, top_p=0.5, top_k=3, min_p=0.1) == SamplingParams(temperature=0.0)
    sampled = read(do_sample=True, temperature=0.5, top_p=0.6, top_k=3, min_p=0.1, num_return_sequences=4)
    assert sampled == SamplingParams(temperature=0.5, top_p=0.6, top_k=3, min_p=0.1, n=4)


def test_lengths_with_and_without_the_prompt() -> None:
    """max_length and min_length count the prompt; max_new_tokens and min_new_tokens do not, and win."""
    assert read(max_new_tokens=9).max_tokens == 9
    assert read(prompt_tokens=4, max_length=30).max_tokens == 26
    assert read(prompt_tokens=4, max_length=30, max_new_tokens=9).max_tokens == 9
    assert read(prompt_tokens=4, min_length=10, max_length=30).min_tokens == 6
    assert read(prompt_tokens=14, min_length=10, max_length=30).min_tokens == 0
    assert read(prompt_tokens=4, min_length=10, min_new_tokens=2).min_tokens == 2
    for prompt in (30, 31):
        with pytest.raises(ValueError, match="max_length"):
            read(prompt_tokens=prompt, max_length=30)


@pytest.mark.parametrize(("given_eos", "expected"), [(5, [5]), ([5, 6], [5, 6]), (None, None)])
def test_end_of_sequence_ids_become_stop_tokens(given_eos: Any, expected: list[int] | None) -> None:
    """In place of the model's own; with none given these stay."""
    params = read(eos_token_id=given_eos)
    assert (params.stop_token_ids, params.ignore_eos) == (expected, expected is not None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 2),
        ("penalty_alpha", 0.6),
        ("prompt_lookup_num_tokens", 3),
        ("guidance_scale", 1.5),
        ("typical_p", 0.5),
        ("epsilon_cutoff", 0.1),
        ("eta_cutoff", 0.1),
        ("no_repeat_ngram_size", 3),
        ("encoder_no_repeat_ngram_size", 3),
        ("encoder_repetition_penalty", 1.5),
        ("bad_words_ids", [[1]]),
        ("sequence_bias", [[[1], 2.0]]),
        ("forced_bos_token_id", 1),
        ("forced_eos_token_id", 1),
        ("suppress_tokens", [1]),
        ("begin_suppress_tokens", [1]),
        ("exponential_decay_length_penalty", (1, 2.0)),
        ("max_time", 1.0),
    ],
)
def test_what_only_generate_does_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        read(**{name: value})


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 1},
        {"no_repeat_ngram_size": 0},
        {"guidance_scale": 1.0},
        {"repetition_penalty": 1.0, "typical_p": 1.0},
        {"pad_token_id": 3, "use_cache": True},
    ],
    ids=str,
)
def test_what_is_switched_off_is_taken(options: dict[str, Any]) -> None:
    assert read(**options) == SamplingParams(temperature=0.0)
