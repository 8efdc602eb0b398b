"""TRL's trainers with rollouts from the engine."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from models.families import make_model, stock_greedy
from models.tiny_tokenizer import make_tokenizer
from peft import LoraConfig
from trainers import OPTIONS, make_trainer, metrics, variety
from trl.chat_template_utils import parse_response, qwen3_chat_template

import hf_paged
from hf_paged.engine.engine import Engine
from hf_paged.integrations import trl as plugin
from hf_paged.integrations.trl import attach, detach
from hf_paged.integrations.trl.support import engine_config, training_bytes

LORA = LoraConfig(r=4, lora_alpha=64, lora_dropout=0.0, target_modules=["q_proj", "v_proj", "down_proj"])
KINDS = [kind for kind in ("GRPO", "RLOO", "Distillation") if hasattr(trl, f"{kind}Trainer")]
DIFFERENCE = "sampling/sampling_logp_difference/mean"


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Any]:
    """Makes a trainer and attaches to it; the first argument is its kind, GRPO if there is none."""

    def attached(kind: str = "GRPO", engine: dict[str, Any] | None = None, **options: Any) -> Any:
        return attach(make_trainer(kind, tmp_path, **options), **(OPTIONS | (engine or {})))

    return attached


def engine_of(trainer: Any) -> Engine:
    with trainer.vllm_generation._ready() as model:
        return trainer.vllm_generation._state.engine(model)


def assert_idle(trainer: Any) -> None:
    scheduler = engine_of(trainer).scheduler
    assert not engine_of(trainer).has_unfinished()
    assert scheduler.num_active_pages == 0
    assert scheduler.pool.num_used == scheduler.tree.num_pages


def stock_logprobs(trainer: Any, prompt: list[int], completion: list[int], temperature: float = 1.0) -> list[float]:
    with torch.no_grad():
        logits = trainer.model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return (logits.float() / temperature).log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0].tolist()


# ---- training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"peft": LORA, "beta": 0.1},
        {"peft": LORA, "beta": 0.1, "gradient_checkpointing": True},
        {"beta": 0.1, "gradient_checkpointing": False},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"temperature": 1.4, "min_p": 0.05, "repetition_penalty": 1.3},
        {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 6},
        {"steps_per_generation": 2, "gradient_accumulation_steps": 4, "num_generations": 8},
    ],
    ids=["plain", "lora", "lora-checkpointing", "reference-model", "filters", "penalty", "iterations", "steps"],
)
def test_the_trainer_agrees_with_the_sampler(make: Callable[..., Any], options: dict[str, Any]) -> None:
    """By TRL's own measure, at every step, while the weights change."""
    trainer = make(**options)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert len(metrics(trainer, DIFFERENCE)) >= 2
    assert max(metrics(trainer, "sampling/sampling_logp_difference/max")) < 1e-4
    assert min(metrics(trainer, "sampling/importance_sampling_ratio/min")) > 0.999
    assert max(metrics(trainer, "grad_norm")) > 0
    after = trainer.model.state_dict()
    assert before.keys() == after.keys(), "generating leaves nothing behind in the state dict"
    assert any(not torch.equal(before[name], after[name]) for name in after)
    assert_idle(trainer)


def test_training_equals_training_on_the_same_completions(make: Callable[..., Any], tmp_path: Path) -> None:
    """Attached or not, the same completions lead to the same weights: the engine leaves no trace in training."""
    trainer = make(vllm_importance_sampling_correction=False)
    told: list[Any] = []
    original = trainer.vllm_generation.generate
    trainer.vllm_generation.generate = lambda *a, **k: told.append(original(*a, **k)) or told[-1]
    trainer.train()
    other = make_trainer("GRPO", tmp_path)
    replayed = iter(told)
    other._generate_single_turn = lambda *_, **__: (next(replayed)[1], None)
    other.train()
    for one, two in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=2e-4)  # a step moves a weight by 1e-2


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "GRPO"])
def test_other_trainers(make: Callable[..., Any], kind: str) -> None:
    trainer = make(kind)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert engine_of(trainer).stats.generation_tokens > 0
    assert any(not torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())
    assert_idle(trainer)


