"""TrainerGeneration: what a TRL trainer asks for completions, in the place and with the contract of its vLLM object."""

from __future__ import annotations

import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

from torch import nn

from hf_paged import many
from hf_paged.distributed.spread import gather, generate_spread, num_processes
from hf_paged.engine.engine import Engine
from hf_paged.integrations.trl.gather import gathered
from hf_paged.integrations.trl.sampling import sampling_params
from hf_paged.integrations.trl.shadow import Shadow
from hf_paged.integrations.trl.support import autocast_dtype, is_sharded
from hf_paged.model.exact_forward import ExactForward
from hf_paged.model.introspect import causal_lm
from hf_paged.outputs import RequestOutput
from hf_paged.sampling_params import RequestOutputKind, SamplingParams
from hf_paged.state import PagedState

logger = logging.getLogger(__name__)

Rollout = tuple[list[list[int]], list[list[int]], list[list[list[float]]], list[list[list[int]]]]


class TrainerGeneration:
    """Completions for one trainer, from its own parameters: there is nothing to copy or to sync.

    Args:
        trainer: a TRL trainer; `attach` has checked it.
        state: what makes the model's engine, at the first rollout.
        sleep: give the engine's memory back after every rollout; None: on a GPU.
        shadow: as in `attach`.
    """

    def __init__(
        self, trainer: Any, state: PagedState, *, sleep: bool | None = None, shadow: bool | None = None
    ) -> None:
        self.replaced: dict[str, Any] = {}
        """The trainer's attributes that `attach` replaced, for `detach`."""
        self.exact: list[ExactForward] = []
        """Forwards that were made exact, until `close`."""
        self._trainer = trainer
        self._state = state
        on_gpu = trainer.accelerator.device.type == "cuda"
        self._sleep = on_gpu if sleep is None else sleep
        dtype = autocast_dtype(trainer) if (on_gpu if shadow is None else shadow) else None
        self._shadow = Shadow(dtype) if dtype is not None and not is_sharded(trainer) else None

    # ---- what TRL calls ------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: list[list[int]],
        images: list[Any] | None = None,
        num_generations: int = 1,
        profiler: AbstractContextManager[Any] | None = None,
    ) -> Rollout:
        """One completion for every prompt. Equal prompts are computed once and sampled as often as they occur.

        Args:
            prompts: token ids, repeated as often as completions are wanted.
            images: must be None.
            num_generations: how often TRL's sampler repeats prompts; what counts is how often they really occur.
            profiler: entered while generating.

        Returns:
            (prompts, completions, log-probabilities, token ids), in the prompts' order. A completion ends with its
            end-of-sequence token if it has one. The last two are `[B][T][1]`, for the sampled tokens: log-probabilities
            after temperature, over the full vocabulary.

        Raises:
            ValueError: images; or a prompt that does not fit the model or the page pool. Nothing was generated.
        """
        if images is not None and any(image is not None for image in images):
            raise ValueError("hf_paged generates from text: train with images on the stock path, without attach()")
        start = time.monotonic()
        with profiler or nullcontext(), self._awake() as engine:
            completions = self._complete(engine, prompts)
        ids = [ids for ids, _ in completions]
        logger.info("%d completions, %d tokens in %.2f s", len(ids), sum(map(len, ids)), time.monotonic() - start)
        return prompts, ids, [[[p] for p in logprobs] for _, logprobs in completions], [[[i] for i in c] for c in ids]

    def sync_weights(self) -> None:
        """Says that the weights changed. They are the trainer's own: nothing is moved."""
        engine = self._state.made
        if engine is not None:
            with gathered(self._trainer.model_wrapped):  # it may look at them
                engine.weights_updated()

    @property
    def llm(self) -> Any:
        """For TRL's tool loop, which asks vLLM's object how long a sequence may be."""
        with self._ready() as model:
            length = self._state.engine(model).intake.max_model_len
        return SimpleNamespace(llm_engine=SimpleNamespace(model_config=SimpleNamespace(max_model_len=length)))

    # ---- for others ----------------------------------------------------------------------------------------

    def sampling_params(self, prompt_tokens: int, n: int) -> SamplingParams:
        """The trainer's sampling as it is now, for a prompt of `prompt_tokens` and `n` completions.

        Raises:
            ValueError, TypeError: something that paged generation cannot do; the message names it.
        """
        return sampling_params(self._trainer, causal_lm(self._trainer.model), prompt_tokens=prompt_tokens, n=n)

    def close(self) -> None:
        """Gives the engine's memory back, and the trainer its own forwards."""
        for forward in self.exact:
            forward.remove()
        self.exact = []
        self._state.drop_engine()

    # ---- one rollout ---------------------------------------------------------------------------------------

    @contextmanager
    def _ready(self) -> Iterator[nn.Module]:
        """The trainer's model as a rollout needs it: parameters whole, in the precision that training computes in."""
        trainer = self._trainer
        lm = causal_lm(trainer.model)
        with ExitStack() as stack:
            stack.enter_context(gathered(trainer.model_wrapped))
            stack.enter_context(_plain_forward(lm))
            if self._shadow is not None:
                stack.enter_context(self._shadow.cast(lm))
            stack.enter_context(trainer.accelerator.autocast())
            yield trainer.model

    @contextmanager
    def _awake(self) -> Iterator[Engine]:
        with self._ready() as model:
            engine = self._state.engine(model)
            try:
                yield engine
            finally:
                if self._sleep and not engine.has_unfinished():
                    engine.sleep()

    def _complete(self, engine: Engine, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
        """(token ids, their log-probabilities) for each prompt, in their order."""
        if not self._spreads():
            return self._complete_all(engine, prompts, many.generate_many)
        everyone = gather(prompts)
        generate = functools.partial(generate_spread, self._trainer.model)
        completions = self._complete_all(engine, list(itertools.chain(*everyone)), generate)
        before = sum(map(len, everyone[: self._trainer.accelerator.process_index]))
        return completions[before : before + len(prompts)]

    def _spreads(self) -> bool:
        """Whether all processes share out what all of them want. Those with tools of their own come to generate as
        often as these need, each for itself; so do trainers that choose by chance what to sample."""
        trainer = self._trainer
        alone = getattr(trainer, "tools", None) or getattr(trainer, "rollout_func", None)
        return num_processes() > 1 and hasattr(trainer, "num_generations") and not alone

    def _complete_all(
        self, engine: Engine, prompts: list[list[int]], generate: Callable[..., list[RequestOutput]]
    ) -> list[tuple[list[int], list[float]]]:
        """The same by `generate(engine, requests, progress)`."""
        places: dict[tuple[int, ...], list[int]] = {}
        for place, prompt in enumerate(prompts):
            places.setdefault(tuple(prompt), []).append(place)
        most = -(-len(prompts) // num_processes())  # of one prompt's samples in one request: all have as much to do
        pieces = [
            (list(prompt), first, where[first : first + most])
            for prompt, where in places.items()
            for first in range(0, len(where), most)
        ]
        pieces.sort(key=lambda piece: piece[1])  # prompts draw their seeds in order, however many pieces there are
        sampling = [self.sampling_params(len(prompt), len(where)) for prompt, _, where in pieces]
        unique = [prompt for prompt, _, _ in pieces]
        lm = causal_lm(self._trainer.model)
        requests = many.make_requests(engine, lm, unique, sampling, RequestOutputKind.FINAL_ONLY)
        seeds: dict[tuple[int, ...], int] = {}
        for request, (prompt, first, _) in zip(requests, pieces, strict=True):
            request.seed = seeds.setdefault(tuple(prompt), request.seed)
            for (
                sequence
            ) in request.sequences:  # noise is of seed and index: samples of a prompt are others in each piece
                sequence.index += first
        outputs = generate(engine, requests, progress=False)
        found: dict[int, tuple[list[int], list[float]]] = {}
        for (_, _, where), output in zip(pieces, outputs, strict=True):
            if output.error is not None:
                raise output.error
            for place, completion in zip(where, output.outputs, strict=True):
                assert completion.token_logprobs is not None
                found[place] = completion.token_ids, completion.token_logprobs
        return [found[place] for place in range(len(prompts))]


@contextmanager
def _plain_forward(lm: Any) -> Iterator[None]:
    """Within it, the model's forward without the autocast that accelerate wraps around it for good: that one keeps the
    weights' casts for as long as an outer autocast lasts, and CUDA graphs would read them after they are gone."""
    if "_original_forward" not in lm.__dict__:
        yield
        return
    prepared, lm.forward = lm.forward, lm._original_forward
    try:
        yield
    finally:
        lm.forward = prepared
