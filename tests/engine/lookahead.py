"""What the tests of lookahead share: small real models, and a watch over what an engine launches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from models.families import make_prompts
from models.tiny_tokenizer import make_tokenizer
from simulator import check_nothing_left

import hf_paged
from hf_paged import RequestOutput, SamplingParams
from hf_paged.engine.batch import Batch
from hf_paged.engine.engine import Engine
from hf_paged.engine.executor import StepResult

OPTIONS = {"page_size": 8, "num_pages": 128, "max_num_seqs": 16}
PROMPTS = make_prompts([1, 5, 9, 17, 24])
TOKENIZER = make_tokenizer()


def greedy(max_tokens: int = 12, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **({"ignore_eos": True} | options))


def seeded(max_tokens: int = 12, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **({"seed": 5, "temperature": 1.3, "ignore_eos": True} | options))


def wrap(stock: Any, ahead: bool = True, **options: Any) -> Any:
    return hf_paged.wrap(copy.deepcopy(stock), **OPTIONS | options, tokenizer=TOKENIZER, async_scheduling=ahead)


def assert_landed(engine: Engine) -> None:
    """Nothing is left of any request: not in the queues, not in the pool, not in the air."""
    check_nothing_left(engine)
    assert not engine._held
    assert not engine._flights


@dataclass
class Watch:
    """What an engine launches."""

    batches: list[Batch] = field(default_factory=list)
    ahead: list[int] = field(default_factory=list)
    """Per launch, how many of its decodes went on from a token that was not known."""

    @classmethod
    def over(cls, engine: Engine) -> Watch:
        watch, launch = cls(), engine.executor.launch

        def watched(batch: Batch) -> Callable[[], StepResult]:
            watch.batches.append(batch)
            watch.ahead.append(sum(sequence.num_pending for sequence in batch.decodes))
            return launch(batch)

        engine.executor.launch = watched  # type: ignore[method-assign]
        return watch


def drain(engine: Engine, most: int = 300) -> dict[str, RequestOutput]:
    last: dict[str, RequestOutput] = {}
    for _ in range(most):
        if not engine.has_unfinished():
            return last
        last |= {output.request_id: output for output in engine.step()}
    raise AssertionError(f"not finished after {most} steps")


def told(output: RequestOutput) -> tuple[Any, ...]:
    """All that a caller sees of an output, but for times."""
    completions = [
        (c.index, c.token_ids, c.text, c.finish_reason, c.stop_reason, _values(c.logprobs)) for c in output.outputs
    ]
    error = None if output.error is None else (type(output.error), str(output.error))
    return completions, _values(output.prompt_logprobs), output.num_cached_tokens, error, output.finished


def _values(logprobs: Any) -> Any:
    if logprobs is None:
        return None
    return [
        None if entry is None else [(token, round(found.logprob, 4), found.rank) for token, found in entry.items()]
        for entry in logprobs
    ]
