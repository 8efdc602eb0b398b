"""generate_many, stream and the engine's own loop."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from many_threads import in_threads
from models.families import VOCAB, left_pad, make_model, make_prompts, stock_greedy
from models.tiny_tokenizer import make_tokenizer
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, StoppingCriteriaList

import hf_paged
from hf_paged import RequestOutput, RequestOutputKind, SamplingParams

OPTIONS = {"page_size": 8, "num_pages": 128, "max_num_seqs": 16}
PROMPTS = make_prompts([1, 5, 9, 17, 24])
TOKENIZER = make_tokenizer()


def greedy(max_tokens: int = 12, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **({"ignore_eos": True} | options))


@pytest.fixture(scope="module")
def stock() -> Any:
    return make_model("Llama")


@pytest.fixture(scope="module")
def shared(stock: Any) -> Any:
    """A wrapped model with a tokenizer; its tests leave it idle."""
    return hf_paged.wrap(copy.deepcopy(stock), **OPTIONS, tokenizer=TOKENIZER)


@pytest.fixture
def model(stock: Any) -> Any:
    return hf_paged.wrap(copy.deepcopy(stock), **OPTIONS, tokenizer=TOKENIZER)


@pytest.fixture(autouse=True)
def left_idle(shared: Any) -> Any:
    yield
    assert_idle(shared)


def assert_idle(model: Any) -> None:
    engine = model.engine
    assert not engine.has_unfinished()
    assert engine.scheduler.num_active_pages == 0
    assert engine.scheduler.num_waiting == 0
    assert not engine.scheduler.running
    assert engine.scheduler.pool.num_used == engine.scheduler.tree.num_pages
    assert len(engine.scheduler._slots) == engine.scheduler.max_num_seqs


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def expect(stock: Any, prompts: list[list[int]], count: int = 12) -> list[list[int]]:
    return [stock_greedy(stock, prompt, count) for prompt in prompts]


# ---- what goes in ------------------------------------------------------------------------------------------


def test_kinds_of_prompts_mixed(stock: Any, shared: Any) -> None:
    ids = TOKENIZER("tea for two")["input_ids"]
    chat = [{"role": "user", "content": "tea?"}]
    chat_ids = TOKENIZER("[user] tea?\n[assistant] ")["input_ids"]
    given = [ids, torch.tensor(ids), np.array(ids), tuple(ids), "tea for two", {"prompt": "tea for two"}]
    given += [{"prompt_token_ids": ids}, {"prompt": "tea for two", "prompt_token_ids": ids}, chat]
    outputs = shared.generate_many(given, greedy())
    assert tokens_of(outputs) == [stock_greedy(stock, ids, 12)] * 8 + [stock_greedy(stock, chat_ids, 12)]
    assert [output.prompt_token_ids for output in outputs] == [ids] * 8 + [chat_ids]
    texts = [None] * 4 + ["tea for two"] * 2 + [None, "tea for two", "[user] tea?\n[assistant] "]
    assert [output.prompt for output in outputs] == texts


def test_text_comes_back(shared: Any) -> None:
    output = shared.generate_many(["tea"], greedy())[0].outputs[0]
    assert output.text == TOKENIZER.decode(output.token_ids, skip_special_tokens=True)
    assert len(output.text) >= 12


def test_one_string_is_one_prompt(shared: Any) -> None:
    assert len(shared.generate_many("tea for two", greedy(2))) == 1


def test_no_prompts(shared: Any) -> None:
    assert shared.generate_many([]) == []
    assert shared.generate_many([], []) == []


def test_sampling_per_prompt(stock: Any, shared: Any) -> None:
    sampling = [greedy(3), SamplingParams(n=2, seed=1, max_tokens=5, ignore_eos=True), greedy(7, logprobs=2), None]
    sampling += [GenerationConfig(max_new_tokens=4, do_sample=False)]
    outputs = shared.generate_many(PROMPTS, sampling)
    assert [[len(c.token_ids) for c in output] for output in outputs] == [[3], [5, 5], [7], [16], [4]]
    for place in (0, 2, 3, 4):
        count = len(outputs[place].outputs[0].token_ids)
        assert outputs[place].outputs[0].token_ids == stock_greedy(stock, PROMPTS[place], count)


def test_generation_config(stock: Any, shared: Any) -> None:
    eos = stock_greedy(stock, PROMPTS[2], 12)[5]
    config = GenerationConfig(max_new_tokens=12, do_sample=False, repetition_penalty=1.5, eos_token_id=eos)
    outputs = shared.generate_many(PROMPTS, config)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = torch.tensor([prompt])
        expected = stock.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        assert output.outputs[0].token_ids == expected[0, len(prompt) :].tolist()


def test_the_models_own_generation_config_is_the_default(stock: Any, model: Any) -> None:
    model.generation_config.max_new_tokens = 5
    model.generation_config.repetition_penalty = 1.3
    twin = copy.deepcopy(stock)
    twin.generation_config.repetition_penalty = 1.3
    assert tokens_of(model.generate_many(PROMPTS)) == expect(twin, PROMPTS, 5)


def test_prompts_are_not_changed_and_parameters_can_be_reused(shared: Any) -> None:
    prompts, params = copy.deepcopy(PROMPTS), greedy(4)
    before = copy.deepcopy(params)
    first = shared.generate_many(prompts, params)
    assert prompts == PROMPTS
    assert params == before
    assert tokens_of(shared.generate_many(prompts, params)) == tokens_of(first)


BAD: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "id beyond the vocabulary": ([[5], [VOCAB]], None, ValueError, f"prompt 1.*{VOCAB}"),
    "negative id": ([[5], [5], [-1]], None, ValueError, "prompt 2.*-1"),
    "empty prompt": ([[5], []], None, ValueError, "prompt 1.*empty"),
    "empty text": ([""], None, ValueError, "empty"),
    "too long": ([[5], [7] * 512], None, ValueError, r"prompt 1.*512"),
    "too long for the pool": ([[5], [7] * 40], [greedy(2), greedy(470)], ValueError, r"prompt 1.*pages"),
    "floats": ([[5], [1.5]], None, TypeError, "prompt 1"),
    "None": ([[5], None], None, TypeError, "prompt 1"),
    "a number": ([[5], 7], None, TypeError, "prompt 1"),
    "bytes": ([b"abc"], None, TypeError, "bytes"),
    "two-dimensional": ([torch.zeros(1, 3, dtype=torch.long)], None, TypeError, "one-dimensional"),
    "flat list": ([5, 6, 7], None, TypeError, r"\[\[1, 2, 3\]\]"),
    "flat chat": ([{"role": "user", "content": "x"}], None, TypeError, "messages"),
    "dict of neither": ([{"text": "x"}], None, TypeError, "prompt_token_ids"),
    "chat without role": ([[{"content": "x"}]], None, ValueError, "role"),
    "too many params": ([[5]], [greedy(), greedy()], ValueError, "2 sampling parameters for 1 prompts"),
    "params of a wrong kind": ([[5]], {"temperature": 0}, TypeError, "SamplingParams"),
    "params of a wrong kind in a list": ([[5], [6]], [greedy(), 3], TypeError, "prompt 1"),
    "stop token beyond": ([[5]], greedy(stop_token_ids=[VOCAB]), ValueError, "stop_token_ids"),
    "bias beyond": ([[5]], greedy(logit_bias={VOCAB: 1.0}), ValueError, "logit_bias"),
    "beams": ([[5]], GenerationConfig(num_beams=2), ValueError, "num_beams"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_errors_come_before_any_work(name: str, stock: Any, shared: Any) -> None:
    prompts, sampling, kind, message = BAD[name]
    small = name == "too long for the pool"
    model = hf_paged.wrap(copy.deepcopy(stock), **OPTIONS | {"num_pages": 16}) if small else shared
    steps = model.engine.stats.steps
    with pytest.raises(kind, match=message):
        model.generate_many(prompts, sampling)
    assert model.engine.stats.steps == steps
    assert_idle(model)


def test_text_without_a_tokenizer(stock: Any) -> None:
    model = hf_paged.wrap(copy.deepcopy(stock), **OPTIONS)
    for call in (
        lambda: model.generate_many(["tea"]),
        lambda: model.generate_many([[{"role": "user", "content": "x"}]]),
        lambda: model.generate_many([[5]], greedy(stop=["x"])),
        lambda: model.stream([5, 6]),
    ):
        with pytest.raises(ValueError, match="tokenizer"):
            call()
    assert_idle(model)
    assert model.generate_many([[5]], greedy(2))[0].outputs[0].text == ""


def test_a_chat_without_a_template(stock: Any) -> None:
    model = hf_paged.wrap(copy.deepcopy(stock), **OPTIONS, tokenizer=make_tokenizer(chat_template=None))
    with pytest.raises(ValueError, match="chat template"):
        model.generate_many([[{"role": "user", "content": "x"}]])


# ---- sampling ----------------------------------------------------------------------------------------------


def test_n_samples(model: Any) -> None:
    output = model.generate_many([PROMPTS[4]], SamplingParams(n=6, seed=3, max_tokens=10, ignore_eos=True))[0]
    assert [completion.index for completion in output] == list(range(6))
    assert len({tuple(completion.token_ids) for completion in output}) == 6
    assert model.engine.stats.prompt_tokens == len(PROMPTS[4]), "the prompt is computed once"


def test_more_samples_than_slots(stock: Any) -> None:
    params = SamplingParams(n=7, seed=3, max_tokens=10, ignore_eos=True)
    wide = hf_paged.wrap(copy.deepcopy(stock), **OPTIONS)
    narrow = hf_paged.wrap(copy.deepcopy(stock), **OPTIONS | {"max_num_seqs": 3, "num_pages": 16})
    expected = [completion.token_ids for completion in wide.generate_many([PROMPTS[3]], params)[0]]
    assert [completion.token_ids for completion in narrow.generate_many([PROMPTS[3]], params)[0]] == expected
    assert_idle(narrow)


def test_a_seed_means_the_same_alone_and_in_a_crowd(stock: Any, shared: Any) -> None:
    params = SamplingParams(n=2, seed=11, max_tokens=12, top_p=0.9, temperature=1.5, ignore_eos=True)
    alone = [completion.token_ids for completion in shared.generate_many([PROMPTS[3]], params)[0]]
    crowd: list[Any] = [SamplingParams(seed=i, max_tokens=9 + i, ignore_eos=True) for i in range(4)]
    others = make_prompts([3, 30, 12, 8], seed=9)
    outputs = shared.generate_many([*others[:2], PROMPTS[3], *others[2:]], [*crowd[:2], params, *crowd[2:]])
    assert [completion.token_ids for completion in outputs[2]] == alone
    tight = hf_paged.wrap(copy.deepcopy(stock), **OPTIONS | {"num_pages": 9, "max_num_seqs": 4})
    outputs = tight.generate_many([*others[:2], PROMPTS[3], *others[2:]], [*crowd[:2], params, *crowd[2:]])
    assert [completion.token_ids for completion in outputs[2]] == alone
    assert tight.engine.scheduler.stats.num_preemptions > 0


def test_without_a_seed_torch_decides(shared: Any) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(tokens_of(shared.generate_many(PROMPTS, params)))
    assert runs[0] == runs[1] != runs[2]


def log_probs_of(stock: Any, prompt: list[int], ids: list[int]) -> torch.Tensor:
    """`[prompt + ids, V]`: each row is for the token after it."""
    with torch.no_grad():
        return torch.log_softmax(stock(torch.tensor([prompt + ids])).logits[0], -1)


@pytest.mark.parametrize("params", [greedy(9, logprobs=3), SamplingParams(seed=5, max_tokens=9, logprobs=3, n=2)])
def test_logprobs_are_the_models_own(params: SamplingParams, stock: Any, shared: Any) -> None:
    params = params.clone(ignore_eos=True)
    for prompt, output in zip(PROMPTS, shared.generate_many(PROMPTS, params), strict=True):
        for completion in output:
            rows = log_probs_of(stock, prompt, completion.token_ids)[len(prompt) - 1 : -1]
            assert len(completion.logprobs) == len(completion.token_ids)
            for row, token, entry in zip(rows, completion.token_ids, completion.logprobs, strict=True):
                assert entry[token].logprob == pytest.approx(float(row[token]), abs=1e-4)
                assert entry[token].rank == int((row > row[token]).sum()) + 1
                top = row.topk(3)
                assert set(top.indices.tolist()) <= set(entry)
                for rank, (value, index) in enumerate(zip(*map(torch.Tensor.tolist, top), strict=True), start=1):
                    assert entry[index].logprob == pytest.approx(value, abs=1e-4)
                    assert entry[index].rank == rank
            total = sum(e[t].logprob for e, t in zip(completion.logprobs, completion.token_ids, strict=True))
            assert completion.cumulative_logprob == pytest.approx(total)


def test_processed_logprobs(stock: Any) -> None:
    model = hf_paged.wrap(copy.deepcopy(stock), **OPTIONS, logprobs_mode="processed_logprobs")
    params = SamplingParams(seed=5, max_tokens=5, logprobs=0, temperature=2.0, top_k=4, ignore_eos=True)
    completion = model.generate_many([PROMPTS[2]], params)[0].outputs[0]
    with torch.no_grad():
        logits = stock(torch.tensor([PROMPTS[2] + completion.token_ids])).logits[0, len(PROMPTS[2]) - 1 : -1] / 2.0
    kept = logits.masked_fill(logits < logits.topk(4).values[:, -1:], -torch.inf)
    for row, token, entry in zip(torch.log_softmax(kept, -1), completion.token_ids, completion.logprobs, strict=True):
        assert entry[token].logprob == pytest.approx(float(row[token]), abs=1e-4)


@pytest.mark.parametrize("engines", ["raw_logprobs", "processed_logprobs", "scaled_logprobs"])
def test_each_request_says_what_its_logprobs_are_of(engines: str, stock: Any) -> None:
    """All kinds side by side; None is the engine's. Prompt log-probabilities are raw."""
    model = hf_paged.wrap(copy.deepcopy(stock), **OPTIONS, logprobs_mode=engines)
    modes = [None, "raw_logprobs", "processed_logprobs", "scaled_logprobs", "scaled_logprobs"]
    temperatures = [2.0, 2.0, 2.0, 0.6, 0.0]
    params = [
        SamplingParams(seed=i, max_tokens=5, logprobs=0, temperature=t, top_k=4, logprobs_mode=mode, prompt_logprobs=p)
        for i, (mode, t, p) in enumerate(zip(modes, temperatures, [None, None, None, 0, None], strict=True))
    ]
    outputs = model.generate_many([PROMPTS[2]] * 5, [p.clone(ignore_eos=True) for p in params])
    for mode, temperature, output in zip(modes, temperatures, outputs, strict=True):
        completion = output.outputs[0]
        with torch.no_grad():
            raw = stock(torch.tensor([PROMPTS[2] + completion.token_ids])).logits[0]
        logits = raw[len(PROMPTS[2]) - 1 : -1]
        if (mode or engines) != "raw_logprobs":
            logits = logits / (temperature or 1.0)
        if (mode or engines) == "processed_logprobs":
            logits = logits.masked_fill(logits < logits.topk(4).values[:, -1:], -torch.inf)
        rows = torch.log_softmax(logits, -1)
        for row, token, entry in zip(rows, completion.token_ids, completion.logprobs, strict=True):
            assert entry[token].logprob == pytest.approx(float(row[token]), abs=1e-4)
        if output.prompt_logprobs:
            of_prompt = torch.log_softmax(raw, -1)[torch.arange(len(PROMPTS[2]) - 1), PROMPTS[2][1:]]
            found = [entry[t].logprob for t, entry in zip(PROMPTS[2][1:], output.prompt_logprobs[1:], strict=True)]
            assert found == pytest.approx(of_prompt.tolist(), abs=1e-4)
    assert sum(output.prompt_logprobs is not None for output in outputs) == 1


