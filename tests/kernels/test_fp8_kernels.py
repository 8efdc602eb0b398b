"""Activations to float8 and weights from it, against plain torch.

Without a GPU the kernels run in Triton's interpreter, whose cast to float8 loses the carry from 1.96 to 2 and has no
NaN: there, nothing shall need rounding.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from hf_paged.kernels.triton import fp8
from hf_paged.kernels.triton.fp8 import FP8Config, dequantize_blocks, fp8_matmul, quantize_groups, quantize_rows

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
FP8 = torch.float8_e4m3fn

few = settings(max_examples=25, deadline=None)


def representable(*sizes: int, seed: int) -> torch.Tensor:
    """float32, numbers that float8 holds, the largest among them."""
    generator = torch.Generator().manual_seed(seed)
    x = (100 * torch.randn(*sizes, generator=generator)).clamp(-448, 448).to(FP8).float()
    x[:, sizes[1] // 2] = 448.0
    return x


@few
@given(
    rows=st.integers(1, 5), columns=st.integers(1, 700), exponent=st.integers(-5, 5),
    at_once=st.sampled_from([128, 16384]), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    strided=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_rows_keep_what_float8_holds(
    rows: int, columns: int, exponent: int, at_once: int, dtype: torch.dtype, strided: bool, seed: int
) -> None:
    """With a power of two as the scale, which the largest number decides."""
    held = representable(rows, columns, seed=seed).to(DEVICE)
    scale = 2.0 ** (exponent + torch.arange(rows, device=DEVICE)[:, None] % 3)
    x = (held * scale).to(dtype)
    x = x.t().contiguous().t() if strided else x
    before, fp8.MOST_AT_ONCE = fp8.MOST_AT_ONCE, at_once
    try:
        quantized, scales = quantize_rows(x)
    finally:
        fp8.MOST_AT_ONCE = before
    assert quantized.dtype == FP8 and scales.shape == (rows, 1)
    assert scales.equal(scale) and quantized.float().equal(held)


def test_rows_of_zeros_and_no_rows() -> None:
    x = torch.zeros(3, 40, device=DEVICE)
    quantized, scales = quantize_rows(x)
    assert (quantized.float() == 0).all() and (scales > 0).all() and scales.isfinite().all()
    quantized, scales = quantize_rows(x[:0])
    assert quantized.shape == (0, 40) and scales.shape == (0, 1)


def test_a_nan_does_not_scale_its_row() -> None:
    x = representable(2, 30, seed=0).to(DEVICE)
    x[0, 3] = float("nan")
    quantized, scales = quantize_rows(x)
    assert scales.tolist() == [[1.0], [1.0]]
    real = ~x.isnan()
    assert quantized.float()[real].equal(x[real])


@pytest.mark.cuda
@pytest.mark.skipif(not ON_GPU, reason="the interpreter's cast does not round, and has no NaN")
@pytest.mark.parametrize("columns", [1, 4096, 14336, 40_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_are_rounded_as_torch_does(columns: int, dtype: torch.dtype) -> None:
    x = torch.randn(33, columns, device=DEVICE).to(dtype)
    x[5] *= 1000
    x[7, -1] = float("nan")
    quantized, scales = quantize_rows(x)
    peak = x.float().nan_to_num(0).abs().amax(1, keepdim=True).clamp(min=fp8.SMALLEST_PEAK)
    most = torch.full_like(peak, 448)  # by a Python number torch divides as if by its reciprocal
    assert scales.equal(peak / most)
    # A NaN's bits may differ: there are two of them.
    found, wanted = quantized.float(), (x.float() * (most / peak)).clamp(-448, 448).to(FP8).float()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert found.isnan().sum() == 1
    again = quantize_rows(x)
    assert again[0].view(torch.uint8).equal(quantized.view(torch.uint8)) and again[1].equal(scales)


def unrolled(weight: torch.Tensor, scale_inv: torch.Tensor) -> torch.Tensor:
    n, k = weight.shape
    scales = scale_inv.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    return weight.float() * scales


@few
@given(n=st.integers(1, 300), k=st.integers(1, 300), dtype=st.sampled_from([torch.float32, torch.float16]))
def test_blocks_are_torchs(n: int, k: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n)
    weight = torch.randn(n, k, generator=generator).to(FP8).to(DEVICE)
    scale_inv = (torch.rand(-(-n // 128), -(-k // 128), generator=generator) + 0.1).to(DEVICE)
    assert dequantize_blocks(weight, scale_inv, dtype).equal(unrolled(weight, scale_inv).to(dtype))


@pytest.mark.cuda
@pytest.mark.skipif(not ON_GPU, reason="the interpreter cuts off instead of rounding to bfloat16")
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (576, 7168), (28672, 4096)])
def test_real_blocks(n: int, k: int) -> None:
    weight = torch.randn(n, k, device=DEVICE).to(FP8)
    scale_inv = torch.rand(-(-n // 128), -(-k // 128), device=DEVICE) + 0.1
    assert dequantize_blocks(weight, scale_inv, torch.bfloat16).equal(unrolled(weight, scale_inv).bfloat16())


def test_scales_that_do_not_fit_are_refused() -> None:
    weight = torch.zeros(200, 300, device=DEVICE).to(FP8)
    assert dequantize_blocks(weight[:0], torch.ones(0, 3, device=DEVICE), torch.float32).shape == (0, 300)
    with pytest.raises(ValueError, match=r"need scale_inv of shape \(2, 3\), not \(3, 2\)"):
        dequantize_blocks(weight, torch.ones(3, 2, device=DEVICE), torch.float32)
    with pytest.raises(ValueError, match="must be float8_e4m3fn and float32, not "):
        dequantize_blocks(weight.float(), torch.ones(2, 3, device=DEVICE), torch.float32)


# ---- products ----------------------------------------------------------------------------------------------


def halves(*sizes: int, seed: int) -> torch.Tensor:
    """float8, small multiples of 1/2: the tensor cores' shorter sums are exact for them."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-4, 5, sizes, generator=generator) / 2).to(FP8).to(DEVICE)


