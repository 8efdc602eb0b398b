"""The engines that ours is compared with: stock `generate`, transformers' continuous batching, vLLM."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from hf_paged.bench.models import Subject, empty_model
from hf_paged.bench.run import Deadline, EngineRun, Settings, best_of
from hf_paged.bench.workloads import Workload

NO_EOS = -1
"""An end-of-sequence id that no token has."""
WARM_UP_TOKENS = 4
CPU_MEMORY = 0.15
"""Share of the host's memory for transformers' continuous batching."""


def _sampling(temperature: float) -> dict[str, Any]:
    """A temperature in the words of GenerationConfig."""
    return {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}


def run_generate(subject: Subject, work: Workload, settings: Settings) -> EngineRun:
    """Stock `generate`, prompts sorted by their length and batched: what can be known before generating."""
    model, device = subject.model, subject.device
    order = sorted(range(len(work.prompts)), key=lambda i: len(work.prompts[i]))
    batch = max(1, settings.generate_batch // work.n)
    kv_bytes = 0

    def generate(chosen: list[int], max_new_tokens: int, max_time: float | None = None) -> list[list[int]]:
        nonlocal kv_bytes
        width = max(len(work.prompts[i]) for i in chosen)
        ids = torch.zeros(len(chosen), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chosen):
            ids[row, width - len(work.prompts[i]) :] = torch.tensor(work.prompts[i])
            mask[row, width - len(work.prompts[i]) :] = 1
        found = model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            max_time=max_time,
            num_return_sequences=work.n,
            eos_token_id=NO_EOS,
            pad_token_id=0,
            return_dict_in_generate=True,
            **_sampling(work.temperature),
        )
        layers = found.past_key_values.layers
        kv_bytes = max(kv_bytes, sum(layer.keys.nbytes + layer.values.nbytes for layer in layers))
        return found.sequences[:, width:].tolist()

    def once(left: float | None) -> tuple[float, list[list[int]]]:
        outputs: list[list[list[int]]] = [[] for _ in order]
        deadline, start = Deadline(left), time.perf_counter()
        for first in range(0, len(order), batch):
            deadline.check()
            chosen = order[first : first + batch]
            rows = generate(chosen, max(max(work.lengths[i]) for i in chosen), deadline.left())
            for row, tokens in enumerate(rows):
                i, sample = chosen[row // work.n], row % work.n
                outputs[i].append(tokens[: work.lengths[i][sample]])
        deadline.check()
        return time.perf_counter() - start, [tokens for group in outputs for tokens in group]

    generate(order[:1], WARM_UP_TOKENS)
    result = best_of(settings, once)
    note = f"sorted by prompt length, batches of {batch * work.n}"
    return EngineRun("generate", kv_bytes=kv_bytes, note=note, **result)


def run_continuous_batching(subject: Subject, work: Workload, settings: Settings) -> EngineRun:
    """transformers' own continuous batching, its cache made and its graphs captured beforehand."""
    model = subject.model
    before = model.config._attn_implementation
    temperature = 0.0 if settings.cb_greedy else work.temperature
    config = GenerationConfig(
        max_new_tokens=max(map(max, work.lengths)), eos_token_id=NO_EOS, pad_token_id=0, **_sampling(temperature)
    )
    # Unless told, the cache takes most of the memory: that of a host is others' too.
    memory = ContinuousBatchingConfig(max_memory_percent=CPU_MEMORY) if subject.device.type == "cpu" else None
    used = before

    def once(left: float | None) -> tuple[float, list[list[int]]]:
        nonlocal used
        with model.continuous_batching_context_manager(config, continuous_batching_config=memory) as manager:
            try:
                used = model.config._attn_implementation
                _batched(manager, [("warm-up", work.prompts[0], WARM_UP_TOKENS)], Deadline(left))
                requests = [
                    (f"{i}-{sample}", prompt, length)
                    for i, (prompt, lengths) in enumerate(zip(work.prompts, work.lengths, strict=True))
                    for sample, length in enumerate(lengths)
                ]
                start = time.perf_counter()
                found = _batched(manager, requests, Deadline(left))
                return time.perf_counter() - start, [found[name] for name, _, _ in requests]
            except BaseException:
                manager.stop(hard_stop=True)  # leaving the context would wait for all requests to be done
                raise

    try:
        result = best_of(settings, once)
    finally:
        model.set_attn_implementation(before)
    note = f"attention {used}" + (", greedy" if settings.cb_greedy and work.temperature else "")
    return EngineRun("continuous-batching", note=note, **result)


def _batched(manager: Any, requests: list[tuple[str, list[int], int]], deadline: Deadline) -> dict[str, list[int]]:
    """Token ids by request id; the requests are (id, prompt, tokens to generate)."""
    found: dict[str, list[int]] = {}
    for name, prompt, length in requests:
        manager.add_request(prompt, request_id=name, max_new_tokens=length, eos_token_id=NO_EOS)
    while len(found) < len(requests):
        result = manager.get_result(timeout=1)
        deadline.check()
        if result is None and not manager.is_running():
            raise RuntimeError("transformers' continuous batching stopped before it was done")
        if result is not None and result.is_finished():
            if result.error:
                raise RuntimeError(str(result.error))
            found[result.request_id] = list(result.generated_tokens)
    return found


def run_vllm(subject: Subject, work: Workload, settings: Settings) -> EngineRun:
    """vLLM on the same shape with weights of its own making; its prefix cache is emptied before each run."""
    try:
        import vllm
    except ImportError as error:
        raise ImportError(f"vLLM cannot be imported ({error}): pip install vllm") from error

    config = subject.config
    subject.drop()
    config.architectures = [type(empty_model(config, subject.dtype, "meta")).__name__]
    longest = max(len(prompt) + max(lengths) for prompt, lengths in zip(work.prompts, work.lengths, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        llm = vllm.LLM(
            model=folder,
            load_format="dummy",
            dtype=str(subject.dtype).removeprefix("torch."),
            skip_tokenizer_init=True,
            max_model_len=min(max(4096, longest), config.max_position_embeddings),
        )
    requests = work.requests()
    prompts = [{"prompt_token_ids": prompt} for prompt, _, _ in requests]
    params = [
        vllm.SamplingParams(n=n, temperature=work.temperature, max_tokens=length, ignore_eos=True, detokenize=False)
        for _, n, length in requests
    ]

    def once(left: float | None) -> tuple[float, list[list[int]]]:
        llm.reset_prefix_cache()
        deadline, start = Deadline(left), time.perf_counter()
        found = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        deadline.check()
        return seconds, [list(completion.token_ids) for output in found for completion in output.outputs]

    warm = vllm.SamplingParams(temperature=work.temperature, max_tokens=WARM_UP_TOKENS, detokenize=False)
    llm.generate(prompts[:16], warm, use_tqdm=False)
    return EngineRun("vllm", note=f"version {vllm.__version__}, random weights", **best_of(settings, once))
