"""Perfetto traces: their structure, what they tell, and that they go away without a trace of their own."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import hf_paged
from hf_paged.bench.host import simulated_engine
from hf_paged.engine.engine import Engine
from hf_paged.observe.perfetto import PerfettoTrace
from hf_paged.sampling_params import SamplingParams

SAMPLING = SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False)


def engine_of(num_pages: int = 32, max_num_seqs: int = 2) -> Engine:
    return simulated_engine(
        num_pages=num_pages, page_size=4, max_num_seqs=max_num_seqs, max_model_len=64, prepare=True, token_budget=8
    )


def run(engine: Engine) -> None:
    while engine.has_unfinished():
        engine.step()


def check(events: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Demands what Perfetto demands of a trace. Returns the slices of each sequence's track, by its name."""
    slices: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    names: dict[tuple[int, int], str] = {}
    for event in events:
        assert event["ph"] in "MXC", event
        track = event["pid"], event["tid"]
        if event["ph"] == "M" and event["name"] == "thread_name":
            assert track not in names
            names[track] = event["args"]["name"]
        elif event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] >= 0
            slices[track].append(event)
        elif event["ph"] == "C":
            assert all(value >= 0 for value in event["args"].values())
    assert slices.keys() <= names.keys(), "a slice on a track without a name"
    for track in slices.values():
        for before, after in pairwise(track):
            assert after["ts"] >= before["ts"] + before["dur"] - 0.01, "slices of a track overlap"
    return {names[track]: found for track, found in slices.items()}


def test_a_trace_is_well_formed_and_tells_the_run(tmp_path: Path) -> None:
    engine = engine_of()
    with closing(PerfettoTrace(tmp_path / "run.json", engine)) as trace:
        for name in "abc":
            engine.add_request([ord(name), *range(2, 14)], SAMPLING, request_id=name)
        engine.add_request([9, 9], SAMPLING.clone(n=2), request_id="two")
        run(engine)
        assert not trace._tracks and not trace._timeline.going_on(0.0), "what is finished is still held"
    assert not (engine.observers or engine.arrival_observers or engine.request_observers)
    tracks = check(json.loads((tmp_path / "run.json").read_text()))
    assert set(tracks) == {"steps", "a", "b", "c", "two #0", "two #1"}
    for name in "abc":
        kinds = [event["name"] for event in tracks[name]]
        assert kinds[0] == "queued" and kinds[-1] == "decode" and set(kinds[1:-1]) == {"prefill"}
        # 13 tokens of prompt do not fit into one step of 8; the first of the 4 tokens comes with the last of them.
        assert sum(e["args"]["tokens"] for e in tracks[name] if e["name"] == "prefill") == 13
        assert len(kinds) >= 4 and tracks[name][-1]["args"]["tokens"] == 3
    assert [event["name"] for event in tracks["two #1"]] == ["queued", "decode"]
    assert any("decode" in e["name"] and "prefill" in e["name"] for e in tracks["steps"])


def test_preempted_sequences_show(tmp_path: Path) -> None:
    engine = engine_of(num_pages=6, max_num_seqs=3)
    with closing(PerfettoTrace(tmp_path / "run.json", engine)):
        for name in "ab":
            engine.add_request([ord(name), 2, 3, 4], SAMPLING.clone(max_tokens=14), request_id=name)
        run(engine)
    assert engine.scheduler.stats.num_preemptions > 0
    tracks = check(json.loads((tmp_path / "run.json").read_text()))
    kinds = [event["name"] for event in tracks["b"]]
    assert "preempted" in kinds
    assert kinds[kinds.index("preempted") + 1] == "prefill" and kinds[-1] == "decode"


def test_a_trace_of_part_of_a_run(tmp_path: Path) -> None:
    engine = engine_of()
    engine.add_request([1, 2, 3], SAMPLING.clone(max_tokens=20), request_id="early")
    engine.step()
    engine.step()
    trace = PerfettoTrace(tmp_path / "run.json.gz", engine)
    engine.step()
    engine.step()
    trace.close()
    trace.close()
    run(engine)
    events = json.loads(gzip.decompress((tmp_path / "run.json.gz").read_bytes()))
    assert [event["name"] for event in check(events)["early"]] == ["queued", "decode"]


def test_an_id_that_is_used_again_gets_a_track_of_its_own(tmp_path: Path) -> None:
    engine = engine_of()
    with closing(PerfettoTrace(tmp_path / "run.json", engine)):
        for _ in range(2):
            engine.add_request([1, 2, 3], SAMPLING, request_id="again")
            engine.step()
            engine.abort("again")
        run(engine)
    events = json.loads((tmp_path / "run.json").read_text())
    check(events)
    assert sum(e["ph"] == "M" and e["args"].get("name") == "again" for e in events) == 2


def test_a_full_disk_does_not_end_the_run(tmp_path: Path) -> None:
    engine = engine_of()
    trace = PerfettoTrace("/dev/full", engine)
    for name in range(30):  # more than a buffer of events
        engine.add_request([name, 2, 3], SAMPLING)
    run(engine)
    assert engine.stats.generation_tokens == 30 * 4
    with pytest.raises(OSError, match="No space"):
        trace.close()
    trace.close()
    assert not engine.observers


def test_from_python(tiny_checkpoint: str, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()
    with pytest.raises(TypeError, match="wrap"), hf_paged.trace(tmp_path / "no.json", model):
        pass
    hf_paged.wrap(model, page_size=16, num_pages=64)
    sampling = SamplingParams(max_tokens=5, ignore_eos=True, temperature=0.0)
    model.generate_many([[1, 2, 3], [4, 5]], sampling, trace=tmp_path / "many.json")
    assert len(check(json.loads((tmp_path / "many.json").read_text()))) == 3
    with hf_paged.trace(tmp_path / "ngram.json", model), pytest.raises(RuntimeError, match="stop here"):
        model.generate_many([[1, 2, 3]], sampling)
        raise RuntimeError("stop here")
    check(json.loads((tmp_path / "ngram.json").read_text()))
    with pytest.raises(OSError):
        model.generate_many([[1, 2, 3]], sampling, trace=tmp_path / "nowhere" / "run.json")
    assert not model.engine.observers and not model.engine.has_unfinished()
