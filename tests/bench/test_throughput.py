"""Engines do the same work, and what goes wrong with one is told in its row."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_paged.bench import engines, isolate, models, peers, throughput
from hf_paged.bench.floor import Floor, Rates
from hf_paged.bench.run import EngineRun, Settings, TimeLimitError, best_of
from hf_paged.bench.workloads import Workload, make_workload
from hf_paged.cli import app, terminal

RATES = Rates(1e10, 1e11)
WORK = Workload("three", [[5, 6, 7], [8] * 40, [9, 3]], [[12], [4], [30]])


@pytest.fixture(scope="module")
def subject() -> models.Subject:
    return models.Subject("tiny")


# ---- models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_random_weights_are_cheap_and_whole(tied: bool) -> None:
    """Weights are random, norms 1, and everything that is no parameter is what transformers makes it."""
    config = models.tiny()
    config.tie_word_embeddings = tied
    model, again = (models.random_model(config, torch.bfloat16, "cpu") for _ in range(2))
    stock = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert not model.training and model.dtype == torch.bfloat16
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    shapes = {name: parameter.shape for name, parameter in stock.named_parameters()}
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes
    for (_, parameter), (_, same) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(parameter, same)
        if parameter.ndim == 1:
            assert (parameter == 1).all()
        else:
            assert parameter.float().std().item() == pytest.approx(0.02, rel=0.1)
    buffers = dict(stock.named_buffers())
    assert buffers
    for name, buffer in model.named_buffers():
        assert buffer.dtype == buffers[name].dtype and torch.equal(buffer, buffers[name])


def test_subjects_have_defaults_and_check_names() -> None:
    subject = models.make_subject("tiny", device="cpu")
    assert subject.dtype == torch.float32
    assert models.make_subject(device="cpu").name == "smollm2"
    assert models.make_subject("tiny", "bfloat16", "cpu").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="unknown model 'x'"):
        models.make_subject("x")


def test_a_dropped_model_is_made_again(subject: models.Subject) -> None:
    first = subject.model
    assert subject.model is first
    subject.drop()
    assert subject.model is not first


# ---- engines -------------------------------------------------------------------------------------------------


def test_engines_do_the_same_work(subject: models.Subject) -> None:
    """All give the same tokens for the same prompts, as many as were asked for, and leave the model as it was."""
    before = subject.model.config._attn_implementation
    ours = engines.run_engine("ours", subject, WORK, Settings(repeats=2))
    stock = engines.run_engine("generate", subject, WORK, Settings(generate_batch=2))
    batched = engines.run_engine("continuous-batching", subject, WORK, Settings())
    assert [len(tokens) for tokens in ours.outputs] == [12, 4, 30], ours.note
    assert throughput.same_tokens(ours, stock) == throughput.same_tokens(ours, batched) == 1.0
    assert len(ours.all_seconds) == 2 and ours.seconds == min(ours.all_seconds)
    assert (ours.steps, ours.decode_steps) == (30, 29)
    assert ours.start_s is not None and ours.start_s > 0
    assert subject.model.config._attn_implementation == before
    assert not hasattr(subject.model, "engine")


def test_samples_share_their_prompt_in_memory(subject: models.Subject) -> None:
    """16 samples of a prompt of 512 tokens, 32 tokens each: about (512 + 16 * 32) tokens of 16 * (512 + 32)."""
    work = make_workload("samples", 1000)
    work = Workload("samples", work.prompts, [[32] * 16], temperature=1.0)
    ours, stock = (engines.run_engine(name, subject, work, Settings()) for name in ("ours", "generate"))
    assert len(set(map(tuple, ours.outputs))) == 16, "samples are drawn apart"
    assert ours.kv_bytes and stock.kv_bytes and stock.kv_bytes / ours.kv_bytes > 8


def test_samples_of_different_lengths(subject: models.Subject) -> None:
    """Each is a request of its own for ours, cut to its length for generate; draws differ between samples."""
    work = Workload("lengths", [[5, 6, 7] * 30, [1, 2] * 30], [[9, 3, 9], [2, 8, 5]], temperature=1.0)
    for name in ("ours", "generate"):
        run = engines.run_engine(name, subject, work, Settings(generate_batch=3))
        assert [len(tokens) for tokens in run.outputs] == [9, 3, 9, 2, 8, 5], run.note
        assert run.outputs[0] != run.outputs[2]


def test_temperature_reaches_every_engine() -> None:
    assert peers._sampling(0.6) == {"do_sample": True, "temperature": 0.6, "top_k": 0}
    assert peers._sampling(0.0) == {"do_sample": False}


def test_options_reach_the_engine(subject: models.Subject) -> None:
    run = engines.run_engine("ours", subject, WORK, Settings(options={"page_size": 8}))
    assert "pages of 8; asleep in " in run.note


@pytest.mark.parametrize("name", ["ours", "generate", "continuous-batching"])
def test_time_limit(subject: models.Subject, name: str) -> None:
    work = Workload("long", [[1, 2, 3]] * 4, [[1000]] * 4)
    run = engines.run_engine(name, subject, work, Settings(time_limit=0.02, generate_batch=1))
    assert run.seconds is None and "did not finish in 0.02 s" in run.note


def test_repeats_end_with_the_time() -> None:
    def once(left: float | None) -> tuple[float, list[list[int]]]:
        asked.append(left)
        return 3.0, [[1]]

    asked: list[float | None] = []
    result = best_of(Settings(repeats=5, time_limit=10.0), once)
    assert asked == [10.0, 7.0, 4.0]
    assert result == {"seconds": 3.0, "all_seconds": [3.0] * 3, "outputs": [[1]]}

    def late(left: float | None) -> tuple[float, list[list[int]]]:
        if left != 10.0:
            raise TimeLimitError
        return once(left)

    assert best_of(Settings(repeats=5, time_limit=10.0), late)["all_seconds"] == [3.0]


def test_a_failing_engine_is_a_row(subject: models.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> EngineRun:
        raise RuntimeError("no luck\nat all")

    def lazy(*_: Any) -> EngineRun:
        return EngineRun("generate", seconds=1.0, outputs=[[1], [2], [3]])

    monkeypatch.setitem(engines.ENGINES, "ours", broken)
    monkeypatch.setitem(engines.ENGINES, "generate", lazy)
    result = throughput.run_throughput("tiny", WORK, ["generate", "ours"], device="cpu", rates=RATES)
    ours, generate = result["runs"]
    assert (ours["engine"], ours["note"], ours["seconds"]) == ("ours", "failed: RuntimeError: no luck", None)
    assert generate["note"] == "failed: RuntimeError: it gave 3 tokens of 46"
    assert throughput.as_table(result).row_count == 2


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is there")
def test_missing_vllm_is_said(subject: models.Subject) -> None:
    assert "pip install vllm" in engines.run_engine("vllm", subject, WORK, Settings()).note


def test_vllm_is_asked_for_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for vLLM notes what it is asked and answers with as many tokens."""
    asked: dict[str, Any] = {"runs": []}

    class LLM:
        def __init__(self, model: str, **options: Any) -> None:
            asked.update(options, config=json.loads((Path(model) / "config.json").read_text()))

        def reset_prefix_cache(self) -> None:
            asked["runs"].append("reset")

        def generate(self, prompts: list[Any], params: Any, use_tqdm: bool) -> list[Any]:
            each = params if isinstance(params, list) else [params] * len(prompts)
            asked["runs"].append([(prompt["prompt_token_ids"], one) for prompt, one in zip(prompts, each, strict=True)])
            completions = [[SimpleNamespace(token_ids=(0,) * one.max_tokens)] * getattr(one, "n", 1) for one in each]
            return [SimpleNamespace(outputs=found) for found in completions]

    stand_in = SimpleNamespace(LLM=LLM, SamplingParams=SimpleNamespace, __version__="0")
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    work = Workload("vllm", [[1, 2], [3]], [[5, 5], [2, 4]], temperature=0.6)
    run = engines.run_engine("vllm", models.Subject("tiny", torch.bfloat16), work, Settings(repeats=2))
    assert [len(tokens) for tokens in run.outputs] == [5, 5, 2, 4], run.note
    assert (asked["load_format"], asked["dtype"], asked["max_model_len"]) == ("dummy", "bfloat16", 4096)
    assert asked["config"]["architectures"] == ["LlamaForCausalLM"]
    assert [entry == "reset" for entry in asked["runs"]] == [False, True, False, True, False]
    timed = asked["runs"][2]
    assert [(prompt, one.n, one.max_tokens) for prompt, one in timed] == [([1, 2], 2, 5), ([3], 1, 2), ([3], 1, 4)]
    assert all(one.temperature == 0.6 and one.ignore_eos for _, one in timed)


