"""Adapters of random weights, saved by PEFT, and what PEFT's own model says with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models.families import make_model, stock_greedy
from peft import LoraConfig, PeftModel, get_peft_model

import hf_paged
from hf_paged import LoRARequest

NEW = 6
SMALL = {"num_hidden_layers": 2}
OPTIONS = {"page_size": 4, "num_pages": 256, "max_num_seqs": 8, "enable_lora": True, "max_loras": 2}
GREEDY = hf_paged.SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)

CONFIGS: dict[str, dict[str, Any]] = {
    "a": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj"]},
    "b": {"r": 8, "lora_alpha": 8, "target_modules": "all-linear", "use_rslora": True},
    "c": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": r".*\.(o_proj|down_proj|gate_proj)",
        "rank_pattern": {r"layers\.1\.mlp\.down_proj": 5},
        "alpha_pattern": {"o_proj": 12},
    },
}


def save_adapter(folder: Path, base: Any, seed: int = 0, **config: Any) -> Path:
    """Has PEFT write an adapter whose weights matter; `base` is changed by it, so give it one of your own."""
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)
    model.save_pretrained(folder)
    return folder


def save_adapters(folder: Path, family: str = "Llama", names: str = "abc") -> dict[str, LoRARequest]:
    requests = {}
    for number, name in enumerate(names, start=1):
        path = save_adapter(folder / name, make_model(family, **SMALL), number, **CONFIGS[name])
        requests[name] = LoRARequest(name, number, str(path))
    return requests


class Stock:
    """PEFT's own model, with every adapter of `requests`."""

    def __init__(self, base: Any, requests: dict[str, LoRARequest]) -> None:
        named = iter(requests.items())
        first, request = next(named)
        self.model = PeftModel.from_pretrained(base, request.lora_path, adapter_name=first).eval()
        for name, request in named:
            self.model.load_adapter(request.lora_path, adapter_name=name)
        self._known: dict[tuple[tuple[int, ...], str | None], list[int]] = {}

    def greedy(self, prompt: list[int], name: str | None) -> list[int]:
        key = tuple(prompt), name
        if key not in self._known:
            if name is None:
                with self.model.disable_adapter():
                    self._known[key] = stock_greedy(self.model, prompt, NEW)
            else:
                self.model.set_adapter(name)
                self._known[key] = stock_greedy(self.model, prompt, NEW)
        return self._known[key]

    @torch.no_grad()
    def logprobs(self, ids: list[int], name: str | None) -> torch.Tensor:
        """float32 `[T, V]`."""
        if name is None:
            with self.model.disable_adapter():
                logits = self.model(torch.tensor([ids])).logits[0]
        else:
            self.model.set_adapter(name)
            logits = self.model(torch.tensor([ids])).logits[0]
        return torch.log_softmax(logits.float(), -1)


def tokens(outputs: list[hf_paged.RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def assert_idle(model: Any) -> None:
    scheduler = model.engine.scheduler
    assert not model.engine.has_unfinished() and not scheduler.has_unfinished()
    assert scheduler.num_active_pages == 0
    assert scheduler.pool.num_used == scheduler.tree.num_pages
