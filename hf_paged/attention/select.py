"""Which attention backend a model gets."""

from __future__ import annotations

import importlib.util
import logging

import torch

from hf_paged.attention.backend import AttentionBackend, LayerSpec
from hf_paged.attention.torch_backend import TorchBackend

logger = logging.getLogger(__name__)


def choose_backend(
    name: str, device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype, layers: list[LayerSpec]
) -> AttentionBackend:
    """The backend of that name; "auto" is Triton on a GPU, plain torch elsewhere.

    Our Triton kernels come first because they measured faster than FlashInfer 0.7.2's in whole steps (see
    docs/benchmarks.md), need no plan, and serve every kind of layer.

    Args:
        dtype, kv_dtype: of the model's keys as computed, and as stored.

    Raises:
        ImportError: a backend was named whose package is not installed.
        ValueError: a backend was named that cannot run on the device, or the pool's dtype needs another one.
    """
    if name == "auto" and device.type != "cuda":
        name = "torch"
    if name == "torch":
        return TorchBackend(device)
    if device.type != "cuda":
        raise ValueError(f"attention_backend={name!r} needs a CUDA device; the model is on {device}")
    if kv_dtype != dtype and torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(
            "an FP8 KV cache on a GPU needs one of compute capability 8.9 or higher, or attention_backend='torch'"
        )
    if name == "flashinfer" and not _installed("flashinfer"):
        raise ImportError("attention_backend='flashinfer' needs FlashInfer: pip install 'hf_paged[cuda]'")
    if not _installed("triton"):
        if name == "triton" or kv_dtype != dtype:
            raise ImportError("attention in Triton's kernels needs Triton, which torch's CUDA builds bring along")
        logger.warning("Triton is not installed: attention runs in plain torch, without CUDA graphs, many times slower")
        return TorchBackend(device)
    if name == "flashinfer":
        from hf_paged.attention.flashinfer_backend import FlashInferBackend

        return FlashInferBackend(device, dtype, kv_dtype, layers)
    from hf_paged.attention.triton_backend import TritonBackend

    return TritonBackend(device)


def exact_backend(device: torch.device) -> AttentionBackend:
    """The backend of exact mode.

    Raises:
        ValueError: the model is not on a GPU.
        ImportError: Triton is not installed.
    """
    if not _installed("triton"):
        raise ImportError("exact=True needs Triton, which torch's CUDA builds bring along")
    from triton import knobs

    if device.type != "cuda" and not knobs.runtime.interpret:
        raise ValueError(f"exact=True needs a GPU: its kernels are Triton's, and the model is on {device}")
    from hf_paged.attention.exact_backend import ExactTritonBackend

    return ExactTritonBackend(device)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