@pytest.mark.parametrize("name", KINDS)
def test_trainer_classes(tmp_path: Path, name: str) -> None:
    made = make_trainer(name, tmp_path)
    kind = getattr(plugin, f"HFPaged{name}Trainer")
    options = {"teacher_model": made.model} if name == "Distillation" else {"reward_funcs": variety}
    trainer = kind(
        model=made.model,
        args=made.args,
        train_dataset=made.train_dataset,
        processing_class=made.processing_class,
        engine_options=OPTIONS,
        **options,
    )
    assert isinstance(trainer, type(made)) and type(trainer) is getattr(plugin, f"HFPaged{name}Trainer")
    trainer.train()
    assert engine_of(trainer).stats.generation_tokens > 0


def test_rewards_see_the_completions(make: Callable[..., Any]) -> None:
    seen: list[dict[str, Any]] = []

    def reward(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.append({"prompts": prompts, "completions": completions, "ids": completion_ids})
        return [float(len(ids)) for ids in completion_ids]

    trainer = make(reward=reward)
    trainer.train()
    tokenizer = trainer.processing_class
    assert len(seen) == 2
    for call in seen:
        assert len(set(call["prompts"])) == 1 and len(call["ids"]) == 4
        assert call["completions"] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in call["ids"]]
        assert len(set(map(tuple, call["ids"]))) == 4, "samples of a group differ"
    assert metrics(trainer, "rewards/reward/mean") == [sum(map(len, call["ids"])) / 4 for call in seen]


def test_end_of_sequence_and_truncation(make: Callable[..., Any]) -> None:
    """The end-of-sequence token stays and nothing follows it; without one, a completion is truncated."""
    model = make_model("Llama")
    with torch.no_grad():
        model.lm_head.weight[2] *= 3  # token 2 ends a sequence; now some do
    calls: list[list[list[int]]] = []
    trainer = make(
        model=model,
        reward=lambda completion_ids, **_: calls.append(completion_ids) or [float(len(ids)) for ids in completion_ids],
        per_device_train_batch_size=16,
        max_steps=1,
    )
    trainer.train()
    ids = calls[0]
    ended = [2 in completion for completion in ids]
    assert any(ended) and not all(ended)
    for completion, end in zip(ids, ended, strict=True):
        assert completion.index(2) == len(completion) - 1 if end else len(completion) == 10
    assert metrics(trainer, "completions/clipped_ratio") == [pytest.approx(1 - sum(ended) / 16)]


def test_evaluation(make: Callable[..., Any]) -> None:
    trainer = make(num_generations_eval=2, max_steps=1)
    trainer.evaluate()
    assert metrics(trainer, f"eval_{DIFFERENCE}")[0] < 1e-4
    trainer.train()
    trainer.evaluate()
    assert metrics(trainer, f"eval_{DIFFERENCE}")[-1] < 1e-4


def test_one_generation_serves_its_steps(make: Callable[..., Any]) -> None:
    trainer = make(num_iterations=2, steps_per_generation=2, max_steps=8)
    calls = []
    original = trainer.vllm_generation.generate
    trainer.vllm_generation.generate = lambda *a, **k: calls.append(trainer.state.global_step) or original(*a, **k)
    trainer.train()
    assert calls == [0, 4]


# ---- what TRL asks -----------------------------------------------------------------------------------------


def test_equal_prompts_are_computed_once(make: Callable[..., Any]) -> None:
    trainer = make(temperature=0.7)
    one, two, three = [5, 6, 7], list(range(10, 40)), [9] * 11
    prompts = [one, two, one, three, two, one, one]
    trainer.model.train()
    back, completions, logprobs, ids = trainer.vllm_generation.generate(prompts, None, 2, None)
    assert all(module.training for module in trainer.model.modules()), "generating leaves the model's mode alone"
    stats = engine_of(trainer).stats
    assert stats.prompt_tokens == len(one) + len(two) + len(three)
    assert back == prompts
    assert [[i] for i in completions[0]] == ids[0]
    assert len(set(map(tuple, completions))) == len(prompts), "each repeat has a sample of its own"
    for prompt, completion, values in zip(prompts, completions, logprobs, strict=True):
        expected = stock_logprobs(trainer, prompt, completion, 0.7)
        assert [value for (value,) in values] == pytest.approx(expected, abs=1e-4)


