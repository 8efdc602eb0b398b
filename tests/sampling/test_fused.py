"""Sampling on a GPU, as far as a CPU can tell: the parameters by slot, and the sampler that draws with the kernel."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from distributions import make_sequence
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_paged.engine.request import Hooks, Request, Sequence
from hf_paged.sampling.draw import absorb, filter_logits, row_keys, uniforms
from hf_paged.sampling.fused import SlotParams, rows_of
from hf_paged.sampling.sampler import Sampler
from hf_paged.sampling_params import SamplingParams

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FIELDS = {
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "keys": np.int64,
    "wants_logprob": np.int32,
    "logprob_scale": np.float32,
}
VOCAB = 40
KEYS = ["0x238275bc38fcbe91", "0xd0734750fde362b3", "0xefc3337756489302"]
"""As they were computed when the hash was chosen."""


def positions_of(sequences: list[Sequence]) -> np.ndarray:
    return np.array([sequence.num_generated + sequence.num_pending for sequence in sequences], dtype=np.int64)


def filled(params: SlotParams, sequences: list[Sequence], spare: int = 3) -> dict[str, list[Any]]:
    """What `fill` writes, after a look that it writes nothing else."""
    arrays = {name: np.full(len(sequences) + spare, 77, dtype=dtype) for name, dtype in FIELDS.items()}
    params.fill(sequences, positions_of(sequences), **arrays)
    assert all((array[len(sequences) :] == 77).all() for array in arrays.values())
    return {name: array[: len(sequences)].tolist() for name, array in arrays.items()}


def expected(sequences: list[Sequence]) -> dict[str, list[Any]]:
    """The definition, from the requests."""
    params = [sequence.request.sampling for sequence in sequences]
    seeds = np.array([sequence.request.seed for sequence in sequences], dtype=np.uint64)
    streams = np.array([sequence.index for sequence in sequences], dtype=np.uint64)
    places = positions_of(sequences).astype(np.uint64)
    return {
        "temperature": [float(np.float32(p.temperature if p.temperature >= 1e-5 else 0.0)) for p in params],
        "top_k": [0 if p.top_k == -1 else p.top_k for p in params],
        "top_p": [float(np.float32(p.top_p)) for p in params],
        "min_p": [float(np.float32(p.min_p)) for p in params],
        "keys": row_keys(seeds, streams, places).view(np.int64).tolist(),
        "wants_logprob": [int(p.logprobs is not None) for p in params],
        "logprob_scale": [
            float(
                np.float32(1 / p.temperature if p.logprobs_mode == "scaled_logprobs" and p.temperature >= 1e-5 else 1)
            )
            for p in params
        ],
    }


params_of = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-6, 0.3, 1.0]),
    top_k=st.sampled_from([-1, 0, 5]),
    top_p=st.sampled_from([0.2, 1.0]),
    min_p=st.sampled_from([0.0, 0.7]),
    logprobs=st.sampled_from([None, 0]),
    logprobs_mode=st.sampled_from([None, "scaled_logprobs"]),
)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_slots_are_filled_with_their_sequences_parameters(data: st.DataObject) -> None:
    """While sequences come, go, change slots, and wait without one."""
    slots = 4
    params = SlotParams(slots)
    sequences = [
        make_sequence(sampling, seed=seed, slot=-1)
        for sampling, seed in data.draw(
            st.lists(st.tuples(params_of, st.integers(0, 2**64 - 1)), min_size=6, max_size=9)
        )
    ]
    for _ in range(data.draw(st.integers(1, 5))):
        running = data.draw(st.lists(st.sampled_from(sequences), min_size=1, max_size=6, unique=True))
        free = data.draw(st.permutations(range(slots)))
        for sequence in sequences:
            sequence.slot = -1
        for place, sequence in enumerate(running):
            sequence.slot = free[place] if place < slots else -1
            sequence.tokens.append(1)
            sequence.num_pending = data.draw(st.integers(0, 1))
        assert filled(params, running) == expected(running)


def test_samples_of_a_request_have_their_own_keys() -> None:
    request = Request("r", [0], SamplingParams(n=5), seed=9)
    for slot, sequence in enumerate(request.sequences):
        sequence.slot = slot if slot < 2 else -1
    keys = filled(SlotParams(2), request.sequences)["keys"]
    assert keys == expected(request.sequences)["keys"]
    assert len(set(keys)) == 5


def test_rows_of_are_the_same_as_slots() -> None:
    """So a seed means the same in steps with graphs and in those without."""
    sequences = [
        make_sequence(
            SamplingParams(temperature=0.1 * i, top_k=i - 1, top_p=0.5, min_p=0.1, logprobs=0), seed=i, slot=i
        )
        for i in range(5)
    ]
    rows = rows_of(sequences, positions_of(sequences), torch.device("cpu"))
    for name, values in filled(SlotParams(5), sequences).items():
        assert getattr(rows, name).tolist() == values
        assert getattr(rows, name).numpy().dtype == FIELDS[name]


def test_uniforms_are_what_they_were() -> None:
    """Seeded outputs must not change from release to release."""
    keys = [np.array(column, dtype=np.uint64) for column in ([0, 1, 2**64 - 1], [0, 2, 5], [0, 3, 2**40])]
    assert [hex(key) for key in row_keys(*keys)] == KEYS
    assert uniforms(*keys).tolist() == [((int(key, 16) >> 12) + 0.5) * 2.0**-52 for key in KEYS]
    halfway = absorb(absorb(np.zeros(3, dtype=np.uint64), keys[0]), keys[1])
    assert absorb(halfway, keys[2]).tolist() == row_keys(*keys).tolist()


@pytest.mark.parametrize(
    ("options", "alone"),
    [
        ({}, True),
        ({"logprobs": 0}, True),
        ({"logprobs": 0, "temperature": 0.5, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "seed": 1, "stop": "x"}, True),
        ({"logprobs": 0, "logprobs_mode": "scaled_logprobs"}, True),
        ({"logprobs": 0, "logprobs_mode": "processed_logprobs"}, False),
        ({"logprobs": 1}, False),
        ({"logprobs": -1}, False),
        ({"prompt_logprobs": 0}, False),
        ({"presence_penalty": 0.5}, False),
        ({"frequency_penalty": 0.5}, False),
        ({"repetition_penalty": 1.5}, False),
        ({"logit_bias": {1: 1.0}}, False),
        ({"min_tokens": 2}, False),
        ({"allowed_token_ids": [1]}, False),
        ({"logits_processors": [max]}, False),
    ],
    ids=str,
)
def test_which_requests_are_fused(options: dict[str, Any], alone: bool) -> None:
    for logprobs in ({}, {"logprobs": 0}):
        assert make_sequence(SamplingParams(**(logprobs | options))).request.fused == alone


def test_processed_log_probabilities_matter_only_to_those_who_ask() -> None:
    assert make_sequence(SamplingParams(logprobs_mode="processed_logprobs")).request.fused


def test_bad_words_and_hooks_are_not_fused() -> None:
    for logprobs in (None, 0):
        sampling = SamplingParams(logprobs=logprobs)
        assert not make_sequence(sampling, bad_words=[[1]]).request.fused
        assert not make_sequence(sampling, hooks=Hooks()).request.fused


# ---- the sampler on a GPU --------------------------------------------------------------------------------------------


class FusedSampler(Sampler):
    """A sampler that takes the GPU's way on any device."""

    def _draw_inverse(self, scores: Any, sequences: Any, random: Any, shown: Any) -> Any:
        return self._draw_fused(scores, sequences, shown)


