"""The draw: its noise, the inverse of the running sum, and the distributions that top-k, top-p and min-p leave."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from distributions import MARGIN, chi_square_p, clear_of_thresholds, probabilities, warp
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_paged.sampling.draw import BLOCK, NUCLEUS, draw, filter_logits, inverse_cdf, uniforms

P = 1e-4
"""Below this a statistical test fails. Seeds are fixed: it either always does or never."""

FILTERS = [
    (0, 1.0, 0.0),
    (5, 1.0, 0.0),
    (0, 0.7, 0.0),
    (0, 1.0, 0.2),
    (8, 0.8, 0.0),
    (8, 1.0, 0.3),
    (0, 0.9, 0.25),
    (12, 0.95, 0.15),
    (1, 1.0, 0.0),
    (0, 1e-6, 0.0),
    (0, 1.0, 1.0),
    (10_000, 0.5, 0.01),
]
"""top_k, top_p, min_p."""


def grid(size: int) -> Tensor:
    """`size` numbers evenly over (0, 1): drawn with them, each token comes up its share of times, one more or less."""
    return (torch.arange(size, dtype=torch.float64) + 0.5) / size


def draw_many(logits: Tensor, u: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """One row of logits drawn from with every u."""
    count = len(u)
    return draw(
        logits.expand(count, -1),
        u,
        np.full(count, top_k),
        np.full(count, top_p),
        np.full(count, min_p, dtype=np.float64),
    )


# ---- the noise -------------------------------------------------------------------------------------------------------


def as_keys(*columns: object) -> list[np.ndarray]:
    return [column.astype(np.uint64) for column in np.broadcast_arrays(*(np.atleast_1d(c) for c in columns))]


WAYS_TO_VARY = [
    pytest.param(7, 0, np.arange(50_000), id="positions"),
    pytest.param(7, np.arange(50_000), 3, id="streams"),
    pytest.param(np.arange(50_000), 0, 0, id="seeds"),
    pytest.param(np.arange(50_000) << 40, 1, 1, id="seeds with equal low bits"),
    pytest.param(np.arange(50_000) % 10, (np.arange(50_000) // 10) % 10, np.arange(50_000) // 100, id="all"),
]


@pytest.mark.parametrize(("seeds", "streams", "positions"), WAYS_TO_VARY)
def test_noise_is_uniform(seeds: object, streams: object, positions: object) -> None:
    """By chi-square over 200 cells, and by Kolmogorov and Smirnov's largest distance."""
    u = torch.from_numpy(uniforms(*as_keys(seeds, streams, positions)))
    counts = torch.bincount((u * 200).long(), minlength=200)
    assert chi_square_p(counts, torch.full((200,), len(u) / 200)) > P
    distance = (u.sort().values - grid(len(u))).abs().max()
    assert distance < 2.2 / len(u) ** 0.5  # the limit's tail beyond 2.2 is 2 exp(-2 * 2.2 ** 2) = 1.3e-4


@pytest.mark.parametrize("lag", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (0, 7, 0)])
def test_neighbours_are_independent(lag: tuple[int, int, int]) -> None:
    """Pairs of numbers whose keys differ by `lag` fill the unit square evenly."""
    count = 40_000
    keys = np.arange(count) % 20, (np.arange(count) // 20) % 20, np.arange(count) // 400
    near = [key + step for key, step in zip(keys, lag, strict=True)]
    one, two = (torch.from_numpy(uniforms(*as_keys(*k))) for k in (keys, near))
    cells = (one * 16).long() * 16 + (two * 16).long()
    assert chi_square_p(torch.bincount(cells, minlength=256), torch.full((256,), count / 256)) > P


def test_every_key_has_its_own_number() -> None:
    """No two of many small keys meet, in whatever order their parts stand."""
    keys = np.array(list(itertools.product(range(20), repeat=3)), dtype=np.uint64)
    assert len(np.unique(uniforms(*keys.T))) == len(keys)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 2**64 - 1)] * 3), min_size=1, max_size=10), st.data())
def test_noise_depends_on_its_keys_alone(rows: list[tuple[int, int, int]], data: st.DataObject) -> None:
    order = data.draw(st.permutations(rows))
    together = uniforms(*np.array(order, dtype=np.uint64).T)
    alone = [uniforms(*np.array([row], dtype=np.uint64).T)[0] for row in order]
    assert together.tolist() == alone
    assert ((together > 0) & (together < 1)).all()