@few
@given(
    m=st.integers(1, 20), n=st.integers(1, 70), k=st.integers(1, 20), splits=st.integers(1, 4),
    columns=st.sampled_from([64, 128]), bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_product_with_scales_per_row(
    m: int, n: int, k: int, splits: int, columns: int, bias: bool, seed: int
) -> None:
    """Parts with nothing in them and tiles that jut out included."""
    k *= 16
    x, weight = halves(m, k, seed=seed), halves(n, k, seed=seed + 1)
    x_scales, scales = (2.0 ** torch.randint(-3, 4, (rows, 1), device=DEVICE) for rows in (m, n))
    shift = torch.randn(n, device=DEVICE) if bias else None
    config = FP8Config(16, columns, splits, num_warps=4, num_stages=2)
    found = fp8_matmul(x, x_scales, weight, scales, shift, dtype=torch.float32, config=config)
    expected = (x.double() * x_scales) @ (weight.double() * scales).T + (0 if shift is None else shift.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-3)  # a multiple of 1 / 256 would be missing


@few
@given(m=st.integers(1, 20), n=st.integers(1, 300), turns=st.integers(1, 4), splits=st.integers(1, 3))
def test_a_product_with_scales_per_block(m: int, n: int, turns: int, splits: int) -> None:
    k = 128 * turns
    x, weight = halves(m, k, seed=n), halves(n, k, seed=n + 1)
    x_scales = 2.0 ** torch.randint(-3, 4, (m, turns), device=DEVICE)
    scales = 2.0 ** torch.randint(-3, 4, (-(-n // 128), turns), device=DEVICE)
    config = FP8Config(16, 64, splits, num_warps=4, num_stages=2)
    found = fp8_matmul(x, x_scales, weight, scales, dtype=torch.float32, config=config)
    expected = (x.double() * x_scales.repeat_interleave(128, 1)) @ unrolled(weight, scales).double().T
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-3)  # a multiple of 1 / 256 would be missing


@few
@given(rows=st.integers(1, 4), groups=st.integers(1, 4), seed=st.integers(0, 99))
def test_groups_of_a_row_have_their_own_scales(rows: int, groups: int, seed: int) -> None:
    held = representable(rows * groups, 128, seed=seed).to(DEVICE)
    factors = 2.0 ** torch.randint(-3, 4, (rows * groups, 1), device=DEVICE)
    quantized, scales = quantize_groups((held * factors).view(rows, -1))
    assert quantized.float().equal(held.view(rows, -1)) and scales.equal(factors.view(rows, groups))


def test_scales_of_other_shapes_are_refused() -> None:
    x, weight = halves(2, 256, seed=0), halves(64, 256, seed=1)
    with pytest.raises(ValueError, match=r"do not go with scales \(2, 1\) and \(1, 2\)"):
        fp8_matmul(x, torch.ones(2, 1, device=DEVICE), weight, torch.ones(1, 2, device=DEVICE))


@pytest.mark.cuda
@pytest.mark.skipif(not ON_GPU, reason="real shapes are for a GPU")
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (4096, 14336), (1032, 4096)])
def test_real_products(n: int, k: int) -> None:
    weight = torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16) / 10
    values, scales = quantize_rows(weight)
    block_scales = torch.rand(-(-n // 128), k // 128, device=DEVICE) / 100
    for m in (1, 7, 16, 33, 64, 128, 200):
        x = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16)
        quantized, x_scales = quantize_rows(x)
        found = fp8_matmul(quantized, x_scales, values, scales)
        expected = (quantized.double() * x_scales) @ (values.double() * scales).T
        torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=2e-3 * expected.abs().max().item())
        assert found.equal(fp8_matmul(quantized, x_scales, values, scales)), "other bits the second time"
        quantized, x_scales = quantize_groups(x)
        found = fp8_matmul(quantized, x_scales, values, block_scales)
        expected = (quantized.double() * x_scales.repeat_interleave(128, 1)) @ unrolled(values, block_scales).double().T
        torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=2e-3 * expected.abs().max().item())
