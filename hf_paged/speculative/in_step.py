"""Drafters that compute inside a step: a draft model, or a head over the target's hidden states."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from hf_paged.attention.backend import LayerSpec
from hf_paged.cache.storage import KVStorage
from hf_paged.config import EngineConfig
from hf_paged.engine.batch import Batch
from hf_paged.engine.request import Sequence
from hf_paged.model.hidden import HiddenStates
from hf_paged.model.inputs import InputBuilder
from hf_paged.model.introspect import ModelLayout
from hf_paged.sampling.fused import SlotParams
from hf_paged.sampling.sampler import Sampler
from hf_paged.speculative.config import SpeculativeConfig
from hf_paged.speculative.drafter import Drafter


class InStepDrafter(Drafter, Protocol):
    """`propose` says how many tokens are drafted; they are drawn when the step is launched, between `before` and the
    target's forward. Its keys and values lie in pages of the same numbers as the target's."""

    layers: list[LayerSpec]
    """Those that attend over its pages."""
    dtype: torch.dtype
    """Of its keys and values."""
    hidden: HiddenStates | None = None
    """What it reads of the target's forwards."""

    def allocate(self, num_pages: int, inputs: InputBuilder) -> KVStorage:
        """Makes the pools, and what is bound to their addresses. Returns them, for the caller to copy, wipe and
        release together with the target's."""

    def make_graphs(self, max_num_seqs: int, max_rows: int) -> None:
        """Prepares for CUDA graphs over the pools as they are, the target's and its own; those that were there are
        dropped."""

    def signs(self) -> tuple[object, ...]:
        """What graphs and aliases depend on beside the pools."""
        return ()

    def drop(self) -> None:
        """Lets go of the pools."""

    def close(self) -> None:
        """Lets go of whatever else it holds, after the pools."""
        return

    def before(self, batch: Batch, writes: np.ndarray | None) -> None:
        """Its own part of a step, before drafts are drawn.

        Args:
            writes: as `InputBuilder.write_pages` returns them.
        """

    def draft(self, drafts: dict[Sequence, list[int]], params: SlotParams | None, sampler: Sampler) -> Tensor | None:
        """Draws the tokens of `drafts`, whose lengths say how many.

        Args:
            params: sampling parameters by slot, where a device can draw by them alone.
            sampler: what draws otherwise.

        Returns:
            int64 `[N]`, all drafts' tokens one after another, where only the device knows them; None when `drafts`
            hold them.
        """

    def after(self, batch: Batch) -> None:
        """The target's forward over the batch is under way."""
        return


def asks_for(method: str, sequence: Sequence) -> bool:
    """Whether a sequence is drafted for by this method: requests may say otherwise, and scored ones are never."""
    request = sequence.request
    return request.speculation is not None and request.speculation.method == method and request.scored is None


def load_drafter(
    speculation: SpeculativeConfig | None, config: EngineConfig, lm: nn.Module, target: ModelLayout
) -> InStepDrafter | None:
    """The drafter that `speculation` names, on the target's device, if it is one that computes inside a step.

    Raises:
        ValueError: it does not go with the target; the message says why.
        FileNotFoundError: there is nothing where it should be.
    """
    dtype = next(lm.parameters()).dtype
    if speculation is not None and speculation.method == "draft_model":
        from hf_paged.speculative.draft_model import DraftModel, load_draft_model

        drafting = load_draft_model(speculation.model, target, dtype)
        return DraftModel(drafting, config, speculation.num_speculative_tokens)
    if speculation is not None and speculation.method == "eagle3":
        from hf_paged.speculative.eagle import load_head
        from hf_paged.speculative.eagle_drafter import Eagle3Drafter

        return Eagle3Drafter(load_head(speculation.model, dtype), lm, target, config)
    return None
