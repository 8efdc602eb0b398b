"""What ranks that have whole experts do in `test_expert_parallel.py`; jobs of `jobs.py`."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import transformers
from families import make_model
from jobs import OPTIONS, attempt, generate
from transformers.distributed import DistributedConfig

import hf_paged
from hf_paged.bench import parallel as bench
from hf_paged.bench.models import SHAPES
from hf_paged.distributed.groups import TensorParallel, join
from hf_paged.distributed.shard import shard

FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {},
    "Qwen3Moe": {"mlp_only_layers": [1]},  # a dense layer between
    "DeepseekV3": {},  # shared experts, and a first layer without any
    "GptOss": {},  # biases, and no plan for attention
}
VARIANTS: dict[str, dict[str, Any]] = FAMILIES | {
    "Mixtral, one after the other": {"experts_implementation": "eager"},
    "Mixtral, batched": {"experts_implementation": "batched_mm"},
    "GptOss, batched": {"experts_implementation": "batched_mm"},
}
CHECKPOINTS: dict[str, str | None] = {
    "Mixtral": "auto",
    "Qwen3Moe": "auto",
    "DeepseekV3": "auto",
    "GptOss": "auto",
    "quantised": "auto",
    "quantised Mixtral": None,
}
"""What they are loaded with, by folder."""


def mixture(family: str) -> Any:
    return make_model(family.partition(",")[0], **VARIANTS[family] | {"num_hidden_layers": 4})


def generate_and_weigh(model: Any) -> dict[str, Any]:
    """Tokens, and the bytes of a layer's experts."""
    found = generate(model)
    held = {name: p.nbytes for name, p in model.named_parameters() if ".experts." in name}
    layers = {name.partition("experts")[0] for name in held}
    hf_paged.unwrap(model)
    return found | {"bytes": sum(held.values()) / max(len(layers), 1), "modules": len(layers)}


def families(parallel: TensorParallel, out: Path) -> dict[str, Any]:
    """On all ranks, and where there are four, on two stages of two."""
    places = {1: parallel}
    if parallel.size == 4:
        places[2] = join(2, "cpu", timeout_s=60, stages=2)
    found = {}
    for stages, place in places.items():
        for family in VARIANTS:
            model = shard(mixture(family), place, enable_expert_parallel=True)
            found[family, stages] = generate_and_weigh(hf_paged.wrap(model, **OPTIONS))
    return found


def checkpoints(parallel: TensorParallel, out: Path, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    options = {"tensor_parallel_size": parallel.size, "device": "cpu"} | OPTIONS
    for name, quantization in CHECKPOINTS.items():
        load = {"quantization": quantization} | options
        found[name] = generate_and_weigh(hf_paged.load(Path(folder, name), enable_expert_parallel=True, **load))
    whole = {"tensor_parallel_size": parallel.size, "enable_expert_parallel": True}
    for name in ("dense", "three experts", "no experts"):
        found[name] = attempt(lambda name=name: hf_paged.load(Path(folder, name), device="cpu", **whole))
    found["parts of biased experts"] = attempt(lambda: hf_paged.load(Path(folder, "GptOss"), **options))
    spread = DistributedConfig(tp_size=parallel.size, ep_size=parallel.size)
    own = transformers.AutoModelForCausalLM.from_pretrained(Path(folder, "Mixtral"), distributed_config=spread)
    found["transformers' own"] = generate_and_weigh(hf_paged.wrap(own, **OPTIONS))
    return found


def compiled(parallel: TensorParallel, out: Path) -> dict[str, Any]:
    model = shard(mixture("Qwen3Moe"), parallel, enable_expert_parallel=True)
    hf_paged.wrap(model, compile="layers", fuse_linear=True, **OPTIONS)
    found = generate(model)
    assert model.engine.executor._runner.compiled is not None, "compiling failed"
    return found


def benchmark(_: TensorParallel, out: Path) -> str:
    """What the benchmark prints."""
    SHAPES["mixture"] = lambda: mixture("Qwen3Moe").config
    options = "--tp 2 --ep --batches 1,3 --context 20 --steps 2 --rounds 2 --dtype float32 --device cpu"
    with redirect_stdout(StringIO()) as printed:
        bench.main(["mixture", *options.split()])
    return printed.getvalue()


JOBS = {
    "expert_families": families,
    "expert_checkpoints": checkpoints,
    "expert_compiled": compiled,
    "expert_benchmark": benchmark,
}
