"""The fused sampler: thresholds against a sort, draws against the race written in numpy, rows that see nothing but
themselves. On the CPU Triton interprets the kernels, slowly: vocabularies are small there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from hf_paged.kernels.triton import sampling  # noqa: E402
from hf_paged.kernels.triton.sampling import find_thresholds, race_block, sample_tokens  # noqa: E402
from hf_paged.sampling.draw import filter_logits, row_keys  # noqa: E402
from hf_paged.sampling.fused import SamplingRows  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
MARGIN = 1e-5
"""How far masses stay from a threshold where two roundings of them are compared."""

needs_gpu = [pytest.mark.cuda, pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")]


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    for mark in needs_gpu:
        test = mark(test)
    return test


def rows_of(
    count: int,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    min_p: Any = 0.0,
    keys: Any = None,
    wants_logprob: Any = 1,
    logprob_scale: Any = 1.0,
) -> SamplingRows:
    """Parameters of `count` rows; each is one number for all or a list. Keys are scattered unless given."""

    def column(values: Any, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(values, dtype=dtype).expand(count).contiguous().to(DEVICE)

    return SamplingRows(
        temperature=column(temperature, torch.float32),
        top_k=column(top_k, torch.int32),
        top_p=column(top_p, torch.float32),
        min_p=column(min_p, torch.float32),
        keys=column(scattered(count) if keys is None else keys, torch.int64),
        wants_logprob=column(wants_logprob, torch.int32),
        logprob_scale=column(logprob_scale, torch.float32),
    )


def scattered(count: int, seed: int = 0) -> Tensor:
    zeros = np.zeros(count, dtype=np.uint64)
    return torch.from_numpy(row_keys(zeros + np.uint64(seed), zeros, np.arange(count, dtype=np.uint64)).view(np.int64))


def sample(
    logits: Tensor, rows: SamplingRows, block: int | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, log-probabilities and ranks, on the CPU."""
    count = len(logits)
    tokens = torch.full((count,), -7, dtype=torch.int64, device=DEVICE)
    logprobs = torch.full((count,), -7.0, device=DEVICE)
    ranks = torch.full((count,), -7, dtype=torch.int32, device=DEVICE)
    mask = None if mask is None else mask.to(DEVICE)
    sample_tokens(logits.to(DEVICE), rows, tokens=tokens, logprobs=logprobs, ranks=ranks, mask=mask, block=block)
    return tokens.cpu(), logprobs.cpu(), ranks.cpu()


def random_logits(rows: int, vocab: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


# ---- what must come out ----------------------------------------------------------------------------------------------


def kept_by_sorting(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """bool `[V]` in float64: what may be drawn. Ties with the last token of top-k and of top-p stay."""
    x = logits.double() / temperature
    ordered = x.sort(descending=True).values
    floor = ordered[top_k - 1] if 0 < top_k < len(x) else -torch.inf
    weights = torch.softmax(x.masked_fill(x < floor, -torch.inf), -1)
    kept = weights > 0
    if top_p < 1:
        kept &= mass_above(weights) < top_p
    return kept & (weights >= min_p * weights.max())


def mass_above(weights: Tensor) -> Tensor:
    """float64 `[V]`: the mass of strictly likelier tokens."""
    ordered, places = weights.sort(descending=True)
    first_of_equals = torch.searchsorted(-ordered, -ordered)
    before = torch.cat([ordered.new_zeros(1), ordered.cumsum(-1)[:-1]])[first_of_equals]
    return torch.zeros_like(weights).scatter_(0, places, before)


def clear_of_thresholds(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> bool:
    """Whether no token lies so near a threshold that rounding decides about it."""
    x = logits.double() / temperature
    kept = kept_by_sorting(logits, temperature, top_k, 1.0, 0.0)
    weights = torch.softmax(x.masked_fill(~kept, -torch.inf), -1)
    near_p = (mass_above(weights) - top_p).abs() < MARGIN
    near_m = (weights / weights.max() - min_p).abs() < MARGIN
    return not (top_p < 1 and bool(near_p.any())) and not (0 < min_p < 1 and bool(near_m.any()))


def philox(key: int, counters: np.ndarray) -> np.ndarray:
    """uint32 `[N, 4]`: Philox4x32-7 of 64-bit keys and counters, as in Salmon et al., section 3.4."""
    low = np.uint64(0xFFFFFFFF)
    counters = counters.astype(np.uint64)
    c = [counters & low, counters >> np.uint64(32), np.zeros_like(counters), np.zeros_like(counters)]
    k = [key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF]
    for _ in range(7):
        one, two = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (two >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]),
            two & low,
            (one >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]),
            one & low,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c, axis=1).astype(np.uint32)


