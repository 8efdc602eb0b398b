"""How much a step may hold, where the configuration does not say."""

from __future__ import annotations

import torch

NUM_SEQS, LARGE_NUM_SEQS = 256, 512
"""Sequences at once; the larger on GPUs of 70 GiB and more."""
TOKEN_BUDGET, LARGE_TOKEN_BUDGET = 2048, 16384
"""Tokens per step; the larger on GPUs of 70 GiB and more. What a step of prefill costs the host is then well hidden
behind the device's work, for small models too."""


def token_budget(device: torch.device) -> int:
    if device.type != "cuda":
        return TOKEN_BUDGET
    return LARGE_TOKEN_BUDGET if _is_large(device) else LARGE_TOKEN_BUDGET // 2


def default_num_seqs(device: torch.device) -> int:
    return LARGE_NUM_SEQS if _is_large(device) else NUM_SEQS


def _is_large(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory >= 70 << 30


def verify_rows(device: torch.device) -> int:
    """Rows of a step that cost little more than one: up to there its time goes into reading weights."""
    return 256 if device.type == "cuda" else 32
