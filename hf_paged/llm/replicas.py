"""`data_parallel_size`: replicas of what `EngineArgs` describe, and what stands for their model here."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from dataclasses import replace

import torch

from hf_paged import many
from hf_paged.distributed.replicas import start
from hf_paged.distributed.replicated import ReplicatedEngine
from hf_paged.engine.intake import Prompt
from hf_paged.llm.arguments import EngineArgs
from hf_paged.outputs import RequestOutput
from hf_paged.sampling_params import RequestOutputKind, SamplingParams


def load_replicas(args: EngineArgs, worker_extension_cls: type | str | None = None) -> ReplicatedModel:
    """`data_parallel_size` replicas, each with the next `tensor_parallel_size` GPUs.

    Raises:
        ValueError: there are not so many GPUs.
        ReplicaLost: one ended while it started.
        as `EngineArgs.load`.
    """
    size, ranks = args.data_parallel_size, args.tensor_parallel_size * args.pipeline_parallel_size
    on_gpu = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu")).type == "cuda"
    one = replace(args, data_parallel_size=1)
    handles = start(one.load, size, devices=_devices(size, ranks) if on_gpu else None, extension=worker_extension_cls)
    return ReplicatedModel(ReplicatedEngine(handles, args.engine_config().seed))


def _devices(size: int, ranks: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES is in each of `size` processes that have `ranks` GPUs each."""
    listed, count = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    visible = listed.split(",")[:count] if listed else [str(number) for number in range(count)]
    if size * ranks > len(visible):
        raise ValueError(
            f"data_parallel_size={size} replicas of {ranks} GPUs need {size * ranks}, and there are {len(visible)}"
        )
    return [",".join(visible[first : first + ranks]) for first in range(0, size * ranks, ranks)]


class ReplicatedModel:
    """Stands where a wrapped model would in a process that has none.

    Args:
        engine: the replicas; they end with this object.
    """

    def __init__(self, engine: ReplicatedEngine) -> None:
        self.engine = engine
        weakref.finalize(self, engine.close)  # at a program's end it runs while threads can still tell the replicas
        facts = engine.handles[0].facts.result()
        self.config, self.generation_config = facts.config, facts.generation_config

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams],
        *,
        progress: bool | None = None,
        lora_request: many.Lora = None,
    ) -> list[RequestOutput]:
        """As a wrapped model's."""
        requests = many.make_requests(self.engine, self, prompts, sampling, RequestOutputKind.FINAL_ONLY, lora_request)
        return many.generate_many(self.engine, requests, progress)

    def stop(self) -> None:
        """Ends the replicas."""
        self.engine.close()
