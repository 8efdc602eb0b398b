"""One rank of a distributed run on the CPU, for `test_distributed.py`. Writes what it
found to `{rank}.json`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from peft import LoraConfig
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from trainers import OPTIONS, make_trainer

from hf_paged.integrations.trl import attach

STEPS, PROMPTS = 3, [[5, 6, 7], [5, 6, 7], list(range(20, 50))]


def train(out: Path, rank: int, options: dict[str, Any]) -> dict[str, Any]:
    """TRL's own loop, DDP around the model."""
    seen: list[list[list[int]]] = []

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.append(completion_ids)
        return [float(len(set(ids))) for ids in completion_ids]

    options |= {"max_steps": STEPS, "per_device_train_batch_size": 2, "reward": reward}
    trainer = attach(make_trainer("GRPO", out, **options), **OPTIONS)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    name = "sampling/sampling_logp_difference/max"
    return {
        "wrapper": type(trainer.model_wrapped).__name__,
        "differences": [row[name] for row in trainer.state.log_history if name in row],
        "completions": seen,
        "changed": sum(not torch.equal(before[name], after[name]) for name in before),
        "weights": float(sum(value.double().abs().sum() for value in after.values())),
    }


def train_sharded(out: Path, rank: int, options: dict[str, Any]) -> dict[str, Any]:
    """A loop of our own over an FSDP 2 model: accelerate shards none on a CPU. Ranks generate for different lengths,
    and the rollout of step 1 is broken off."""
    trainer = make_trainer("GRPO", out, **options)
    lm = trainer.model.get_base_model() if "peft" in options else trainer.model
    for layer in lm.model.layers:
        fully_shard(layer)
    trainer.model_wrapped = model = fully_shard(trainer.model)
    attach(trainer, **OPTIONS)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    differences, broken, sharded = [], 0, []
    prompts = PROMPTS[: 2 + rank]
    for step in range(STEPS):
        if step == 1:
            handle = lm.model.layers[1].register_forward_hook(fail)
            try:
                trainer.vllm_generation.generate(prompts)
            except Broken:
                broken += 1
            handle.remove()
            sharded.append(all(isinstance(p, DTensor) for p in model.parameters()))
        _, completions, logprobs, _ = trainer.vllm_generation.generate(prompts)
        sharded.append(all(isinstance(p, DTensor) for p in model.parameters()))
        ids, start = torch.tensor([prompts[0] + completions[0]]), len(prompts[0])
        found = model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1).gather(1, ids[0, start:, None])[:, 0]
        own = torch.tensor([value for (value,) in logprobs[0]])
        differences.append(float((found.detach() - own).abs().max()))
        found.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        trainer.vllm_generation.sync_weights()
    return {"differences": differences, "broken": broken, "sharded": sharded}


GROUPS = [[[5, 6, 7]] * 5 + [[8, 9]], [[5, 6, 7]] * 3 + [list(range(20, 50)), [4] * 9, [8, 9]]]
"""Prompts of two ranks; the first is sampled more often than one of them samples at all."""


def rollout(out: Path, rank: int, options: dict[str, Any]) -> dict[str, Any]:
    """Each asks for completions of its own prompts, and gets what one process would have drawn for all."""
    trainer = attach(make_trainer("GRPO", out, generation_kwargs={"seed": 11}), **OPTIONS)
    generation = trainer.vllm_generation
    world = int(os.environ.get("WORLD_SIZE", 1))
    prompts = GROUPS[rank] if world > 1 else GROUPS[0] + GROUPS[1]
    found: dict[str, Any] = {"completions": generation.generate(prompts)[1]}
    found["tokens"] = generation._state.made.stats.generation_tokens
    if rank:
        handle = trainer.model.model.layers[1].register_forward_hook(fail)
    try:
        generation.generate(prompts)
    except Exception as error:
        found["error"] = type(error).__name__, str(error)
    if rank:
        handle.remove()
    found["again"] = generation.generate(prompts)[1]
    return found


class Broken(Exception):
    """What a layer raises in the middle of a rollout."""


def fail(*_: Any) -> None:
    raise Broken


def main(strategy: str, adapter: str, out: str) -> None:
    rank = int(os.environ.get("RANK", 0))
    lora = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"])
    run = {"ddp": train, "fsdp2": train_sharded, "rollout": rollout}[strategy]
    result = run(Path(out) / str(rank), rank, {"peft": lora} if adapter == "lora" else {})
    Path(out, f"{rank}.json").write_text(json.dumps(result), encoding="utf-8")


main(*sys.argv[1:])
