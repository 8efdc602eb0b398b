"""FP8 linear layers: quantisation by row, the operator, and the layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantization.writers import fp8_writer
from torch import Tensor

from hf_paged.quantization.fp8 import E4M3, FP8Linear, quantize_rows

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of the norm of the result."""


def make_layer(
    inputs: int, outputs: int, block: tuple[int, int] | None, seed: int = 0, *, bias: bool = False
) -> tuple[FP8Linear, Tensor]:
    """(a layer, the weight `[N, K]` that it means)."""
    layer, weight = fp8_writer("scales", block)(inputs, outputs, seed)
    shift = torch.randn(outputs, generator=torch.Generator().manual_seed(seed)) if bias else None
    return FP8Linear(layer["weight"], layer["scales"], block, bias=shift), weight


@settings(max_examples=40, deadline=None)
@given(
    inputs=st.integers(1, 80),
    outputs=st.integers(1, 80),
    block=st.sampled_from([None, (1, 16), (16, 16), (32, 48), (128, 128)]),
    rows=st.sampled_from([(1,), (2, 3), (0,), (17,)]),
    bias=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 99),
)
def test_a_layer_is_the_product_with_its_weight(
    inputs: int, outputs: int, block: Any, rows: tuple[int, ...], bias: bool, dtype: torch.dtype, seed: int
) -> None:
    layer, weight = make_layer(inputs, outputs, block, seed, bias=bias)
    torch.testing.assert_close(layer.dequantize(torch.float32), weight, rtol=1e-6, atol=0)
    x = torch.randn(*rows, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)
    found = layer.to(dtype)(x)
    size = float((x.float().abs() @ weight.abs().T).norm())  # of the terms: a sum of few may cancel
    expected = torch.nn.functional.linear(x.float(), weight)
    if layer.bias is not None:
        expected, size = (
            expected + layer.bias.float(),
            size + float(layer.bias.float().norm()) * max(1, expected.shape[0]),
        )
    assert found.dtype is dtype and found.shape == expected.shape
    assert float((found.float() - expected).norm()) <= TOLERANCE[dtype] * size


def test_blocks_of_128_that_are_cut_off() -> None:
    """192 rows make a whole block and half of one: the scale's row is the element's row over 128, not over 96."""
    layer = FP8Linear(torch.ones(192, 160).to(E4M3), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), (128, 128))
    weight = layer.dequantize(torch.float32)
    assert [float(weight[n, k]) for n, k in ((0, 0), (127, 127), (127, 128), (128, 0), (191, 159))] == [1, 1, 2, 3, 4]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 5),
    columns=st.integers(1, 40),
    exponent=st.integers(-30, 30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_rows_are_quantised_to_the_last_bit_but_three(
    rows: int, columns: int, exponent: int, dtype: torch.dtype, seed: int
) -> None:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).mul(2.0**exponent).to(dtype)
    values, scales = quantize_rows(x)
    assert values.dtype is E4M3 and scales.dtype is torch.float32
    assert values.shape == x.shape and scales.shape == (rows, 1)
    largest = x.float().abs().amax(1, keepdim=True)
    # Half a unit in the last place, or of the smallest subnormal.
    error = (values.float() * scales - x.float()).abs()
    assert bool((error <= torch.maximum(x.float().abs() / 16, largest * 2.0**-10 / 448) * 1.001).all())
    assert bool(values.float().abs().amax(1).eq(448).all())


def test_rows_of_zeros_and_nan() -> None:
    values, scales = quantize_rows(torch.tensor([[0.0, 0.0], [torch.nan, 1.0], [3.0, -6.0]]))
    found = values.float() * scales
    assert found[0].tolist() == [0, 0] and bool(found[1].isnan().all())
    assert found[2].tolist() == [3, -6]


@pytest.mark.parametrize("block", [None, (16, 16)])
def test_the_gradient_is_the_inputs_alone(block: Any) -> None:
    layer, weight = make_layer(40, 24, block, bias=True)
    x = torch.randn(2, 3, 40, requires_grad=True)
    ahead = torch.randn(2, 3, 24)
    layer(x).backward(ahead)
    torch.testing.assert_close(x.grad, ahead @ weight, rtol=1e-4, atol=1e-5)
    assert not list(layer.parameters())


def test_the_operator_keeps_torchs_rules() -> None:
    layer, _ = make_layer(40, 24, (16, 16), bias=True)
    x = torch.randn(3, 40, requires_grad=True)
    tensors = x, layer.codes, layer.scales, layer.bias, list(layer.block)
    # All but "test_schema", which compares tensors before and after in a way that torch has not for FP8.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.hf_paged.fp8_linear.default, tensors, test_utils=checks)


@pytest.mark.parametrize("convert", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_another_dtype_is_of_activations(convert: Any) -> None:
    """Cast to it, the weight would be a weight of its scaled numbers."""
    layer, weight = make_layer(40, 24, (16, 16), bias=True)
    convert(layer)
    assert layer.codes.dtype is E4M3 and layer.scales.dtype is torch.float32
    assert layer.bias is not None and layer.bias.dtype is not torch.float32
    torch.testing.assert_close(copy.deepcopy(layer).dequantize(torch.float32), weight, rtol=1e-6, atol=0)


def test_autocast_decides_the_dtype_as_for_any_linear_layer() -> None:
    layer, weight = make_layer(40, 24, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(torch.ones(1, 40))
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.float(), weight.sum(1)[None], rtol=3e-2, atol=3e-2)
