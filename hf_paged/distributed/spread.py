"""One list of requests over the replicas that torchrun, or accelerate, has started.

Each process has the whole list, each replica computes a share, and all processes get all outputs.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hf_paged import many
from hf_paged.distributed.errors import Divergence, PeerFailed, PeerLost
from hf_paged.distributed.groups import TIMEOUT_S, under_torchrun
from hf_paged.distributed.parcel import pack_output, unpack_output
from hf_paged.distributed.routing import Router
from hf_paged.distributed.shard import parallel_of
from hf_paged.engine.engine import Engine
from hf_paged.engine.request import Request
from hf_paged.model.introspect import causal_lm
from hf_paged.outputs import RequestOutput


def num_processes() -> int:
    """Of those that were started together and have met; 1 where there are no others."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(value: Any) -> list[Any]:
    """Every process' value, by rank. All of them call it.

    Raises:
        PeerLost: one of them is gone, or has not come within the group's timeout.
    """
    values: list[Any] = [None] * num_processes()
    try:
        dist.all_gather_object(values, value)
    except dist.DistError as error:
        raise PeerLost(f"another process ended or hangs, look for its own error: {error}") from error
    except RuntimeError as error:  # gloo's own
        raise PeerLost(f"another process ended, look for its own error: {error}") from error
    return values


def generate_spread(
    model: Any, engine: Engine, requests: list[Request], progress: bool | None, what: str = "generate"
) -> list[RequestOutput]:
    """As `many.generate_many`, each replica computing a share. All processes call it with the same requests.

    Requests get the ids and the seeds that they have on rank 0, so tokens do not depend on how many processes there
    are.

    Args:
        model: of the engine.
        progress: a bar of this process' own share.

    Raises:
        Divergence: the processes have other requests than rank 0.
        PeerFailed: another process failed; this one's share is done, and lost.
        PeerLost: another process is gone.
    """
    if under_torchrun() and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_S))
    if num_processes() == 1:
        return many.generate_many(engine, requests, progress, what)
    first = dist.get_rank() == 0
    told = gather((_fingerprint(requests), [(request.request_id, request.seed) for request in requests if first]))
    if odd := [str(rank) for rank, (fingerprint, _) in enumerate(told) if fingerprint != told[0][0]]:
        raise Divergence(
            f"rank {', '.join(odd)} has other prompts or parameters than rank 0: to spread them, every process must "
            "give the same list"
        )
    for request, (request_id, seed) in zip(requests, told[0][1], strict=True):
        request.request_id, request.seed = request_id, seed
    parallel = parallel_of(causal_lm(model))
    ranks = parallel.link.size if parallel is not None else 1
    share = shares(engine, requests, num_processes() // ranks)[dist.get_rank() // ranks]
    failure: BaseException | None = None
    outputs: list[RequestOutput] = []
    try:
        outputs = many.generate_many(engine, [requests[place] for place in share], progress, what)
    except BaseException as error:  # the others wait for what has become of it
        failure = error
    reason = None if failure is None else f"{type(failure).__name__}: {failure}"
    packed = [] if dist.get_rank() % ranks else [(p, pack_output(o)) for p, o in zip(share, outputs, strict=False)]
    try:
        everyone = gather((reason, packed))
    finally:
        if failure is not None:
            raise failure
    for rank, (reason, _) in enumerate(everyone):
        if reason is not None:
            raise PeerFailed(f"rank {rank} failed: {reason}")
    tokenizer = engine.intake.tokenizer
    decode = None if tokenizer is None else tokenizer.decode
    found = dict(pair for _, pairs in everyone for pair in pairs)
    return [unpack_output(found[place], request, decode) for place, request in enumerate(requests)]


def shares(engine: Engine, requests: Sequence[Request], replicas: int) -> list[list[int]]:
    """Which requests, by their places, each of the replicas computes: the same on all processes."""
    router = Router(
        replicas,
        page_size=engine.scheduler.page_size,
        num_pages=engine.scheduler.num_pages,
        max_num_seqs=sum(request.sampling.n for request in requests) + 1,  # nothing waits
    )
    adapters = {0: 0}  # by generation, numbers that are the same on all processes
    for place, request in enumerate(requests):
        n, adapter = request.sampling.n, adapters.setdefault(request.adapter_generation, len(adapters))
        router.add(str(place), (0, place), request.prompt_token_ids, n, request.max_tokens, adapter)
    found: list[list[int]] = [[] for _ in range(replicas)]
    while (taken := router.take()) is not None:
        found[taken[1]].append(int(taken[0]))
    return found


def _fingerprint(requests: list[Request]) -> int:
    """Alike in processes with the same prompts and parameters, and hardly ever otherwise."""
    told = [
        (tuple(r.prompt_token_ids), r.sampling.n, r.max_tokens, r.sampling.temperature, r.sampling.seed, r.adapter_name)
        for r in requests
    ]
    return zlib.crc32(repr(told).encode())
