"""ReplicatedEngine with replicas that do what a test says."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from hf_paged import CompletionOutput, LoRARequest, RequestOutput, SamplingParams
from hf_paged.distributed.errors import ReplicaLost
from hf_paged.distributed.replica import Facts
from hf_paged.distributed.replicated import ReplicatedEngine
from hf_paged.engine.request import Request
from hf_paged.lora.adapter import Adapter
from hf_paged.sampling_params import RequestOutputKind

FACTS = Facts(
    config=None, generation_config=None, tokenizer=None, vocab_size=100, max_model_len=64,
    eos_token_ids=frozenset(), logprobs_mode="raw_logprobs", speculation=None, adapters=None,
    num_pages=16, page_size=4, max_num_seqs=2,
)  # fmt: skip
WHOLE = SamplingParams(max_tokens=4, output_kind=RequestOutputKind.FINAL_ONLY)


class Fake:
    """A replica, as `Handle` shows it."""

    def __init__(self, number: int) -> None:
        self.number, self.state, self.lost, self.called = number, None, None, False
        self.heard_s = self.moved_s = float("inf")
        self.facts: Future[Facts] = Future()
        self.facts.set_result(FACTS)
        self.sent: list[tuple[Any, ...]] = []
        self.on_news: Any = None
        self.on_lost: Any = None

    def send(self, *message: Any) -> None:
        self.sent.append(message)

    def close(self, deadline: float) -> None:
        pass

    @property
    def has(self) -> list[str]:
        return [message[1] for message in self.sent if message[0] == "add"]

    def end(self) -> None:
        self.lost = ReplicaLost(f"replica {self.number} ended by signal 9")
        self.on_lost(self)

    def tell(self, request_id: str, finished: bool = True) -> None:
        sample = CompletionOutput(0, "", [1], None, None, finish_reason="length" if finished else None)
        self.on_news(self, [RequestOutput(request_id, None, [], None, [sample], finished=finished)])


@pytest.fixture
def fakes() -> list[Fake]:
    return [Fake(number) for number in range(3)]


@pytest.fixture
def engine(fakes: list[Fake]) -> Any:
    engine = ReplicatedEngine(fakes, seed=0)  # type: ignore[arg-type]
    yield engine
    engine.close()


def having(fakes: list[Fake], request_id: str) -> Fake:
    [found] = [fake for fake in fakes if fake.lost is None and request_id in fake.has]
    return found


def test_a_request_that_ends_its_replicas(engine: Any, fakes: list[Fake]) -> None:
    """It is tried on two, and leaves the third alone."""
    poison = engine.add_request([1, 2, 3], WHOLE)
    having(fakes, poison).end()
    having(fakes, poison).end()
    [output] = engine.step()
    assert isinstance(output.error, ReplicaLost) and output.outputs[0].finish_reason == "error"
    other = engine.add_request([1, 2, 3], WHOLE)
    having(fakes, other).tell(other)
    [output] = engine.step()
    assert output.error is None and output.prompt_token_ids == [1, 2, 3] and not engine.has_unfinished()


def test_an_adapter_goes_where_its_requests_go(engine: Any, fakes: list[Fake]) -> None:
    """Once to each replica, to one that takes over from a lost one too."""

    def arriving(fake: Fake) -> list[list[int]]:
        return [list(message[3].arriving) for message in fake.sent if message[0] == "add"]

    adapter = Adapter(LoRARequest("a", 1, "somewhere"), 7, {})
    for name in "ab":
        engine.submit([Request(name, [1, 2, 3], WHOLE, adapter=adapter)])
    first = having(fakes, "a")
    assert first is having(fakes, "b") and arriving(first) == [[7], []]
    first.end()
    second = having(fakes, "a")
    assert second is having(fakes, "b") and arriving(second) == [[7], []]


def test_a_stream_is_not_begun_again(engine: Any, fakes: list[Fake]) -> None:
    stream = engine.add_request([1, 2, 3], WHOLE.clone(output_kind=RequestOutputKind.DELTA))
    whole = engine.add_request([1, 2, 3, 4], WHOLE)
    fake = having(fakes, stream)
    fake.tell(stream, finished=False)
    fake.end()
    first, last = engine.step()
    assert first.error is None and isinstance(last.error, ReplicaLost) and last.request_id == stream
    having(fakes, whole).tell(whole)
    assert [output.request_id for output in engine.step()] == [whole]


def test_news_of_the_lost_are_nobodys(engine: Any, fakes: list[Fake]) -> None:
    """What a replica had sent before it was given up must not end a request that another one computes now."""
    request_id = engine.add_request([1, 2, 3], WHOLE)
    fake = having(fakes, request_id)
    fake.end()
    fake.tell(request_id)
    assert engine.has_unfinished() and not engine.step()
    having(fakes, request_id).tell(request_id)
    assert len(engine.step()) == 1


def test_what_waits_here(engine: Any, fakes: list[Fake]) -> None:
    """Each replica has three at once; the others wait, can be aborted, and end when all replicas are lost."""
    ids = [engine.add_request([place], WHOLE) for place in range(12)]
    given = [request_id for fake in fakes for request_id in fake.has]
    assert len(given) == 9 and engine.load.waiting == 3
    waiting = [request_id for request_id in ids if request_id not in given]
    engine.abort(waiting[0])
    [output] = engine.step()
    assert output.request_id == waiting[0] and output.outputs[0].finish_reason == "abort"
    done = having(fakes, given[0])
    for request_id in list(done.has):
        done.tell(request_id)
    assert sum(len(fake.has) for fake in fakes) == 11, "it takes what waits for others"
    for fake in fakes:
        fake.end()
    outputs = engine.step()
    assert {output.request_id for output in outputs} == {*ids} - {waiting[0]} and not engine.has_unfinished()
    assert sum(output.error is not None for output in outputs) == 8
    with pytest.raises(ReplicaLost, match="no replica is left"):
        engine.add_request([1], WHOLE)


def test_too_large_for_a_pool(engine: Any) -> None:
    with pytest.raises(ValueError, match="need 17 pages"):
        engine.submit([_request(engine, [1] * 60, 8)])


def _request(engine: Any, prompt: list[int], max_tokens: int) -> Any:
    request = engine.intake.request(prompt, WHOLE)
    request.max_tokens = max_tokens
    return request