@pytest.mark.parametrize("budget", [None, 16])
def test_prompt_logprobs(budget: int | None, stock: Any) -> None:
    model = hf_paged.wrap(copy.deepcopy(stock), **OPTIONS, max_num_batched_tokens=budget)
    for _ in range(2):  # the second time the prompts are cached
        outputs = model.generate_many(PROMPTS, greedy(3, prompt_logprobs=2))
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            rows = log_probs_of(stock, prompt, [])
            assert len(output.prompt_logprobs) == len(prompt)
            assert output.prompt_logprobs[0] is None
            for row, token, entry in zip(rows, prompt[1:], output.prompt_logprobs[1:], strict=False):
                assert entry[token].logprob == pytest.approx(float(row[token]), abs=1e-4)
                assert entry[token].rank == int((row > row[token]).sum()) + 1
                assert len(entry) in (2, 3)
        assert tokens_of(outputs) == expect(stock, PROMPTS, 3)


# ---- how it ends -------------------------------------------------------------------------------------------


def test_finish_and_stop_reasons(stock: Any, model: Any) -> None:
    prompt = PROMPTS[3]
    free = stock_greedy(stock, prompt, 24)
    text = TOKENIZER.decode(free, skip_special_tokens=True)
    at = next(i for i in range(6, 20) if free.index(free[i]) == i)
    third = next(text[i : i + 3] for i in range(8, 20) if text.find(text[i : i + 3]) == i)
    plain = model.generate_many([prompt], greedy(24))[0].outputs[0]
    assert (plain.finish_reason, plain.stop_reason, plain.token_ids) == ("length", None, free)

    by_id = model.generate_many([prompt], greedy(24, stop_token_ids=[free[at]]))[0].outputs[0]
    assert (by_id.finish_reason, by_id.stop_reason) == ("stop", free[at])
    assert by_id.token_ids == free[: at + 1]
    assert by_id.text == TOKENIZER.decode(free[:at], skip_special_tokens=True)

    by_text = model.generate_many([prompt], greedy(24, stop=["@@nowhere", third]))[0].outputs[0]
    assert (by_text.finish_reason, by_text.stop_reason) == ("stop", third)
    assert by_text.text == text[: text.find(third)]
    assert by_text.token_ids == free[: len(by_text.token_ids)]

    kept = model.generate_many([prompt], greedy(24, stop=third, include_stop_str_in_output=True))[0].outputs[0]
    assert kept.text == text[: text.find(third) + len(third)]

    model.generation_config.eos_token_id = [free[at], next(i for i in range(VOCAB) if i not in free)]
    hf_paged.wrap(model)  # a new engine, which reads the ids again
    ended = model.generate_many([prompt], greedy(24, ignore_eos=False))[0].outputs[0]
    assert (ended.finish_reason, ended.stop_reason, ended.token_ids) == ("stop", None, free[: at + 1])
    ignored = model.generate_many([prompt], greedy(24))[0].outputs[0]
    assert ignored.finish_reason == "length"
    later = model.generate_many([prompt], greedy(24, ignore_eos=False, min_tokens=at + 3))[0].outputs[0]
    assert len(later.token_ids) >= at + 3
    assert later.token_ids[:at] == free[:at]
    assert free[at] not in later.token_ids[: at + 3]