def race(logits: Tensor, temperature: float, key: int) -> np.ndarray:
    """float64 `[V]`: each token's score; the largest wins."""
    vocab = len(logits)
    bits = philox(key, np.arange(-(-vocab // 4))).reshape(-1)[:vocab]
    return logits.double().numpy() / temperature - np.log(-np.log1p(-(bits.astype(np.float64) + 0.5) * 2.0**-32))


def chi_square_p(counts: Tensor, expected: Tensor) -> float:
    """The p-value of Pearson's test; cells that expect fewer than 5 are put together, impossible ones must be empty."""
    assert int(counts[expected == 0].sum()) == 0, "drew what has probability 0"
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]]).double()
    used = expected > 0
    statistic = ((counts - expected)[used] ** 2 / expected[used]).sum()
    degrees = torch.tensor((int(used.sum()) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, statistic / 2)) if degrees > 0 else 1.0


# ---- thresholds ------------------------------------------------------------------------------------------------------

filters_of = st.tuples(
    st.one_of(st.just(0), st.integers(1, 70)),
    st.one_of(st.just(1.0), st.floats(0.01, 0.995), st.floats(0.8, 0.9999)),
    st.sampled_from([0.0, 0.0, 0.0, 0.0, 0.001, 0.03, 0.4, 1.0]),
)
dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
blocks = st.sampled_from([4, 16, 128])
"""In few lanes much of a row finds no place, and thresholds must be searched in memory."""


