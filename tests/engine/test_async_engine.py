"""The engine behind asyncio: the same tokens, streams, early exits and failures."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_paged
from hf_paged import SamplingParams
from hf_paged.engine.async_engine import AsyncEngine
from hf_paged.engine.engine import Engine

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPTS = [[5, 6, 7], [8] * 20, [9, 3], list(range(3, 40))]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    return hf_paged.wrap(LlamaForCausalLM(config).eval(), page_size=8, num_pages=64)


def play(engine: Engine, scene: Callable[[AsyncEngine], Awaitable[None]]) -> None:
    """Runs a coroutine with an AsyncEngine, and checks that nothing is left in the engine."""

    async def main() -> None:
        async with AsyncEngine(engine) as served:
            await asyncio.wait_for(scene(served), timeout=60)

    asyncio.run(main())
    assert not engine.has_unfinished()
    assert engine.scheduler.num_active_pages == 0


async def tokens_of(engine: AsyncEngine, prompt: list[int], sampling: SamplingParams = GREEDY) -> list[int]:
    last = None
    async for output in engine.generate(prompt, sampling):
        last = output
    assert last is not None and last.finished
    return last.outputs[0].token_ids


def test_many_at_once_get_what_generate_many_gives(model: Any) -> None:
    expected = [output.outputs[0].token_ids for output in model.generate_many(PROMPTS, GREEDY)]

    async def scene(engine: AsyncEngine) -> None:
        assert await asyncio.gather(*(tokens_of(engine, prompt) for prompt in PROMPTS)) == expected

    play(model.engine, scene)


def test_outputs_grow_step_by_step(model: Any) -> None:
    async def scene(engine: AsyncEngine) -> None:
        lengths = [len(output.outputs[0].token_ids) async for output in engine.generate(PROMPTS[0], GREEDY)]
        assert lengths == list(range(1, 13))

    play(model.engine, scene)


def test_leaving_early_aborts(model: Any) -> None:
    async def scene(engine: AsyncEngine) -> None:
        outputs = engine.generate(PROMPTS[0], GREEDY.clone(max_tokens=200))
        async for output in outputs:
            assert not output.finished
            break
        await outputs.aclose()  # type: ignore[attr-defined]
        assert not engine.engine.has_unfinished()

    play(model.engine, scene)


def test_a_cancelled_task_aborts(model: Any) -> None:
    async def scene(engine: AsyncEngine) -> None:
        task = asyncio.create_task(tokens_of(engine, PROMPTS[0], GREEDY.clone(max_tokens=200)))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not engine.engine.has_unfinished()

    play(model.engine, scene)


def test_bad_arguments_raise_where_they_are_given(model: Any) -> None:
    async def scene(engine: AsyncEngine) -> None:
        with pytest.raises(ValueError, match="outside the model's vocabulary"):
            await tokens_of(engine, [1000])
        with pytest.raises(ValueError, match="tokenizer"):
            async for _ in engine.stream([1, 2]):
                pass
        assert len(await tokens_of(engine, PROMPTS[0])) == 12

    play(model.engine, scene)


def test_a_failed_step_reaches_its_readers_and_the_engine_goes_on(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = model.engine
    launch = engine.executor.launch

    def fail(batch: Any) -> Any:
        monkeypatch.setattr(engine.executor, "launch", launch)
        raise RuntimeError("the device is on fire")

    async def scene(served: AsyncEngine) -> None:
        monkeypatch.setattr(engine.executor, "launch", fail)
        with pytest.raises(RuntimeError, match="a step of the engine failed"):
            await tokens_of(served, PROMPTS[0])
        assert len(await tokens_of(served, PROMPTS[0])) == 12

    play(engine, scene)


def test_closing_wakes_those_who_wait(model: Any) -> None:
    async def main() -> None:
        engine = AsyncEngine(model.engine)
        task = asyncio.create_task(tokens_of(engine, PROMPTS[0], GREEDY.clone(max_tokens=200)))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(engine.close)
        with pytest.raises(RuntimeError):
            await asyncio.wait_for(task, timeout=30)
        with pytest.raises(RuntimeError, match="closed"):
            await tokens_of(engine, PROMPTS[0])

    asyncio.run(main())
    assert not model.engine.has_unfinished()


def test_a_pause_holds_generators_until_it_ends(model: Any) -> None:
    expected = [output.outputs[0].token_ids for output in model.generate_many(PROMPTS, GREEDY)]

    async def scene(engine: AsyncEngine) -> None:
        running = [asyncio.create_task(tokens_of(engine, prompt)) for prompt in PROMPTS[:2]]
        await asyncio.sleep(0.01)
        await engine.pause()
        assert engine.paused
        steps = engine.engine.stats.steps
        late = [asyncio.create_task(tokens_of(engine, prompt)) for prompt in PROMPTS[2:]]
        direct = asyncio.create_task(asyncio.to_thread(model.generate_many, PROMPTS, GREEDY))
        await asyncio.sleep(0.2)
        assert engine.engine.stats.steps == steps
        assert not any(task.done() for task in (*late, direct))
        await engine.resume()
        assert not engine.paused
        assert await asyncio.gather(*running, *late) == expected
        assert [output.outputs[0].token_ids for output in await direct] == expected

    play(model.engine, scene)


def test_aborted_in_a_pause(model: Any) -> None:
    """A generator ends with what its request has so far; a cancelled task leaves nothing behind."""

    async def scene(engine: AsyncEngine) -> None:
        outputs = engine.generate(PROMPTS[0], GREEDY.clone(max_tokens=200), request_id="mine")
        first = await anext(outputs)  # type: ignore[arg-type]
        task = asyncio.create_task(tokens_of(engine, PROMPTS[1], GREEDY.clone(max_tokens=200)))
        await asyncio.sleep(0.01)
        await engine.pause()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        engine.engine.abort("mine")
        last = [output async for output in outputs][-1]
        assert last.outputs[0].finish_reason == "abort"
        assert last.outputs[0].token_ids[:1] == first.outputs[0].token_ids
        assert engine.paused
        await engine.resume()

    play(model.engine, scene)


def test_closing_in_a_pause(model: Any) -> None:
    async def main() -> None:
        engine = AsyncEngine(model.engine)
        await engine.pause()
        task = asyncio.create_task(tokens_of(engine, PROMPTS[0]))
        await asyncio.sleep(0.05)
        await asyncio.wait_for(asyncio.to_thread(engine.close), timeout=30)
        with pytest.raises(RuntimeError):
            await asyncio.wait_for(task, timeout=30)

    asyncio.run(main())
    model.engine.resume()
    assert not model.engine.has_unfinished()


def test_an_id_in_use_disturbs_nobody(model: Any) -> None:
    async def scene(engine: AsyncEngine) -> None:
        first = engine.generate(PROMPTS[0], GREEDY, request_id="mine")
        await anext(first)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="in use"):
            await anext(engine.generate(PROMPTS[1], GREEDY, request_id="mine"))  # type: ignore[arg-type]
        last = [output async for output in first][-1]
        assert last.outputs[0].finish_reason == "length"

    play(model.engine, scene)


def test_lost(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that fails, on a device that goes on, is nothing; a device that answers no call any more is the end."""

    def fail(batch: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def dead() -> None:
        raise RuntimeError("CUDA error")

    async def scene(engine: AsyncEngine) -> None:
        for synchronize, lost in ((lambda: None, False), (dead, True)):
            with monkeypatch.context() as patch:
                patch.setattr(torch.accelerator, "synchronize", synchronize)
                patch.setattr(model.engine.executor, "launch", fail)
                with pytest.raises(RuntimeError, match="a step of the engine failed"):
                    await tokens_of(engine, PROMPTS[0])
            assert (engine.lost() is not None) == lost
        assert "illegal memory access" in (engine.lost() or "")
        with pytest.raises(RuntimeError, match="illegal memory access"):
            await tokens_of(engine, PROMPTS[0])

    play(model.engine, scene)


def test_the_thread_ends(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits is told, and so is whoever asks later."""

    def end(batch: Any) -> Any:
        raise SystemExit(3)

    async def scene(engine: AsyncEngine) -> None:
        assert engine.lost() is None
        with monkeypatch.context() as patch:
            patch.setattr(model.engine.executor, "launch", end)
            with pytest.raises(RuntimeError, match="a step of the engine failed"):
                await tokens_of(engine, PROMPTS[0])
        assert "SystemExit: 3" in (engine.lost() or "")
        with pytest.raises(RuntimeError, match="thread ended"):
            await tokens_of(engine, PROMPTS[0])

    play(model.engine, scene)
    assert model.generate_many(PROMPTS[:1], GREEDY)[0].finished


@pytest.mark.slow
def test_memory_settles(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of requests leave nothing, in objects or in resident memory. Without oneDNN, which keeps compiled
    kernels for each number of rows."""
    psutil = pytest.importorskip("psutil")
    monkeypatch.setattr("hf_paged.model.cpu._operator", lambda: None)
    process = psutil.Process()

    async def one(engine: AsyncEngine, number: int) -> None:
        prompt = [number % 90 + 3, number // 90 % 90 + 3, *range(3, 12)]
        async for _ in engine.generate(prompt, SamplingParams(max_tokens=number % 7 + 1)):
            if number % 30 == 0:
                break

    async def worker(engine: AsyncEngine, numbers: range) -> None:
        for number in numbers:
            await one(engine, number)

    async def main() -> list[tuple[float, int]]:
        found = []
        async with AsyncEngine(model.engine) as engine:
            for first in range(0, 6000, 1000):
                await asyncio.gather(*(worker(engine, range(first + k, first + 1000, 32)) for k in range(32)))
                gc.collect()
                found.append((process.memory_info().rss / 2**20, len(gc.get_objects())))
        return found

    found = asyncio.run(main())
    assert found[-1][0] - found[2][0] < 4, f"MiB and objects after each thousand requests: {found}"
    assert found[-1][1] - found[2][1] < 1000, f"MiB and objects after each thousand requests: {found}"