def test_eos_set_on_the_generation_config_after_the_engine_was_made(stock: Any, model: Any) -> None:
    """generate() reads model.generation_config at every call; so must generate_many."""
    prompt = PROMPTS[3]
    free = stock_greedy(stock, prompt, 24)
    model.generate_many([prompt], greedy(2))
    model.generation_config.eos_token_id = free[7]
    expected = free[: free.index(free[7]) + 1]
    assert stock_greedy(model, prompt, 24) == expected
    config = GenerationConfig(max_new_tokens=24, do_sample=False)
    assert model.generate_many([prompt], config)[0].outputs[0].token_ids == expected
    assert model.generate_many([prompt], greedy(24, ignore_eos=False))[0].outputs[0].token_ids == expected


def test_no_eos_means_no_eos(stock: Any) -> None:
    """Someone who sets generation_config.eos_token_id to None wants no end; the config's id is not asked."""
    twin = copy.deepcopy(stock)
    free = stock_greedy(stock, PROMPTS[3], 24)
    twin.config.eos_token_id = free[7]
    twin.generation_config.eos_token_id = None
    model = hf_paged.wrap(twin, **OPTIONS)
    assert stock_greedy(model, PROMPTS[3], 24) == free
    config = GenerationConfig(max_new_tokens=24, do_sample=False)
    assert model.generate_many([PROMPTS[3]], config)[0].outputs[0].token_ids == free