def unmix(state: int) -> int:
    """The inverse of one round of `uniforms` after its key went in."""

    def unshift(value: int, by: int) -> int:
        found = value
        for _ in range(64 // by + 1):
            found = value ^ (found >> by)
        return found

    state = unshift(state, 31) * pow(0x94D049BB133111EB, -1, 2**64) % 2**64
    state = unshift(state, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) % 2**64
    return (unshift(state, 30) - 0x9E3779B97F4A7C15) % 2**64


def key_to(state: int) -> np.ndarray:
    """A seed that with stream and position 0 ends in `state`."""
    return np.array([unmix(unmix(unmix(state)))], dtype=np.uint64)


@pytest.mark.parametrize("state", [0, 2**11 - 1, 2**63, 2**64 - 2**12])
def test_noise_is_never_0(state: int) -> None:
    """Keys found backwards from the rarest states."""
    (u,) = uniforms(*as_keys(key_to(state), 0, 0))
    assert abs(u - state / 2**64) < 1e-12, "the key does not lead to the state: unmix is wrong"
    assert 0 < u < 1


def test_noise_is_never_1() -> None:
    (u,) = uniforms(*as_keys(key_to(2**64 - 1), 0, 0))
    assert u < 1


# ---- the inverse of the running sum ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 5 * BLOCK + 77])
def test_inverse_cdf_gives_each_its_share(size: int) -> None:
    """Weights of any scale, many of them zero."""
    torch.manual_seed(size)
    weights = torch.rand(size) ** 4 * (torch.rand(size) < 0.6)
    weights[size // 2] += 0.1
    count = 2048
    for scale in (1.0, 1e-6, 1e6):
        chosen = inverse_cdf((weights * scale).expand(count, -1), grid(count))
        counts = torch.bincount(chosen, minlength=size)
        assert len(counts) == size
        assert (counts - count * (weights.double() / weights.double().sum())).abs().max() <= 1 + 1e-3
        assert int(counts[weights == 0].sum()) == 0
        assert (chosen.diff() >= 0).all()


@settings(max_examples=300, deadline=None)
@given(
    size=st.integers(1, 3 * BLOCK),
    positive=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from([1e-30, 1e-7, 1e-3, 0.3, 1.0, 3.0]))
    ),
    u=st.floats(0, 1, exclude_min=True, exclude_max=True),
)
def test_inverse_cdf_finds_the_token_of_u(size: int, positive: list[tuple[float, float]], u: float) -> None:
    """The token at which the running sum passes u; never one of weight 0."""
    weights = torch.zeros(1, size)
    for place, weight in positive or [(0.5, 1.0)]:
        weights[0, int(place * size)] = weight
    index = int(inverse_cdf(weights, torch.tensor([u], dtype=torch.float64))[0])
    assert weights[0, index] > 0
    running = weights[0].double().cumsum(-1)
    total = float(running[-1])
    assert float(running[index]) >= u * total * (1 - 1e-12)
    assert float(running[index] - weights[0, index]) <= u * total * (1 + 1e-12)


