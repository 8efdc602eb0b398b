"""What ranks do in `test_lora_ranks.py`; `jobs.py` runs them."""

from __future__ import annotations

import pickle
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
    """Layers fused and not, shared by the ranks and by stages."""
    found: dict[str, Any] = {}
    for family in FAMILIES:
        adapters = adapters_of(family, folder)
        model = hf_paged.wrap(shard(family_model(family), parallel), fuse_linear=family != "Llama", **ADAPTED)
        found[family] = said(model, adapters)
        found[f"{family}, plain"] = tokens(model.generate_many(PROMPTS, GREEDY))
        if family == "Llama":
            found |= hot(model, adapters, out)
        hf_paged.unwrap(model)
    stages = join(1, "cpu", timeout_s=60, stages=2)
    model = hf_paged.wrap(shard(family_model("Llama"), stages), **ADAPTED)
    found["stages"] = said(model, adapters_of("Llama", folder))
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
    found = {"Llama": said(model, adapters_of("Llama", folder))}
    assert model.engine.executor._runner.compiled is not None, "compiling failed"
    return found


def other_adapters(parallel: TensorParallel, out: Path, folder: str) -> dict[str, Any]:
    """Each rank asks for another one, of those that it has."""
    adapters, rank = adapters_of("Llama", folder), torch.distributed.get_rank()
    model = hf_paged.wrap(shard(family_model("Llama"), parallel), **ADAPTED)
    said(model, adapters)
    asked = adapters["ca"[rank]]
    found = {"divergence": attempt(lambda: model.generate_many(PROMPTS, GREEDY, lora_request=asked))}
    Path(out, f"{rank}.pickle").write_bytes(pickle.dumps(found))
    return found


JOBS = {"adapted": adapted, "adapted_compiled": adapted_compiled, "other_adapters": other_adapters}
