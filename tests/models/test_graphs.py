"""Decode steps as CUDA graphs: whatever the batch, the same tokens as without them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from families import left_pad, make_model, make_prompts

import hf_paged
from hf_paged import SamplingParams
from hf_paged.attention.shared import SharedPlanner
from hf_paged.model import graphs as graphs_module

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPTS = make_prompts([1 + (7 * i) % 37 for i in range(20)])
NEW = 24


def make(family: str = "Llama", **changes: Any) -> Any:
    return make_model(family, **changes).to("cuda")


def greedy(max_tokens: int = NEW, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **options)


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """What the model itself says to PROMPTS."""
    model = make()
    batch = {name: tensor.to("cuda") for name, tensor in left_pad(PROMPTS).items()}
    out = model.generate(**batch, do_sample=False, max_new_tokens=NEW)
    return out[:, batch["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module", autouse=True)
def clean_gpu() -> Iterator[None]:
    yield
    torch._dynamo.reset()
    torch.cuda.empty_cache()


def wrap(model: Any, **options: Any) -> Any:
    return hf_paged.wrap(model, **{"page_size": 16, "num_pages": 512, "max_num_seqs": 32} | options)


def answers(model: Any, prompts: list[list[int]], sampling: Any) -> list[list[int]]:
    found = [output.outputs[0].token_ids for output in model.generate_many(prompts, sampling)]
    scheduler = model.engine.scheduler
    assert scheduler.num_active_pages == 0
    assert scheduler.pool.num_used == scheduler.tree.num_pages
    assert not model.engine.has_unfinished()
    return found


def graphs_of(model: Any) -> Any:
    return model.engine.executor._graphs


def sizes_of(graphs: Any) -> set[int]:
    return {kind.size for kind in graphs._captured}


def count_replays(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch sizes of all steps that run as graphs from here on."""
    graphs, sizes = graphs_of(model), []
    launch = graphs.launch

    def counted(sequences: list[Any], *args: Any) -> Any:
        sizes.append(len(sequences))
        return launch(sequences, *args)

    monkeypatch.setattr(graphs, "launch", counted)
    return sizes


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("hf_paged") and r.levelno >= logging.WARNING]


