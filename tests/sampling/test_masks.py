"""Masks as bits say what masks over logits say."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_paged import SamplingParams
from hf_paged.engine.request import Request, Sequence
from hf_paged.sampling.errors import NothingToSample
from hf_paged.sampling.masks import masks_of
from hf_paged.sampling.processors import forbid

VOCAB = 70
TOKENS = st.integers(0, VOCAB - 1)


@st.composite
def sequences(draw: st.DrawFn) -> Sequence:
    generated = draw(st.lists(TOKENS, max_size=4))
    prompt = draw(st.lists(TOKENS, min_size=1, max_size=4))
    allowed = draw(st.none() | st.lists(TOKENS, min_size=1, max_size=40, unique=True))
    sampling = SamplingParams(min_tokens=draw(st.integers(0, 4)), max_tokens=9, allowed_token_ids=allowed)
    # Words that often begin as the text ends.
    heads = st.sampled_from([[], generated[-1:], generated[-2:], (prompt + generated)[-3:], [3]])
    words = [head + [draw(TOKENS)] for head in draw(st.lists(heads, max_size=3))]
    stops = frozenset(draw(st.lists(TOKENS, max_size=2)))
    request = Request("r", prompt, sampling, bad_words=words, stop_token_ids=stops)
    (sequence,) = request.sequences
    sequence.tokens.extend(generated)
    if draw(st.integers(0, 9)) == 0:
        sequence.finish_reason = "stop"
    return sequence


@settings(deadline=None, max_examples=150)
@given(st.lists(sequences(), min_size=1, max_size=5))
def test_bits_are_those_of_the_logits_that_stay(rows: list[Sequence]) -> None:
    mask, errors = masks_of(rows, VOCAB)
    concerned = [sequence.request.masked and sequence.finish_reason is None for sequence in rows]
    if mask is None:
        assert not any(concerned)
        return
    assert mask.shape == (len(rows), 3) and mask.dtype == torch.int32
    allowed = np.unpackbits(mask.numpy().view(np.uint8), axis=1, bitorder="little")[:, :VOCAB].astype(bool)
    for place, sequence in enumerate(rows):
        logits = torch.zeros(VOCAB)
        if concerned[place]:
            forbid(logits, sequence)
        assert (logits == 0).tolist() == allowed[place].tolist()
        assert (place in errors) == (not allowed[place].any())
        assert all(isinstance(error, NothingToSample) for error in errors.values())