@st.composite
def rows_with_ties(draw: Any) -> Tensor:
    """float32 `[V]` on a grid that every dtype holds exactly, so that ties abound; some tokens are impossible, zeros
    have both signs."""
    size, steps = draw(st.integers(2, 70)), draw(st.sampled_from([1, 2, 16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = torch.randint(-4 * steps, 4 * steps + 1, (size,), generator=generator) / steps
    logits[1:][torch.rand(size - 1, generator=generator) < draw(st.sampled_from([0.0, 0.1, 0.9]))] = -torch.inf
    return torch.where((logits == 0) & (torch.rand(size, generator=generator) < 0.5), -0.0, logits)


@settings(max_examples=150, deadline=None)
@given(
    logits=rows_with_ties(),
    filters=filters_of,
    temperature=st.sampled_from([0.3, 1.0, 2.5, 20.0]),
    dtype=dtypes,
    block=blocks,
)
def test_kept_tokens_are_those_of_a_sort(
    logits: Tensor, filters: tuple[int, float, float], temperature: float, dtype: torch.dtype, block: int
) -> None:
    assume(clear_of_thresholds(logits, temperature, *filters))
    rows = rows_of(1, temperature, *filters)
    threshold = find_thresholds(logits[None].to(DEVICE, dtype), rows, block=block).cpu()
    assert (logits >= threshold).tolist() == kept_by_sorting(logits, temperature, *filters).tolist()


@settings(max_examples=80, deadline=None)
@given(
    size=st.integers(2, 70),
    scale=st.sampled_from([0.3, 2.0, 8.0]),
    seed=st.integers(0, 2**32),
    filters=filters_of,
    dtype=dtypes,
    block=blocks,
)
def test_kept_tokens_are_those_of_filter_logits(
    size: int, scale: float, seed: int, filters: tuple[int, float, float], dtype: torch.dtype, block: int
) -> None:
    """Where no two tokens are equally likely: the same as where processed scores are shown on a CPU."""
    logits = random_logits(1, size, seed, scale)[0].to(dtype).float()
    assume(logits.sort().values.diff().min() > 1e-5 and clear_of_thresholds(logits, 1.0, *filters))
    threshold = find_thresholds(logits[None].to(DEVICE, dtype), rows_of(1, 1.0, *filters), block=block).cpu()
    assert (logits >= threshold).tolist() == torch.isfinite(filter_logits(logits, *filters)).tolist()


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_thresholds_of_any_size(scale: float, dtype: torch.dtype) -> None:
    """Logits next to zero, and so large that a search must cross most of the exponents."""
    filters = [(7, 1.0, 0.0), (45, 1.0, 0.0), (0, 0.8, 0.0), (0, 0.99, 0.0), (40, 0.97, 0.0), (3, 0.7, 0.0)]
    columns = list(zip(*filters, strict=True))
    logits = (random_logits(6, 60) * scale).to(dtype).float()
    for block in (4, 16, 64):
        found = find_thresholds(logits.to(DEVICE, dtype), rows_of(6, scale, *columns), block=block).cpu()
        for row, threshold, one in zip(logits, found, filters, strict=True):
            assert clear_of_thresholds(row, scale, *one)
            assert torch.equal(row >= threshold, kept_by_sorting(row, scale, *one))


@pytest.mark.parametrize("top_p", [0.25, 0.4, 0.9])
def test_ties_with_the_kth_count_in_top_p(top_p: float) -> None:
    """Fourteen tokens tie with the third; four lanes hold six of them, yet all are part of the mass."""
    logits = torch.tensor([[2.0] * 2 + [1.0] * 14])
    kept = logits >= find_thresholds(logits.to(DEVICE), rows_of(1, 1.0, 3, top_p), block=4).cpu()
    assert torch.equal(kept[0], kept_by_sorting(logits[0], 1.0, 3, top_p, 0.0))


def test_rows_without_filters_keep_all_that_is_possible() -> None:
    logits = random_logits(5, 40)
    logits[:, 7] = -torch.inf
    rows = rows_of(5, [1.0, 1.0, 0.0, 1.0, 1.0], [0, 40, 3, 0, 39], 1.0, 0.0)
    kept = logits >= find_thresholds(logits.to(DEVICE), rows).cpu()[:, None]
    assert kept[:4].sum(-1).tolist() == [39] * 4  # greedy rows are not filtered
    assert torch.equal(kept[4], torch.isfinite(logits[4]))


# ---- noise -----------------------------------------------------------------------------------------------------------


@triton.jit
def _exponentials(bits, out, SIZE: tl.constexpr):
    where = tl.arange(0, SIZE)
    tl.store(out + where, sampling._exponential(tl.load(bits + where).to(tl.uint32, bitcast=True)))


def test_exponential_is_accurate_at_both_ends() -> None:
    """Against float64, relative; the least cells decide about most draws, and the last must not be infinite."""
    ends = [0, 1, 2, 3, 1000, 2**27 - 1, 2**27, 2**27 + 1, 2**31, 2**32 - 2**20, 2**32 - 200, 2**32 - 2, 2**32 - 1]
    bits = np.concatenate([ends, np.logspace(0, 32, 4096 - len(ends), base=2) - 1]).astype(np.uint64).astype(np.uint32)
    out = torch.empty(4096, device=DEVICE)
    _exponentials[(1,)](torch.from_numpy(bits.view(np.int32)).to(DEVICE), out, SIZE=4096)
    v = (bits.astype(np.float64) + 0.5) * 2.0**-32
    exact = -np.log1p(-v) / math.log(2)
    error = np.abs(out.double().cpu().numpy() / exact - 1)
    assert error[bits < 2**32 - 2**12].max() < 2e-5
    assert error.max() < 0.1  # the largest: late in any case, and finite


def test_philox_known_answers() -> None:
    """Random123's: kat_vectors, philox4x32 with 7 rounds."""
    assert [hex(word) for word in philox(0, np.zeros(1))[0]] == ["0x5f6fb709", "0xd893f64", "0x4f121f81", "0x4f730a48"]


def test_the_numpy_race_has_the_right_distribution() -> None:
    """What the kernel's tokens are compared with: many keys, by chi-square."""
    logits, count = random_logits(1, 10)[0], 4000
    tokens = torch.tensor([int(race(logits, 0.7, int(key)).argmax()) for key in scattered(count)])
    expected = count * torch.softmax(logits.double() / 0.7, -1)
    assert chi_square_p(torch.bincount(tokens, minlength=10), expected) > 1e-3


# ---- draws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [16, 128])
def test_tokens_are_the_winners_of_the_race(block: int) -> None:
    """The kernel against numpy, whole rows and rows with a filter, all four words of a Philox call."""
    count, vocab = 40, 75
    logits = random_logits(count, vocab, scale=0.5)
    filters = [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.6, 0.0), (20, 0.9, 0.3)] * 10
    temperature = [0.5 + 0.04 * row for row in range(count)]
    keys = scattered(count)
    tokens, _, _ = sample(logits, rows_of(count, temperature, *zip(*filters, strict=True), keys), block)
    words = set()
    for row in range(count):
        scores = race(logits[row], temperature[row], int(keys[row]))
        scores[~kept_by_sorting(logits[row], temperature[row], *filters[row]).numpy()] = -np.inf
        second, first = np.sort(scores)[-2:]
        assert first - second > 1e-4, "too near to compare: choose other seeds"
        assert int(tokens[row]) == int(scores.argmax())
        words.add(int(tokens[row]) % 4)
    assert words == {0, 1, 2, 3}


DRAWS = [
    (1.0, 0, 1.0, 0.0),
    (0.6, 0, 1.0, 0.0),
    (1.5, 5, 1.0, 0.0),
    (1.0, 0, 0.8, 0.0),
    (1.0, 0, 1.0, 0.2),
    (0.8, 9, 0.9, 0.1),
]
"""temperature, top_k, top_p, min_p."""


def assert_probabilities(options: tuple[float, int, float, float], count: int, block: int | None = None) -> None:
    logits = random_logits(1, 24, seed=3, scale=1.5)[0]
    kept = kept_by_sorting(logits, *options)
    expected = count * torch.softmax((logits.double() / options[0]).masked_fill(~kept, -torch.inf), -1)
    tokens, _, _ = sample(logits.expand(count, -1), rows_of(count, *options, wants_logprob=0), block)
    assert chi_square_p(torch.bincount(tokens, minlength=24), expected) > 1e-3


@pytest.mark.parametrize("options", DRAWS, ids=str)
def test_tokens_have_their_probabilities(
    options: tuple[float, int, float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row drawn from with many keys; its threshold is found once, for the interpreter's sake."""
    find = sampling.find_thresholds

    def find_once(logits: Tensor, rows: SamplingRows, **options: Any) -> Tensor:
        return find(logits[:1], rows, **options).expand(len(logits)).contiguous()

    monkeypatch.setattr(sampling, "find_thresholds", find_once)
    assert_probabilities(options, 400, block=32)


@on_gpu
@pytest.mark.parametrize("options", DRAWS, ids=str)
def test_many_tokens_have_their_probabilities(options: tuple[float, int, float, float]) -> None:
    assert_probabilities(options, 60_000)


def test_greedy_takes_the_first_maximum() -> None:
    logits = random_logits(4, 70)
    for row, places in enumerate([[0, 69], [13, 14, 15], [63, 64], [69]]):
        logits[row, places] = 9.0
    for dtype in (torch.bfloat16, torch.float32):
        for block in (16, 64, None):
            tokens, _, ranks = sample(logits.to(dtype), rows_of(4, 0.0, 3, 0.5, 0.1), block)
            assert tokens.tolist() == [0, 13, 63, 69]
            assert ranks.tolist() == [1] * 4


def test_lowest_temperatures_and_lowest_logits() -> None:
    """Where logits divided by temperature leave float32, a token that may be drawn is still drawn."""
    logits = torch.full((3, 30), -torch.inf)
    logits[0, 11] = logits[1, 12] = -3e38
    logits[2, 13], logits[2, 14] = 500.0, 499.9
    tokens, logprobs, _ = sample(logits, rows_of(3, 1e-5, [0, 2, 0], 1.0, [0.0, 0.5, 0.0]), 16)
    assert tokens.tolist() == [11, 12, 13]
    assert logprobs[:2].tolist() == [0.0, 0.0]


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_row_is_the_same_at_any_place_in_any_blocks_and_dtype(data: st.DataObject) -> None:
    """Alone in float32 and one block, or among others in half precision and many blocks."""
    count, vocab = data.draw(st.integers(2, 5)), data.draw(st.integers(20, 70))
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16]))
    logits = random_logits(count, vocab, data.draw(st.integers(0, 99)), 1.0).to(dtype)
    options = [
        data.draw(st.sampled_from([(0.7, 0, 1.0, 0.0), (1.3, 9, 1.0, 0.0), (1.0, 0, 0.7, 0.0), (0.0, 0, 1.0, 0.0)]))
        for _ in range(count)
    ]
    keys = data.draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=count, max_size=count))
    together, _, _ = sample(
        logits, rows_of(count, *zip(*options, strict=True), keys), data.draw(st.sampled_from([4, 16]))
    )
    me = data.draw(st.integers(0, count - 1))
    alone, _, _ = sample(logits[me : me + 1].float(), rows_of(1, *options[me], keys[me]))
    assert alone.tolist() == [together[me]]


