"""Tiny models on the GPU, and what they say without us."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from models.families import left_pad, make_model, make_prompts

import hf_paged
from hf_paged import RequestOutput, SamplingParams

DEVICE = "cuda"
PAGE = 16
PROMPTS = make_prompts([1, 15, 16, 17, 40, 70])
NEW = 24

needs_gpu = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_flashinfer = pytest.mark.skipif(
    importlib.util.find_spec("flashinfer") is None, reason="FlashInfer is not installed"
)


def make(family: str = "Llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    return make_model(family, **changes).to(DEVICE, dtype)


def make_half(kv_heads: int = 2, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A size that every backend has kernels for, with weights that half precision, and even FP8 pages, do justice."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 128, "num_attention_heads": 4}
    return make(dtype=dtype, **sizes, num_key_value_heads=kv_heads, initializer_range=0.08)


def wrap(model: Any, **options: Any) -> Any:
    return hf_paged.wrap(model, **{"page_size": PAGE, "num_pages": 256, "max_num_seqs": 8} | options)


def wrap_for(backend: str, model: Any, **options: Any) -> Any:
    """Wrapped, for this backend's kernels; skips where FlashInfer is installed but can neither load nor build its."""
    wrap(model, attention_backend=backend, **options)
    if backend == "flashinfer" and not all(model.engine.executor._backend._served.values()):
        hf_paged.unwrap(model)
        pytest.skip("FlashInfer has no kernels for this model here")
    return model


def greedy(max_tokens: int = NEW, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **options)


def padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in left_pad(prompts).items()}


def stock_answers(model: Any, prompts: list[list[int]] = PROMPTS, count: int = NEW) -> list[list[int]]:
    """The new tokens of transformers' own greedy generation, past any end-of-sequence id. The model is not wrapped."""
    assert not isinstance(model, hf_paged.PagedGenerationMixin)
    batch = padded(prompts)
    out = model.generate(**batch, do_sample=False, max_new_tokens=count)
    return out[:, batch["input_ids"].shape[1] :].tolist()


def twin_answers(model: Any, family: str = "Llama", count: int = NEW) -> list[list[int]]:
    """What a new model with the same weights, and the same buffers, says."""
    twin = make(family)
    twin.load_state_dict(model.state_dict())
    buffers = dict(model.named_buffers())
    for name, buffer in twin.named_buffers():
        buffer.copy_(buffers[name])
    return stock_answers(twin, count=count)


def answers(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def samples(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def assert_idle(model: Any) -> None:
    """No request and no page is left behind, and nothing is in the air."""
    engine = model.engine
    scheduler = engine.scheduler
    assert not engine.has_unfinished()
    assert not scheduler.has_unfinished()
    assert scheduler.num_active_pages == 0
    assert scheduler.pool.num_used == scheduler.tree.num_pages
    assert len(scheduler._slots) == scheduler.max_num_seqs
    assert not engine._flights


def captured(model: Any) -> list[int]:
    """The batch sizes for which there is a graph."""
    graphs = model.engine.executor._graphs
    return [] if graphs is None else sorted({kind.size for kind in graphs._captured})


@torch.no_grad()
def differences(model: Any, outputs: list[RequestOutput]) -> torch.Tensor:
    """|reported - own| log-probability of every sampled token, where own is that of the model's forward."""
    found = []
    for output in outputs:
        for completion in output.outputs:
            ids = torch.tensor([output.prompt_token_ids + completion.token_ids], device=DEVICE)
            rows = torch.log_softmax(model(ids, use_cache=False).logits[0].float(), -1).cpu()
            start = len(output.prompt_token_ids) - 1
            for place, (token, entry) in enumerate(zip(completion.token_ids, completion.logprobs or [], strict=True)):
                found.append(abs(entry[token].logprob - float(rows[start + place, token])))
    assert found
    return torch.tensor(found)
