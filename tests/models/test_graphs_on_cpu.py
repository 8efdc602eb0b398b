"""Graphs without a GPU: Triton's interpreter runs the kernels, and a graph is a function that is called again.

What is tested is everything around the device: the numbers a step uploads, padding, pending tokens, the block table.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from speculative.drafters import Alternating, Always
from transformers import LlamaConfig, LlamaForCausalLM

import hf_paged
import hf_paged.engine.model_executor
from hf_paged.attention.shared import SharedPlanner
from hf_paged.engine.engine import Engine
from hf_paged.engine.request import Request
from hf_paged.model import graphs, mixed_graphs
from hf_paged.sampling import device
from hf_paged.speculative.config import SpeculativeConfig
from hf_paged.speculative.draft_model import DraftModel
from hf_paged.speculative.eagle import Eagle3Head
from hf_paged.state import build_engine

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter stands in for a missing GPU")


class Replays:
    """Records by remembering: every replay computes the step again, from whatever the buffers hold then."""

    def __init__(self) -> None:
        self.count = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            self.count += 1
            work()

        return replay


class Landed:
    def synchronize(self) -> None:
        pass


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def graph_engine(
    model: Any, monkeypatch: pytest.MonkeyPatch, *, lookahead: bool = True, **options: Any
) -> tuple[Engine, Replays]:
    """An engine whose steps are `Replays`, those with prefill from the first one on."""
    from hf_paged.attention.triton_backend import TritonBackend

    for module in (graphs, device):
        monkeypatch.setattr(module, "record", Landed)
    options = {"max_num_seqs": 4, "page_size": 4, "num_pages": 64, "async_scheduling": lookahead} | options
    engine = build_engine(model, hf_paged.EngineConfig(**options))
    executor: Any = engine.executor
    executor._backend = TritonBackend(torch.device("cpu"))
    executor._allocate()
    recorder = Replays()
    executor._device_sampler = device.DeviceSampler(16, torch.device("cpu"))
    executor._graphs = graphs.DecodeGraphs(
        executor._runner, executor._backend, 4, executor._max_pages, engine.executor.page_size, 16, recorder=recorder
    )
    mixed = mixed_graphs.MixedGraphs(executor._runner, executor._backend, executor._graphs, 10**6)
    mixed._seen = set(itertools.product(mixed.sizes, mixed._sampled, (False, True), (False, True)))
    executor._mixed = mixed
    return engine, recorder


def test_warming_up_captures_what_all_sequences_need(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger steps have drafts, and graphs of their own."""
    engine, _ = graph_engine(model, monkeypatch)
    engine.warm_up()
    executor: Any = engine.executor
    assert max(executor._graphs.sizes) == 16
    assert {kind.size for kind in executor._graphs._captured} == {1, 2, 4}


def test_draws_in_flight_keep_their_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline of three stages has three steps in flight."""

    def draw(logits: torch.Tensor, rows: Any, *, tokens: torch.Tensor, **_: Any) -> None:
        tokens.copy_(logits.argmax(-1))

    monkeypatch.setattr(device, "record", Landed)
    monkeypatch.setattr(device, "token_sampler", lambda exact: draw)
    sampler = device.DeviceSampler(4, torch.device("cpu"), in_flight=3)
    sequences = Request("r", [1], hf_paged.SamplingParams(temperature=0.0)).sequences
    sequences[0].slot = 0
    landings = [sampler.stage(torch.eye(8)[token : token + 1], sequences).draw() for token in (5, 6, 7)]
    assert [landing.wait(sequences).tokens for landing in landings] == [[5], [6], [7]]


def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(3, 64, (length,), generator=draw).tolist() for length in (1, 4, 9, 14)]


def run(engine: Engine, params: hf_paged.SamplingParams) -> list[list[list[int]]]:
    """Outputs of different lengths, so that the batch shrinks from one graph's size to the next."""
    requests = [
        engine.intake.request(prompt, dataclasses.replace(params, max_tokens=params.max_tokens + 2 * i))
        for i, prompt in enumerate(prompts())
    ]
    last = {output.request_id: output for output in engine.run(requests)}
    assert engine.scheduler.num_active_pages == 0
    return [[completion.token_ids for completion in last[r.request_id].outputs] for r in requests]