def test_generation_follows_its_prompt(make: Callable[..., Any]) -> None:
    """Greedy completions come back to the prompts they continue."""
    trainer = make(generation_kwargs={"do_sample": False})
    prompts = [[5, 6, 7], [50, 51], [5, 6, 7], [100, 3, 77, 12]]
    _, completions, _, _ = trainer.vllm_generation.generate(prompts, None, 1, None)
    for prompt, completion in zip(prompts, completions, strict=True):
        expected = stock_greedy(trainer.model, prompt, 10)
        expected = expected[: expected.index(2) + 1] if 2 in expected else expected
        assert completion == expected


def test_the_trainers_sampling(make: Callable[..., Any]) -> None:
    trainer = make(
        temperature=0.6,
        top_k=7,
        top_p=0.8,
        min_p=0.02,
        repetition_penalty=1.2,
        max_completion_length=9,
        generation_kwargs={"min_new_tokens": 3, "top_p": 0.7, "stop": ["xy"], "logit_bias": {5: -1.0}},
    )
    found = trainer.vllm_generation.sampling_params(prompt_tokens=4, n=3)
    expected = hf_paged.SamplingParams(
        n=3, temperature=0.6, top_k=7, top_p=0.7, min_p=0.02, repetition_penalty=1.2, max_tokens=9, min_tokens=3,
        stop=["xy"], logit_bias={5: -1.0}, stop_token_ids=[2], ignore_eos=True, logprobs=0,
        logprobs_mode="scaled_logprobs",
    )  # fmt: skip
    assert found == expected
    trainer.train()
    assert len(metrics(trainer, "reward")) == 2


def test_default_sampling_takes_all_tokens(make: Callable[..., Any]) -> None:
    found = make().vllm_generation.sampling_params(prompt_tokens=4, n=1)
    assert (found.temperature, found.top_k, found.top_p, found.min_p, found.max_tokens) == (1.0, 0, 1.0, 0.0, 10)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"generation_kwargs": {"num_beams": 2}}, ValueError, "num_beams"),
        ({"generation_kwargs": {"no_repeat_ngram_size": 2}}, ValueError, "no_repeat_ngram_size"),
        ({"generation_kwargs": {"num_return_sequences": 2}}, ValueError, "num_return_sequences"),
        ({"generation_kwargs": {"temprature": 2}}, ValueError, "temprature"),
        ({"generation_kwargs": {"logprobs": 2}}, ValueError, "logprobs"),
        ({"vllm_structured_outputs_regex": "a+"}, ValueError, "vllm_structured_outputs_regex"),
        ({"engine": {"num_page": 3}}, TypeError, "num_pages"),
    ],
)
def test_refused_when_attaching(tmp_path: Path, options: dict[str, Any], error: type[Exception], says: str) -> None:
    engine = options.pop("engine", {})
    trainer = make_trainer("GRPO", tmp_path, **options)
    before = set(trainer.__dict__)
    with pytest.raises(error, match=says):
        attach(trainer, **engine)
    assert set(trainer.__dict__) == before and trainer.use_vllm is False


def test_trainers_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="GRPOTrainer, RLOOTrainer"):
        attach(object())
    trainer = make_trainer("GRPO", tmp_path)
    trainer.args.use_vllm = True
    with pytest.raises(ValueError, match="use_vllm=False"):
        attach(trainer)
    with pytest.raises(ValueError, match="use_vllm=False"):
        plugin.HFPagedGRPOTrainer(trainer.model, variety, trainer.args)
    trainer.args.use_vllm = False
    trainer.model.config.is_encoder_decoder = True
    with pytest.raises(hf_paged.UnsupportedModelError, match="encoder-decoder"):
        attach(trainer)


def test_images_are_refused(make: Callable[..., Any]) -> None:
    trainer = make()
    with pytest.raises(ValueError, match="images"):
        trainer.vllm_generation.generate([[1, 2]], [["an image"]], 1, None)
    assert len(trainer.vllm_generation.generate([[1, 2]], [None], 1, None)[1]) == 1


def test_a_prompt_too_long_is_named(make: Callable[..., Any]) -> None:
    trainer = make()
    with pytest.raises(ValueError, match=r"prompt 1: .* 600 tokens"):
        trainer.vllm_generation.generate([[1, 2], [3] * 600], None, 1, None)
    assert_idle(trainer)


# ---- tools -------------------------------------------------------------------------------------------------


