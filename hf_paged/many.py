"""generate_many and stream: lists of prompts, and text as it comes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

from tqdm import tqdm
from transformers import GenerationConfig

from hf_paged.engine.front import FrontEngine
from hf_paged.engine.intake import Prompt
from hf_paged.engine.request import Request
from hf_paged.lora.request import LoRARequest, one_each
from hf_paged.outputs import RequestOutput
from hf_paged.sampling_params import RequestOutputKind, SamplingParams

Sampling = SamplingParams | GenerationConfig | None
Lora = LoRARequest | Sequence[LoRARequest | None] | None
"""One adapter for all prompts, or one or None per prompt."""


def make_requests(
    engine: FrontEngine,
    lm: Any,
    prompts: Sequence[Prompt],
    sampling: Sampling | Sequence[Sampling],
    kind: RequestOutputKind,
    lora_request: Lora = None,
) -> list[Request]:
    """A request per prompt, or an error that says which prompt is wrong; nothing is submitted."""
    prompts = list_prompts(prompts)
    if isinstance(sampling, list | tuple):
        if len(sampling) != len(prompts):
            raise ValueError(
                f"{len(sampling)} sampling parameters for {len(prompts)} prompts: give one, or one per prompt"
            )
        each = list(sampling)
    else:
        each = [sampling] * len(prompts)
    adapters = one_each(lora_request, len(prompts))
    made: dict[int, SamplingParams] = {}  # one copy per object given, however many prompts share it
    requests = []
    for place, (prompt, params, adapter) in enumerate(zip(prompts, each, adapters, strict=True)):
        try:
            if isinstance(params, SamplingParams):
                if id(params) not in made:
                    made[id(params)] = params.clone(output_kind=kind)
                own = made[id(params)]
            elif params is None or isinstance(params, GenerationConfig):
                length = len(engine.intake.tokenize(prompt)[1])
                own = _from_config(lm, params, length).clone(output_kind=kind)
            else:
                raise TypeError(f"sampling must be SamplingParams or GenerationConfig, got {type(params).__name__}")
            request = engine.intake.request(prompt, own, lora_request=adapter)
            engine.check(request)
        except (TypeError, ValueError, FileNotFoundError) as error:
            if len(prompts) == 1:
                raise
            raise type(error)(f"prompt {place}: {error}") from error
        requests.append(request)
    return requests


def list_prompts(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts as a list, or a TypeError that says where one was forgotten."""
    if isinstance(prompts, str | dict):
        prompts = [prompts]
    prompts = list(prompts)
    if prompts and all(isinstance(prompt, int) for prompt in prompts):
        raise TypeError("prompts is one list of token ids: put it in a list, [[1, 2, 3]]")
    if prompts and all(isinstance(prompt, dict) and "role" in prompt for prompt in prompts):
        raise TypeError("prompts is one chat: put it in a list, [messages]")
    return prompts


def _from_config(lm: Any, config: GenerationConfig | None, prompt_tokens: int) -> SamplingParams:
    """A GenerationConfig completed by the model's own and by transformers' defaults, as `generate` would."""
    no_length = all(
        c is None or (c.max_length is None and c.max_new_tokens is None) for c in (config, lm.generation_config)
    )
    full, _ = lm._prepare_generation_config(config)
    if no_length:
        full.max_length = None
    return SamplingParams.from_generation_config(full, prompt_tokens=prompt_tokens).clone(ignore_eos=True)


def generate_many(
    engine: FrontEngine, requests: list[Request], progress: bool | None, what: str = "generate"
) -> list[RequestOutput]:
    """Runs requests to their end. Outputs come back in the order of the requests; `what` names the progress bar."""
    outputs: dict[str, RequestOutput] = {}
    bar = Progress(engine, len(requests), progress, what)
    with closing(bar), closing(engine.run(requests)) as running:  # type: ignore[type-var]
        for output in running:
            outputs[output.request_id] = output
            bar.done(output)
    return [outputs[request.request_id] for request in requests]


def stream_text(engine: FrontEngine, request: Request) -> Iterator[str]:
    """The text of one request as it grows; the pieces joined are its final text."""
    with closing(engine.run([request])) as running:  # type: ignore[type-var]
        for output in running:
            if output.error is not None:
                raise output.error
            for completion in output.outputs:
                if completion.text:
                    yield completion.text


class Progress:
    """A bar of requests done, tokens per second in and out, running and waiting sequences, and pool use.

    Args:
        show: None shows it on a terminal only.
    """

    def __init__(self, engine: FrontEngine, total: int, show: bool | None, what: str) -> None:
        hidden = not (sys.stderr.isatty() if show is None else show)
        self._engine = engine
        self._bar = tqdm(total=total, disable=hidden, unit="req", desc=what, dynamic_ncols=True)
        self._start = self._last = time.monotonic()
        self._in, self._out = engine.stats.prompt_tokens, engine.stats.generation_tokens
        if not hidden:
            engine.observers.append(self._tick)

    def done(self, output: RequestOutput) -> None:
        if output.finished:
            self._bar.update()

    def close(self) -> None:
        if self._tick in self._engine.observers:
            self._engine.observers.remove(self._tick)
        self._bar.close()

    def _tick(self, record: Any) -> None:
        now = time.monotonic()
        if now - self._last < 0.2:
            return
        self._last = now
        stats, elapsed = self._engine.stats, now - self._start
        load = self._engine.load
        self._bar.set_postfix_str(
            f"{(stats.prompt_tokens - self._in) / elapsed:.0f} tok/s in, "
            f"{(stats.generation_tokens - self._out) / elapsed:.0f} out, "
            f"{load.running} running, {load.waiting} waiting, pool {100 * load.active_pages / load.num_pages:.0f}%"
        )
