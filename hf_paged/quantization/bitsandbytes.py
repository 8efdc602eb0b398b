"""Models with layers of bitsandbytes: transformers loads them, and these layers stay as they are.

What must be known of them beside that: which steps of theirs cannot be captured, how precisely they compute, and that
on some CPUs they would pack their weights away in a first forward.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

METHOD = "bitsandbytes"
"""Its `quant_method` in configs."""


def nf4(dtype: torch.dtype) -> Any:
    """The `BitsAndBytesConfig` of QLoRA (arXiv 2305.14314): NF4 with quantised scales, computing in `dtype`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def loading_options(device: torch.device, config: Any = None) -> dict[str, Any]:
    """What `from_pretrained` is told beside a path and a dtype.

    Args:
        config: a `BitsAndBytesConfig`; None for a checkpoint that says itself how it is quantised.

    Raises:
        ImportError: bitsandbytes or accelerate is not installed.
    """
    for package in (METHOD, "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"a model quantised with bitsandbytes needs {package}: pip install 'hf_paged[bitsandbytes]'"
            )
    return {"device_map": {"": device}} | ({} if config is None else {"quantization_config": config})


def dequantize(model: Any) -> None:
    """Puts ordinary linear layers in the places of a transformers model's bitsandbytes ones, in the model's dtype."""
    from transformers.integrations.bitsandbytes import Bnb4bitDeserialize, Bnb8bitDeserialize

    model.dequantize(model.dtype)
    # It would be saved by undoing how it was read, and how quantised weights were read cannot be undone.
    own = (Bnb4bitDeserialize, Bnb8bitDeserialize)
    model._weight_conversions = [
        conversion
        for conversion in model._weight_conversions
        if not any(isinstance(operation, own) for operation in getattr(conversion, "operations", ()))
    ]


def why_uncapturable(lm: nn.Module) -> str | None:
    """Why a model's steps cannot be CUDA graphs; None when no layer of bitsandbytes speaks against it."""
    if any(layer.state.threshold > 0 for layer in _layers(lm, "Linear8bitLt")):
        return (
            "LLM.int8() has the host look for outliers in every layer's input; with llm_int8_threshold=0.0, or four "
            "bits, it would not"
        )
    return None


def computes_coarsely(lm: nn.Module) -> bool:
    """Whether layers round more than the dtype of what goes in and comes out tells: to 8 bits (and by other rows'
    outliers, too), or to half precision."""
    halves = (layer.compute_dtype for layer in _layers(lm, "Linear4bit"))
    return any(True for _ in _layers(lm, "Linear8bitLt")) or any(d is not None and d.itemsize == 2 for d in halves)


def pack_for_cpu(lm: nn.Module, packs: bool) -> None:
    """Says whether layers of four bits pack their weights for a CPU in a forward in eval mode.

    bitsandbytes does so on CPUs with bfloat16 products. From packed weights no gradient comes, which nobody is told,
    and a checkpoint is another than it was: so not in models that we run, which may be trained and saved afterwards.
    What is packed already stays so.
    """
    for layer in _layers(lm, "Linear4bit"):
        if hasattr(layer, "support_avx512bf16_for_cpu"):  # newer versions
            layer.support_avx512bf16_for_cpu = packs and sys.modules[METHOD].functional.has_avx512bf16()


def _layers(lm: nn.Module, kind: str) -> Iterator[Any]:
    """Layers of a class in bitsandbytes, which whoever has one has imported."""
    library = sys.modules.get(METHOD)
    if library is not None:
        yield from (module for module in lm.modules() if isinstance(module, getattr(library.nn, kind)))
