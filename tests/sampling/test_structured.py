"""Structured output: whatever a model would say, it has the form that was asked for."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
from typing import Any

import pytest
import torch
from sampling.bytewise import byte_model, byte_tokenizer
from speculative.drafters import Always
from transformers import AutoModelForCausalLM

import hf_paged
from hf_paged import SamplingParams
from hf_paged.sampling_params import GuidedDecodingParams, StructuredOutputsParams

OPTIONS: dict[str, Any] = {"page_size": 16, "num_pages": 128, "max_num_seqs": 16}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"enum": ["x", "y"]}, "c": {"type": "boolean"}},
    "required": ["a", "b", "c"],
}
CODE = "[0-9]{3}-[a-f]{2}"


@pytest.fixture(scope="module")
def model(tiny_checkpoint: str) -> Any:
    return hf_paged.wrap(AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval(), **OPTIONS)


@pytest.fixture(autouse=True)
def left_idle(model: Any) -> Any:
    yield
    assert not model.engine.has_unfinished() and model.engine.scheduler.num_active_pages == 0


def sampling(max_tokens: int = 48, **form: Any) -> SamplingParams:
    return SamplingParams(seed=1, max_tokens=max_tokens, structured_outputs=StructuredOutputsParams(**form))


def texts(outputs: Any) -> list[str]:
    return [sample.text for output in outputs for sample in output.outputs]


FORMS: list[tuple[dict[str, Any], Any]] = [
    ({"regex": CODE}, lambda text: re.fullmatch(CODE, text)),
    ({"choice": ["yes", "no", 'a "quoted" \\ 😀 ß\n']}, lambda text: text in ("yes", "no", 'a "quoted" \\ 😀 ß\n')),
    (
        {"grammar": 'root ::= "<" inner ">"\ninner ::= [a-f] | "x" [0-9]'},
        lambda text: re.fullmatch("<([a-f]|x[0-9])>", text),
    ),
    ({"json": SCHEMA, "disable_any_whitespace": True}, lambda text: set(json.loads(text)) == {"a", "b", "c"}),
    ({"json": json.dumps(SCHEMA), "disable_any_whitespace": True}, lambda text: json.loads(text)["a"] <= 99),
]


@pytest.mark.parametrize(("form", "holds"), FORMS, ids=[f"{i}-{next(iter(form))}" for i, (form, _) in enumerate(FORMS)])
def test_the_form_holds_for_every_sample(model: Any, form: dict[str, Any], holds: Any) -> None:
    (output,) = model.generate_many(["The sea"], sampling(**form).clone(n=6))
    for sample in output.outputs:
        assert sample.finish_reason == "stop" and holds(sample.text), sample.text
    assert len(set(texts([output]))) > 1, "the model still chooses"


def test_cut_short_it_is_the_beginning_of_the_form(model: Any) -> None:
    (output,) = model.generate_many(["The sea"], sampling(json_object=True, max_tokens=12))
    assert output.outputs[0].text.startswith("{") and output.outputs[0].finish_reason == "length"


def test_a_form_travels_to_other_ranks(model: Any) -> None:
    params = SamplingParams(
        temperature=0.0, max_tokens=8, structured_outputs=StructuredOutputsParams(regex="(red|green) [0-9]{3}")
    )
    requests = [model.engine.intake.request([5, 6, 7], params) for _ in range(2)]
    requests[1].form = pickle.loads(pickle.dumps(requests[1].form))
    last = {output.request_id: output for output in model.engine.run(requests)}
    one, other = (last[request.request_id].outputs[0] for request in requests)
    assert one.token_ids == other.token_ids and one.text.startswith(("red", "green"))


def test_a_structural_tag(model: Any) -> None:
    tag = {
        "type": "structural_tag",
        "format": {"type": "tag", "begin": "<n>", "content": {"type": "regex", "pattern": "[0-9]{2}"}, "end": "</n>"},
    }
    (text,) = texts(model.generate_many(["The sea"], sampling(structural_tag=tag)))
    assert re.fullmatch("<n>[0-9]{2}</n>", text)


def test_open_objects_hold_anything_and_named_ones_nothing_else(model: Any) -> None:
    compiler = model.engine.intake.compile_form
    tokenizer = model.engine.intake.tokenizer

    def allows(schema: dict[str, Any], text: str, **options: Any) -> bool:
        params = StructuredOutputsParams(json=schema, **options)
        matcher = compiler(params, frozenset([2])).matcher()
        return all(matcher.accept_token(t) for t in [*tokenizer(text, add_special_tokens=False)["input_ids"], 2])

    named = {"type": "object", "properties": {"a": {"type": "integer"}, "d": {"type": "object"}}, "required": ["a"]}
    assert allows(named, '{"a": 1, "d": {"x": [1]}}') and allows({"type": "array"}, "[1, {}]")
    assert not allows(named, '{"a": 1, "z": 2}') and not allows(named, "{}")
    assert allows({"const": {"type": "object"}}, '{"type":"object"}', disable_any_whitespace=True)


def test_neighbours_are_as_if_alone(model: Any) -> None:
    free = SamplingParams(seed=3, max_tokens=10, ignore_eos=True)
    params = [free, sampling(regex=CODE), free.clone(repetition_penalty=1.2), sampling(choice=["yes", "no"])]
    prompts = ["The sea", "The sky", "The hill", "The road"]
    together = model.generate_many(prompts, params)
    alone = [model.generate_many([prompt], one)[0] for prompt, one in zip(prompts, params, strict=True)]
    assert texts(together) == texts(alone)


def test_drafts_change_no_token(tiny_checkpoint: str, model: Any) -> None:
    """Rows that verify drafts have masks of their own: those of the text with the draft."""
    form = sampling(grammar='root ::= ("one two three four five six seven " | "x"){3,5} "."').clone(max_tokens=48)
    prompts = ["one two three four five six seven one two three four five six seven", "The sea"]
    expected = model.generate_many(prompts, form)
    drafting = hf_paged.wrap(
        AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval(),
        speculative_config={"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1},
        **OPTIONS,
    )
    drafting.engine.speculator.pace, drafting.engine.speculator._jumps = Always(), False
    found = drafting.generate_many(prompts, form)
    stats = drafting.engine.speculator.stats["ngram"]
    assert texts(found) == texts(expected)
    assert all(output.outputs[0].finish_reason == "stop" for output in found)
    assert stats.num_draft_tokens > stats.num_accepted_tokens > 0


@pytest.fixture(scope="module")
def bytewise() -> Any:
    return byte_model()


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("speculation", [None, {"method": "ngram", "num_speculative_tokens": 3}], ids=["", "ngram"])
def test_what_is_forced_costs_few_steps(bytewise: Any, lookahead: bool, speculation: dict[str, Any] | None) -> None:
    """The same text comes out, whoever else is there."""
    forms = [
        {"regex": "(red|blue) and then the long way round [0-9]{2}[a-z]{5}, the end"},
        {"json": SCHEMA, "disable_any_whitespace": True},
        {"choice": ["somewhere over the rainbow", "somewhere else"]},
    ]
    params = [sampling(80, **form).clone(n=2, logprobs=1) for form in forms]
    params.append(SamplingParams(max_tokens=20, seed=2, ignore_eos=True))
    found, steps = [], []
    for jumps in (True, False):
        options = OPTIONS | {"async_scheduling": lookahead, "speculative_config": speculation}
        model = hf_paged.wrap(bytewise, tokenizer=byte_tokenizer(), **options)
        model.engine.speculator._jumps, model.engine.speculator.max_rows = jumps, 64
        outputs = model.generate_many(["The sea"] * 4, params)
        found.append([(s.text, s.finish_reason, s.cumulative_logprob) for o in outputs for s in o.outputs])
        steps.append(model.engine.stats.steps)
        stats = model.engine.speculator.stats
        assert ("forced" in stats) == jumps
        if jumps:
            assert stats["forced"].acceptance_rate == 1 and stats["forced"].num_draft_tokens > 50
        hf_paged.unwrap(bytewise)
    for one, other in zip(*found, strict=True):
        assert one[:2] == other[:2] and one[2] == pytest.approx(other[2], abs=1e-4)
    assert steps[0] < 0.7 * steps[1]


def test_what_is_forced_may_be_spelled_otherwise(tiny_checkpoint: str, model: Any) -> None:
    """A model that cuts words into other tokens than those that were drafted keeps to its own."""
    form = sampling(60, regex="The lighthouse keeper went home in the evening( and sang)?").clone(n=4)
    (output,) = model.generate_many(["The sea"], form)
    stats = model.engine.speculator.stats["forced"]
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
    plain = hf_paged.wrap(AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval(), **OPTIONS)
    plain.engine.speculator._jumps = False
    (expected,) = plain.generate_many(["The sea"], form)
    assert [sample.token_ids for sample in output.outputs] == [sample.token_ids for sample in expected.outputs]


def test_whose_words_are_spelled_otherwise_is_not_drafted_for(bytewise: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_paged.sampling.structured import FormState

    monkeypatch.setattr(FormState, "forced", lambda state, sequence: [1, 1, 1])
    model = hf_paged.wrap(bytewise, tokenizer=byte_tokenizer(), **OPTIONS)
    (output,) = model.generate_many(["The sea"], sampling(60, regex="and then the long way round to the end"))
    assert output.outputs[0].text == "and then the long way round to the end"
    assert 3 <= model.engine.speculator.stats["forced"].num_drafts <= 8
    hf_paged.unwrap(bytewise)


def test_processors_are_called_as_without_forms(bytewise: Any) -> None:
    """One that counts would notice rows of drafts."""
    calls = []

    def processor(generated: list[int], logits: torch.Tensor) -> torch.Tensor:
        calls.append(len(generated))
        return logits

    model = hf_paged.wrap(bytewise, tokenizer=byte_tokenizer(), **OPTIONS)
    model.generate_many(["The sea"], sampling(30, regex="and then the long way").clone(logits_processors=[processor]))
    assert calls == list(range(len(calls)))
    hf_paged.unwrap(bytewise)


def test_preempted_and_computed_again(tiny_checkpoint: str, model: Any) -> None:
    prompts = [f"Number {i} of the sea" for i in range(4)]
    form = sampling(regex="([0-9]{3}-){6}").clone(max_tokens=32)
    expected = model.generate_many(prompts, form)
    small = hf_paged.wrap(
        AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval(), page_size=8, num_pages=10, max_num_seqs=4
    )
    assert texts(small.generate_many(prompts, form)) == texts(expected)
    assert small.engine.scheduler.stats.num_preemptions > 0


def test_an_interrupted_step_forgets_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that an interrupt leaves half way is made again from the tokens."""
    from hf_paged.sampling.structured import FormState

    form = sampling(regex=CODE)
    expected = texts(model.generate_many(["The sea"], form))
    accept, calls = FormState.accept, 0

    def interrupted(state: Any, token: int) -> bool:
        nonlocal calls
        calls += 1
        if calls == 3:
            accept(state, token)
            raise KeyboardInterrupt
        return accept(state, token)

    engine = model.engine
    request_id = engine.add_request("The sea", form)
    monkeypatch.setattr(FormState, "accept", interrupted)
    outputs = []
    while engine.has_unfinished():
        with contextlib.suppress(KeyboardInterrupt):
            outputs += engine.step()
    assert calls > 3 and outputs[-1].request_id == request_id
    assert texts([outputs[-1]]) == expected