def test_a_generation_configs_eos_replaces_the_models(stock: Any) -> None:
    twin = copy.deepcopy(stock)
    free = stock_greedy(stock, PROMPTS[3], 24)
    early, late = free[4], next(token for token in free[8:] if token not in free[:8])
    twin.generation_config.eos_token_id = early
    model = hf_paged.wrap(twin, **OPTIONS)
    config = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=late, pad_token_id=0)
    ids = torch.tensor([PROMPTS[3]])
    expected = stock.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, ids.shape[1] :]
    assert expected[-1] == late
    assert model.generate_many([PROMPTS[3]], config)[0].outputs[0].token_ids == expected.tolist()


def test_up_to_the_models_length(stock: Any) -> None:
    model = hf_paged.wrap(copy.deepcopy(stock), **OPTIONS, max_model_len=24)
    outputs = model.generate_many(PROMPTS[:4], greedy(100))
    assert [len(o.prompt_token_ids) + len(o.outputs[0].token_ids) for o in outputs] == [24] * 4
    assert {o.outputs[0].finish_reason for o in outputs} == {"length"}
    assert tokens_of(outputs) == [stock_greedy(stock, p, 24 - len(p)) for p in PROMPTS[:4]]
    outputs = model.generate_many(PROMPTS[:4], greedy(max_tokens=None))
    assert [len(o.outputs[0].token_ids) for o in outputs] == [24 - len(p) for p in PROMPTS[:4]]