# ---- processes of their own ----------------------------------------------------------------------------------


def test_isolated_engine_gives_the_same_tokens(subject: models.Subject) -> None:
    here = engines.run_engine("generate", subject, WORK, Settings())
    there = isolate.run_isolated("generate", subject, WORK, Settings(time_limit=100.0))
    assert there.note == here.note and there.outputs == here.outputs
    assert there.seconds is not None and there.seconds > 0


def test_isolated_engine_that_hangs_or_dies(subject: models.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolate, "START_SECONDS", 0)
    run = isolate.run_isolated("generate", subject, WORK, Settings(time_limit=0.1))
    assert run.note.startswith("did not finish in 0.1 s, and was killed")
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    run = isolate.run_isolated("generate", subject, WORK, Settings())
    assert run.note.startswith("failed: its process ended with status 1")


# ---- reports -------------------------------------------------------------------------------------------------


def test_report_compares_with_ours_and_with_the_floor() -> None:
    work = Workload("pairs", [[1, 2]], [[2, 2]])
    floor = Floor(weights_s=1.0, kv_s=2.0, shared_kv_s=1.0, prefill_s=1.0)
    ours = EngineRun("ours", seconds=8.0, kv_bytes=10, outputs=[[1, 2], [3, 4]])
    peer = EngineRun("generate", seconds=16.0, kv_bytes=30, outputs=[[1, 2], [3, 5]])
    other = EngineRun("vllm", seconds=4.0, outputs=[[1, 2], [3, 4]])
    result = throughput.report(work, [ours, peer, other], floor, RATES)
    rows = result["runs"]
    assert [row["floor_fraction"] for row in rows] == [0.5, 0.25, 1.0]
    assert [row["shared_floor_fraction"] for row in rows] == [0.375, 0.1875, 0.75]
    assert [row["speedup_of_ours"] for row in rows] == [1.0, 2.0, 0.5]
    assert [row["same_tokens"] for row in rows] == [1.0, 0.5, None]
    assert [row["tokens_per_s"] for row in rows] == [0.5, 0.25, 1.0]
    assert rows[1]["kv_ratio_of_ours"] == 3.0
    assert (result["floor"]["total_s"], result["floor"]["shared_total_s"]) == (4.0, 3.0)
    assert result["rates"] == {"bytes_per_s": 1e10, "flops_per_s": 1e11}
    alone = throughput.report(work, [peer], floor, RATES)["runs"][0]
    assert alone["speedup_of_ours"] is None and alone["floor_fraction"] == 0.25


def test_command_prints_json_or_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "measure_rates", lambda *_: RATES)
    command = [
        "bench",
        "throughput",
        "--model",
        "tiny",
        "--device",
        "cpu",
        "--requests",
        "2",
        "--engines",
        "generate,ours",
    ]
    command += ["--option", "page_size=64", "--option", "enable_prefix_caching=false", "--time-limit", "60"]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert [run["engine"] for run in data["runs"]] == ["ours", "generate"]
    assert data["settings"]["options"] == {"page_size": 64, "enable_prefix_caching": False}
    assert data["runs"][0]["note"].count("pages of 64;") == 1
    assert data["runs"][1]["same_tokens"] == 1.0
    assert data["runs"][0]["floor_fraction"] > 0
    monkeypatch.setattr(terminal, "console", Console(width=240))
    result = CliRunner().invoke(app, [*command, "--workload", "samples"])
    assert result.exit_code == 0, result.output
    assert "of the floor" in result.output and "prompt read once" in result.output