BAD: list[tuple[dict[str, Any], str]] = [
    ({"json": "{"}, "no JSON"),
    ({"json": {"type": "objekt"}}, "objekt"),
    ({"json": {"$ref": "#/nowhere"}}, "nowhere"),
    ({"json": {"type": "string", "minLength": 5, "maxLength": 2}}, "minLength"),
    ({"json": {"a": {1, 2}}}, "no JSON"),
    ({"regex": "(a"}, "parenthesis"),
    ({"regex": "(?=a)b"}, "Lookahead"),
    ({"grammar": "root ::= nothing"}, "nothing"),
    ({"grammar": 'start ::= "a"'}, "root"),
    ({"grammar": 'root ::= root "a"'}, "no text can be"),
    ({"structural_tag": "{}"}, "structural_tag"),
    ({"regex": "a" * 600_000}, "characters"),
]


@pytest.mark.parametrize(("form", "told"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_what_cannot_be_is_refused_before_any_work(model: Any, form: dict[str, Any], told: str) -> None:
    steps = model.engine.stats.steps
    with pytest.raises(ValueError, match=told):
        model.generate_many(["The sea"], sampling(**form))
    assert model.engine.stats.steps == steps


def test_a_schema_that_is_too_deep(model: Any) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(100):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ValueError, match="levels deep"):
        model.generate_many(["The sea"], sampling(json=schema))


@pytest.mark.parametrize(
    ("form", "error"),
    [({}, ValueError), ({"regex": "a", "choice": ["b"]}, ValueError), ({"regex": 5}, TypeError),
     ({"choice": []}, TypeError), ({"choice": ["a", 5]}, TypeError), ({"choice": [""]}, ValueError),
     ({"json": 5}, TypeError), ({"regex": "a", "whitespace_pattern": " "}, ValueError)],
)  # fmt: skip
def test_parameters_that_make_no_sense(form: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        StructuredOutputsParams(**form)


def test_it_needs_an_end_and_a_tokenizer(model: Any, tiny_checkpoint: str) -> None:
    with pytest.raises(ValueError, match="ignore_eos"):
        model.generate_many(["The sea"], sampling(regex="a").clone(ignore_eos=True))
    bare = hf_paged.wrap(AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval(), tokenizer=False, **OPTIONS)
    with pytest.raises(ValueError, match="tokenizer"):
        bare.generate_many([[5]], sampling(regex="a"))


def test_a_missing_package_is_named(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "xgrammar", None)
    monkeypatch.setattr(model.engine.intake, "_forms", None)
    with pytest.raises(ImportError, match=r"hf_paged\[structured\]"):
        model.generate_many(["The sea"], sampling(regex="a"))


def test_older_names_and_pydantic(model: Any) -> None:
    from pydantic import BaseModel

    class Answer(BaseModel):
        yes: bool

    params = SamplingParams(
        max_tokens=24, seed=2, guided_decoding=GuidedDecodingParams(json=Answer, disable_any_whitespace=True)
    )
    (text,) = texts(model.generate_many(["The sea"], params))
    assert isinstance(Answer.model_validate_json(text).yes, bool)
    with pytest.raises(TypeError, match="jsn"):
        GuidedDecodingParams(jsn={})


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "num_return_sequences": 3}, {"num_beams": 2}], ids=str)
def test_generate(model: Any, options: dict[str, Any]) -> None:
    """transformers' own generate, paged and (beams) by the stock loop."""
    tokenizer = model.engine.intake.tokenizer
    batch = tokenizer(["The sea", "The wide and deep sky"], return_tensors="pt", padding=True, padding_side="left")
    ids = model.generate(**batch, structured_outputs=StructuredOutputsParams(regex=CODE), max_new_tokens=14, **options)[
        :, batch["input_ids"].shape[1] :
    ]
    found = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert len(found) == 2 * options.get("num_return_sequences", 1)
    assert all(re.fullmatch(CODE, text) for text in found), found


def test_generate_refuses_before_any_work(model: Any) -> None:
    batch = model.engine.intake.tokenizer("The sea", return_tensors="pt")
    with pytest.raises(ValueError, match="parenthesis"):
        model.generate(**batch, structured_outputs=StructuredOutputsParams(regex="(a"))
    with pytest.raises(TypeError, match="StructuredOutputsParams"):
        model.generate(**batch, structured_outputs={"regex": "a"})
