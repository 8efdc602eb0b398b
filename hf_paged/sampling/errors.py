"""Why a sequence could not be sampled."""

from __future__ import annotations


class NothingToSample(RuntimeError):
    """Every token is forbidden, or a processor left logits that are not numbers."""


class NonFiniteLogits(NothingToSample):
    """The model's own logits are not numbers to sample from; nor may the keys and values be that it left."""