# ---- streams -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["tea for two", [5, 6, 7], [{"role": "user", "content": "tea?"}]])
def test_a_stream_joined_is_the_text(prompt: Any, shared: Any) -> None:
    expected = shared.generate_many([prompt], greedy(20))[0].outputs[0].text
    pieces = list(shared.stream(prompt, greedy(20)))
    assert "".join(pieces) == expected
    assert len(pieces) > 10, "in pieces"
    assert all(pieces)


def test_a_stream_with_a_stop_string(shared: Any) -> None:
    text = shared.generate_many(["tea"], greedy(30))[0].outputs[0].text
    stop = next(text[i : i + 4] for i in range(10, 20) if text.find(text[i : i + 4]) == i)
    assert "".join(shared.stream("tea", greedy(30, stop=stop))) == text[: text.find(stop)]


def test_leaving_a_stream_aborts(shared: Any) -> None:
    for piece in shared.stream("tea for two", greedy(200)):
        assert piece
        break
    assert_idle(shared)
    stream = shared.stream("tea for two", greedy(200))
    next(stream)
    assert shared.engine.has_unfinished()
    stream.close()
    assert_idle(shared)


def test_a_stream_nobody_reads_starts_nothing(shared: Any) -> None:
    stream = shared.stream("tea", greedy(20))
    assert_idle(shared)
    del stream
    assert_idle(shared)


def test_stream_refuses_at_once(shared: Any) -> None:
    with pytest.raises(ValueError, match="n=2"):
        shared.stream("tea", SamplingParams(n=2))
    with pytest.raises(ValueError, match="empty"):
        shared.stream([])


def test_two_streams_and_a_batch_at_once(stock: Any, shared: Any) -> None:
    alone = ["".join(shared.stream(text, greedy(25))) for text in ("tea", "two")]
    streams = [shared.stream(text, greedy(25)) for text in ("tea", "two")]
    found = ["", ""]
    found[0] += next(streams[0])
    found[1] += next(streams[1])
    assert tokens_of(shared.generate_many(PROMPTS, greedy())) == expect(stock, PROMPTS)
    found[1] += "".join(streams[1])
    found[0] += "".join(streams[0])
    assert found == alone


# ---- the engine's own loop ---------------------------------------------------------------------------------


def drain(engine: Any) -> dict[str, RequestOutput]:
    last: dict[str, RequestOutput] = {}
    while engine.has_unfinished():
        for output in engine.step():
            last[output.request_id] = output
    return last


def test_add_request_and_step(stock: Any, shared: Any) -> None:
    engine = shared.engine
    ids = [engine.add_request(prompt, greedy()) for prompt in PROMPTS]
    assert len(set(ids)) == len(ids)
    assert engine.has_unfinished()
    last = drain(engine)
    assert [last[i].outputs[0].token_ids for i in ids] == expect(stock, PROMPTS)
    assert all(last[i].finished for i in ids)
    assert engine.step() == []


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_output_kinds(kind: RequestOutputKind, shared: Any) -> None:
    engine = shared.engine
    expected = shared.generate_many([PROMPTS[2]], greedy())[0].outputs[0]
    engine.add_request(PROMPTS[2], greedy(output_kind=kind), request_id="mine")
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    assert {output.request_id for output in outputs} == {"mine"}
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    completions = [output.outputs[0] for output in outputs]
    if kind is RequestOutputKind.DELTA:
        assert [token for c in completions for token in c.token_ids] == expected.token_ids
        assert "".join(c.text for c in completions) == expected.text
    else:
        assert completions[-1].token_ids == expected.token_ids
        assert completions[-1].text == expected.text
    if kind is RequestOutputKind.FINAL_ONLY:
        assert len(outputs) == 1
    if kind is RequestOutputKind.CUMULATIVE:
        assert [len(c.token_ids) for c in completions] == list(range(1, 13))


def test_an_id_in_use(shared: Any) -> None:
    engine = shared.engine
    engine.add_request(PROMPTS[0], greedy(2), request_id="twice")
    with pytest.raises(ValueError, match="twice"):
        engine.add_request(PROMPTS[1], greedy(2), request_id="twice")
    assert set(drain(engine)) == {"twice"}
    engine.add_request(PROMPTS[1], greedy(2), request_id="twice")
    assert set(drain(engine)) == {"twice"}, "an id is free again once its request is done"


@pytest.mark.parametrize("when", [0, 1, 4])
def test_abort(when: int, stock: Any, shared: Any) -> None:
    engine = shared.engine
    ids = [engine.add_request(prompt, greedy()) for prompt in PROMPTS[1:4]]
    outputs = [output for _ in range(when) for output in engine.step()]
    engine.abort(ids[1])
    engine.abort(["unknown", ids[1]])
    while engine.has_unfinished():
        outputs += engine.step()
    last = {output.request_id: output for output in outputs + engine.step()}
    gone = last[ids[1]]
    assert gone.finished
    assert gone.outputs[0].finish_reason == "abort"
    expected = expect(stock, PROMPTS[1:4])
    assert len(gone.outputs[0].token_ids) == when
    assert gone.outputs[0].token_ids == expected[1][:when]
    assert [last[ids[i]].outputs[0].token_ids for i in (0, 2)] == [expected[0], expected[2]]


def test_one_caller_does_not_get_anothers_outputs(stock: Any, shared: Any) -> None:
    engine = shared.engine
    mine = engine.add_request(PROMPTS[4], greedy())
    assert tokens_of(shared.generate_many(PROMPTS[:2], greedy())) == expect(stock, PROMPTS[:2])
    outputs = drain(engine)
    for output in engine.step():
        outputs[output.request_id] = output
    assert list(outputs) == [mine]
    assert outputs[mine].outputs[0].token_ids == stock_greedy(stock, PROMPTS[4], 12)