def sampler() -> Sampler:
    pytest.importorskip("triton")
    return FusedSampler(VOCAB, DEVICE)


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


MIXED = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.7, "top_k": 5},
    {"top_p": 0.6, "logprobs": 2},
    {"min_p": 0.2, "presence_penalty": 1.0},
    {"temperature": 1.4, "top_k": 9, "top_p": 0.8, "allowed_token_ids": [*range(20)]},
]


def test_the_eager_draw_is_the_kernels() -> None:
    """The same tokens as the kernel gives for the raw logits, where nothing else touches them."""
    from hf_paged.kernels.triton.sampling import sample_tokens

    logits = random_logits(6).bfloat16()
    sequences = [
        make_sequence(SamplingParams(**MIXED[i % 4]), seed=i, generated=[1] * i, slot=i) for i in range(len(logits))
    ]
    sequences[2].num_pending = 1
    found = sampler().sample(logits, sequences)
    rows = rows_of(sequences, np.array([0, 1, 3, 3, 4, 5]), DEVICE)
    tokens = torch.empty(6, dtype=torch.int64, device=DEVICE)
    logprobs = torch.empty(6, device=DEVICE)
    ranks = torch.empty(6, dtype=torch.int32, device=DEVICE)
    sample_tokens(logits, rows, tokens=tokens, logprobs=logprobs, ranks=ranks)
    assert found.tokens == tokens.tolist()
    entry = found.logprobs[3]
    assert entry is not None and found.logprobs[0] is None
    assert entry.logprobs[0] == pytest.approx(float(logprobs[3]), abs=1e-5)
    assert entry.rank == int(ranks[3])