def test_all_bits_of_a_key_count() -> None:
    """Keys that differ in one bit, low or high, draw from 4,096 equal tokens without meeting."""
    keys = [0, *(1 << bit for bit in range(0, 63, 3)), -(2**63)]
    tokens, _, _ = sample(torch.zeros(len(keys), 4096), rows_of(len(keys), keys=keys))
    assert len(tokens.unique()) >= len(keys) - 1  # one pair meets by chance once in sixteen


# ---- what is reported ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logprobs_and_ranks(dtype: torch.dtype) -> None:
    """Of the raw logits, whatever temperature and filters did; bfloat16 rows have ties."""
    count, vocab = 8, 70
    logits = random_logits(count, vocab, scale=6.0).to(dtype)
    logits[:, 5] = -torch.inf
    logits[3] -= 500
    wants = [1, 0] * 4
    tokens, logprobs, ranks = sample(logits, rows_of(count, [3.0] * 6 + [0.0] * 2, 30, 1.0, wants_logprob=wants), 16)
    chosen = logits.float().gather(1, tokens[:, None])
    assert torch.allclose(logprobs, torch.log_softmax(logits.float(), -1).gather(1, tokens[:, None])[:, 0], atol=2e-6)
    exact = (logits.float() > chosen).sum(-1) + 1
    assert ranks.tolist() == [int(rank) if want else 0 for rank, want in zip(exact, wants, strict=True)]
    assert ranks.max() > 1


