"""StepTrace: what it records, and the picture."""

from pathlib import Path

from hf_paged.bench.host import simulated_engine
from hf_paged.observe.trace import StepTrace
from hf_paged.sampling_params import SamplingParams


def test_a_trace_tells_what_ran_when(tmp_path: Path) -> None:
    engine = simulated_engine(num_pages=32, page_size=4, max_num_seqs=2, max_model_len=64, prepare=True)
    sampling = SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False)
    with StepTrace(engine) as trace:
        for name in "abc":
            engine.add_request([ord(name), 2, 3, 4, 5], sampling, request_id=name)
        while engine.has_unfinished():
            engine.step()
    prefilled = [request for record in trace.records for request, _, _ in record.chunks]
    assert sorted(prefilled) == ["a", "b", "c"]
    decoded = [request for record in trace.records for request, _ in record.decodes]
    assert {name: decoded.count(name) for name in "abc"} == {"a": 3, "b": 3, "c": 3}
    assert all(len(record.decodes) + len(record.chunks) <= 2 for record in trace.records)
    assert trace.records[0].num_waiting > 0
    assert trace.peak_pages == 4  # two at once, of 8 written tokens each
    assert trace.records[-1].active_pages == 0
    assert not engine.observers

    picture = tmp_path / "trace.png"
    trace.plot(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 5000


def test_an_empty_trace_can_be_drawn(tmp_path: Path) -> None:
    engine = simulated_engine(num_pages=4, page_size=4, max_num_seqs=2, max_model_len=16, prepare=False)
    with StepTrace(engine) as trace:
        pass
    trace.plot(tmp_path / "empty.png")
    assert trace.peak_pages == 0
