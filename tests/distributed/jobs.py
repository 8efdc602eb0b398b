"""What ranks do in `test_parallel.py` and others; run by `ranks.py`, one process per rank."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "models")]

import torch
from families import make_model, make_prompts

import hf_paged
from hf_paged import SamplingParams
from hf_paged.distributed.groups import TensorParallel, join
from hf_paged.distributed.shard import shard

FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Llama, one key head": {"num_key_value_heads": 1},
    "Llama, tied, odd vocabulary, biases": {
        "tie_word_embeddings": True, "vocab_size": 161, "attention_bias": True, "mlp_bias": True,
    },
    "Qwen3": {},
    "Gemma2": {},
    "Gemma3": {},
    "Phi3": {},
    "Mixtral": {},
    "Qwen3Moe": {},
    "DeepseekV3": {},
}  # fmt: skip
OPTIONS = {"num_pages": 64, "page_size": 8, "max_num_batched_tokens": 48, "max_num_seqs": 8}
PROMPTS = make_prompts([5, 23, 70, 11])
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=2)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.9, max_tokens=8, ignore_eos=True, seed=7, n=2)


def family_model(name: str) -> Any:
    return make_model(name.partition(",")[0], **FAMILIES[name])


def generate(model: Any) -> dict[str, Any]:
    """Tokens, greedy and sampled, and log-probabilities."""
    greedy = model.generate_many(PROMPTS, GREEDY)
    sampled = model.generate_many(PROMPTS, SAMPLED)
    assert model.engine.scheduler.num_active_pages == 0
    return {
        "greedy": [output.outputs[0].token_ids for output in greedy],
        "sampled": [[one.token_ids for one in output.outputs] for output in sampled],
        "logprobs": [
            [{token: entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs]
            for output in greedy
        ],
    }


def families(parallel: TensorParallel, out: Path) -> dict[str, Any]:
    found = {}
    for name in FAMILIES:
        if "one key head" not in name and parallel.size > 2 and name != "Llama":
            continue
        model = hf_paged.wrap(shard(family_model(name), parallel), **OPTIONS)
        found[name] = generate(model)
        hf_paged.unwrap(model)
    return found


JOBS: dict[str, Callable[..., Any]] = {"families": families}


def main(job: str, out: str, *args: str) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    result = JOBS[job](join(size, "cpu", timeout_s=60), Path(out), *args)
    Path(out, f"{rank}.pickle").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
