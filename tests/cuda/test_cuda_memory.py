"""The GPU is shared: with training, with other engines, threads and streams, and after Ctrl-C."""

from __future__ import annotations

import gc
import threading
import time
from typing import Any

import pytest
import torch
from gpu_models import (
    DEVICE,
    NEW,
    PROMPTS,
    answers,
    assert_idle,
    captured,
    greedy,
    make,
    make_half,
    needs_flashinfer,
    needs_gpu,
    padded,
    samples,
    stock_answers,
    twin_answers,
    wrap,
    wrap_for,
)
from many_threads import in_threads
from models.families import make_prompts

import hf_paged
from hf_paged import SamplingParams
from hf_paged.cache.remappable import RemappableMemory

pytestmark = needs_gpu

MIB = 1 << 20
SEEDED = SamplingParams(seed=7, n=2, max_tokens=NEW, ignore_eos=True)


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return stock_answers(make())


def reserved() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    pools = sum(thing.mapped_bytes for thing in gc.get_objects() if isinstance(thing, RemappableMemory))
    return torch.cuda.memory_reserved() + pools


# ---- memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["triton", pytest.param("flashinfer", marks=needs_flashinfer)])
def test_sleep_gives_the_memory_back(backend: str) -> None:
    """Of the pool and of what the graphs took, at least 95 of 100."""
    model = wrap_for(backend, make_half(), num_pages=1, max_num_seqs=32)
    page = model.engine.executor.storage.num_bytes
    wrap_for(backend, model, num_pages=1024 * MIB // page + 1, max_num_seqs=32)
    sampling = SamplingParams(seed=1, n=2, max_tokens=9, logprobs=0, ignore_eos=True)
    before = samples(model.generate_many(PROMPTS, sampling))
    few = reserved()  # with all that is compiled, and what libraries keep for themselves
    model.engine.warm_up()
    awake = reserved()
    graphs = model.engine.executor._graphs
    assert captured(model) == [size for size in graphs.sizes if size <= graphs.spare_slot], "no step is larger"
    pool, graphs = model.engine.executor.storage.num_bytes, awake - few
    assert pool > 1024 * MIB
    graphs_before = model.engine.executor._graphs
    for explicit in (True, False):
        model.engine.sleep()
        asleep = reserved()
        assert awake - asleep >= 0.95 * (pool + graphs), f"{awake=} {asleep=} {pool=} {graphs=}"
        if explicit:
            torch.cuda.synchronize()
            begin = time.monotonic()
            model.engine.wake_up()
            torch.cuda.synchronize()
            assert time.monotonic() - begin < 1.0
            assert reserved() - asleep >= pool
            assert model.engine.executor._graphs is graphs_before and captured(model)
        again = samples(model.generate_many(PROMPTS, sampling))
        assert again == before
        model.engine.warm_up()
        awake = reserved()
    assert_idle(model)
    hf_paged.unwrap(model)


def test_sleep_around_a_training_step(expected: list[list[int]]) -> None:
    model = wrap(make(), compile="off")
    assert answers(model.generate_many(PROMPTS, greedy())) == expected
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, fused=True)
    ids = torch.tensor(make_prompts([12, 12], seed=3), device=DEVICE)
    for _ in range(2):
        model.engine.sleep()
        optimizer.zero_grad()
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.eval()
        assert answers(model.generate_many(PROMPTS, greedy())) == twin_answers(model) != expected
    assert_idle(model)


def test_warming_up_wakes(expected: list[list[int]]) -> None:
    """A paused engine may sleep in the middle of requests; what is captured then needs its pages."""
    model = wrap(make(), compile="off")
    engine = model.engine
    ids = [engine.add_request(prompt, greedy()) for prompt in PROMPTS]
    for _ in range(3):
        engine.step()
    engine.pause()
    engine.sleep()
    engine.warm_up()
    engine.resume()
    last: dict[str, Any] = {}
    while engine.has_unfinished():
        last |= {output.request_id: output for output in engine.step()}
    assert [last[i].outputs[0].token_ids for i in ids] == expected


def test_sleep_refuses_while_requests_are_unfinished(expected: list[list[int]]) -> None:
    model = wrap(make(), compile="off")
    engine = model.engine
    ids = [engine.add_request(prompt, greedy()) for prompt in PROMPTS]
    for _ in range(3):
        engine.step()
    with pytest.raises(RuntimeError, match="unfinished"):
        engine.sleep()
    last: dict[str, Any] = {}
    while engine.has_unfinished():
        last |= {output.request_id: output for output in engine.step()}
    assert [last[i].outputs[0].token_ids for i in ids] == expected
    engine.sleep()


