"""`LLM(..., data_parallel_size=2)` and a server over it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import replica_jobs
import torch
import torch.distributed as dist

from hf_paged import LLM, BeamSearchParams, SamplingParams, StructuredOutputsParams
from hf_paged.distributed.errors import ReplicaLost
from hf_paged.llm.replicas import _devices

sys.path.append(str(Path(__file__).resolve().parents[1] / "integrations"))

SMALL = {"num_pages": 128, "block_size": 16, "max_num_seqs": 8, "dtype": "float32"}
TEXTS = [f"The {number} seas are" for number in range(12)]
CHAT = [{"role": "user", "content": "Why is the sky blue?"}]
SAMPLING = [
    SamplingParams(temperature=0.0, max_tokens=12, logprobs=1),
    SamplingParams(temperature=0.8, max_tokens=12, n=3),
    SamplingParams(temperature=0.8, max_tokens=12, seed=5, stop=["e"], best_of=4),
    SamplingParams(max_tokens=12, structured_outputs=StructuredOutputsParams(regex="[a-f]{3,20}")),
]


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: str) -> Iterator[Any]:
    llm = LLM(tiny_checkpoint, data_parallel_size=2, **SMALL)
    yield llm
    llm.shutdown()
    llm.shutdown()
    with pytest.raises(ReplicaLost, match="shut down"):
        llm.generate("The sea", use_tqdm=False)


def said(llm: Any) -> list[Any]:
    outputs = [llm.generate(TEXTS, sampling, use_tqdm=False) for sampling in SAMPLING]
    outputs.append(llm.chat([CHAT] * 3, SAMPLING[1], use_tqdm=False))
    ids = llm.enqueue(TEXTS[:2])
    outputs.append(llm.wait_for_completion(use_tqdm=False))
    assert [output.request_id for output in outputs[-1]] == ids
    return [
        [
            (output.request_id, output.prompt, one.text, one.token_ids, one.finish_reason, one.stop_reason)
            for output in each
            for one in output.outputs
        ]
        for each in outputs
    ]


def test_says_what_one_says(llm: Any, tiny_checkpoint: str) -> None:
    alone = LLM(tiny_checkpoint, **SMALL)
    assert said(llm) == said(alone)
    mine, other = (each.generate(TEXTS[0], SAMPLING[0], use_tqdm=False)[0].outputs[0] for each in (llm, alone))
    assert [[entry.decoded_token for entry in step.values()] for step in mine.logprobs] == [
        [entry.decoded_token for entry in step.values()] for step in other.logprobs
    ]
    assert llm.get_default_sampling_params() == alone.get_default_sampling_params()
    assert llm.get_tokenizer().decode([5, 6]) == alone.get_tokenizer().decode([5, 6])


def test_what_reaches_all(llm: Any) -> None:
    assert len(set(llm.collective_rpc(replica_jobs.pid))) == 2
    assert llm.apply_model(replica_jobs.name_of) == ["LlamaForCausalLM"] * 2
    assert llm.reset_prefix_cache()
    llm.sleep()
    llm.wake_up(["kv_cache"])
    assert llm.collective_rpc(replica_jobs.pages) == [0, 0]


def test_what_needs_the_model_here(llm: Any) -> None:
    for call in (llm.start_profile, lambda: llm.beam_search("The sea", BeamSearchParams(beam_width=2, max_tokens=4))):
        with pytest.raises(ValueError, match="leave data_parallel_size out"):
            call()


def test_a_server(llm: Any) -> None:
    httpx = pytest.importorskip("httpx")
    from live_server import serve

    body = {"model": "tiny", "prompt": "The sea is", "max_tokens": 8, "temperature": 0, "n": 1}
    with serve(llm.model) as live:
        whole = [httpx.post(f"{live.url}/v1/completions", json=body | {"prompt": text}).json() for text in TEXTS]
        expected = llm.generate(TEXTS, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
        assert [answer["choices"][0]["text"] for answer in whole] == [output.outputs[0].text for output in expected]
        with httpx.stream("POST", f"{live.url}/v1/completions", json=body | {"stream": True}) as stream:
            assert stream.read().count(b"data: ") > 3
        metrics = httpx.get(f"{live.url}/metrics").text
        for number in "01":
            assert f'hf_paged:generation_tokens_total{{engine="{number}",model_name="tiny"}}' in metrics
            assert f'hf_paged:e2e_request_latency_seconds_count{{engine="{number}",model_name="tiny"}}' in metrics
        assert httpx.get(f"{live.url}/health").status_code == 200
        assert metrics.count("# TYPE hf_paged:e2e_request_latency_seconds histogram") == 1


def test_arguments(tiny_checkpoint: str, llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="positive integer"):
        LLM(tiny_checkpoint, data_parallel_size=0)
    with pytest.raises(ValueError, match="data_parallel_rank=1 cannot be had"):
        LLM(tiny_checkpoint, data_parallel_rank=1)
    with pytest.raises(ValueError, match="2 replicas of 2 GPUs need 4, and there are 0"):
        LLM(tiny_checkpoint, data_parallel_size=2, tensor_parallel_size=2, device="cuda")


@pytest.mark.parametrize(
    ("listed", "expected"),
    [(None, ["0,1", "2,3"]), ("4,5,6,7,1", ["4,5", "6,7"]), ("GPU-a,GPU-b,2,3", ["GPU-a,GPU-b", "2,3"])],
)
def test_each_has_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch, listed: str | None, expected: list[str]) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(listed.split(",")) if listed else 5)
    assert _devices(2, 2) == expected
    with pytest.raises(ValueError, match="3 replicas of 2 GPUs need 6"):
        _devices(3, 2)


@pytest.mark.slow
def test_no_checkpoint() -> None:
    """The replicas find that out, and it is told as in one process."""
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        LLM("/nowhere", data_parallel_size=2)


@pytest.mark.slow
def test_replicas_of_several_ranks(tiny_checkpoint: str) -> None:
    llm = LLM(tiny_checkpoint, data_parallel_size=2, tensor_parallel_size=2, **SMALL)
    try:
        greedy, drawn = (llm.generate(TEXTS, sampling, use_tqdm=False) for sampling in SAMPLING[:2])
    finally:
        llm.shutdown()
    assert not dist.is_initialized()
    alone = LLM(tiny_checkpoint, **SMALL)
    for ours, sampling in ((greedy, SAMPLING[0]), (drawn, SAMPLING[1])):
        for mine, other in zip(ours, alone.generate(TEXTS, sampling, use_tqdm=False), strict=True):
            assert [one.token_ids for one in mine.outputs] == [one.token_ids for one in other.outputs]
