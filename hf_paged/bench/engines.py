"""The engines that a workload is timed on: ours, stock `generate`, transformers' continuous batching."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

import hf_paged
from hf_paged.bench.workloads import Workload
from hf_paged.cache.storage import page_bytes
from hf_paged.engine.executor import ModelExecutor

NO_EOS = -1
"""An end-of-sequence id that no token has."""


@dataclass(frozen=True)
class EngineRun:
    """One engine's time on one workload."""

    engine: str
    seconds: float
    tokens_out: int
    """Tokens that were asked for; what an engine computes beyond them is its own affair."""
    kv_bytes: int | None
    """Most bytes of keys and values held at once, where it can be told."""
    outputs: list[list[int]]
    """Token ids per prompt and sample, prompts in order, to compare engines by."""
    note: str = ""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens_out / self.seconds


def run_ours(model: Any, work: Workload) -> EngineRun:
    """hf_paged, its engine built and its prefix cache emptied beforehand."""
    hf_paged.wrap(model)
    try:
        params = [
            hf_paged.SamplingParams(
                n=work.n, temperature=float(work.n > 1), max_tokens=count, ignore_eos=True, detokenize=False, seed=0
            )
            for count in work.max_tokens
        ]
        model.generate_many([work.prompts[0][:8]], hf_paged.SamplingParams(max_tokens=2, detokenize=False))
        engine = model.engine
        engine.reset_prefix_cache()
        engine.scheduler.stats.peak_pages = 0
        start = time.perf_counter()
        outputs = model.generate_many(work.prompts, params, progress=False)
        seconds = time.perf_counter() - start
        executor = engine.executor
        assert isinstance(executor, ModelExecutor)
        one_page = page_bytes(executor.layout.layers, executor.page_size, executor.layout.kv_dtype)
        return EngineRun(
            "hf_paged",
            seconds,
            work.tokens_out,
            engine.scheduler.stats.peak_pages * one_page,
            [completion.token_ids for output in outputs for completion in output.outputs],
            note=f"{engine.scheduler.stats.peak_pages} pages of {executor.page_size}",
        )
    finally:
        hf_paged.unwrap(model)


def run_generate(model: Any, work: Workload, batch: int = 16) -> EngineRun:
    """Stock `generate`, prompts sorted by their length and batched: what can be known before generating."""
    order = sorted(range(len(work.prompts)), key=lambda i: len(work.prompts[i]))
    outputs: list[list[list[int]]] = [[] for _ in order]
    kv_bytes = 0
    start = time.perf_counter()
    for first in range(0, len(order), batch):
        chosen = order[first : first + batch]
        width = max(len(work.prompts[i]) for i in chosen)
        ids = torch.zeros(len(chosen), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chosen):
            ids[row, width - len(work.prompts[i]) :] = torch.tensor(work.prompts[i])
            mask[row, width - len(work.prompts[i]) :] = 1
        found = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max(work.max_tokens[i] for i in chosen),
            do_sample=work.n > 1,
            top_k=0,
            num_return_sequences=work.n,
            eos_token_id=NO_EOS,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
        layers = found.past_key_values.layers
        kv_bytes = max(kv_bytes, sum(layer.keys.nbytes + layer.values.nbytes for layer in layers))
        for row, tokens in enumerate(found.sequences[:, width:].tolist()):
            i = chosen[row // work.n]
            outputs[i].append(tokens[: work.max_tokens[i]])
    seconds = time.perf_counter() - start
    flat = [tokens for group in outputs for tokens in group]
    return EngineRun(
        "generate", seconds, work.tokens_out, kv_bytes, flat, note=f"sorted by prompt length, batches of {batch}"
    )


def run_continuous_batching(model: Any, work: Workload) -> EngineRun:
    """transformers' own continuous batching, with torch's attention."""
    before = model.config._attn_implementation
    config = GenerationConfig(
        max_new_tokens=max(work.max_tokens), do_sample=work.n > 1, top_k=0, eos_token_id=NO_EOS, pad_token_id=0
    )
    found: dict[str, list[int]] = {}
    try:
        start = time.perf_counter()
        with model.continuous_batching_context_manager(generation_config=config) as manager:
            for i, prompt in enumerate(work.prompts):
                for sample in range(work.n):
                    manager.add_request(
                        prompt, request_id=f"{i}-{sample}", max_new_tokens=work.max_tokens[i], eos_token_id=NO_EOS
                    )
            while len(found) < work.n * len(work.prompts):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    found[result.request_id] = list(result.generated_tokens)
                elif result is None and not manager.is_running():
                    raise RuntimeError("transformers' continuous batching stopped before it was done")
        seconds = time.perf_counter() - start
    finally:
        model.set_attn_implementation(before)
    outputs = [found[f"{i}-{sample}"] for i in range(len(work.prompts)) for sample in range(work.n)]
    return EngineRun("continuous batching", seconds, work.tokens_out, None, outputs, note=f"attention {before}")


ENGINES: dict[str, Callable[[Any, Workload], EngineRun]] = {
    "ours": run_ours,
    "generate": run_generate,
    "continuous-batching": run_continuous_batching,
}