# ---- sizes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compile", ["layers", "off"])
def test_batches_of_every_size_in_turn(
    compile: str, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrap(make(), compile=compile)
    sizes = count_replays(model, monkeypatch)
    for count in range(1, 21):
        assert answers(model, PROMPTS[:count], greedy(6)) == [tokens[:6] for tokens in expected[:count]]
    assert set(sizes) == set(range(1, 21)), "not all ran as graphs"
    assert sizes_of(graphs_of(model)) == {1, 2, 4, 8, 16, 32}


@pytest.mark.parametrize("options", [{}, {"async_scheduling": False}, {"num_pages": 40, "max_num_seqs": 12}], ids=str)
def test_a_batch_that_shrinks_one_by_one(
    options: dict[str, Any], expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs are captured while a step is in the air, whose tokens the captured step will want."""
    model = wrap(make(), compile="off", **options)
    sizes = count_replays(model, monkeypatch)
    lengths = [4 + i for i in range(20)]
    for _ in range(2):  # captured, then replayed
        found = answers(model, PROMPTS, [greedy(length) for length in lengths])
        assert found == [tokens[:length] for tokens, length in zip(expected, lengths, strict=True)]
    assert {1, 2, 3, 7} <= set(sizes)


def test_a_batch_larger_than_the_largest_graph(expected: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Such steps run without one; as sequences end, graphs go on from their tokens, and the other way round."""
    monkeypatch.setattr(graphs_module, "SIZES", (1, 2, 4))
    model = wrap(make(), compile="off")
    assert graphs_of(model).sizes[-1] == 4
    sizes = count_replays(model, monkeypatch)
    lengths = [NEW - i for i in range(20)]
    found = answers(model, PROMPTS, [greedy(length) for length in lengths])
    assert found == [tokens[:length] for tokens, length in zip(expected, lengths, strict=True)]
    assert max(sizes) == 4
    engine = model.engine
    ids = [engine.add_request(prompt, greedy()) for prompt in PROMPTS[:3]]
    last: dict[str, Any] = {}
    for _ in range(6):
        last |= {output.request_id: output for output in engine.step()}
    ids += [engine.add_request(prompt, greedy()) for prompt in PROMPTS[3:6]]
    while engine.has_unfinished():
        last |= {output.request_id: output for output in engine.step()}
    assert [last[i].outputs[0].token_ids for i in ids] == expected[:6]


def test_warming_up_captures_all_there_are(expected: list[list[int]]) -> None:
    model = wrap(make(), compile="off", max_num_seqs=20)
    model.engine.warm_up()
    captured = dict(graphs_of(model)._captured)
    largest = max(kind.size for kind in captured)
    assert 20 <= largest <= 32, "nothing larger than all sequences need"
    plain = (False,), (False,), (True,)
    expected_kinds = {(1, False, False, False, True), *itertools.product((2, 4, 8, 16, largest), (False, True), *plain)}
    assert set(captured) >= expected_kinds and all(not kind.dependent for kind in captured)
    assert answers(model, PROMPTS, [greedy(4 + i) for i in range(20)]) == [
        tokens[: 4 + i] for i, tokens in enumerate(expected)
    ]
    model.engine.warm_up()
    assert graphs_of(model)._captured == captured


def test_prefill_beside_decodes(expected: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """More requests than slots: as soon as a kind of step comes again, it is a graph."""
    model = wrap(make(), compile="off", max_num_seqs=8)
    mixed, kinds = model.engine.executor._mixed, []
    launch = mixed.launch
    monkeypatch.setattr(mixed, "launch", lambda kind, *args: kinds.append(kind) or launch(kind, *args))
    for _ in range(2):
        found = answers(model, PROMPTS, [greedy(4 + i) for i in range(20)])
        assert found == [tokens[: 4 + i] for i, tokens in enumerate(expected)]
    assert len(kinds) > 10 and len(set(kinds)) > 1


@pytest.mark.parametrize("slots", [8, 32])
def test_prompts_that_begin_alike(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they share is read once, in steps with prefill beside them too."""
    monkeypatch.setattr(SharedPlanner, "_pays", lambda *_: True)
    system = make_prompts([130], seed=3)[0]
    prompts = [system + PROMPTS[i % 3] + PROMPTS[i] for i in range(20)]
    model = make()
    batch = {name: tensor.to("cuda") for name, tensor in left_pad(prompts).items()}
    out = model.generate(**batch, do_sample=False, max_new_tokens=NEW)[:, batch["input_ids"].shape[1] :].tolist()
    wrap(model, compile="off", max_num_seqs=slots)
    for _ in range(2):  # the second time, all of them find the prefix in the cache
        assert answers(model, prompts, [greedy(4 + i) for i in range(20)]) == [t[: 4 + i] for i, t in enumerate(out)]
    assert any(kind.shares for kind in graphs_of(model)._captured)


def test_warming_up_while_requests_run(expected: list[list[int]]) -> None:
    model = wrap(make(), compile="off")
    engine = model.engine
    ids = [engine.add_request(prompt, greedy()) for prompt in PROMPTS[:5]]
    last: dict[str, Any] = {}
    for _ in range(4):
        last |= {output.request_id: output for output in engine.step()}
    engine.warm_up()
    while engine.has_unfinished():
        last |= {output.request_id: output for output in engine.step()}
    assert [last[i].outputs[0].token_ids for i in ids] == expected[:5]


def test_long_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over many pages."""
    model = make()
    batch = {name: tensor.to("cuda") for name, tensor in left_pad(PROMPTS[:3]).items()}
    out = model.generate(**batch, do_sample=False, max_new_tokens=200)
    wanted = out[:, batch["input_ids"].shape[1] :].tolist()
    wrap(model)
    sizes = count_replays(model, monkeypatch)
    assert answers(model, PROMPTS[:3], greedy(200)) == wanted
    assert len(sizes) == 199


# ---- between graphs ------------------------------------------------------------------------------------


def test_every_step_that_only_decodes_is_a_graph(expected: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(make(), compile="off")
    sizes, records = count_replays(model, monkeypatch), []
    model.engine.observers.append(records.append)
    assert answers(model, PROMPTS[:7], greedy()) == expected[:7]
    assert len(sizes) == sum(not record.chunks for record in records) == NEW - 1


@pytest.mark.parametrize("host", [{"presence_penalty": 1.0}, {"logprobs": 2}, {"prompt_logprobs": 0}], ids=str)
def test_steps_without_a_graph_in_between(
    host: dict[str, Any], expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """New prompts, some of them in chunks, and requests that need the host come and go; pages change meanwhile."""
    model = wrap(make(), compile="off", max_num_batched_tokens=32, num_pages=60)
    engine = model.engine
    sizes = count_replays(model, monkeypatch)
    ids: dict[int, str] = {}
    last: dict[str, Any] = {}
    for place in range(12):
        ids[place] = engine.add_request(PROMPTS[place], greedy())
        if place % 4 == 2:
            engine.add_request(PROMPTS[place + 3], greedy(3, **host))
        for _ in range(2 + place % 3 * 3):
            last |= {output.request_id: output for output in engine.step()}
    while engine.has_unfinished():
        last |= {output.request_id: output for output in engine.step()}
    assert [last[ids[place]].outputs[0].token_ids for place in range(12)] == expected[:12]
    assert len(sizes) > 10


def test_samples_of_a_prompt_share_pages_that_graphs_read() -> None:
    params = SamplingParams(n=6, seed=3, temperature=1.2, max_tokens=NEW, ignore_eos=True)
    found = []
    for options in ({}, {"cuda_graphs": False}, {"max_num_seqs": 4}):
        model = wrap(make(), compile="off", **options)
        found.append([[c.token_ids for c in output.outputs] for output in model.generate_many(PROMPTS[2:5], params)])
    assert found[0] == found[1] == found[2]


def test_new_values_need_no_new_graphs_and_new_places_do(expected: list[list[int]]) -> None:
    model = wrap(make(), compile="off")
    assert answers(model, PROMPTS[:5], greedy()) == expected[:5]
    graphs, captured = graphs_of(model), dict(graphs_of(model)._captured)
    weight = model.model.layers[0].mlp.gate_proj.weight
    with torch.no_grad():
        weight.mul_(-1)
    assert answers(model, PROMPTS[:5], greedy()) != expected[:5]
    assert graphs_of(model) is graphs
    assert graphs._captured == captured
    with torch.no_grad():
        weight.mul_(-1)
    weight.data = weight.data.clone()
    assert answers(model, PROMPTS[:5], greedy()) == expected[:5]
    assert graphs_of(model) is not graphs


# ---- what cannot be captured ---------------------------------------------------------------------------


def wait_in_forward(model: Any, rows: int) -> Callable[[], None]:
    """From here on a forward of at most so many rows waits for the device, which a capture does not allow."""

    def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        if output.shape[-2] <= rows:
            float(output.detach().sum())
        return output

    return model.model.layers[1].mlp.register_forward_hook(hook).remove


def test_a_model_that_cannot_be_captured(expected: list[list[int]], caplog: pytest.LogCaptureFixture) -> None:
    """It runs without graphs, and says so once. The device is fit for other work afterwards."""
    caplog.set_level(logging.WARNING, logger="hf_paged")
    model = make()
    wait_in_forward(model, rows=10_000)
    wrap(model, compile="off")
    for _ in range(2):
        assert answers(model, PROMPTS, greedy()) == expected
    assert graphs_of(model) is None
    told = warnings_of(caplog)
    assert len(told) == 1
    assert "cannot be captured" in told[0]
    ids = torch.tensor(PROMPTS[5:6], device="cuda")
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in model.parameters())
    other = wrap(make(), compile="off")
    assert answers(other, PROMPTS, greedy()) == expected
    assert graphs_of(other)._captured


def test_a_capture_that_fails_while_a_graph_is_in_the_air(
    expected: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    """The step that could not be captured still finds the tokens of the one before it."""
    caplog.set_level(logging.WARNING, logger="hf_paged")
    model = make()
    wait_in_forward(model, rows=2)
    wrap(model, compile="off")
    lengths = [NEW, NEW - 4, NEW - 8, NEW - 12, NEW - 12]
    found = answers(model, PROMPTS[:5], [greedy(length) for length in lengths])
    assert found == [tokens[:length] for tokens, length in zip(expected, lengths, strict=False)]
    assert graphs_of(model) is None
    assert len(warnings_of(caplog)) == 1


def test_no_memory_for_one_graph(
    expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps of that size run without; the others keep theirs."""
    caplog.set_level(logging.WARNING, logger="hf_paged")
    model = wrap(make(), compile="off")
    graphs = graphs_of(model)
    capture = graphs._capture

    def short(kind: Any) -> Any:
        if kind.size == 4:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return capture(kind)

    monkeypatch.setattr(graphs, "_capture", short)
    lengths = [NEW - 2 * i for i in range(8)]
    for _ in range(2):
        found = answers(model, PROMPTS[:8], [greedy(length) for length in lengths])
        assert found == [tokens[:length] for tokens, length in zip(expected, lengths, strict=False)]
    assert graphs_of(model) is graphs
    assert sizes_of(graphs) == {1, 2, 8}
    assert len(warnings_of(caplog)) == 1
    assert model.engine.scheduler.max_num_seqs == 32
