"""Versions of the weights: counted once per change, told per token; and sequences computed again after one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lookahead import PROMPTS, Watch, assert_landed, drain, greedy, seeded, told, wrap
from models.families import stock_greedy
from simulator import make_engine

from hf_paged import RequestOutputKind
from hf_paged.engine.request import Request, Sequence


@pytest.fixture(params=[False, True], ids=["synchronous", "lookahead"])
def model(request: pytest.FixtureRequest, stock: Any) -> Any:
    return wrap(stock, request.param)


def change(model: Any) -> None:
    """As nobody is told: no optimizer, no version counter."""
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1.7)


def optimizer_step(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = torch.tensor([PROMPTS[4]])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def versions(model: Any, tokens: int = 3) -> list[int]:
    completion = model.generate_many([PROMPTS[2]], greedy(tokens))[0].outputs[0]
    assert len(completion.weight_versions) == len(completion.token_ids) == tokens
    return completion.weight_versions


# ---- what counts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"enable_prefix_caching": False}], ids=str)
def test_a_change_between_requests_counts_once(options: dict[str, Any], stock: Any) -> None:
    model = wrap(stock, **options)
    change(model)  # before the engine has seen any weights
    assert versions(model) == [0, 0, 0]
    assert versions(model) == [0, 0, 0]
    change(model)
    assert versions(model) == [1, 1, 1]
    optimizer_step(model)
    optimizer_step(model)
    assert versions(model) == [2, 2, 2], "learnt of at one look"
    change(model)
    model.engine.weights_updated()
    assert model.engine.weight_version == 3
    assert versions(model) == [3, 3, 3], "the change that was told of is not found again"
    change(model)
    assert versions(model) == [4, 4, 4]
    assert model.engine.weight_version == 4


def test_what_changes_no_weights_does_not_count(model: Any) -> None:
    versions(model)
    model.engine.reset_prefix_cache()
    model.engine.sleep()
    model.engine.wake_up()
    other = torch.nn.Parameter(torch.ones(2))
    other.grad = torch.ones(2)
    torch.optim.SGD([other], lr=0.1).step()
    assert versions(model) == [0, 0, 0]


@pytest.mark.parametrize("how", ["told", "optimizer", "optimizer, told", "optimizer, noticed, told", "resumed, told"])
def test_a_change_while_requests_run_counts_once(how: str, model: Any) -> None:
    """Whether it is told of before or after the engine has noticed it, or not at all."""
    engine = model.engine
    name = engine.add_request(PROMPTS[1], greedy(9))
    for _ in range(4):
        engine.step()
    if how.startswith("optimizer"):
        optimizer_step(model)
    else:
        change(model)
    if "noticed" in how:
        engine.step()
    if "resumed" in how:
        engine.pause()
        engine.resume()
    if "told" in how:
        engine.weights_updated()
        assert engine.weight_version == 1
    found = drain(engine)[name].outputs[0].weight_versions
    assert found == sorted(found)
    assert set(found) == {0, 1}
    assert len(found) == 9
    assert versions(model) == [1, 1, 1]
    for version in (2, 3):  # who says so without a change is believed
        engine.weights_updated()
        assert engine.weight_version == version


# ---- per token ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [False, True])
def test_a_token_belongs_to_the_version_at_its_steps_launch(ahead: bool, stock: Any) -> None:
    """With lookahead, the step in the air was launched before the change."""
    model = wrap(stock, ahead)
    engine = model.engine
    watch = Watch.over(engine)
    name = engine.add_request(PROMPTS[1], greedy(9))
    for _ in range(3):
        engine.step()
    launched = len(watch.batches)
    assert launched == 4 if ahead else 3
    engine.weights_updated()
    assert drain(engine)[name].outputs[0].weight_versions == [0] * launched + [1] * (9 - launched)


def test_outputs_of_every_kind_tell_versions(model: Any) -> None:
    """Deltas joined, what was cumulative in the end, and what is told only at the end are the same."""
    engine = model.engine
    names = {
        kind: engine.add_request(PROMPTS[1], seeded(8, n=2, output_kind=kind, seed=1)) for kind in RequestOutputKind
    }
    found: dict[RequestOutputKind, dict[int, list[int]]] = {kind: {0: [], 1: []} for kind in names}
    for step in range(100):
        if not engine.has_unfinished():
            break
        if step in (3, 6):
            engine.weights_updated()
        for output in engine.step():
            kind = next(kind for kind, name in names.items() if name == output.request_id)
            for completion in output.outputs:
                assert len(completion.weight_versions) == len(completion.token_ids)
                known = found[kind][completion.index] if kind is RequestOutputKind.DELTA else []
                found[kind][completion.index] = known + completion.weight_versions
    lists = [each for kind in names for each in found[kind].values()]
    assert lists == [lists[0]] * 6
    assert len(lists[0]) == 8
    assert set(lists[0]) == {0, 1, 2}


def test_a_run_whose_token_was_lost_says_nothing() -> None:
    """An interrupt may come between the note of a version and its token."""
    sequence = Sequence(Request("r", [5, 6], greedy()), 0, [5, 6], 2)
    assert sequence.weight_versions == []
    sequence.weight_runs = [(0, 0), (3, 2)]
    sequence.tokens += [7, 8]
    assert sequence.weight_versions == [0, 0]
    sequence.weight_runs.append((4, 2))
    sequence.tokens += [9]
    assert sequence.weight_versions == [0, 0, 4]


# ---- computed again ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 2, 7])
@pytest.mark.parametrize("options", [{}, {"num_pages": 8, "max_num_seqs": 3}, {"max_num_batched_tokens": 16}], ids=str)
@pytest.mark.parametrize("ahead", [False, True])
def test_recompute_goes_on_with_the_new_weights(ahead: bool, options: dict[str, Any], steps: int, stock: Any) -> None:
    """The tokens so far stay; those after are what the new weights say to them."""
    model, after = wrap(stock, ahead, **options), copy.deepcopy(stock)
    change(after)
    engine = model.engine
    names = [engine.add_request(prompt, greedy(12)) for prompt in PROMPTS]
    for _ in range(steps):
        engine.step()
    change(model)
    engine.weights_updated(kv="recompute")
    assert not engine._flights
    last = drain(engine)
    differing = 0
    for name, prompt in zip(names, PROMPTS, strict=True):
        completion = last[name].outputs[0]
        assert len(completion.token_ids) == 12
        old = completion.weight_versions.count(0)
        assert completion.weight_versions == [0] * old + [1] * (12 - old)
        assert completion.token_ids[:old] == stock_greedy(stock, prompt, 12)[:old]
        assert completion.token_ids[old:] == stock_greedy(after, prompt + completion.token_ids[:old], 12 - old)
        differing += completion.token_ids != stock_greedy(stock, prompt, 12)
    assert differing, "the change must matter"
    assert_landed(engine)


def test_keep_leaves_keys_and_values_alone(model: Any, stock: Any) -> None:
    """Computed is nothing but one token per step, and the old keys and values show in what comes out."""
    after = copy.deepcopy(stock)
    change(after)
    engine = model.engine
    name = engine.add_request(PROMPTS[4], greedy(12))
    for _ in range(3):
        engine.step()
    change(model)
    engine.weights_updated()
    last = drain(engine)[name]
    assert engine.stats.prompt_tokens == len(PROMPTS[4])
    old = last.outputs[0].weight_versions.count(0)
    ids = last.outputs[0].token_ids
    assert 0 < old < 12
    assert ids[old:] != stock_greedy(after, PROMPTS[4] + ids[:old], 12 - old)


@pytest.mark.parametrize("when", range(6))
def test_recompute_loses_and_repeats_no_token(when: int, model: Any) -> None:
    """With weights that stay what they are nobody can tell: seeds, samples that fork, log-probabilities."""
    params = [
        seeded(9, logprobs=0),
        seeded(9, n=3, seed=8),
        greedy(9, prompt_logprobs=1),
        seeded(9, presence_penalty=0.7, logprobs=2),
        seeded(1, n=2),
    ]
    expected = [told(output)[:2] for output in model.generate_many(PROMPTS, params)]
    model.engine.reset_prefix_cache()
    engine = model.engine
    names = [engine.add_request(prompt, p) for prompt, p in zip(PROMPTS, params, strict=True)]
    last: dict[str, Any] = {}
    for _ in range(when):
        last |= {output.request_id: output for output in engine.step()}
    for _ in range(2):
        engine.weights_updated(kv="recompute")
    last |= drain(engine)
    assert [told(last[name])[:2] for name in names] == expected
    assert_landed(engine)


def test_recompute_in_simulated_traffic() -> None:
    """Every few steps, in a small pool: every token is still what the pages say."""
    engine = make_engine(
        num_pages=20, max_num_seqs=7, max_num_batched_tokens=12, max_model_len=32, paged=True, lookahead=True
    )
    prompts = [[1 + (7 * i + j) % 49 for j in range(1 + i % 20)] for i in range(120)]
    names = {engine.add_request(prompt, greedy(8, n=1 + i % 3)): prompt for i, prompt in enumerate(prompts)}
    done: dict[str, Any] = {}
    for step in range(5000):
        if not engine.has_unfinished():
            break
        if step % 5 == 4:
            engine.weights_updated(kv="recompute")
        done |= {output.request_id: output for output in engine.step()}
    assert set(done) == set(names)
    for name, prompt in names.items():
        for completion in done[name].outputs:
            full = _expected(engine, prompt, completion.index)
            assert completion.token_ids == full
            assert completion.weight_versions == sorted(completion.weight_versions)
    assert engine.weight_version > 20
    assert_landed(engine)


def _expected(engine: Any, prompt: list[int], index: int) -> list[int]:
    """Past the end-of-sequence token, which these requests ignore."""
    from simulator import VOCAB, _entry

    total = entry = 0
    tokens: list[int] = []
    fed = list(prompt)
    while len(tokens) < 8:
        for token in fed:
            entry = _entry(entry, token)
            total += entry
        tokens.append((total + index) % VOCAB)
        fed = tokens[-1:]
    return tokens


def test_what_kv_may_say(model: Any) -> None:
    for kv in ("drop", "", None, True):
        with pytest.raises(ValueError, match='kv must be "keep" or "recompute"'):
            model.engine.weights_updated(kv=kv)
    assert model.engine.weight_version == 0
