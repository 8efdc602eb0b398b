"""One step of lookahead: launched before the last step's tokens are known, and nobody can tell from the results."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lookahead import PROMPTS, TOKENIZER, Watch, assert_landed, drain, greedy, seeded, told, wrap
from models.families import VOCAB, left_pad, make_model, make_prompts, stock_greedy
from simulator import Simulation, make_engine
from transformers import LogitsProcessor, LogitsProcessorList

import hf_paged
from hf_paged import RequestOutput, RequestOutputKind
from hf_paged.sampling_params import LOGPROBS_MODES

# ---- the same results ----------------------------------------------------------------------------------


def no_worse(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    return logits + 0.5 * torch.arange(VOCAB) / VOCAB


MIXED = [greedy(9), seeded(12, n=3), greedy(5, logprobs=0), seeded(20, top_k=9, top_p=0.9, seed=3), greedy(1)]
HOST: dict[str, dict[str, Any]] = {
    "penalties": {"presence_penalty": 0.7, "frequency_penalty": 0.3, "repetition_penalty": 1.3},
    "a processor": {"logits_processors": [no_worse]},
    "prompt_logprobs": {"prompt_logprobs": 2},
    "logprobs": {"logprobs": 2},
    "min_tokens": {"min_tokens": 6},
    "a bias": {"logit_bias": {7: 3.0}},
    "allowed ids": {"allowed_token_ids": list(range(20, 60))},
}
"""What only the host can sample."""

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "greedy": (greedy(), {}),
    "seeded": (seeded(top_p=0.9), {}),
    "samples that fork": (seeded(n=4), {}),
    "more samples than slots": (seeded(n=5), {"max_num_seqs": 3}),
    "one token": (greedy(1), {}),
    "one token of many samples": (seeded(1, n=5), {"max_num_seqs": 3}),
    "two tokens": (greedy(2), {}),
    "two tokens of many samples": (seeded(2, n=5), {"max_num_seqs": 3}),
    "one slot": (MIXED, {"max_num_seqs": 1}),
    "log-probabilities of the sampled": (seeded(logprobs=0), {}),
    "lengths that differ": (MIXED, {}),
    "chunks": (MIXED, {"max_num_batched_tokens": 5, "max_num_seqs": 4}),
    "preemption": (MIXED, {"num_pages": 7, "max_num_seqs": 4}),
    "preemption, chunks, no cache": (
        MIXED,
        {"num_pages": 7, "max_num_seqs": 4, "max_num_batched_tokens": 6, "enable_prefix_caching": False},
    ),
    "up to the model's length": (greedy(None), {"max_model_len": 30}),
    "processed log-probabilities": (seeded(logprobs=0, top_k=5), {"logprobs_mode": "processed_logprobs"}),
    "scaled log-probabilities": (seeded(logprobs=0, top_k=5), {"logprobs_mode": "scaled_logprobs"}),
    "log-probabilities by request": (
        [
            seeded(4 if mode == "processed_logprobs" else 12, logprobs=0, top_k=5, logprobs_mode=mode)
            for mode in (*LOGPROBS_MODES, None, "raw_logprobs")
        ],
        {"logprobs_mode": "scaled_logprobs"},
    ),
    **{f"beside {name}": ([*MIXED[:3], greedy(7, **options), MIXED[3]], {}) for name, options in HOST.items()},
    **{f"only {name}": (greedy(7, **options), {}) for name, options in HOST.items()},
}


@pytest.mark.parametrize("name", list(CASES))
def test_results_are_those_of_the_synchronous_engine(name: str, stock: Any) -> None:
    params, options = CASES[name]
    results, watches = [], []
    for ahead in (False, True):
        model = wrap(stock, ahead, **options)
        watches.append(Watch.over(model.engine))
        # The second time from the prefix cache, as far as that reaches.
        results.append([told(output) for _ in range(2) for output in model.generate_many(PROMPTS, params)])
        if name.startswith("preemption"):
            assert model.engine.scheduler.stats.num_preemptions > 0
        assert_landed(model.engine)
    assert results[0] == results[1]
    assert not any(watches[0].ahead)
    held = name.startswith(("only", "processed", "one token"))
    assert any(watches[1].ahead) != held, "nothing was launched ahead" if not held else "launched without its token"


@pytest.mark.parametrize("family", ["Gemma2", "GptOss", "Qwen3Moe", "Mistral"])
def test_other_families(family: str) -> None:
    stock = make_model(family)
    prompts = make_prompts([1, 9, 30])
    model = hf_paged.wrap(copy.deepcopy(stock), page_size=8, num_pages=14, max_num_seqs=4, async_scheduling=True)
    found = [output.outputs[0].token_ids for output in model.generate_many(prompts, greedy(20))]
    assert found == [stock_greedy(stock, prompt, 20) for prompt in prompts]
    assert_landed(model.engine)


def test_generate_is_transformers_own(stock: Any, model: Any) -> None:
    """Also with an end-of-sequence id that ends rows at different steps, and with processors of transformers."""
    batch = left_pad(PROMPTS[1:])
    free = stock.generate(**batch, do_sample=False, max_new_tokens=20)[:, batch["input_ids"].shape[1] :]
    options: list[dict[str, Any]] = [{}, {"eos_token_id": int(free[1, 6])}, {"repetition_penalty": 1.4}]

    class Forbid(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores.index_fill(1, input_ids[0, -1:] % 7, -torch.inf)

    for more in options:
        more = {"do_sample": False, "max_new_tokens": 20} | more
        assert torch.equal(model.generate(**batch, **more), stock.generate(**batch, **more))
    one = left_pad(PROMPTS[2:3])
    own = {"logits_processor": LogitsProcessorList([Forbid()]), "do_sample": False, "max_new_tokens": 9}
    assert torch.equal(model.generate(**one, **own), stock.generate(**one, **own))
    assert_landed(model.engine)


def test_simulated_traffic_with_samples_and_a_small_pool() -> None:
    engine = make_engine(
        num_pages=20, max_num_seqs=7, max_num_batched_tokens=12, max_model_len=32, paged=True, lookahead=True
    )
    watch = Watch.over(engine)
    done = Simulation(engine, 400, wave=30, seed=11).run()
    assert done.preemptions > 0
    assert sum(watch.ahead) > len(watch.ahead)
    assert_landed(engine)


# ---- the end of a sequence is seen one step late -------------------------------------------------------


def first_new(tokens: list[int], begin: int) -> int:
    """The first place from `begin` on whose token was not there before."""
    return next(i for i in range(begin, len(tokens)) if tokens[i] not in tokens[:i])


@pytest.mark.parametrize("how", ["id", "end of sequence", "text", "text that is kept"])
@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_nothing_after_a_stop_is_reported(
    how: str, kind: RequestOutputKind, stock: Any, expected: list[list[int]]
) -> None:
    """Beside a request that goes on, so that the step after the stop is really in the air when it is seen."""
    free = expected[3]
    text = TOKENIZER.decode(free, skip_special_tokens=True)
    at = first_new(free, 6)
    stop = next(text[i : i + 3] for i in range(8, 20) if text.find(text[i : i + 3]) == i)
    model = wrap(stock)
    options: dict[str, Any] = {"stop_token_ids": [free[at]]}
    if how == "end of sequence":
        model.generation_config.eos_token_id = free[at]
        options = {"ignore_eos": False}
    elif how != "id":
        options = {"stop": stop, "include_stop_str_in_output": how.endswith("kept")}
    engine = model.engine
    watch = Watch.over(engine)
    mine = engine.add_request(PROMPTS[3], greedy(24, output_kind=kind, **options))
    other = engine.add_request(PROMPTS[2], greedy(24, output_kind=RequestOutputKind.FINAL_ONLY))
    outputs: list[RequestOutput] = []
    while engine.has_unfinished():
        outputs += engine.step()
    assert outputs[-1].request_id == other
    assert outputs[-1].outputs[0].token_ids == expected[2]
    own = [output for output in outputs if output.request_id == mine]
    assert [output.finished for output in own] == [False] * (len(own) - 1) + [True]
    end = own[-1].outputs[0]
    assert end.finish_reason == "stop"
    joined = [token for output in own for c in output.outputs for token in c.token_ids]
    tokens = joined if kind is RequestOutputKind.DELTA else end.token_ids
    shown = "".join(c.text for output in own for c in output.outputs)
    shown = shown if kind is RequestOutputKind.DELTA else end.text
    if how in ("id", "end of sequence"):
        assert tokens == free[: at + 1]
        assert shown == TOKENIZER.decode(free[:at], skip_special_tokens=True)
    else:
        assert shown == text[: text.find(stop) + len(stop) * how.endswith("kept")]
        assert tokens == free[: len(tokens)]
        assert stop not in TOKENIZER.decode(tokens[:-1], skip_special_tokens=True)
        assert stop in TOKENIZER.decode(tokens, skip_special_tokens=True)
    late = [batch for batch in watch.batches if any(s.request.request_id == mine for s in batch.decodes)]
    assert len(late) == len(tokens), "one step more than needed was computed for it, and no more"
    thrown_away = 1
    assert engine.stats.generation_tokens == sum(len(batch.sampled()) for batch in watch.batches) - thrown_away
    assert_landed(engine)


def test_the_last_step_is_not_computed_where_its_end_is_known(model: Any) -> None:
    """max_tokens is seen coming: nothing is launched for a sequence whose last token is in the air."""
    watch = Watch.over(model.engine)
    model.generate_many(PROMPTS, [greedy(n) for n in (1, 2, 3, 7, 7)])
    assert sum(len(batch.sampled()) for batch in watch.batches) == 1 + 2 + 3 + 7 + 7


def test_a_request_comes_while_a_wasted_row_is_in_the_air(stock: Any, expected: list[list[int]]) -> None:
    """It takes over the slot and the pages that the row still writes to."""
    for at in range(2, 10):
        stop = first_new(expected[4], at)
        model = wrap(stock, num_pages=10, max_num_seqs=2)
        engine = model.engine
        short = engine.add_request(PROMPTS[4], greedy(24, stop_token_ids=[expected[4][stop]]))
        long = engine.add_request(PROMPTS[1], greedy(24))
        last: dict[str, RequestOutput] = {}
        while short not in last or not last[short].finished:
            last |= {output.request_id: output for output in engine.step()}
        assert engine._flights
        assert any(s.finished for s in engine._flights[0].batch.decodes), "no wasted row"
        late = engine.add_request(PROMPTS[3], greedy(20))
        last |= drain(engine)
        assert last[short].outputs[0].token_ids == expected[4][: stop + 1]
        assert last[long].outputs[0].token_ids == expected[1]
        assert last[late].outputs[0].token_ids == expected[3][:20]
        assert_landed(engine)


def test_the_prefix_cache_holds_what_the_synchronous_one_holds(stock: Any) -> None:
    """A second turn of a chat finds the first one's answer, and so does the same prompt again."""
    found = []
    for ahead in (False, True):
        model, cached = wrap(stock, ahead), list[list[int]]()
        prompts = [list(prompt) for prompt in PROMPTS]
        for _ in range(3):
            outputs = model.generate_many(prompts, greedy(13))
            cached.append([output.num_cached_tokens for output in outputs])
            prompts = [p + o.outputs[0].token_ids + [7, 8] for p, o in zip(prompts, outputs, strict=True)]
        found.append(cached)
        assert_landed(model.engine)
    assert found[0] == found[1]
    # All but the last token of a turn was computed; of that, whole pages are found.
    assert found[0][1] == [(len(prompt) + 12) // 8 * 8 for prompt in PROMPTS]


def test_prompts_that_arrive_in_the_middle_find_pages_that_are_full(stock: Any, expected: list[list[int]]) -> None:
    model = wrap(stock)
    engine = model.engine
    engine.add_request(PROMPTS[4], greedy(24), request_id="first")
    for _ in range(4):
        engine.step()
    engine.add_request(PROMPTS[4], greedy(24), request_id="second")
    last = drain(engine)
    assert last["second"].num_cached_tokens == 16, "24 tokens are three pages, and the last token is always computed"
    assert [last[name].outputs[0].token_ids for name in ("first", "second")] == [expected[4]] * 2
    assert_landed(engine)


# ---- aborts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", range(6))
@pytest.mark.parametrize("pages", [128, 9])
def test_an_abort_in_mid_flight(when: int, pages: int, stock: Any, expected: list[list[int]]) -> None:
    engine = wrap(stock, num_pages=pages, max_num_seqs=4).engine
    ids = [engine.add_request(prompt, greedy(20)) for prompt in PROMPTS]
    outputs = [output for _ in range(when) for output in engine.step()]
    engine.abort(ids[1])
    late = engine.add_request(PROMPTS[0], seeded(9, n=2))
    last = {output.request_id: output for output in outputs} | drain(engine)
    gone = last[ids[1]].outputs[0]
    assert gone.finish_reason == "abort"
    assert len(gone.token_ids) == when
    assert gone.token_ids == expected[1][:when]
    for place in (0, 2, 3, 4):
        assert last[ids[place]].outputs[0].token_ids == expected[place][:20]
    alone = wrap(stock, ahead=False).generate_many([PROMPTS[0]], seeded(9, n=2))[0]
    assert [c.token_ids for c in last[late].outputs] == [c.token_ids for c in alone.outputs]
    assert_landed(engine)


@pytest.mark.parametrize("when", [1, 2, 5])
def test_everything_is_aborted_in_mid_flight(when: int, model: Any, expected: list[list[int]]) -> None:
    """Nothing stays in the air, where it would hold on to the device's memory and be counted as work later."""
    engine = model.engine
    ids = [engine.add_request(prompt, greedy(20)) for prompt in PROMPTS]
    for _ in range(when):
        engine.step()
    engine.abort(ids)
    engine.step()
    assert_landed(engine)
    outputs = model.generate_many(PROMPTS, greedy(20))
    assert [output.outputs[0].token_ids for output in outputs] == [tokens[:20] for tokens in expected]
    assert_landed(engine)


def test_an_iterator_is_closed_early(model: Any, expected: list[list[int]]) -> None:
    engine = model.engine
    for taken in range(1, 5):
        running = engine.run([engine.intake.request(prompt, greedy(20)) for prompt in PROMPTS])
        for _ in range(taken):
            next(running)
        running.close()
        assert_landed(engine)
    stream = model.stream("tea for two", greedy(100))
    next(stream)
    stream.close()
    assert_landed(engine)
    outputs = model.generate_many(PROMPTS, greedy(20))
    assert [output.outputs[0].token_ids for output in outputs] == [tokens[:20] for tokens in expected]


# ---- requests that need the host -----------------------------------------------------------------------


@pytest.mark.parametrize("name", list(HOST))
def test_a_request_that_needs_the_host_suspends_lookahead(name: str, stock: Any) -> None:
    """It comes while others run ahead; when it is done they run ahead again. All as without lookahead."""
    results = []
    for ahead in (False, True):
        engine = wrap(stock, ahead).engine
        watch = Watch.over(engine)
        ids = [engine.add_request(prompt, seeded(24, n=2)) for prompt in PROMPTS[:2]]
        last: dict[str, RequestOutput] = {}
        for _ in range(4):
            last |= {output.request_id: output for output in engine.step()}
        before = len(watch.ahead)
        ids.append(engine.add_request(PROMPTS[3], greedy(7, **HOST[name])))
        while ids[2] not in last or not last[ids[2]].finished:
            last |= {output.request_id: output for output in engine.step()}
        between = len(watch.ahead)
        last |= drain(engine)
        assert not any(watch.ahead[before:between])
        assert any(watch.ahead[:before]) == any(watch.ahead[between:]) == ahead
        results.append([told(last[i]) for i in ids])
        assert_landed(engine)
    assert results[0] == results[1]


@pytest.mark.parametrize("end", ["length", "abort", "error"])
def test_lookahead_begins_when_the_last_that_needs_the_host_is_gone(
    end: str, stock: Any, expected: list[list[int]]
) -> None:
    def fails(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        if end == "error" and len(ids) == 4:
            raise ValueError("the processor's own fault")
        return logits

    engine = wrap(stock).engine
    watch = Watch.over(engine)
    host = [engine.add_request(PROMPTS[i], greedy(6 + i, logits_processors=[fails])) for i in (0, 1)]
    engine.step()
    ids = [engine.add_request(PROMPTS[i], greedy(24)) for i in (2, 3)]
    last: dict[str, RequestOutput] = {}
    for step in range(40):
        if end == "abort" and step == 3:
            engine.abort(host)
        held = bool(engine._held)
        assert held == any(request_id in engine._requests for request_id in host)
        last |= {output.request_id: output for output in engine.step()}
        if held:
            assert not any(watch.ahead)
    assert any(watch.ahead)
    assert not engine.has_unfinished()
    assert [last[i].outputs[0].token_ids for i in ids] == expected[2:4]
    assert {last[i].outputs[0].finish_reason for i in host} == {end}
    assert_landed(engine)
