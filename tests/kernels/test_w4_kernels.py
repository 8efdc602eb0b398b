"""Linear layers of 4-bit codes, against codes unpacked one by one.

Without a GPU the kernels run in Triton's interpreter, on small shapes; it has no products of bfloat16, and rounds to it
by cutting off.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from hf_paged.kernels.triton import w4
from hf_paged.kernels.triton.w4 import W4Config, w4_config, w4_dequantize, w4_linear, w4_matmul

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Of the largest result."""

few = settings(max_examples=25, deadline=None)


class Layer(NamedTuple):
    """A layer as the kernels take it."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    group_size: int


def make(k: int, n: int, group: int, dtype: torch.dtype, seed: int = 0) -> tuple[Layer, torch.Tensor]:
    """A random layer, and its weights `[N, K]` in float32, exact: both from codes that are not packed yet."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (k, n), generator=generator)
    zeros = torch.randint(0, 17, (k // group, n), generator=generator)
    scales = (torch.rand(k // group, n, generator=generator) * 0.1 + 0.01).to(dtype)
    group_of = torch.arange(k) // group
    weight = (codes - zeros[group_of]) * scales.float()[group_of]
    turns = -(-k // 128)
    padded = torch.zeros(128 * turns, n, dtype=torch.int64)
    padded[:k] = codes
    planes = padded.view(turns, 4, 32, n)  # turn, place in the number, number, output
    packed = sum(planes[:, j] << 4 * j for j in range(4)).transpose(1, 2)
    packed = torch.where(packed >= 2**15, packed - 2**16, packed).to(torch.int16).contiguous()
    layer = Layer(packed.to(DEVICE), scales.to(DEVICE), zeros.to(DEVICE, torch.uint8), group)
    return layer, weight.T.contiguous().to(DEVICE)


def random(*sizes: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_close(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert found.dtype == x.dtype and found.shape == expected.shape
    allowed = TOLERANCE[x.dtype] * expected.abs().max().item()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=allowed)


groups = st.tuples(st.sampled_from([8, 24, 32, 64, 128]), st.integers(1, 6))
"""Inputs per group, and groups."""


@few
@given(
    groups=groups, m=st.integers(1, 40), n=st.integers(1, 12), dtype=st.sampled_from(DTYPES), bias=st.booleans(),
    strided=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@example(groups=(128, 4), m=1, n=9, dtype=torch.float16, bias=True, strided=False, seed=0)
@example(groups=(512, 1), m=16, n=5, dtype=torch.float16, bias=True, strided=True, seed=1)
def test_a_product_is_that_of_the_weights(
    groups: tuple[int, int], m: int, n: int, dtype: torch.dtype, bias: bool, strided: bool, seed: int
) -> None:
    group, count = groups
    k, n = group * count, 8 * n
    layer, weight = make(k, n, group, dtype, seed)
    x = random(k, m, dtype=dtype, seed=seed).t() if strided else random(m, k, dtype=dtype, seed=seed)
    shift = random(n, dtype=dtype, seed=seed + 1) if bias else None
    assert_close(w4_matmul(x, *layer, shift), x, weight, shift)


@few
@given(
    groups=groups, m=st.integers(1, 20), n=st.integers(1, 6), dtype=st.sampled_from(DTYPES), splits=st.integers(1, 5),
    rows=st.sampled_from([8, 16]), columns=st.sampled_from([16, 64]), bias=st.booleans(),
)  # fmt: skip
def test_it_does_not_matter_how_a_product_is_cut_up(
    groups: tuple[int, int], m: int, n: int, dtype: torch.dtype, splits: int, rows: int, columns: int, bias: bool
) -> None:
    """Parts with nothing in them and tiles that jut out included."""
    group, count = groups
    layer, weight = make(group * count, 8 * n, group, dtype)
    x, shift = random(m, group * count, dtype=dtype), random(8 * n, dtype=dtype) if bias else None
    config = W4Config(rows, columns, splits, num_warps=4, num_stages=2)
    assert_close(w4_matmul(x, *layer, shift, config=config), x, weight, shift)


@few
@given(groups=groups, n=st.integers(1, 20), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_weights_are_dequantised_exactly(groups: tuple[int, int], n: int, dtype: torch.dtype, seed: int) -> None:
    group, count = groups
    layer, weight = make(group * count, 8 * n, group, dtype, seed)
    assert w4_dequantize(*layer).equal(weight.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0, -1, 0x7654, -0x1235, -(2**15)])
def test_every_bit_of_a_number_has_its_place(value: int, dtype: torch.dtype) -> None:
    codes = torch.full((1, 8, 32), value, dtype=torch.int16, device=DEVICE)
    scales = torch.ones(4, 8, device=DEVICE, dtype=dtype)
    zeros = torch.full((4, 8), 3, dtype=torch.uint8, device=DEVICE)
    expected = [(value >> 4 * j & 15) - 3 for j in range(4) for _ in range(32)]
    assert w4_dequantize(codes, scales, zeros, 32)[5].tolist() == expected
    one_hot = torch.eye(128, device=DEVICE, dtype=dtype)
    assert w4_matmul(one_hot, codes, scales, zeros, 32)[:, 5].tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_part_of_a_larger_layer(dtype: torch.dtype) -> None:
    """Its columns lie between others'."""
    (codes, scales, zeros, group), weight = make(256, 48, 64, dtype)
    part = codes[:, 8:24], scales[:, 8:24], zeros[:, 8:24], group
    x = random(3, 256, dtype=dtype)
    assert_close(w4_matmul(x, *part), x, weight[8:24], None)
    assert w4_dequantize(*part).equal(weight[8:24].to(dtype))


def test_few_and_many_rows_and_any_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, weight = make(64, 16, 32, torch.float32)
    calls: list[int] = []
    monkeypatch.setattr(w4, "w4_matmul", lambda x, *rest: calls.append(x.shape[0]) or w4_matmul(x, *rest))
    shift = random(16, dtype=torch.float32)
    monkeypatch.setattr(w4, "MOST_ROWS", 40)
    for rows in (3, 40, 41):
        for bias in (None, shift):
            x = random(rows, 64, dtype=torch.float32)
            assert_close(w4_linear(x, *layer, bias), x, weight, bias)
    assert calls == [3, 3, 40, 40]
    x = random(2, 3, 64, dtype=torch.float32)
    assert_close(w4_linear(x, *layer).flatten(0, 1), x.flatten(0, 1), weight, None)
    assert w4_linear(x[:, :0], *layer).shape == (2, 0, 16)
    assert w4_linear(x[0, 0], *layer).shape == (16,)


def test_no_rows_and_no_columns() -> None:
    layer, _ = make(64, 16, 32, torch.float32)
    x = random(3, 64, dtype=torch.float32)
    assert w4_matmul(x[:0], *layer).shape == (0, 16)
    none = Layer(*(tensor[:, :0].contiguous() for tensor in layer[:3]), 32)
    assert w4_matmul(x, *none).shape == (3, 0)
    assert w4_dequantize(*none).shape == (0, 64)


def test_activations_may_lie_anywhere() -> None:
    """Also where a pair of them is not aligned."""
    layer, weight = make(64, 16, 32, torch.float16)
    for m in (1, 5):
        x = random(m * 64 + 1, dtype=torch.float16)[1:].view(m, 64)
        assert x.data_ptr() % 4
        assert_close(w4_matmul(x, *layer), x, weight, None)


@pytest.mark.parametrize("m", [1, 2, 5])
def test_the_same_bits_twice(m: int) -> None:
    layer, _ = make(512, 40, 128, torch.float16)
    x = random(m, 512, dtype=torch.float16)
    config = w4_config(m, 40, 512)._replace(splits=2)
    assert w4_matmul(x, *layer, config=config).equal(w4_matmul(x, *layer, config=config))


@pytest.mark.parametrize("k", [8, 1024, 4096, 14336, 12288 + 8])
@pytest.mark.parametrize("n", [8, 1024, 4096, 28672])
def test_no_part_of_a_product_is_empty(k: int, n: int) -> None:
    """An empty one would be added all the same."""
    for m in (1, 2, 3, 16, 17, 64, 300):
        for dtype in (torch.bfloat16, torch.float32):
            config = w4_config(m, n, k, dtype)
            turns = -(-k // 128)
            each = -(-turns // config.splits)
            assert (config.splits - 1) * each < turns
            assert config.block_m >= 8


def wrong(layer: Layer, name: str) -> tuple[Any, ...]:
    codes, scales, zeros, group = layer
    return {
        "dtypes": (codes.long(), scales, zeros, group),
        "group": (codes, scales, zeros, 80),
        "scales": (codes, scales[:, :15].contiguous(), zeros, group),
        "zeros": (codes, scales, zeros[:, :8].contiguous(), group),
        "strides": (codes.transpose(1, 2).contiguous().transpose(1, 2), scales, zeros, group),
    }[name]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dtypes", "codes, scales and zeros must be int16"),
        ("group", r"codes have shape \(1, 16, 32\), and scales \(2, 16\) of groups of 80 inputs need \(2, 16, 32\)"),
        ("scales", r"codes have shape \(1, 16, 32\), and scales \(2, 15\) of groups of 32 inputs need \(1, 15, 32\)"),
        ("zeros", r"zeros have shape \(2, 8\)"),
        ("strides", "contiguous"),
    ],
)
def test_what_is_no_layer_is_refused(name: str, said: str) -> None:
    layer, _ = make(64, 16, 32, torch.float32)
    with pytest.raises(ValueError, match=said):
        w4_matmul(random(1, 64, dtype=torch.float32), *wrong(layer, name))
    with pytest.raises(ValueError, match=said):
        w4_dequantize(*wrong(layer, name))


def test_activations_that_do_not_fit_are_refused() -> None:
    layer, _ = make(64, 16, 32, torch.float32)
    with pytest.raises(ValueError, match="x has 56 columns, and the weights have 64 inputs"):
        w4_matmul(random(1, 56, dtype=torch.float32), *layer)
    with pytest.raises(ValueError, match=r"x is torch.float16 and the scales are torch.float32"):
        w4_matmul(random(1, 64, dtype=torch.float16), *layer)


@pytest.mark.cuda
@pytest.mark.skipif(not ON_GPU, reason="real shapes are for a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("k", "n", "group"), [(4096, 4096, 128), (14336, 4096, 128), (4096, 1032, 32), (4096, 6144, 4096)]
)
def test_real_layers(k: int, n: int, group: int, dtype: torch.dtype) -> None:
    layer, weight = make(k, n, group, dtype)
    assert w4_dequantize(*layer).equal(weight.to(dtype))
    bias = random(n, dtype=dtype, seed=2)
    for m in (1, 2, 7, 16, 33, 64, 200):
        x = random(m, k, dtype=dtype)
        found = w4_matmul(x, *layer, bias)
        assert_close(found, x, weight, bias)
        assert found.equal(w4_matmul(x, *layer, bias)), "other bits the second time"
        graph, out = torch.cuda.CUDAGraph(), torch.empty_like(found)
        with torch.cuda.graph(graph):
            out.copy_(w4_matmul(x, *layer, bias))
        for _ in range(2):
            x.copy_(random(m, k, dtype=dtype, seed=3))
            graph.replay()
            assert_close(out, x, weight, bias)
