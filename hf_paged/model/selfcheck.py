"""A model is paged only after it has shown that it can be: a short prompt through pages against its own forward.

Whatever a model does beyond attention over keys and values (a state between tokens, a mask of its own kind) shows here
as different logits, before a user ever sees a wrong token.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from hf_paged.attention.backend import AttentionBackend, AttentionBatch, PrefillSpan
from hf_paged.cache.storage import KVStorage
from hf_paged.model.fuse import FusedLinears
from hf_paged.model.inputs import StepInputs
from hf_paged.model.introspect import ModelLayout, causal_lm, evaluation_mode, refuse, trial
from hf_paged.model.linear import LeanLinears
from hf_paged.model.runner import ModelRunner
from hf_paged.quantization.bitsandbytes import computes_coarsely
from hf_paged.quantization.fp8 import FP8Linear

CHUNKS = [(0, 2), (2, 5), (5, 6), (6, 7), (7, 8)]
"""A first chunk, a chunk with context, and three decode steps: six of the eight rows depend on what pages hold."""

FLOAT32_LIMIT = 1e-3
"""Of the norm of a row's difference over the row's norm, for every row. Correct models stay near 1e-6 (TF32 near
3e-4)."""

HALF_LIMIT = 0.1
"""The same of the median row of those that depend on pages: in half precision a router of a mixture of experts may flip
on a rounding and throw off single rows. Correct models stay under 0.02, and with FP8 pages under 0.06; a lost state or
mask costs 0.3 and more."""

FP8_LIMIT = 0.25
"""As `HALF_LIMIT`, where activations are rounded to FP8: what differs by a rounding in bfloat16 then differs by one of
four bits, in every layer. An 8B model of random weights is at 0.11."""


def check_prompt(layout: ModelLayout) -> list[int]:
    """The tokens that a model is checked with."""
    return [(7 + 5 * place) % layout.vocab_size for place in range(CHUNKS[-1][1])]


@torch.no_grad()
def check_model(
    model: nn.Module,
    layout: ModelLayout,
    backend: AttentionBackend,
    *,
    fused: FusedLinears | None = None,
    lean: LeanLinears | None = None,
    kv_dtype: torch.dtype | None = None,
    exact: bool = False,
) -> None:
    """Eight tokens in chunks, over pages of 4 tokens, against one stock forward of all of them.

    Raises:
        UnsupportedModelError: they disagree.
    """
    lm = causal_lm(model)
    size = 4
    pages = np.array([1, 0], dtype=np.int32)
    storage = KVStorage(
        layout.layers,
        len(pages),
        size,
        dtype=kv_dtype or layout.kv_dtype,
        device=layout.device,
        layout=backend.layout,
    )
    runner = ModelRunner(model, layout, backend, storage, fused=fused, lean=lean, exact=exact)
    ids = np.array(check_prompt(layout), dtype=np.int64)
    with trial(model), evaluation_mode(lm):
        expected = lm(input_ids=torch.from_numpy(ids).to(layout.device)[None], use_cache=False).logits[0].float()
        if not expected.isfinite().all():
            raise refuse(model, "the logits of its own forward are not finite: look for NaN or infinity in its weights")
        found = []
        for start, end in CHUNKS:
            position = np.arange(start, end)
            decodes = end - start == 1
            spans = [] if decodes else [PrefillSpan(row=0, length=end - start, context=start, pages=pages)]
            attention = AttentionBatch(
                page_size=size,
                decode_lengths=np.array([end] if decodes else [], dtype=np.int64),
                decode_pages=pages[None] if decodes else np.zeros((0, 0), dtype=np.int32),
                spans=spans,
                write_pages=pages[position // size].astype(np.int64),
                write_offsets=position % size,
            )
            rows = np.arange(end - start)
            found.append(runner.forward(StepInputs(ids[start:end], position, attention, rows, [], [])).float())
    per_row = (torch.cat(found) - expected).norm(dim=-1) / expected.norm(dim=-1)
    full = storage.keys[0].dtype in (torch.float32, torch.float64) and not computes_coarsely(lm)
    difference = float(per_row.max() if full else per_row[CHUNKS[0][1] :].median())
    limit = FP8_LIMIT if any(isinstance(module, FP8Linear) for module in lm.modules()) else HALF_LIMIT
    if not difference <= (FLOAT32_LIMIT if full else limit):  # NaN fails too
        raise refuse(
            model,
            f"through pages its logits differ from its own forward's by {difference:.2g} of their norm, "
            "so it does more than attend to keys and values",
        )