def test_unwrapping_gives_everything_back() -> None:
    """The second time, when all that libraries keep for themselves is there, nothing is left."""
    model = make_half()
    left = []
    for _ in range(3):
        wrap(model, num_pages=2000)
        model.generate_many(PROMPTS, SamplingParams(max_tokens=5, ignore_eos=True))
        pool = model.engine.executor.storage.num_bytes
        hf_paged.unwrap(model)
        left.append(reserved())
    assert left[2] - left[0] < 0.05 * pool + 4 * MIB


def test_a_pool_sized_from_what_is_free_leaves_room() -> None:
    """Steps as large as they get, and captures, stay within the share that was given."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 8, "head_dim": 64, "max_position_embeddings": 16384}
    model = make(dtype=torch.bfloat16, **sizes, initializer_range=0.05)
    before = reserved()
    free, total = torch.cuda.mem_get_info()
    room = 4096 * MIB
    hf_paged.wrap(model, gpu_memory_utilization=(total - free + room) / total, max_num_seqs=96, compile="off")
    pool = model.engine.executor.storage.num_bytes
    assert 0.3 * room < pool < room
    torch.cuda.reset_peak_memory_stats()
    prompts = make_prompts([4000] * 6, seed=2)
    model.generate_many(prompts, SamplingParams(max_tokens=4, n=8, top_p=0.9, ignore_eos=True, seed=1))
    model.engine.warm_up()
    assert torch.cuda.max_memory_reserved() + pool - before < 1.05 * room
    assert_idle(model)
    hf_paged.unwrap(model)


# ---- Ctrl-C and other ends -----------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2, 7])
@pytest.mark.parametrize("options", [{}, {"cuda_graphs": False}], ids=["graphs", "no graphs"])
def test_interrupted_in_the_middle(step: int, options: dict[str, Any], expected: list[list[int]]) -> None:
    """Ctrl-C while a step is in the air: the pool is empty, and the next generation is right."""
    model = wrap(make(), compile="off", **options)
    _ = model.engine

    def interrupt(record: Any) -> None:
        if record.step == step:
            raise KeyboardInterrupt

    model.engine.observers.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.generate_many(PROMPTS, greedy())
    model.engine.observers.remove(interrupt)
    assert_idle(model)
    assert answers(model.generate_many(PROMPTS, greedy())) == expected
    assert_idle(model)


def test_aborts_and_arrivals_in_mid_flight(expected: list[list[int]]) -> None:
    model = wrap(make(), num_pages=24, compile="off")
    engine = model.engine
    for when in range(1, 6):
        ids = [engine.add_request(prompt, greedy()) for prompt in PROMPTS]
        last: dict[str, Any] = {}
        for _ in range(when):
            last |= {output.request_id: output for output in engine.step()}
        engine.abort(ids[::2])
        ids.append(engine.add_request(PROMPTS[0], greedy()))
        while engine.has_unfinished():
            last |= {output.request_id: output for output in engine.step()}
        for place in (1, 3, 5):
            assert last[ids[place]].outputs[0].token_ids == expected[place]
        assert last[ids[-1]].outputs[0].token_ids == expected[0]
        for place in (0, 2, 4):
            tokens = last[ids[place]].outputs[0].token_ids
            assert tokens == expected[place][: len(tokens)]
        assert_idle(model)


def test_out_of_memory_in_a_step(expected: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one: the step asks the device for more than it has."""
    model = wrap(make(), max_num_batched_tokens=64, compile="off")
    runner, calls = model.engine.executor._runner, [0]
    forward = runner.forward

    def greedy_for_memory(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            torch.empty(1 << 50, dtype=torch.uint8, device=DEVICE)
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "forward", greedy_for_memory)
        assert answers(model.generate_many(PROMPTS, greedy())) == expected
    assert calls[0] > 2
    assert model.engine.scheduler.max_num_batched_tokens == 32
    assert_idle(model)
    assert answers(model.generate_many(PROMPTS, greedy())) == expected


# ---- others on the same device -------------------------------------------------------------------------


def test_two_engines_take_turns(expected: list[list[int]]) -> None:
    """Call by call, then step by step with a step of each in the air; two of a kind, and one of another."""
    models = [wrap(make()), wrap(make("Qwen3")), wrap(make(seed=1))]
    wanted = [expected, stock_answers(make("Qwen3")), stock_answers(make(seed=1))]
    for _ in range(2):
        for model, tokens in zip(models, wanted, strict=True):
            assert answers(model.generate_many(PROMPTS, greedy())) == tokens
    ids = [[model.engine.add_request(prompt, greedy()) for prompt in PROMPTS] for model in models]
    last: dict[tuple[int, str], Any] = {}
    while any(model.engine.has_unfinished() for model in models):
        for place, model in enumerate(models):
            last |= {(place, output.request_id): output for output in model.engine.step()}
    for place, tokens in enumerate(wanted):
        assert [last[place, i].outputs[0].token_ids for i in ids[place]] == tokens
        assert_idle(models[place])