@pytest.mark.parametrize("size", [BLOCK, 2 * BLOCK, 2 * BLOCK + 3])
@pytest.mark.parametrize("u", [2.0**-54, 0.5, 1 - 2.0**-53])
def test_inverse_cdf_at_the_ends(size: int, u: float) -> None:
    """One positive weight anywhere is always found, also beside blocks and a tail of zeros."""
    for place in (0, 1, BLOCK - 1, size // 2, size - 1):
        weights = torch.zeros(1, size)
        weights[0, place] = 0.3
        assert int(inverse_cdf(weights, torch.tensor([u], dtype=torch.float64))[0]) == place


def test_inverse_cdf_at_the_ends_of_blocks() -> None:
    """u within a few roundings of every block's end, where the two running sums may disagree about the block."""
    generator = torch.Generator().manual_seed(0)
    for blocks in list(range(2, 12)) * 4:
        weights = torch.rand(blocks, BLOCK, generator=generator) ** 3
        weights[:, :3] = weights[:, -3:] = 0.0  # so that a step too far is seen
        ends = weights.sum(1, dtype=torch.float64).cumsum(0)
        u = torch.cat([ends / ends[-1] * (1 + step * 2.0**-53) for step in range(-5, 6)]).clamp(max=1 - 2.0**-53)
        chosen = inverse_cdf(weights.view(1, -1).expand(len(u), -1), u)
        assert (weights.view(-1)[chosen] > 0).all()


def test_inverse_cdf_rows_are_their_own() -> None:
    torch.manual_seed(0)
    weights, u = torch.rand(40, 2 * BLOCK + 9) ** 3, torch.rand(40, dtype=torch.float64)
    together = inverse_cdf(weights, u)
    assert together.tolist() == [int(inverse_cdf(weights[i : i + 1], u[i : i + 1])) for i in range(40)]


@pytest.mark.parametrize("size", [30, 700, 1100])
def test_inverse_cdf_statistics(size: int) -> None:
    torch.manual_seed(1)
    weights = torch.softmax(2 * torch.randn(size), -1)
    count = 8_000
    u = torch.from_numpy(uniforms(*as_keys(size, 0, np.arange(count))))
    chosen = torch.cat([inverse_cdf(weights.expand(2000, -1), part) for part in u.split(2000)])
    assert chi_square_p(torch.bincount(chosen, minlength=size), count * weights) > P


# ---- the filters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_draw_gives_each_token_its_probability(filters: tuple[int, float, float], temperature: float) -> None:
    """Small vocabulary: with an even grid of u to one count, and with our own noise by chi-square."""
    torch.manual_seed(3)
    logits, count = 1.5 * torch.randn(40), 3000
    top_k, top_p, min_p = filters
    exact = probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    counts = torch.bincount(draw_many(logits / temperature, grid(count), *filters), minlength=40)
    assert (counts - count * exact).abs().max() <= 1 + 1e-2
    noise = torch.from_numpy(uniforms(*as_keys(11, 0, np.arange(count))))
    counts = torch.bincount(draw_many(logits / temperature, noise, *filters), minlength=40)
    assert chi_square_p(counts, count * exact) > P


@pytest.mark.parametrize("vocab", [NUCLEUS - 1, NUCLEUS, NUCLEUS + 1, 2 * NUCLEUS + 5 * BLOCK + 77])
@pytest.mark.parametrize(
    ("filters", "sharpness"),
    [
        ((0, 1.0, 0.0), 2.0),
        ((0, 0.9, 0.0), 3.0),
        ((0, 0.995, 0.0), 0.5),  # flat: far more than NUCLEUS tokens belong to it
        ((0, 0.98, 0.05), 0.3),
        ((NUCLEUS, 0.9, 0.0), 0.5),
        ((1500, 0.99, 0.0), 0.5),
        ((50, 0.95, 0.02), 2.0),
        ((0, 1.0, 0.1), 1.0),
    ],
)
def test_draw_from_a_large_vocabulary(vocab: int, filters: tuple[int, float, float], sharpness: float) -> None:
    """More tokens than top-p's first look takes, with and without room for all that belong to it."""
    torch.manual_seed(vocab)
    logits, count = sharpness * torch.randn(vocab), 512
    top_k, top_p, min_p = filters
    exact = probabilities(logits, top_k=top_k, top_p=top_p, min_p=min_p)
    counts = torch.bincount(draw_many(logits, grid(count), *filters), minlength=vocab)
    assert (counts - count * exact).abs().max() <= 1 + 1e-2
    assert int(counts[exact == 0].sum()) == 0
    # Single tokens are too rare to see where the tail was cut off: eight groups from the likeliest to the rarest do.
    order = exact.argsort(descending=True)
    group = (exact[order].cumsum(-1) * 8).clamp(max=7.99).long()
    drawn, share = (torch.zeros(8).double().index_add_(0, group, x[order].double()) for x in (counts, count * exact))
    assert ((drawn - share).abs() <= 4 * share.sqrt() + 2).all()


@st.composite
def distinct_logits(draw_: st.DrawFn) -> Tensor:
    """2 to 40 logits, no two nearer than 0.01, some tokens impossible."""
    values = draw_(st.lists(st.integers(-400, 400), min_size=2, max_size=40, unique=True))
    logits = torch.tensor(values, dtype=torch.float32) / 100
    impossible = draw_(st.sets(st.integers(1, len(values) - 1), max_size=3))
    logits[list(impossible)] = -torch.inf
    return logits


filters_of = st.tuples(
    st.one_of(st.just(0), st.integers(1, 45)),
    st.one_of(st.just(1.0), st.floats(0.001, 0.999)),
    st.one_of(st.just(0.0), st.floats(0.001, 0.999), st.just(1.0)),
)


@settings(max_examples=150, deadline=None)
@given(logits=distinct_logits(), filters=filters_of)
def test_reachable_tokens_are_those_transformers_keeps(logits: Tensor, filters: tuple[int, float, float]) -> None:
    """Drawn with u at the middle and the ends of every kept token's share, in both orders that a draw may use."""
    top_k, top_p, min_p = filters
    assume(clear_of_thresholds(logits, *filters))
    exact = probabilities(logits, top_k=top_k, top_p=top_p, min_p=min_p)
    looks = [grid(64), torch.tensor([2.0**-54, 1 - 2.0**-53], dtype=torch.float64)]
    for ordered in (exact, exact.sort(descending=True).values):
        upper = ordered.cumsum(-1)
        looks.append((upper - ordered / 2)[ordered > 0])
        looks.append(torch.cat([upper * (1 - 1e-9), upper * (1 + 1e-9)]).clamp(1e-12, 1 - 1e-12))
    reached = set(draw_many(logits, torch.cat(looks), *filters).tolist())
    kept = set(torch.isfinite(warp(logits, top_k=top_k, top_p=top_p, min_p=min_p)).nonzero()[:, 0].tolist())
    assert reached == kept


@settings(max_examples=250, deadline=None)
@given(logits=distinct_logits(), filters=filters_of)
def test_filter_logits_is_transformers_warpers(logits: Tensor, filters: tuple[int, float, float]) -> None:
    top_k, top_p, min_p = filters
    assume(clear_of_thresholds(logits, *filters))
    before = logits.clone()
    assert torch.equal(filter_logits(logits, *filters), warp(logits, top_k=top_k, top_p=top_p, min_p=min_p))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("vocab", [NUCLEUS + 300, 5000])
def test_filter_logits_of_a_large_vocabulary(vocab: int, filters: tuple[int, float, float]) -> None:
    top_k, top_p, min_p = filters
    generator = torch.Generator().manual_seed(vocab)
    compared = 0
    for sharpness in (0.5, 1.0, 3.0):
        logits = sharpness * torch.randn(vocab, generator=generator)
        if len(logits.unique()) < vocab or not clear_of_thresholds(logits, *filters):
            continue
        compared += 1
        assert torch.equal(filter_logits(logits, *filters), warp(logits, top_k=top_k, top_p=top_p, min_p=min_p))
    assert compared or MARGIN * vocab > 0.01  # only where tokens are as dense as the margin is none left to compare


@pytest.mark.parametrize("top_k", [0, 60])
def test_top_p_of_1_keeps_all(top_k: int) -> None:
    """However unlikely: the running sum of float32 probabilities is a little more or less than 1."""
    for seed in range(20):
        logits = 10 * torch.randn(80, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(filter_logits(logits, top_k, 1.0, 0.0), warp(logits, top_k=top_k))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(filters_of, st.floats(1e-9, 1 - 1e-9)), min_size=1, max_size=8),
    vocab=st.sampled_from([37, NUCLEUS, NUCLEUS + 200]),
    seed=st.integers(0, 1000),
)
def test_rows_do_not_see_each_other(rows: list[tuple[tuple[int, float, float], float]], vocab: int, seed: int) -> None:
    """Rows with different filters drawn together are the rows drawn alone."""
    logits = torch.randn(len(rows), vocab, generator=torch.Generator().manual_seed(seed))
    top_k, top_p, min_p = (np.array(column) for column in zip(*(filters for filters, _ in rows), strict=True))
    u = torch.tensor([value for _, value in rows], dtype=torch.float64)
    together = draw(logits, u, top_k, top_p.astype(np.float64), min_p.astype(np.float64))
    alone = [int(draw_many(logits[i], u[i : i + 1], *filters)) for i, (filters, _) in enumerate(rows)]
    assert together.tolist() == alone