def test_priority(stock: Any) -> None:
    model = hf_paged.wrap(copy.deepcopy(stock), **OPTIONS | {"max_num_seqs": 1})
    order: list[str] = []
    for name, priority in (("c", 5), ("a", -1), ("b", 0)):
        model.engine.add_request(PROMPTS[1], greedy(3, priority=priority), request_id=name)
    while model.engine.has_unfinished():
        order += [output.request_id for output in model.engine.step() if output.finished]
    assert order == ["a", "b", "c"]


# ---- small pools -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fifty(stock: Any) -> list[tuple[list[int], int, list[int]]]:
    """Prompts, how many tokens to generate, and what they are."""
    prompts = make_prompts([1 + i % 23 for i in range(50)], seed=4)
    counts = [3 + (7 * i) % 30 for i in range(50)]
    batch = left_pad(prompts)
    width = batch["input_ids"].shape[1]
    new = stock.generate(**batch, do_sample=False, max_new_tokens=max(counts))[:, width:].tolist()
    return [(prompt, count, row[:count]) for prompt, count, row in zip(prompts, counts, new, strict=True)]


@pytest.mark.parametrize("caching", [True, False])
def test_eight_pages_serve_fifty_requests(caching: bool, stock: Any, fifty: Any) -> None:
    model = hf_paged.wrap(copy.deepcopy(stock), page_size=8, num_pages=8, max_num_seqs=8, enable_prefix_caching=caching)
    outputs = model.generate_many([prompt for prompt, _, _ in fifty], [greedy(count) for _, count, _ in fifty])
    assert tokens_of(outputs) == [expected for _, _, expected in fifty]
    assert model.engine.scheduler.stats.num_preemptions > 0
    assert model.engine.scheduler.stats.peak_pages <= 8
    assert_idle(model)


def test_exactly_the_whole_pool(stock: Any) -> None:
    model = hf_paged.wrap(copy.deepcopy(stock), page_size=8, num_pages=4, max_num_seqs=4)
    prompt = make_prompts([12])[0]
    count = 4 * 8 - 12 + 1  # the last token is never written
    assert tokens_of(model.generate_many([prompt] * 3, greedy(count))) == expect(stock, [prompt] * 3, count)
    with pytest.raises(ValueError, match=r"12 prompt tokens and up to 22 .* 5 pages of 8 .* has 4"):
        model.generate_many([prompt], greedy(count + 1))
    assert_idle(model)
    with pytest.raises(ValueError, match="whole pool has 4"):
        model.engine.add_request(prompt, greedy(count + 1))
    assert_idle(model)


# ---- chaos -------------------------------------------------------------------------------------------------


class Boom(Exception):
    pass


class RaisesAt(LogitsProcessor):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] >= self.length:
            raise Boom("the processor's own fault")
        return scores