def test_logprobs_of_scaled_logits() -> None:
    """Raw and scaled rows side by side: neither tokens nor ranks change."""
    temperatures = [0.0, 0.5, 2.5, 1.0, 1e-5, 0.5, 0.0, 1.7]
    scales = [1.0, 2.0, 0.4, 1.0, 1e5, 1.0, 1.0, 1 / 1.7]
    logits = random_logits(8, 70, scale=6.0)
    logits[:, 5] = -torch.inf
    logits[:, 16:32] -= 500  # a block that weighs nothing
    tokens, logprobs, ranks = sample(logits, rows_of(8, temperatures, 30, logprob_scale=scales), 16)
    raw_tokens, _, raw_ranks = sample(logits, rows_of(8, temperatures, 30), 16)
    scaled = torch.log_softmax(logits.double() * torch.tensor(scales, dtype=torch.float64)[:, None], -1)
    exact = scaled.gather(1, tokens[:, None])[:, 0]
    assert torch.allclose(logprobs.double(), exact, rtol=1e-6, atol=1e-5)
    assert torch.equal(tokens, raw_tokens)
    assert torch.equal(ranks, raw_ranks)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under the interpreter
@pytest.mark.parametrize("options", [(1.0, 0, 1.0, 0.0), (0.7, 5, 0.9, 0.1), (0.0, 0, 1.0, 0.0)], ids=str)
def test_rows_that_cannot_be_sampled(options: tuple[float, int, float, float]) -> None:
    """They get -1, and their neighbours what they get alone."""
    logits = random_logits(9, 40)
    logits[1, 3] = torch.nan
    logits[2] = torch.nan
    logits[4, 39] = torch.inf
    logits[5] = -torch.inf
    logits[6, 0], logits[6, 1] = torch.inf, torch.nan
    logits[7, 17:] = -torch.inf  # whole blocks, yet not the row
    bad, keys = [1, 2, 4, 5, 6], scattered(9)
    for dtype in (torch.bfloat16, torch.float32):
        tokens, logprobs, ranks = sample(logits.to(dtype), rows_of(9, *options, keys), 16)
        assert (tokens[bad] == -1).all()
        assert logprobs[bad].isnan().all()
        assert (ranks[bad] == 0).all()
        good = [row for row in range(9) if row not in bad]
        alone, alone_logprobs, _ = sample(logits[good].to(dtype), rows_of(len(good), *options, keys[good]), 16)
        assert tokens[good].tolist() == alone.tolist()
        assert torch.equal(logprobs[good], alone_logprobs)
        assert (tokens[7] < 17) and (tokens[good] >= 0).all()