def stock(model: Any, count: int) -> list[list[list[int]]]:
    return [
        [
            model.generate(
                torch.tensor([p]), max_new_tokens=count + 2 * i, do_sample=False, eos_token_id=None, pad_token_id=0
            )[0, len(p):].tolist()
        ]
        for i, p in enumerate(prompts())
    ]  # fmt: skip


def mixed_replays(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(decodes, chunks) of every step with prefill that runs as a graph from here on."""
    mixed: Any = engine.executor._mixed  # type: ignore[attr-defined]
    found, launch = [], mixed.launch

    def counted(kind: Any, batch: Any, *args: Any) -> Any:
        found.append((len(batch.decodes), len(batch.chunks)))
        return launch(kind, batch, *args)

    monkeypatch.setattr(mixed, "launch", counted)
    return found


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("page_size", [4, 64])
def test_prefill_beside_decodes(model: Any, monkeypatch: pytest.MonkeyPatch, lookahead: bool, page_size: int) -> None:
    """More requests than slots: prompts join decodes, step by step."""
    engine, _ = graph_engine(model, monkeypatch, lookahead=lookahead, page_size=page_size)
    replays = mixed_replays(engine, monkeypatch)
    greedy = hf_paged.SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    many = [prompts()[i % 4][: 1 + i] for i in range(9)]
    requests = [engine.intake.request(p, greedy.clone(max_tokens=2 + i % 3)) for i, p in enumerate(many)]
    last = {output.request_id: output for output in engine.run(requests)}
    for request in requests:
        ids = torch.tensor([request.prompt_token_ids])
        own = model.generate(ids, max_new_tokens=request.max_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert last[request.request_id].outputs[0].token_ids == own[0, ids.shape[1] :].tolist()
    assert sum(decodes > 0 for decodes, _ in replays) > 3
    assert engine.scheduler.num_active_pages == 0


@pytest.mark.parametrize("slots", [3, 4])
def test_prompts_that_begin_alike(model: Any, monkeypatch: pytest.MonkeyPatch, slots: int) -> None:
    """What they share is read once, by steps with prefill too."""
    engine, recorder = graph_engine(model, monkeypatch, page_size=16, max_num_seqs=slots)
    planner = SharedPlanner(page_size=16, token_bytes=1, kv_heads=2, group=2, multiprocessors=4)
    monkeypatch.setattr(planner, "_pays", lambda *_: True)
    engine.executor._sharing = planner  # type: ignore[attr-defined]
    plans, plan = [], planner.plan
    monkeypatch.setattr(planner, "plan", lambda *args: plans.append(plan(*args)) or plans[-1])
    system = torch.randint(3, 64, (66,), generator=torch.Generator().manual_seed(2)).tolist()
    many = [system + prompts()[i % 3] for i in range(5)]
    greedy = hf_paged.SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    requests = [engine.intake.request(p, greedy.clone(max_tokens=4 + i % 3)) for i, p in enumerate(many)]
    last = {output.request_id: output for output in engine.run(requests)}
    for request in requests:
        ids = torch.tensor([request.prompt_token_ids])
        own = model.generate(ids, max_new_tokens=request.max_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert last[request.request_id].outputs[0].token_ids == own[0, ids.shape[1] :].tolist()
    assert recorder.count and any(plan is not None and (plan.lengths == 64).all() for plan in plans)


def test_steps_whose_logits_are_wanted_run_without_a_graph(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = graph_engine(model, monkeypatch)
    replays = mixed_replays(engine, monkeypatch)
    params = hf_paged.SamplingParams(max_tokens=1, prompt_logprobs=0, ignore_eos=True)
    request = engine.intake.request(prompts()[3], params)
    (output,) = [output for output in engine.run([request]) if output.finished]
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 14
    assert not replays


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_pages": 7}, {"max_num_batched_tokens": 5}],
    ids=["room", "preemption", "chunks between decodes"],
)
def test_greedy_equals_stock(
    model: Any, monkeypatch: pytest.MonkeyPatch, lookahead: bool, options: dict[str, int]
) -> None:
    engine, recorder = graph_engine(model, monkeypatch, lookahead=lookahead, **options)
    greedy = hf_paged.SamplingParams(temperature=0.0, max_tokens=7, ignore_eos=True)
    assert run(engine, greedy) == stock(model, 7)
    assert recorder.count > 5
    assert engine.scheduler.stats.num_preemptions > 0 or options.get("num_pages") is None


def test_samples_of_a_prompt_are_those_of_steps_without_graphs(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = hf_paged.SamplingParams(n=2, temperature=0.9, top_p=0.9, top_k=30, seed=5, max_tokens=2, ignore_eos=True)
    with_graphs, recorder = graph_engine(model, monkeypatch)
    found = run(with_graphs, sampled)
    assert recorder.count
    without, recorder = graph_engine(model, monkeypatch, lookahead=False)
    without.executor._graphs = without.executor._mixed = None  # type: ignore[attr-defined]
    assert run(without, sampled) == found
    assert not recorder.count


def test_log_probabilities_come_with_the_tokens(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raw ones and those at the request's temperature, in the same graphs."""
    engine, recorder = graph_engine(model, monkeypatch)
    raw = hf_paged.SamplingParams(temperature=0.7, seed=1, max_tokens=3, logprobs=0, ignore_eos=True)
    scaled = raw.clone(logprobs_mode="scaled_logprobs")
    requests = [engine.intake.request(prompt, (raw, scaled)[i % 2]) for i, prompt in enumerate(prompts())]
    last = {output.request_id: output for output in engine.run(requests)}
    assert recorder.count
    for request in requests:
        completion = last[request.request_id].outputs[0]
        ids = torch.tensor([request.prompt_token_ids + completion.token_ids])
        with torch.no_grad():
            heat = 0.7 if request.logprobs_mode == "scaled_logprobs" else 1.0
            log_probs = torch.log_softmax(model(ids).logits[0].float() / heat, -1)
        for place, (token, entry) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
            row = log_probs[request.num_prompt + place - 1]
            assert entry[token].logprob == pytest.approx(row[token].item(), abs=1e-4)
            assert entry[token].rank == 1 + int((row > row[token]).sum())


def test_many_changes_of_the_block_table_go_up_on_their_own(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "WRITES_PER_ROW", 0)
    engine, recorder = graph_engine(model, monkeypatch, page_size=1, num_pages=256)
    engine.executor._graphs.page_size = 1  # type: ignore[attr-defined]
    greedy = hf_paged.SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    assert run(engine, greedy) == stock(model, 2)
    assert recorder.count


def test_a_step_that_cannot_be_recorded_runs_without_a_graph(
    model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, _ = graph_engine(model, monkeypatch)

    class Refuses:
        def record(self, work: Callable[[], None]) -> Callable[[], None]:
            raise RuntimeError("operation not permitted when stream is capturing")

    engine.executor._graphs.recorder = Refuses()  # type: ignore[attr-defined]
    greedy = hf_paged.SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    assert run(engine, greedy) == stock(model, 2)
    assert sum("cannot be captured" in record.message for record in caplog.records) == 1


# ---- masks -------------------------------------------------------------------------------------------------


def masked_requests(engine: Engine, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Request]:
    """Free ones between others of which less may be drawn, by what was drawn before."""
    xgrammar = pytest.importorskip("xgrammar")
    from hf_paged.sampling.structured import Form

    words = ["<s>", "<pad>", "</s>", *(chr(ord("a") + i % 26) * (1 + i // 26) for i in range(61))]
    info = xgrammar.TokenizerInfo(words, vocab_size=64, stop_token_ids=[2])
    form = Form(xgrammar.GrammarCompiler(info).compile_regex("(ab|cd|x[y-z]{1,9})+"), [2])
    monkeypatch.setattr(engine.intake, "compile_form", lambda *_: form)
    free = hf_paged.SamplingParams(max_tokens=9, ignore_eos=True, **({"temperature": 0.0} | options))
    formed = free.clone(structured_outputs=hf_paged.StructuredOutputsParams(regex="stands for it"), max_tokens=11)
    few = free.clone(allowed_token_ids=[5, 9, 33, 63], max_tokens=5)
    late = free.clone(stop_token_ids=list(range(3, 40)), min_tokens=4)
    params = [free, formed, few, late, formed.clone(max_tokens=6), late]
    return [engine.intake.request(prompts()[i % 4], each) for i, each in enumerate(params)]


def tokens_of(engine: Engine, requests: list[Request]) -> list[list[list[int]]]:
    last = {output.request_id: output for output in engine.run(requests)}
    assert engine.scheduler.num_active_pages == 0 and not engine._held
    return [[completion.token_ids for completion in last[request.request_id].outputs] for request in requests]


def waiting_draws(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the rows of each draw that waited for tokens."""
    waited, settle = [], hf_paged.engine.model_executor.ModelExecutor.settle

    def counted(executor: Any) -> None:
        if executor._waiting is not None:
            waited.append(len(executor._waiting._sequences))
        settle(executor)

    monkeypatch.setattr(hf_paged.engine.model_executor.ModelExecutor, "settle", counted)
    return waited


@pytest.mark.parametrize("options", [{}, {"num_pages": 9}, {"max_num_batched_tokens": 5}], ids=str)
def test_masks_are_made_while_a_step_is_computed(
    model: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, int]
) -> None:
    """Looking ahead, in graphs, and with the tokens of steps that the host samples one by one."""
    engine, recorder = graph_engine(model, monkeypatch, **options)
    plain = build_engine(model, hf_paged.EngineConfig(max_num_seqs=4, page_size=4, num_pages=64))
    expected = tokens_of(plain, masked_requests(plain, monkeypatch))
    waited = waiting_draws(monkeypatch)
    assert tokens_of(engine, masked_requests(engine, monkeypatch)) == expected
    assert recorder.count > 5 and sum(rows > 1 for rows in waited) > 5
    assert {kind.draws for kind in engine.executor._graphs._captured} >= {False}  # type: ignore[attr-defined]
    assert engine.scheduler.stats.num_preemptions > 0 or "num_pages" not in options
    alone = [request for request in masked_requests(engine, monkeypatch) if not request.masked]
    assert tokens_of(engine, alone) == expected[:1], "a neighbour's mask is not its own"


def test_masked_samples_and_log_probabilities(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws depend on seeds, not on graphs; log-probabilities are those without the mask."""
    options = {"temperature": 0.8, "seed": 3, "logprobs": 0, "n": 2}
    found = []
    for graphs_wanted in (True, False):
        engine, _ = graph_engine(model, monkeypatch, lookahead=graphs_wanted)
        if not graphs_wanted:
            engine.executor._graphs = engine.executor._mixed = None  # type: ignore[attr-defined]
        requests = masked_requests(engine, monkeypatch, **options)
        last = {output.request_id: output for output in engine.run(requests)}
        found.append([last[request.request_id] for request in requests])
    for request, output, other in zip(requests, *found, strict=True):
        assert [o.token_ids for o in output.outputs] == [o.token_ids for o in other.outputs]
        for completion in output.outputs:
            with torch.no_grad():
                ids = torch.tensor([request.prompt_token_ids + completion.token_ids])
                log_probs = torch.log_softmax(model(ids).logits[0], -1)[request.num_prompt - 1 :]
            for row, token, entry in zip(log_probs, completion.token_ids, completion.logprobs, strict=False):
                assert entry[token].logprob == pytest.approx(row[token].item(), abs=1e-4)


def test_no_memory_for_a_draw_that_waited(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything goes on in smaller batches, from the tokens that are known."""
    engine, _ = graph_engine(model, monkeypatch)
    expected = tokens_of(engine, masked_requests(engine, monkeypatch))
    settle, times = engine.executor.settle, itertools.count()

    def failing() -> None:
        if engine.executor._waiting is not None and next(times) in (2, 5):  # type: ignore[attr-defined]
            raise torch.OutOfMemoryError("no room")
        settle()

    monkeypatch.setattr(engine.executor, "settle", failing)
    budget = engine.scheduler.max_num_batched_tokens
    requests = masked_requests(engine, monkeypatch)
    last = {output.request_id: output for output in engine.run(requests)}
    assert [[last[r.request_id].outputs[0].token_ids] for r in requests] == expected
    assert next(times) > 5 and engine.scheduler.max_num_batched_tokens == budget // 4
    assert engine.scheduler.num_active_pages == 0


def test_what_the_model_gives_no_chance(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request fails, and nothing that others have is wiped."""
    engine, _ = graph_engine(model, monkeypatch)
    free = hf_paged.SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    (expected,) = tokens_of(engine, [engine.intake.request(prompts()[0], free)])
    forward = engine.executor._runner._compute  # type: ignore[attr-defined]

    def without_nine(*args: Any) -> torch.Tensor:
        logits = forward(*args).clone()
        logits[:, 9] = -torch.inf
        return logits

    monkeypatch.setattr(engine.executor._runner, "_compute", without_nine)  # type: ignore[attr-defined]
    purged = []
    monkeypatch.setattr(engine, "_purge", lambda: purged.append(True))
    requests = [engine.intake.request(prompts()[0], each) for each in (free, free.clone(allowed_token_ids=[9]))]
    last = {output.request_id: output for output in engine.run(requests)}
    assert 9 in expected[0] or last[requests[0].request_id].outputs[0].token_ids == expected[0]
    with pytest.raises(Exception, match="nothing that is allowed a chance"):
        raise last[requests[1].request_id].error or AssertionError
    assert not purged


def test_an_interrupt_while_a_draw_waits(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = graph_engine(model, monkeypatch)
    expected = tokens_of(engine, masked_requests(engine, monkeypatch))
    settle, times = engine.executor.settle, itertools.count()

    def interrupted() -> None:
        if engine.executor._waiting is not None and next(times) == 3:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        settle()

    monkeypatch.setattr(engine.executor, "settle", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokens_of(engine, masked_requests(engine, monkeypatch))
    assert engine.scheduler.num_active_pages == 0 and not engine.has_unfinished()
    assert tokens_of(engine, masked_requests(engine, monkeypatch)) == expected


def test_no_memory_for_logits_leaves_the_others_their_graphs(
    model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps that do not draw need room for their logits; those that do need not pay for it."""
    engine, recorder = graph_engine(model, monkeypatch)
    decode: Any = engine.executor._graphs  # type: ignore[attr-defined]
    engine.executor._mixed = None  # type: ignore[attr-defined]
    finish = decode.finish

    def finished(logits: Any, rows: Any, *, draws: bool) -> None:
        if not draws:
            raise torch.OutOfMemoryError("no room")
        finish(logits, rows, draws=draws)

    monkeypatch.setattr(decode, "finish", finished)
    plain = build_engine(model, hf_paged.EngineConfig(max_num_seqs=4, page_size=4, num_pages=64))
    expected = tokens_of(plain, masked_requests(plain, monkeypatch))
    assert tokens_of(engine, masked_requests(engine, monkeypatch)) == expected
    assert any("no memory is left" in record.message for record in caplog.records)
    before = recorder.count
    assert run(engine, hf_paged.SamplingParams(temperature=0.0, max_tokens=7, ignore_eos=True)) == stock(model, 7)
    assert recorder.count > before + 5


def test_a_step_that_was_given_up_keeps_no_logits_of_a_closed_engine(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = graph_engine(model, monkeypatch)
    executor: Any = engine.executor

    def interrupted() -> None:
        if executor._waiting is not None:
            raise KeyboardInterrupt

    monkeypatch.setattr(executor, "settle", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokens_of(engine, masked_requests(engine, monkeypatch))
    assert executor._waiting is not None
    logits = weakref.ref(executor._waiting)
    engine.close()
    gc.collect()
    assert logits() is None


# ---- speculation -------------------------------------------------------------------------------------------


def drafting_engine(
    model: Any, monkeypatch: pytest.MonkeyPatch, speculation: SpeculativeConfig, **options: Any
) -> tuple[Engine, Replays]:
    """As `graph_engine`, drafting in every step; a draft model has graphs of its own."""
    engine, recorder = graph_engine(model, monkeypatch, speculative_config=None, **options)
    executor: Any = engine.executor
    if speculation.model is not None:
        drafter = DraftModel(speculation.model, hf_paged.EngineConfig(), speculation.num_speculative_tokens)
        drafter._backend = executor._backend
        executor.drafter = drafter
        executor._draft_storage = drafter.allocate(executor.num_pages, executor._inputs)
        drafter._graphs = graphs.DecodeGraphs(
            drafter._runner, drafter._backend, 4, executor._max_pages, engine.executor.page_size, 16, 8,
            recorder=recorder,
        )  # fmt: skip
        engine.speculator._drafters[speculation] = drafter
    engine.speculator.pace = Always()
    engine.intake.speculation = speculation
    return engine, recorder


def test_hidden_states_of_replays(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs leave them where they can be found after each replay, whatever ran in between."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 2
    torch.manual_seed(0)
    deep = LlamaForCausalLM(config).eval()
    config = copy.deepcopy(config)
    config.eagle_aux_hidden_state_layer_ids = [1, 1, 1]
    head = Eagle3Head(config)
    options: dict[str, Any] = {"speculative_config": {"method": "eagle3", "model": head, "num_speculative_tokens": 2}}
    engine, recorder = graph_engine(deep, monkeypatch, lookahead=True, **options)
    executor: Any = engine.executor
    hidden = executor.drafter.hidden
    hidden.fix(16, config.hidden_size, torch.float32, torch.device("cpu"))
    executor._mixed = None
    engine.speculator.pace = Alternating()
    seen: list[tuple[int, bool]] = []
    after = executor.drafter.after

    def watched(batch: Any) -> None:
        # What a replay has not left in the fixed place would be missed on a GPU, where nothing else runs.
        if batch.num_tokens <= 16:
            hidden._found = []
        seen.append((batch.num_tokens, bool(batch.drafts)))
        after(batch)

    monkeypatch.setattr(executor.drafter, "after", watched)
    sampling = hf_paged.SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    assert run(engine, sampling) == stock(deep, 9)
    assert recorder.count >= 5 and engine.speculator.stats["eagle3"].num_drafts > 3
    assert {drafts for _, drafts in seen} == {True, False} and max(count for count, _ in seen) > 16


SAMPLED = {"n": 2, "temperature": 0.8, "top_p": 0.9, "seed": 4}


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("same", {"temperature": 0.0}),
        pytest.param("other", SAMPLED, marks=pytest.mark.slow),
        pytest.param("ngram", SAMPLED, marks=pytest.mark.slow),
    ],
)
def test_drafts(model: Any, monkeypatch: pytest.MonkeyPatch, kind: str, params: dict[str, Any]) -> None:
    """Verified in graphs; a draft model's draws never leave the device before."""
    sampling = hf_paged.SamplingParams(max_tokens=9, ignore_eos=True, **params)
    plain, _ = graph_engine(model, monkeypatch)
    expected = run(plain, sampling)
    other = copy.deepcopy(model)
    if kind == "other":
        torch.manual_seed(9)
        other = LlamaForCausalLM(model.config).eval()
    speculation = (
        SpeculativeConfig("ngram", 3, options=(("prompt_lookup_max", 1), ("prompt_lookup_min", 1)))
        if kind == "ngram"
        else SpeculativeConfig("draft_model", 3, other)
    )
    engine, recorder = drafting_engine(model, monkeypatch, speculation)
    assert run(engine, sampling) == expected
    stats = engine.speculator.stats[speculation.method]
    assert stats.num_drafts > 5
    assert recorder.count >= 10
    if kind == "same":
        assert stats.num_accepted_tokens == stats.num_draft_tokens
    if kind == "other":
        assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
