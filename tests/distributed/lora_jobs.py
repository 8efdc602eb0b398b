"""What ranks do in `test_lora_ranks.py`; `jobs.py` runs them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from families import make_prompts
from jobs import OPTIONS, attempt, family_model, tokens

import hf_paged
from hf_paged import LoRARequest, SamplingParams
from hf_paged.distributed.groups import TensorParallel, join
from hf_paged.distributed.shard import shard

FAMILIES = ("Llama", "Llama, one key head", "Phi3", "DeepseekV3")
PROMPTS = make_prompts([5, 23, 70, 11, 9, 30], seed=6)
MIX = ["a", None, "b", "c", "b", "a"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
ADAPTED = OPTIONS | {"enable_lora": True, "max_loras": 2, "max_cpu_loras": 3}


def adapters_of(family: str, folder: str) -> dict[str | None, LoRARequest]:
    return {name: LoRARequest(name, i, str(Path(folder, family, name))) for i, name in enumerate("abc", start=1)}


def said(model: Any, adapters: dict[str | None, LoRARequest]) -> list[list[int]]:
    """By several adapters, more than fit in a step, and none."""
    found = tokens(model.generate_many(PROMPTS, GREEDY, lora_request=[adapters.get(name) for name in MIX]))
    assert model.engine.scheduler.num_active_pages == 0
    return found


def adapted(parallel: TensorParallel, out: Path, folder: str) -> dict[str, Any]:
    """Layers fused and not, shared by the ranks and by stages; and two replicas."""
    found: dict[str, Any] = {}
    for family in FAMILIES:
        adapters = adapters_of(family, folder)
        model = hf_paged.wrap(shard(family_model(family), parallel), fuse_linear=family != "Llama", **ADAPTED)
        found[family] = said(model, adapters)
        found[f"{family}, plain"] = tokens(model.generate_many(PROMPTS, GREEDY))
        if family == "Llama":
            found |= hot(model, adapters, out)
        hf_paged.unwrap(model)
    options = ADAPTED | {"fuse_linear": True}
    model = hf_paged.load(Path(folder, "gptq"), device="cpu", tensor_parallel_size=parallel.size, **options)
    found["gptq"] = said(model, adapters_of("gptq", folder))
    stages = join(1, "cpu", timeout_s=60, stages=2)
    model = hf_paged.wrap(shard(family_model("Llama"), stages), **ADAPTED)
    found["stages"] = said(model, adapters_of("Llama", folder))
    model = hf_paged.wrap(family_model("Llama"), **ADAPTED)  # a replica on each
    requests = [adapters_of("Llama", folder).get(name) for name in MIX]
    found["spread"] = tokens(model.generate_many(PROMPTS, GREEDY, spread=True, lora_request=requests))
    assert model.engine.stats.generation_tokens < len(PROMPTS) * 6
    model = hf_paged.wrap(shard(family_model("Llama"), parallel), **ADAPTED)
    said(model, adapters_of("Llama", folder))
    other = adapters_of("Llama", folder)["ca"[torch.distributed.get_rank()]]  # of those that it has
    found["divergence"] = attempt(lambda: model.generate_many(PROMPTS, GREEDY, lora_request=other))
    return found


def hot(model: Any, adapters: dict[str | None, LoRARequest], out: Path) -> dict[str, Any]:
    """Adapters that are missing, change and go."""
    rank, engine = torch.distributed.get_rank(), model.engine
    nowhere = LoRARequest("nowhere", 8, "/nowhere")
    found: dict[str, Any] = {
        "nowhere": attempt(lambda: model.generate_many(PROMPTS, GREEDY, lora_request=nowhere)),
        "steps": engine.stats.steps,
    }
    # Rank 0 alone has this folder: the others are told what is in it.
    folder = Path(out, f"changing of {rank}")
    changing = LoRARequest("changing", 9, str(folder))
    if rank == 0:
        shutil.copytree(adapters["a"].lora_path, folder)
    found["before"] = tokens(model.generate_many(PROMPTS, GREEDY, lora_request=changing))
    if rank == 0:
        shutil.rmtree(folder)
        shutil.copytree(adapters["b"].lora_path, folder)
    again = LoRARequest("changing", 9, str(folder), load_inplace=True)
    found["changed"] = tokens(model.generate_many(PROMPTS, GREEDY, lora_request=again))
    found["known"] = engine.list_loras()
    found["removed"] = engine.remove_lora(9), engine.remove_lora(9), engine.list_loras()
    return found


def adapted_compiled(parallel: TensorParallel, out: Path, folder: str) -> dict[str, Any]:
    options = ADAPTED | {"compile": "layers", "fuse_linear": True}
    model = hf_paged.wrap(shard(family_model("Llama"), parallel), **options)
    adapters = adapters_of("Llama", folder)
    found = {"Llama": said(model, adapters)}
    assert model.engine.executor._runner.compiled is not None, "compiling failed"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model.generate_many(PROMPTS[:1], GREEDY.clone(max_tokens=1), lora_request=adapters["b"])
    calls = {event.key: event.count for event in profile.key_averages()}
    layers = model.config.num_hidden_layers
    assert calls["hf_paged::all_reduce_add"] == 2 * layers, "the residual stream is added within the sums"
    assert calls["hf_paged::add_adapters"] == 4 * layers, "fused layers are given their parts together"
    return found


JOBS = {"adapted": adapted, "adapted_compiled": adapted_compiled}