@pytest.mark.parametrize("made", ["before", "inside"])
def test_generation_on_another_stream(made: str, expected: list[list[int]]) -> None:
    model, side = make(), torch.cuda.Stream()
    wrap(model, compile="off")
    if made == "before":
        assert answers(model.generate_many(PROMPTS, greedy())) == expected
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            assert answers(model.generate_many(PROMPTS, greedy())) == expected
        assert torch.cuda.current_stream() == side
    assert answers(model.generate_many(PROMPTS, greedy())) == expected  # no word of waiting for the side stream
    assert captured(model)
    assert_idle(model)


def test_steps_of_one_generation_on_two_streams(expected: list[list[int]]) -> None:
    model, streams = wrap(make(), compile="off"), [torch.cuda.Stream(), torch.cuda.Stream()]
    engine = model.engine
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    ids = [engine.add_request(prompt, greedy()) for prompt in PROMPTS]
    last: dict[str, Any] = {}
    turn = 0
    while engine.has_unfinished():
        turn += 1
        with torch.cuda.stream(streams[turn % 2]):
            last |= {output.request_id: output for output in engine.step()}
    assert [last[i].outputs[0].token_ids for i in ids] == expected
    assert_idle(model)


@pytest.mark.parametrize("own_stream", [False, True])
def test_a_thread_trains_while_another_generates(own_stream: bool, expected: list[list[int]]) -> None:
    """Gradients without a step: the tokens stay what they are, and so do the gradients. Graphs are captured meanwhile,
    and the layers compiled."""
    model, twin = wrap(make()), make()
    _ = model.engine  # making one moves the weights, which must not be in use then
    ids = torch.tensor(make_prompts([12, 12], seed=3), device=DEVICE)
    twin(input_ids=ids, labels=ids).loss.backward()
    wanted = {name: parameter.grad for name, parameter in twin.named_parameters()}
    torch.cuda.synchronize()
    done = threading.Event()

    def train() -> int:
        stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
        rounds = 0
        with torch.cuda.stream(stream):
            while not done.is_set() or rounds < 3:
                model.zero_grad()
                model(input_ids=ids, labels=ids).loss.backward()
                stream.synchronize()
                for name, parameter in model.named_parameters():
                    torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-5, msg=name)
                rounds += 1
        return rounds

    def generate() -> list[Any]:
        try:
            return [answers(model.generate_many(PROMPTS, greedy())) for _ in range(5)]
        finally:
            done.set()

    trained, found = in_threads(train, generate)
    assert isinstance(trained, int), trained
    assert trained >= 3
    assert found == [expected] * 5
    assert captured(model)
    assert_idle(model)


def test_four_threads_generate_with_one_model(expected: list[list[int]]) -> None:
    model, batch = wrap(make()), padded(PROMPTS)
    alone = samples(model.generate_many(PROMPTS, SEEDED))
    found = in_threads(
        lambda: answers(model.generate_many(PROMPTS, greedy())),
        lambda: samples(model.generate_many(PROMPTS, SEEDED)),
        lambda: answers(model.generate_many(PROMPTS[::-1], greedy(logprobs=2))),
        lambda: model.generate(**batch, do_sample=False, max_new_tokens=NEW)[:, batch["input_ids"].shape[1] :].tolist(),
    )
    assert found == [expected, alone, expected[::-1], expected]
    assert_idle(model)


def test_generation_in_modes_of_the_callers(expected: list[list[int]]) -> None:
    """inference_mode, no_grad, grad, autocast off and on: pools and graphs outlive the mode they were made in."""
    model = wrap(make())
    with torch.inference_mode():
        assert answers(model.generate_many(PROMPTS, greedy())) == expected
    assert answers(model.generate_many(PROMPTS, greedy())) == expected
    with torch.no_grad():
        assert answers(model.generate_many(PROMPTS, greedy())) == expected
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        outputs = model.generate_many(PROMPTS, SamplingParams(seed=1, max_tokens=8, logprobs=0, ignore_eos=True))
    assert [output.error for output in outputs] == [None] * len(PROMPTS)
    assert answers(model.generate_many(PROMPTS, greedy())) == expected, "graphs remember the autocast"
    assert_idle(model)


def test_generation_under_a_default_device(expected: list[list[int]]) -> None:
    """What is the host's stays on the host."""
    batch, model = padded(PROMPTS), wrap(make(), compile="off")
    with torch.device(DEVICE):
        assert answers(model.generate_many(PROMPTS, greedy())) == expected
        found = model.generate(**batch, do_sample=False, max_new_tokens=NEW)
        assert len(model.generate_many(PROMPTS[:1], SamplingParams(n=3, max_tokens=4))[0].outputs) == 3
        assert [score.device.type for score in model.score(PROMPTS[:2], [[3, 4], [5]])] == ["cpu", "cpu"]
    assert found[:, batch["input_ids"].shape[1] :].tolist() == expected
    assert model.engine.stats.generation_tokens > 2 * NEW, "generate() went through the stock loop"
    assert_idle(model)
