"""LLM itself: arguments, threads, refusals."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from many_threads import in_threads

from hf_paged import LLM, LoRARequest, SamplingParams
from hf_paged.sampling_params import BeamSearchParams

SMALL = {"num_pages": 128, "block_size": 16, "max_num_seqs": 16}
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: str) -> Any:
    return LLM(tiny_checkpoint, **SMALL)


def tokens(outputs: Any) -> list[list[int]]:
    return [sample.token_ids for output in outputs for sample in output.outputs]


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"max_model_length": 64}, TypeError, "Did you mean 'max_model_len'"),
        ({"data_parallel_size": 0}, ValueError, "positive integer"),
        ({"pipeline_parallel_size": 0}, ValueError, "positive integer"),
        ({"enable_lora": True, "max_loras": 0}, ValueError, "max_loras must be a positive integer"),
        ({"fully_sharded_loras": True}, ValueError, "fully_sharded_loras=True cannot be had"),
        ({"cpu_offload_gb": 4}, ValueError, "cpu_offload_gb=4"),
        ({"gpu_memory_utilization": 1.5}, ValueError, "gpu_memory_utilization"),
        ({"block_size": 24}, ValueError, "power of two"),
        ({"block_size": 16, "page_size": 16}, ValueError, "given twice"),
        ({"spec_tokens": 3}, ValueError, "spec_method"),
        ({"quantization": "int3"}, ValueError, "int3"),
        ({"dtype": "int8"}, ValueError, "dtype"),
        ({"skip_tokenizer_init": True, "tokenizer": "x"}, ValueError, "contradict"),
        ({"max_model_len": 4096}, ValueError, "own limit of 1024"),
        ({"chat_template": "no such file"}, ValueError, "chat_template"),
    ],
)
def test_bad_arguments(tiny_checkpoint: str, options: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        LLM(tiny_checkpoint, **options)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        LLM(str(tmp_path / "nothing"))


def test_what_means_nothing_is_logged(tiny_checkpoint: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hf_paged"):
        LLM(tiny_checkpoint, swap_space=4, **SMALL)
    assert sum("swap_space" in record.message for record in caplog.records) == 1


def test_a_model_in_memory_is_wrapped_in_place(llm: Any) -> None:
    expected = tokens(llm.generate(["The sea"], GREEDY, use_tqdm=False))
    model = LLM(llm.model, **SMALL)
    assert model.model is llm.model
    assert tokens(model.generate(["The sea"], GREEDY, use_tqdm=False)) == expected
    with pytest.raises(ValueError, match="loaded already"):
        LLM(llm.model, quantization="fp8")


def test_many_threads_get_what_one_gets(llm: Any) -> None:
    prompts = [f"Number {i} is" for i in range(12)]
    expected = tokens(llm.generate(prompts, GREEDY, use_tqdm=False))
    calls = [lambda p=prompt: tokens(llm.generate(p, GREEDY, use_tqdm=False)) for prompt in prompts]
    assert [found[0] for found in in_threads(*calls)] == expected
    assert llm.engine.scheduler.num_active_pages == 0


def test_without_a_tokenizer(tiny_checkpoint: str) -> None:
    llm = LLM(tiny_checkpoint, skip_tokenizer_init=True, **SMALL)
    assert llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)[0].outputs[0].text == ""
    with pytest.raises(ValueError, match="tokenizer"):
        llm.generate(["text"], GREEDY, use_tqdm=False)
    with pytest.raises(ValueError, match="tokenizer"):
        llm.get_tokenizer()


def test_another_tokenizer(llm: Any, smollm2_tokenizer: Any) -> None:
    class Shouting:
        def __call__(self, text: str, **options: Any) -> Any:
            return smollm2_tokenizer(text.upper(), **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(smollm2_tokenizer, name)

    own = llm.get_tokenizer()
    llm.set_tokenizer(Shouting())
    output = llm.generate("the sea", GREEDY, use_tqdm=False)[0]
    llm.set_tokenizer(own)
    assert output.prompt_token_ids == smollm2_tokenizer("THE SEA")["input_ids"]


def test_the_end_of_a_prompt(llm: Any) -> None:
    sampling = GREEDY.clone(truncate_prompt_tokens=3)
    assert llm.generate([[5, 6, 7, 8, 9]], sampling, use_tqdm=False)[0].prompt_token_ids == [7, 8, 9]
    fitting = llm.generate([[5] * 2000], GREEDY.clone(truncate_prompt_tokens=-1), use_tqdm=False)[0]
    assert len(fitting.prompt_token_ids) == 1024 - 8


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda llm: llm.generate(["a"], [GREEDY, GREEDY]), ValueError, "2 sampling parameters for 1 prompts"),
        (lambda llm: llm.generate(["a"], GREEDY, priority=[1, 2]), ValueError, "2 priorities"),
        (lambda llm: llm.generate(), ValueError, "give prompts"),
        (lambda llm: llm.generate([{"role": "user", "content": "x"}], GREEDY), TypeError, "call chat"),
        (lambda llm: llm.generate(["a"], GREEDY, lora_request=object()), TypeError, "lora_request"),
        (lambda llm: llm.generate(["a"], GREEDY, lora_request=LoRARequest("a", 1, "x")), ValueError, "enable_lora"),
        (lambda llm: llm.chat([{"content": "x"}], GREEDY), ValueError, '"role"'),
        (lambda llm: llm.chat([], GREEDY), ValueError, "at least one message"),
        (
            lambda llm: llm.chat([{"role": "user", "content": [{"type": "image_url"}]}], GREEDY),
            ValueError,
            "only text is served",
        ),
        (lambda llm: llm.chat([{"role": "user", "content": "x"}], chat_template="{{ oops"), ValueError, "template"),
        (lambda llm: llm.embed(["a"]), NotImplementedError, "generates text"),
        (lambda llm: llm.score("a", "b"), NotImplementedError, "llm.model.score"),
        (lambda llm: llm.sleep(level=2), ValueError, "sleep level"),
        (lambda llm: llm.wake_up(tags=["cache"]), ValueError, "kv_cache"),
        (lambda llm: llm.collective_rpc("no_such"), AttributeError, "no_such"),
        (lambda llm: llm.stop_profile(), RuntimeError, "start_profile"),
        (lambda llm: llm.beam_search(["a"], BeamSearchParams(2, 4000)), ValueError, "model's length of 1024"),
        (lambda llm: BeamSearchParams(0, 4), ValueError, "beam_width"),
        (lambda llm: BeamSearchParams(2, 4, temperature=1.0), ValueError, "temperature must be 0"),
        (lambda llm: SamplingParams(n=3, best_of=2), ValueError, "best_of"),
    ],
)
def test_bad_calls(llm: Any, call: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        call(llm)
    assert not llm.engine.has_unfinished()


def test_a_worker_extension(llm: Any) -> None:
    class Extension:
        def scale(self: Any, factor: float) -> float:
            weight = self.model.lm_head.weight
            weight.data.mul_(factor)
            return float(weight.detach().abs().sum())

    twice = LLM(llm.model, worker_extension_cls=Extension, **SMALL)
    (before,) = twice.collective_rpc("scale", args=(1.0,))
    assert twice.collective_rpc("scale", kwargs={"factor": 2.0})[0] == pytest.approx(2 * before)
    twice.collective_rpc("scale", args=(0.5,))


def test_one_beam_is_greedy_search(llm: Any) -> None:
    prompt = [5, 6, 7]
    expected = llm.generate([prompt], GREEDY.clone(logprobs=0), use_tqdm=False)[0].outputs[0]
    (sequence,) = llm.beam_search([prompt], BeamSearchParams(1, 8, ignore_eos=True))[0].sequences
    assert sequence.tokens == prompt + expected.token_ids
    assert sequence.cum_logprob == pytest.approx(expected.cumulative_logprob, abs=1e-3)
    assert sequence.finish_reason == "length"


@pytest.mark.slow
def test_a_profile(llm: Any, tmp_path: Path) -> None:
    traced = LLM(llm.model, profiler_config={"torch_profiler_dir": str(tmp_path)}, **SMALL)
    traced.start_profile()
    with pytest.raises(RuntimeError, match="already"):
        traced.start_profile()
    traced.generate(["The sea"], GREEDY, use_tqdm=False)
    file = traced.stop_profile()
    assert file.parent == tmp_path and "aten::" in file.read_text()


@pytest.mark.slow
def test_a_gguf_file_speaks(smollm2_dir: str) -> None:
    llm = LLM(f"{smollm2_dir}/SmolLM2-135M-Instruct.Q4_1.gguf", max_model_len=256, **SMALL)
    (output,) = llm.chat([{"role": "user", "content": "What is the capital of France?"}], GREEDY, use_tqdm=False)
    assert "Paris" in output.outputs[0].text


def test_a_model_on_two_ranks_says_the_same(tiny_checkpoint: str, llm: Any) -> None:
    """They are started from here, and end here."""
    prompts, params = ["One two three", "The cat"], SamplingParams(temperature=0.0, max_tokens=8)
    both = LLM(tiny_checkpoint, tensor_parallel_size=2, device="cpu", **SMALL)
    children = both._ranks._children
    try:
        assert tokens(both.generate(prompts, params, use_tqdm=False)) == tokens(
            llm.generate(prompts, params, use_tqdm=False)
        )
    finally:
        both.shutdown()
    assert all(child.poll() is not None for child in children)


def test_a_loaded_model_is_not_spread(llm: Any) -> None:
    with pytest.raises(ValueError, match="loaded already: tensor_parallel_size"):
        LLM(llm.model, tensor_parallel_size=2)