def forbids_all(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    return logits if len(ids) < 3 else torch.full_like(logits, -torch.inf)


def returns_nonsense(ids: list[int], logits: torch.Tensor) -> Any:
    return logits if len(ids) < 3 else logits[:5]


def returns_nan(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    return logits if len(ids) < 3 else logits * torch.nan


FAULTS: dict[str, tuple[Callable[..., Any], type[Exception]]] = {
    "raises": (RaisesAt(len(PROMPTS[2]) + 3), Boom),
    "raises at once": (RaisesAt(0), Boom),
    "forbids all": (forbids_all, RuntimeError),
    "wrong shape": (returns_nonsense, ValueError),
    "NaN": (returns_nan, RuntimeError),
}


@pytest.mark.parametrize("name", list(FAULTS))
@pytest.mark.parametrize("n", [1, 3])
def test_a_processors_fault_is_its_requests_own(name: str, n: int, stock: Any, shared: Any) -> None:
    processor, kind = FAULTS[name]
    bad = greedy(12, n=n, logits_processors=[processor])
    outputs = shared.generate_many(PROMPTS, [greedy(), greedy(), bad, greedy(), greedy()])
    expected = expect(stock, PROMPTS)
    for place in (0, 1, 3, 4):
        assert outputs[place].outputs[0].token_ids == expected[place]
        assert outputs[place].error is None
    failed = outputs[2]
    assert isinstance(failed.error, kind)
    assert failed.finished
    assert {completion.finish_reason for completion in failed} == {"error"}
    count = 0 if name == "raises at once" else 3
    assert failed.outputs[0].token_ids == expected[2][:count]
    assert_idle(shared)
    assert tokens_of(shared.generate_many(PROMPTS, greedy())) == expected


def test_a_criterions_fault_in_generate(stock: Any, shared: Any) -> None:
    class Broken(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            if input_ids.shape[1] > 12:
                raise Boom("the criterion's own fault")
            return torch.zeros(1, dtype=torch.bool)

    with pytest.raises(Boom):
        shared.generate(
            torch.tensor([PROMPTS[2]]),
            do_sample=False,
            max_new_tokens=9,
            stopping_criteria=StoppingCriteriaList([Broken()]),
        )
    assert_idle(shared)
    assert tokens_of(shared.generate_many(PROMPTS, greedy())) == expect(stock, PROMPTS)


def fail_at(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, call: int, error: BaseException) -> None:
    """The `call`-th call of a method raises, once."""
    original, count = getattr(target, name), 0

    def flaky(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, flaky)


PLACES: dict[str, Callable[[Any], tuple[Any, str]]] = {
    "forward": lambda model: (model.engine.executor._runner, "forward"),
    "attention": lambda model: (model.engine.executor._runner.backend, "run"),
    "sample": lambda model: (model.engine.executor._sampler, "sample"),
    "schedule": lambda model: (model.engine.scheduler, "schedule"),
    "advance": lambda model: (model.engine.scheduler, "advance"),
    "end_of": lambda model: (model.engine.output_processor, "end_of"),
    "output": lambda model: (model.engine.output_processor, "output"),
    "read inbox": lambda model: (model.engine, "_read_inbox"),
    "append": lambda model: (model.engine, "_append"),
}


@pytest.mark.parametrize("call", [1, 2, 5])
@pytest.mark.parametrize("place", list(PLACES))
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_interrupted_in_the_middle_of_a_step(
    place: str, call: int, error: type[BaseException], stock: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C can fall anywhere. It reaches the caller, and afterwards model and engine are as good as new."""
    model.train()
    target, name = PLACES[place](model)
    with monkeypatch.context() as patch:
        fail_at(patch, target, name, call, error("now"))
        params = [greedy(), greedy(), SamplingParams(n=3, seed=1, max_tokens=8, ignore_eos=True), greedy(), greedy()]
        try:
            model.generate_many(PROMPTS, params)
        except BaseException as raised:
            assert type(raised) is error, raised
        else:
            # A criterion's fault is its request's own; a call that never came is none.
            assert place in ("end_of", "output"), "it was swallowed"
    assert_idle(model)
    assert model.config._attn_implementation == "sdpa"
    assert all(module.training for module in model.modules())
    assert tokens_of(model.generate_many(PROMPTS, greedy())) == expect(stock, PROMPTS)
    batch = left_pad(PROMPTS[2:4])
    twin = copy.deepcopy(stock).train()
    assert torch.equal(model(**batch).logits, twin(**batch).logits)
    model(**batch, labels=batch["input_ids"]).loss.backward()


class InterruptAt:
    """Raises KeyboardInterrupt at the `line`-th line of hf_paged's engine that this thread runs, as Ctrl-C might."""

    def __init__(self, line: int) -> None:
        self.left = line
        self.where = ""

    def __call__(self, frame: Any, event: str, arg: Any) -> Any:
        name = frame.f_code.co_filename
        if not any(part in name for part in ("hf_paged/engine/", "hf_paged/cache/", "hf_paged/many")):
            return None
        # Around a lock's `with` a trace function can raise where Python never looks for signals, on lines that no
        # handler covers (the NOP of a `try:`): what would be left there cannot happen.
        if frame.f_code.co_name in ("_take_turn", "take", "_claim_ids"):
            return self
        if event == "line":
            self.left -= 1
            if self.left == 0:
                self.where = f"{name.rpartition('hf_paged/')[2]}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self


def interrupted_everywhere(stock: Any, lines: Any) -> list[str]:
    """Interrupts generation at each of these lines. Returns the places after which something was not as before."""
    model = hf_paged.wrap(copy.deepcopy(stock), page_size=8, num_pages=12, max_num_seqs=4)
    prompts = [PROMPTS[1], PROMPTS[2], PROMPTS[3]]
    params = [greedy(4), SamplingParams(n=2, seed=1, max_tokens=3, ignore_eos=True), greedy(5)]
    expected = [[c.token_ids for c in output] for output in model.generate_many(prompts, params)]
    bad = []
    for line in lines:
        tracer = InterruptAt(line)
        before = sys.gettrace()
        try:
            sys.settrace(tracer)
            model.generate_many(prompts, params)
        except BaseException as error:
            raised: BaseException | None = error
        else:
            raised = None
        finally:
            sys.settrace(before)
        try:
            assert raised is None or type(raised) is KeyboardInterrupt, f"raised {raised!r}"
            assert_idle(model)
            found = model.generate_many(prompts, params)
            assert [[c.token_ids for c in output] for output in found] == expected
            assert_idle(model)
        except BaseException as error:
            bad.append(f"line {line}, {tracer.where}: {type(error).__name__} {str(error)[:60]}")
            model.__dict__["_hf_paged"].drop_engine()
        if not tracer.where:
            break
    return bad


def test_interrupted_at_any_line(stock: Any) -> None:
    assert interrupted_everywhere(stock, range(1, 6000, 13)) == []


@pytest.mark.slow
def test_interrupted_at_every_line(stock: Any) -> None:
    assert interrupted_everywhere(stock, range(1, 100_000)) == []


def test_neighbours_of_an_interrupted_caller_go_on(stock: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of another caller survive a step that fails under this one's feet."""
    ids = [model.engine.add_request(prompt, greedy()) for prompt in PROMPTS[:3]]
    for _ in range(4):
        model.engine.step()
    with monkeypatch.context() as patch:
        fail_at(patch, model.engine.executor._runner, "forward", 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            model.generate_many(PROMPTS[3:], greedy())
    last = drain(model.engine)
    for output in model.engine.step():
        last[output.request_id] = output
    assert [last[i].outputs[0].token_ids for i in ids] == expect(stock, PROMPTS[:3])
    assert_idle(model)


def test_interrupted_generate(stock: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = left_pad(PROMPTS)
    _ = model.engine
    with monkeypatch.context() as patch:
        fail_at(patch, model.engine.executor._runner, "forward", 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            model.generate(**batch, do_sample=False, max_new_tokens=9)
    assert_idle(model)
    expected = stock.generate(**batch, do_sample=False, max_new_tokens=9)
    assert torch.equal(model.generate(**batch, do_sample=False, max_new_tokens=9), expected)


def test_a_tokenizer_that_fails_does_not_wedge_the_engine(stock: Any) -> None:
    """Slow tokenizers raise on ids they do not know, and vocabularies are padded."""

    class Fragile:
        def __init__(self) -> None:
            self.bad = stock_greedy(stock, PROMPTS[2], 12)[4]

        def decode(self, ids: list[int], **options: Any) -> str:
            if self.bad in ids:
                raise KeyError(self.bad)
            return TOKENIZER.decode(ids, **options)

    model = hf_paged.wrap(copy.deepcopy(stock), **OPTIONS, tokenizer=Fragile())
    try:
        output = model.generate_many([PROMPTS[2]], greedy())[0]
        assert isinstance(output.error, KeyError) or output.outputs[0].finish_reason == "length"
    except KeyError:
        pass
    assert_idle(model)
    params = greedy(detokenize=False)
    assert tokens_of(model.generate_many(PROMPTS, params)) == expect(stock, PROMPTS)


def test_an_observer_that_fails_does_not_wedge_the_engine(stock: Any, model: Any) -> None:
    def broken(record: Any) -> None:
        raise Boom("the observer's own fault")

    model.engine.observers.append(broken)
    with pytest.raises(Boom):
        model.generate_many(PROMPTS, greedy())
    model.engine.observers.remove(broken)
    assert_idle(model)
    assert tokens_of(model.generate_many(PROMPTS, greedy())) == expect(stock, PROMPTS)


def test_nan_weights_fail_the_request_and_leave_no_trace(stock: Any, model: Any) -> None:
    expected = expect(stock, PROMPTS)
    weight = model.model.embed_tokens.weight
    bad = next(i for i in range(3, VOCAB) if not any(i in ids for ids in (*PROMPTS, *expected)))
    kept = weight.data[bad].clone()
    weight.data[bad] = torch.nan
    outputs = model.generate_many([*PROMPTS, [7, bad, 9] * 5], greedy())
    assert tokens_of(outputs[:-1]) == expected
    assert outputs[-1].outputs[0].finish_reason == "error"
    assert "nan" in str(outputs[-1].error).lower()
    assert_idle(model)
    assert tokens_of(model.generate_many(PROMPTS, greedy())) == expected
    weight.data[bad] = kept
    everyone = [*PROMPTS, [7, bad, 9] * 5]
    assert tokens_of(model.generate_many(everyone, greedy())) == expect(stock, everyone)
    assert all(bool(torch.isfinite(pool).all()) for pool in model.engine.executor.storage.values)


# ---- threads -----------------------------------------------------------------------------------------------


def test_four_threads_at_once(stock: Any, model: Any) -> None:
    prompts = [make_prompts([3 + i, 20 - i, 9], seed=i) for i in range(4)]
    params = greedy(20)
    found = in_threads(*(lambda p=p: tokens_of(model.generate_many(p, params)) for p in prompts))
    assert found == [expect(stock, p, 20) for p in prompts]
    assert_idle(model)


def test_threads_of_different_kinds(stock: Any, model: Any) -> None:
    batch = left_pad(PROMPTS[1:4])
    text = "".join(model.stream("tea", greedy(20)))
    found = in_threads(
        lambda: model.generate(**batch, do_sample=False, max_new_tokens=20).tolist(),
        lambda: "".join(model.stream("tea", greedy(20))),
        lambda: tokens_of(model.generate_many(PROMPTS, greedy(20))),
        lambda: next(iter(model.stream("tea for two", greedy(200)))),
    )
    assert found[0] == stock.generate(**batch, do_sample=False, max_new_tokens=20).tolist()
    assert found[1] == text
    assert found[2] == expect(stock, PROMPTS, 20)
    assert isinstance(found[3], str)


def test_one_threads_fault_is_its_own(stock: Any, model: Any) -> None:
    bad = greedy(20, logits_processors=[RaisesAt(15)])
    found = in_threads(
        lambda: tokens_of(model.generate_many(PROMPTS, greedy(20))),
        lambda: model.generate_many([PROMPTS[2]], bad)[0].error,
        lambda: model.generate_many([[VOCAB + 1]]),
        lambda: tokens_of(model.generate_many(PROMPTS[2:], greedy(20))),
    )
    assert found[0] == expect(stock, PROMPTS, 20)
    assert isinstance(found[1], Boom)
    assert isinstance(found[2], ValueError)
    assert found[3] == expect(stock, PROMPTS[2:], 20)
    assert_idle(model)


def test_the_first_calls_of_four_threads_make_one_engine(stock: Any) -> None:
    model = hf_paged.wrap(copy.deepcopy(stock), **OPTIONS)
    engines = in_threads(*([lambda: model.engine] * 4))
    assert len({id(engine) for engine in engines}) == 1


def test_a_processor_cannot_generate_with_its_own_model(model: Any, stock: Any) -> None:
    """It would wait for itself. It is told so, and its neighbour does not notice."""

    def inward(generated: list[int], logits: torch.Tensor) -> torch.Tensor:
        model.generate_many([PROMPTS[1]], greedy(2))
        return logits

    bad, good = model.generate_many([PROMPTS[1], PROMPTS[2]], [greedy(4).clone(logits_processors=[inward]), greedy()])
    assert bad.outputs[0].finish_reason == "error"
    assert "in the middle of a step" in str(bad.error)
    assert good.outputs[0].token_ids == expect(stock, [PROMPTS[2]])[0]
    assert_idle(model)