def test_rows_that_lie_apart() -> None:
    """A view of wider rows: what lies between is not looked at."""
    wide = torch.full((5, 64), torch.nan)
    wide[:, :37] = random_logits(5, 37)
    rows = rows_of(5, 1.0, [0, 3, 0, 0, 3], [1.0, 1.0, 0.6, 1.0, 0.6])
    apart, packed = sample(wide.to(DEVICE)[:, :37], rows, 16), sample(wide[:, :37].contiguous(), rows, 16)
    assert all(torch.equal(one, other) for one, other in zip(apart, packed, strict=True))


def packed_bits(allowed: Tensor) -> Tensor:
    """bool `[B, V]` -> int32 `[B, ceil(V / 32)]`, the lowest bit first."""
    padded = np.zeros((len(allowed), -(-allowed.shape[1] // 32) * 32), dtype=np.uint8)
    padded[:, : allowed.shape[1]] = allowed.numpy()
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32).copy())


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_masked_tokens_are_as_if_their_logits_were_not_there(data: st.DataObject) -> None:
    """What is drawn is what would be of the others alone; log-probabilities and ranks are of all."""
    vocab = data.draw(st.sampled_from([7, 32, 70, 129]))
    block = data.draw(st.sampled_from([16, 64]))
    count = 4
    logits = random_logits(count, vocab, seed=data.draw(st.integers(0, 99)), scale=4.0)
    share = data.draw(st.sampled_from([0.1, 0.5, 0.95]))
    seed = data.draw(st.integers(0, 99))
    allowed = torch.rand(count, vocab, generator=torch.Generator().manual_seed(seed)) < share
    allowed[:, data.draw(st.integers(0, vocab - 1))] = True
    allowed[3] = True
    parameters = [0.0, 0.8, 1.3, 1.0], [0, 3, 0, 5], [1.0, 1.0, 0.7, 0.9], [0.0, 0.0, 0.05, 0.0]
    rows = rows_of(count, *parameters)
    tokens, logprobs, ranks = sample(logits, rows, block, packed_bits(allowed))
    expected, _, _ = sample(logits.masked_fill(~allowed, -torch.inf), rows, block)
    assert torch.equal(tokens, expected)
    assert bool(allowed.gather(1, tokens[:, None]).all())
    chosen = logits.gather(1, tokens[:, None])
    assert torch.allclose(logprobs, torch.log_softmax(logits, -1).gather(1, tokens[:, None])[:, 0], atol=1e-5)
    assert torch.equal(ranks.long(), (logits > chosen).sum(-1) + 1)
    whole, whole_logprobs, _ = sample(logits, rows, block)
    assert whole[3] == tokens[3] and whole_logprobs[3] == logprobs[3]  # a neighbour's mask is not its own


@pytest.mark.parametrize("options", [(1.0, 0, 1.0, 0.0), (0.7, 5, 0.9, 0.1), (0.0, 0, 1.0, 0.0)], ids=str)
def test_rows_without_a_chance(options: tuple[float, int, float, float]) -> None:
    """All that the mask allows is -inf: not the model's fault, and not what a row of NaN is."""
    logits = random_logits(3, 40)
    logits[0, 7:9] = -torch.inf
    logits[1, 3] = torch.nan
    allowed = torch.zeros(3, 40, dtype=torch.bool)
    allowed[:, 7:9] = True
    tokens, logprobs, ranks = sample(logits, rows_of(3, *options), 16, packed_bits(allowed))
    assert tokens[:2].tolist() == [-2, -1] and int(tokens[2]) in (7, 8)
    assert logprobs[:2].isnan().all() and ranks[:2].tolist() == [0, 0]


def test_thresholds_below_what_the_lanes_hold() -> None:
    """A search that must read the row again reads the mask again too."""
    logits = random_logits(2, 600, scale=0.01)
    allowed = torch.zeros(2, 600, dtype=torch.bool)
    allowed[:, ::2] = True
    for top_k, top_p in ((250, 1.0), (0, 0.9)):
        rows = rows_of(2, 1.0, top_k, top_p)
        found = find_thresholds(logits.to(DEVICE), rows, mask=packed_bits(allowed).to(DEVICE), block=16)
        expected = find_thresholds(logits.masked_fill(~allowed, -torch.inf).to(DEVICE), rows, block=16)
        assert torch.equal(found, expected)


def test_unusable_shapes() -> None:
    with pytest.raises(ValueError, match=r"a mask of 2 rows of 40 logits is int32 \[2, 2\]"):
        sample(torch.zeros(2, 40), rows_of(2), mask=torch.zeros(2, 1, dtype=torch.int32))
    sample(torch.zeros(0, 10), rows_of(0))
    with pytest.raises(ValueError, match="side by side"):
        sample(torch.zeros(10, 3).to(DEVICE).T, rows_of(3))


def test_blocks_fill_the_gpu() -> None:
    """Few rows are cut small, many are not."""
    assert race_block(1, 151_936) == 1024
    assert race_block(256, 151_936) == race_block(512, 32_000) == 4096
    assert race_block(1, 10) == 1024


# ---- large vocabularies ----------------------------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_thresholds_of_a_large_vocabulary(dtype: torch.dtype, scale: float) -> None:
    """bfloat16 has many ties there; a scale of 1 spreads the mass over most of the vocabulary."""
    logits = random_logits(16, 151_936, scale=scale).to(DEVICE, dtype)
    filters = [(50, 1.0, 0.0), (0, 0.95, 0.0), (50, 0.9, 0.0), (0, 1.0, 0.05), (5000, 1.0, 0.0), (0, 0.3, 0.02)]
    filters = (filters * 3)[:16]
    found = find_thresholds(logits, rows_of(16, 0.8, *zip(*filters, strict=True)))
    for row, threshold, (top_k, top_p, min_p) in zip(logits.float(), found, filters, strict=True):
        kept = row >= threshold
        x = row.double() / 0.8
        floor = x.sort(descending=True).values[top_k - 1] if top_k else -torch.inf
        weights = torch.softmax(x.masked_fill(x < floor, -torch.inf), -1)
        above = mass_above(weights)
        near = (above - top_p).abs() < MARGIN if top_p < 1 else torch.zeros_like(kept)
        near |= (weights / weights.max() - min_p).abs() < MARGIN if min_p else False
        expected = (weights > 0) & (above < top_p if top_p < 1 else True) & (weights >= min_p * weights.max())
        assert torch.equal(kept[~near], expected[~near])


@on_gpu
def test_a_large_vocabulary() -> None:
    """In any blocks, from bfloat16 as from float32, greedy as argmax."""
    logits = random_logits(64, 151_936).to(DEVICE, torch.bfloat16)
    options = [(1.0, 0, 1.0, 0.0), (0.7, 50, 0.9, 0.0), (1.0, 0, 0.95, 0.0), (0.0, 0, 1.0, 0.0)] * 16
    rows = rows_of(64, *zip(*options, strict=True))
    first = sample(logits, rows)
    for block in (1024, 2048, 4096):
        assert torch.equal(sample(logits, rows, block)[0], first[0])
    assert torch.equal(sample(logits.float(), rows)[0], first[0])
    assert torch.equal(first[0][3::4], logits.float().argmax(-1).cpu()[3::4])
    chosen = first[0].to(DEVICE)[:, None]
    exact = torch.log_softmax(logits.float(), -1).gather(1, chosen)[:, 0].cpu()
    assert torch.allclose(first[1], exact, atol=1e-5)
    assert torch.equal(first[2], ((logits > logits.gather(1, chosen)).sum(-1) + 1).int().cpu())


@on_gpu
def test_in_a_cuda_graph() -> None:
    """Parameters and logits change between replays; tokens are those of a call without a graph."""
    logits = random_logits(32, 32_000).to(DEVICE, torch.bfloat16)
    rows = rows_of(32, 1.0, 50, 0.9)
    tokens = torch.empty(32, dtype=torch.int64, device=DEVICE)
    outputs = {"logprobs": torch.empty(32, device=DEVICE), "ranks": torch.empty(32, dtype=torch.int32, device=DEVICE)}
    sample_tokens(logits, rows, tokens=tokens, **outputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample_tokens(logits, rows, tokens=tokens, **outputs)
    for step in range(5):
        logits.copy_(random_logits(32, 32_000, seed=step))
        rows.keys.copy_(scattered(32, seed=step))
        rows.top_k.fill_(step * 20)
        rows.temperature.fill_(step / 2)
        graph.replay()
        assert torch.equal(tokens.cpu(), sample(logits, rows)[0])
