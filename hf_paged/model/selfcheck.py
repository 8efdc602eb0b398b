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
from hf_paged.model.inputs import StepInputs
from hf_paged.model.introspect import ModelLayout, causal_lm, evaluation_mode, refuse
from hf_paged.model.runner import ModelRunner

PROMPT, DECODES = 5, 3
TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-2}
"""Of the norm of the logits' difference over the logits' norm. Half precision gets 0.25: routers of random mixtures of
experts flip on a rounding, while a lost state or mask costs about 1."""


@torch.no_grad()
def check_model(model: nn.Module, layout: ModelLayout, backend: AttentionBackend) -> None:
    """Prefill of 5 tokens, then 3 decode steps over pages of 4 tokens, against one stock forward of all 8.

    Raises:
        UnsupportedModelError: they disagree.
    """
    lm = causal_lm(model)
    total, size = PROMPT + DECODES, 4
    pages = np.array([1, 0], dtype=np.int32)
    storage = KVStorage(
        layout.layers, len(pages), size, dtype=layout.kv_dtype, device=layout.device, layout=backend.layout
    )
    runner = ModelRunner(model, layout, backend, storage)
    ids = np.arange(7, 7 + 5 * total, 5, dtype=np.int64) % layout.vocab_size
    with evaluation_mode(lm):
        expected = lm(input_ids=torch.from_numpy(ids).to(layout.device)[None], use_cache=False).logits[0].float()
    found = []
    for start, end in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, total))]:
        position = np.arange(start, end)
        spans = [] if start else [PrefillSpan(row=0, length=end, context=0, pages=pages)]
        attention = AttentionBatch(
            page_size=size,
            decode_lengths=np.array([end] if start else [], dtype=np.int64),
            decode_pages=pages[None] if start else np.zeros((0, 0), dtype=np.int32),
            spans=spans,
            write_pages=pages[position // size].astype(np.int64),
            write_offsets=position % size,
        )
        rows = np.arange(end - start)
        found.append(runner.forward(StepInputs(ids[start:end], position, attention, rows, [], [])).float())
    difference = ((torch.cat(found) - expected).norm() / expected.norm()).item()
    if not difference <= TOLERANCE.get(layout.kv_dtype, 0.25):
        raise refuse(
            model,
            f"through pages its logits differ from its own forward's by {difference:.2g} of their norm, "
            "so it does more than attend to keys and values",
        )
