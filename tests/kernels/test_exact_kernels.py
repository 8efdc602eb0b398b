"""Kernels of exact mode: a row's bits are its own, and its numbers are torch's.

Without a GPU they run in Triton's interpreter, on smaller shapes and in float32 and float16.
"""

from __future__ import annotations

import pytest
import torch
from exactly import DEVICE, ON_GPU, bits, ordered_products  # noqa: F401

pytest.importorskip("triton")

from hf_paged.kernels.triton.exact import matmul, row_sum
from hf_paged.kernels.triton.exact_logprobs import exact_logprobs, sample_tokens_exactly
from hf_paged.sampling.fused import SamplingRows

ROWS = 4096 if ON_GPU else 300
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
SHAPES = [(1024, 3072), (3072, 1024), (4096, 4096), (1000, 24)] if ON_GPU else [(96, 80), (70, 24)]
"""(K, N)."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def random(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


# ---- products ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_a_rows_product_is_the_same_in_any_company(k: int, n: int, dtype: torch.dtype) -> None:
    x, weight, bias = random(ROWS, k, dtype=dtype), random(n, k, dtype=dtype, seed=1), random(n, dtype=dtype, seed=2)
    whole = matmul(x, weight.t(), bias)
    for count in (1, 3, 17, 128, 300):
        for start in (0, 5, ROWS - count):
            start = min(start, ROWS - count)
            part = matmul(x[start : start + count], weight.t(), bias)
            assert (bits(part) == bits(whole[start : start + count])).all(), (count, start)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_columns_may_be_multiplied_in_pieces(k: int, n: int, dtype: torch.dtype) -> None:
    """As trainers do with a vocabulary, into a wider buffer."""
    x, weight = random(19, k, dtype=dtype), random(n, k, dtype=dtype, seed=1)
    whole, cut = matmul(x, weight.t()), n // 3 * 2
    buffer = torch.full((19, 2 * n), 7.0, dtype=dtype, device=DEVICE)
    for start, end in ((0, cut), (cut, n)):
        tile = buffer[:, : end - start]
        assert matmul(x, weight[start:end].t(), out=tile) is tile
        assert (bits(tile) == bits(whole[:, start:end])).all()
    assert (buffer[:, cut:] == 7.0).all(), "nothing is written beyond the tile"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_products_are_torchs(k: int, n: int, dtype: torch.dtype) -> None:
    x, weight, bias = random(130, k, dtype=dtype), random(n, k, dtype=dtype, seed=1), random(n, dtype=dtype, seed=2)
    exact = (x.double() @ weight.t().double() + bias.double()).to(dtype)
    close = TOLERANCE[dtype]
    torch.testing.assert_close(matmul(x, weight.t(), bias), exact, rtol=close, atol=close)
    for other in (weight.t().contiguous(), weight.repeat_interleave(2, 0)[::2].t()):
        assert (bits(matmul(x, other, bias)) == bits(matmul(x, weight.t(), bias))).all(), "strides do not matter"
    strided = random(k, 130, dtype=dtype, seed=3).t()
    assert (bits(matmul(strided, weight.t())) == bits(matmul(strided.contiguous(), weight.t()))).all()


def test_batches_of_products() -> None:
    a, b = random(3, 7, 20), random(3, 20, 9, seed=1)
    found = matmul(a, b)
    torch.testing.assert_close(found, a @ b)
    assert all((bits(found[i]) == bits(matmul(a[i], b[i]))).all() for i in range(3))
    weight = random(20, 9, seed=2)
    torch.testing.assert_close(matmul(a, weight.expand(3, -1, -1)), a @ weight)
    assert matmul(a[:, :0], b).shape == (3, 0, 9)


# ---- sums --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 7, 128, 1500, 5000])
def test_a_rows_sum_is_the_same_in_any_company(columns: int, dtype: torch.dtype) -> None:
    x = random(ROWS, columns, dtype=dtype)
    whole = row_sum(x)
    torch.testing.assert_close(whole, x.double().sum(1).float(), rtol=1e-5, atol=1e-3)
    for count in (1, 3, 17, 128):
        assert (bits(row_sum(x[5 : 5 + count])) == bits(whole[5 : 5 + count])).all(), count


# ---- log-probabilities -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [100, 1024, 3333, *([151_936] if ON_GPU else [])])
def test_log_probabilities_are_torchs_and_the_rows_own(vocab: int, dtype: torch.dtype) -> None:
    logits = 4 * random(20, vocab, dtype=dtype)
    tokens = torch.arange(20, device=DEVICE) * 3 % vocab
    scales = torch.linspace(0.5, 2.0, 20, device=DEVICE)
    found = exact_logprobs(logits, tokens, scales)
    expected = torch.log_softmax(logits.double() * scales[:, None], -1).gather(1, tokens[:, None])[:, 0].float()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for count in (1, 3, 17):
        part = exact_logprobs(logits[2 : 2 + count], tokens[2 : 2 + count], scales[2 : 2 + count])
        assert (bits(part) == bits(found[2 : 2 + count])).all()


def test_tokens_that_could_not_be_sampled_have_none() -> None:
    logits = random(3, 50)
    logits[1, 4] = float("nan")
    found = exact_logprobs(logits, torch.tensor([-1, 3, 5], device=DEVICE), torch.ones(3, device=DEVICE))
    assert found.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [100, 4096, 40_000])
def test_log_probabilities_are_trls_fused_heads(
    vocab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, over the same logits, whichever columns it takes at a time."""
    head = pytest.importorskip("trl.kernels.chunked_logprob")
    monkeypatch.setattr(head, "_use_triton", lambda device: True)
    hidden, weight = random(9, 16, dtype=dtype), random(vocab, 16, dtype=dtype, seed=1)
    tokens = torch.arange(9, device=DEVICE) * 7 % vocab
    temperature = 0.7

    def product(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        return matmul(a, b, out=out)

    monkeypatch.setattr(head.torch, "mm", product)
    for outputs in ((), ("entropy",)):
        theirs = head.ChunkedLogProbFunction.apply(
            hidden, weight, None, tokens, temperature, 32768, None, 1.0, outputs
        )[0]
        scales = torch.full((9,), 1 / temperature, device=DEVICE)
        assert (bits(exact_logprobs(matmul(hidden, weight.t()), tokens, scales)) == bits(theirs)).all()


def test_the_draw_is_the_samplers_own() -> None:
    from hf_paged.kernels.triton.sampling import sample_tokens

    count, logits = 5, 3 * random(5, 200)
    values = {
        "temperature": torch.full((count,), 0.8), "top_k": torch.full((count,), 20, dtype=torch.int32),
        "top_p": torch.full((count,), 0.9), "min_p": torch.zeros(count), "keys": torch.arange(count),
        "wants_logprob": torch.ones(count, dtype=torch.int32), "logprob_scale": torch.full((count,), 1.25),
    }  # fmt: skip
    rows = SamplingRows(**{name: value.to(DEVICE) for name, value in values.items()})
    results = []
    for sample in (sample_tokens, sample_tokens_exactly):
        out = {
            "tokens": torch.empty(count, dtype=torch.int64, device=DEVICE),
            "logprobs": torch.empty(count, device=DEVICE),
            "ranks": torch.empty(count, dtype=torch.int32, device=DEVICE),
        }
        sample(logits, rows, **out)
        results.append(out)
    plain, exact = results
    assert plain["tokens"].equal(exact["tokens"]) and plain["ranks"].equal(exact["ranks"])
    torch.testing.assert_close(plain["logprobs"], exact["logprobs"], rtol=1e-5, atol=1e-5)