def test_a_row_is_the_same_alone_and_in_a_crowd() -> None:
    logits = random_logits(6)

    def sequence(i: int) -> Sequence:
        return make_sequence(SamplingParams(**MIXED[i]), seed=i, generated=[2, 3], slot=i)

    together = sampler().sample(logits, [sequence(i) for i in range(6)])
    alone = [sampler().sample(logits[i : i + 1], [sequence(i)]).tokens[0] for i in range(6)]
    assert together.tokens == alone
    assert not together.errors


def test_draws_differ_by_seed_index_and_position() -> None:
    request = [Request("r", [0], SamplingParams(n=2), seed=seed) for seed in range(2)]
    sequences = [
        Sequence(request[seed], index, [0] * (1 + length), 1, slot=0)
        for seed, index, length in itertools.product(range(2), range(2), range(3))
    ]
    tokens = sampler().sample(torch.zeros(len(sequences), VOCAB, device=DEVICE), sequences).tokens
    assert len(set(tokens)) > 5


def test_rows_without_a_finite_logit_fail_alone() -> None:
    logits = random_logits(4)
    logits[1] = torch.nan
    logits[2] = -torch.inf
    found = sampler().sample(logits, [make_sequence(SamplingParams(), seed=i, slot=i) for i in range(4)])
    assert sorted(found.errors) == [1, 2]
    clean = sampler().sample(logits[[0, 3]], [make_sequence(SamplingParams(), seed=i, slot=i) for i in (0, 3)])
    assert [found.tokens[0], found.tokens[3]] == clean.tokens


def test_processed_scores_show_what_was_drawn_from() -> None:
    """Ties at the end of top-p all stay, and the token is never one that is shown as impossible."""
    logits = random_logits(3)
    logits[2] = torch.zeros(VOCAB)
    options: list[dict[str, Any]] = [{"temperature": 0.7, "top_k": 6}, {"top_p": 0.7}, {"top_p": 0.5}]
    sequences = [
        make_sequence(SamplingParams(**o, logprobs=-1, logprobs_mode="processed_logprobs"), seed=i, slot=i)
        for i, o in enumerate(options)
    ]
    entries = sampler().sample(logits, sequences).logprobs
    for row, (entry, o) in enumerate(zip(entries, options, strict=True)):
        assert entry is not None and np.isfinite(entry.logprobs[0])
        shown = dict(zip(entry.token_ids[1:], entry.logprobs[1:], strict=True))
        warm = logits[row] / o.get("temperature", 1.0)
        exact = torch.log_softmax(filter_logits(warm, o.get("top_k", 0), o.get("top_p", 1.0), 0.0), -1)
        if row == 2:
            exact = torch.log_softmax(warm, -1)
        assert [shown[token] for token in range(VOCAB)] == pytest.approx(exact.tolist(), abs=1e-5)