@pytest.mark.skipif("prefix" not in signature(parse_response).parameters, reason="its parser wants older transformers")
def test_tool_calls(make: Callable[..., Any]) -> None:
    """TRL's tool loop: some completions call a tool, and only those go on, after its result, once each."""
    tokenizer = make_tokenizer(qwen3_chat_template)
    called: list[tuple[int, int]] = []

    def multiply(a: int, b: int) -> int:
        """Multiplies two integers.

        Args:
            a: The first integer.
            b: The second integer.

        Returns:
            The product.
        """
        called.append((a, b))
        return a * b

    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": "3 x 4?"}]] * 8})
    trainer = make(
        model=make_model("Llama", max_position_embeddings=4096),
        tools=[multiply],
        rows=rows,
        processing_class=tokenizer,
        max_completion_length=400,
        max_steps=1,
        generation_kwargs={"max_new_tokens": 12},
    )
    call = tokenizer('<tool_call>\n{"name": "multiply", "arguments": {"a": 3, "b": 4}}\n</tool_call>')["input_ids"]
    turns: list[Any] = []
    generate = trainer.vllm_generation.generate

    def answer(prompts: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        back, completions, logprobs, ids = generate(prompts, *args, **kwargs)
        if not turns:  # the first turn's samples 1 and 3 call the tool
            for row in (1, 3):
                completions[row], ids[row] = call, [[i] for i in call]
                logprobs[row] = [[p] for p in stock_logprobs(trainer, prompts[row], call)]
        turns.append((prompts, completions))
        return back, completions, logprobs, ids

    trainer.vllm_generation.generate = answer
    trainer.train()
    assert called == [(3, 4)] * 2
    (first, _), (second, continued) = turns[:2]
    assert len(first) == 4 and len(second) == 2
    for prompt in second:
        assert prompt[: len(first[0]) + len(call)] == first[0] + call
        assert "12" in tokenizer.decode(prompt[len(first[0]) + len(call) :])
    assert continued[0] != continued[1]
    assert max(metrics(trainer, "sampling/sampling_logp_difference/max")) < 1e-4
    assert metrics(trainer, "tools/call_frequency") == [0.5]


def test_the_tool_loop_is_told_how_long_a_sequence_may_be(make: Callable[..., Any]) -> None:
    for options, length in (({}, 512), ({"max_model_len": 64}, 64)):
        generation = make(engine=options).vllm_generation
        assert generation.llm.llm_engine.model_config.max_model_len == length


# ---- the model and the engine ------------------------------------------------------------------------------


def test_autocast(make: Callable[..., Any]) -> None:
    """float32 weights that train under bfloat16 autocast are sampled under it, with and without LoRA."""
    for peft in (None, LORA):
        trainer = make(bf16=True, peft=peft)
        trainer.train()
        assert max(metrics(trainer, DIFFERENCE)) < 0.05
        assert next(trainer.model.parameters()).dtype == torch.float32
        pool = engine_of(trainer).executor.storage.keys[0]
        assert pool.dtype == torch.bfloat16


def test_sleep_gives_the_pool_back(make: Callable[..., Any]) -> None:
    for sleep in (True, False, None):
        trainer = make(engine={"sleep": sleep})
        trainer.vllm_generation.generate([[1, 2]], None, 1, None)
        asleep = trainer.vllm_generation._state.made.executor.storage is None
        assert asleep == bool(sleep), "None is asleep on a GPU only"
        trainer.train()
        assert max(metrics(trainer, DIFFERENCE)) < 1e-4


def test_detach(make: Callable[..., Any]) -> None:
    trainer = make(max_steps=1)
    trainer.train()
    state = trainer.vllm_generation._state
    detach(trainer)
    detach(trainer)
    assert not hasattr(trainer, "vllm_generation") and not hasattr(trainer, "_last_loaded_step")
    assert (trainer.use_vllm, trainer.vllm_mode) == (False, trainer.args.vllm_mode)
    assert state.made is None
    trainer.train()
    assert len(metrics(trainer, DIFFERENCE)) == 0, "the stock path reports no sampler's log-probabilities"
    attach(trainer, **OPTIONS)
    trainer.train()
    assert len(metrics(trainer, DIFFERENCE)) == 1


def test_attaching_again_replaces_the_engine(make: Callable[..., Any]) -> None:
    trainer = make(max_steps=1)
    trainer.train()
    old = trainer.vllm_generation._state
    attach(trainer, **(OPTIONS | {"num_pages": 64}))
    assert old.made is None and engine_of(trainer).scheduler.num_pages == 64
    detach(trainer)
    assert trainer.use_vllm is False


def test_a_wrapped_model_keeps_its_engine(make: Callable[..., Any]) -> None:
    model = hf_paged.wrap(make_model("Llama"), **(OPTIONS | {"num_pages": 96}))
    trainer = make(model=model, engine={"num_pages": 64})
    trainer.train()
    assert engine_of(trainer) is model.engine and model.engine.scheduler.num_pages == 64
    detach(trainer)
    assert len(model.generate_many([[1, 2]])) == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_a_rollout(make: Callable[..., Any], error: type[BaseException]) -> None:
    trainer = make(bf16=True)
    trainer.train()
    forward, training = trainer.model.forward, trainer.model.training
    left = 5

    def fail(*_: Any) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise error("in a layer")

    handle = trainer.model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(error, match="in a layer"):
        trainer.train()
    handle.remove()
    assert trainer.model.forward == forward and trainer.model.training == training
    assert_idle(trainer)
    trainer.train()
    assert max(metrics(trainer, DIFFERENCE)) < 0.05


def test_weights_changed_behind_the_trainers_back_are_seen(make: Callable[..., Any]) -> None:
    trainer = make(generation_kwargs={"do_sample": False})
    prompt = [5, 6, 7, 8, 9, 10, 11, 12, 13]
    first = trainer.vllm_generation.generate([prompt], None, 1, None)[1][0]
    trainer.vllm_generation.sync_weights()
    with torch.no_grad():
        trainer.model.model.embed_tokens.weight.copy_(trainer.model.model.embed_tokens.weight.flip(0))
    second = trainer.vllm_generation.generate([prompt], None, 1, None)[1][0]
    assert second != first
    assert second == stock_greedy(trainer.model, prompt, 10)[: len(second)]


def test_dropout_is_warned_of_once(make: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    dropping = LoraConfig(r=4, lora_dropout=0.2, target_modules=["q_proj", "v_proj"])
    with caplog.at_level(logging.WARNING, "hf_paged"):
        make(peft=dropping).train()
    assert sum("lora_dropout" in record.message for record in caplog.records) == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING, "hf_paged"):
        make(peft=LORA)
    assert not caplog.records


def test_memory_that_training_takes(tmp_path: Path) -> None:
    trainer = make_trainer("GRPO", tmp_path, peft=LORA)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert training_bytes(trainer.model) == 12 * trained > 0


def test_sharding_optimizers_keep_their_parameters(tmp_path: Path) -> None:
    """fuse_linear would move parameters out of memory that DeepSpeed and FSDP own."""
    trainer = make_trainer("GRPO", tmp_path)
    given = hf_paged.EngineConfig(num_pages=7)
    for kind, fuse in (("DEEPSPEED", False), ("FSDP", False), ("MULTI_CPU", None)):
        accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value=kind), device=torch.device("cpu"))
        fake = SimpleNamespace(accelerator=accelerator, model=trainer.model)
        chosen = engine_config(fake, given, {"max_num_seqs": 3})
        assert (chosen.fuse_linear, chosen.num_pages, chosen.max_num_seqs) == (fuse, 7, 3)
        if fuse is False:
            with pytest.raises(ValueError, match=f"fuse_linear.*{kind}"):
                engine_config(fake, given, {"fuse_linear": True})


# ---- TRL is optional ---------------------------------------------------------------------------------------


def test_without_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin._trainer_class.cache_clear()
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"hf_paged\[trl\]"):
        plugin.HFPagedGRPOTrainer  # noqa: B018
    with pytest.raises(AttributeError, match="HFPagedSFTTrainer"):
        plugin.HFPagedSFTTrainer  # noqa: B018


def test_trl_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin._trainer_class.cache_clear()
    monkeypatch.setitem(sys.modules, "trl", SimpleNamespace(__version__="0.9", GRPOTrainer=object))
    with pytest.raises(ImportError, match=r"trl\.RLOOTrainer.*0\.9"):
        plugin.HFPagedRLOOTrainer  # noqa: B018
    plugin._trainer_class.cache_clear()
