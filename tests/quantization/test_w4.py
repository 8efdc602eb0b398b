"""Linear layers of four bits: the canonical form, the operator over it, and the layer."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantization.writers import random_weight, word
from torch import Tensor

from hf_paged.quantization.formats.base import in_group_order
from hf_paged.quantization.w4 import CPU_GROUP_SIZES, W4Linear, pack_codes, pack_for_cpu, unpack_codes, unpack_nibbles

several = settings(max_examples=40, deadline=None)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Of the norm of the result."""


def make_layer(
    inputs: int, outputs: int, group_size: int, seed: int = 0, *, act_order: bool = False, bias: bool = False
) -> tuple[W4Linear, Tensor]:
    """(a float32 layer, the weight `[N, K]` that it means)."""
    weight = random_weight(inputs, outputs, group_size, seed, act_order=act_order)
    zeros = torch.tensor(weight.zeros, dtype=torch.uint8)
    size = inputs // len(zeros)
    codes, perm = in_group_order(torch.tensor(weight.codes).T, torch.tensor(weight.groups), size)
    shift = torch.randn(outputs, generator=torch.Generator().manual_seed(seed)) if bias else None
    return W4Linear(codes, weight.scales.float(), zeros, size, perm=perm, bias=shift), weight.dequantized()


@several
@given(values=st.lists(st.lists(st.integers(0, 15), min_size=8, max_size=8), min_size=1, max_size=6))
def test_words_hold_eight_rows_low_bits_first(values: list[list[int]]) -> None:
    words = torch.tensor([[word(column) for column in values]], dtype=torch.int32)
    assert unpack_nibbles(words).T.tolist() == values


@several
@given(outputs=st.integers(1, 5), inputs=st.integers(1, 300), seed=st.integers(0, 99))
def test_every_code_has_its_place(outputs: int, inputs: int, seed: int) -> None:
    nibbles = torch.randint(0, 16, (outputs, inputs), generator=torch.Generator().manual_seed(seed))
    codes = pack_codes(nibbles)
    assert codes.dtype is torch.int16 and codes.shape == (-(-inputs // 128), outputs, 32) and codes.is_contiguous()
    for n, k in {(0, 0), (outputs - 1, inputs - 1), (outputs // 2, inputs // 3)}:
        number = int(codes[k // 128, n, k % 32]) & 0xFFFF
        assert number >> 4 * (k % 128 // 32) & 15 == nibbles[n, k]
    assert torch.equal(unpack_codes(codes, inputs), nibbles.to(torch.uint8))


@several
@given(
    groups=st.integers(1, 3),
    group_size=st.sampled_from([8, 24, 32, 64, 96, 128]),
    outputs=st.sampled_from([1, 8, 16, 24, 48, 80]),
    rows=st.sampled_from([(1,), (2, 3), (0,), (17,)]),
    act_order=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 99),
)
def test_a_layer_is_the_product_with_its_weight(
    groups: int,
    group_size: int,
    outputs: int,
    rows: tuple[int, ...],
    act_order: bool,
    bias: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    layer, weight = make_layer(groups * group_size, outputs, group_size, seed, act_order=act_order, bias=bias)
    assert torch.equal(layer.dequantize(torch.float32), weight)
    x = torch.randn(*rows, groups * group_size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    found = layer.to(dtype)(x)
    product = torch.nn.functional.linear(x.float(), weight)
    shift = torch.zeros(outputs) if layer.bias is None else layer.bias.float()
    expected = product + shift
    assert found.dtype is dtype and found.shape == expected.shape
    # The product is rounded before the bias is added, which may leave little of it.
    size = float((product.abs() + shift.abs()).norm())
    assert float((found.float() - expected).norm()) <= TOLERANCE[dtype] * size


@pytest.mark.parametrize("group_size", [*CPU_GROUP_SIZES, -1])
def test_the_cpu_operator_serves_the_usual_groups(group_size: int) -> None:
    layer, _ = make_layer(256, 32, group_size)
    assert pack_for_cpu(layer.codes, layer.scales, layer.zeros, layer.group_size) is not None


def test_a_weight_that_the_cpu_operator_does_not_take_is_dequantised() -> None:
    for layer, _ in (make_layer(64, 24, 32), make_layer(48, 16, 24)):
        assert pack_for_cpu(layer.codes, layer.scales, layer.zeros, layer.group_size) is None


@pytest.mark.parametrize("act_order", [False, True])
def test_the_gradient_is_the_inputs_alone(act_order: bool) -> None:
    layer, weight = make_layer(64, 32, 32, act_order=act_order, bias=True)
    x = torch.randn(2, 3, 64, requires_grad=True)
    ahead = torch.randn(2, 3, 32)
    layer(x).backward(ahead)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, ahead @ weight, rtol=1e-4, atol=1e-5)
    assert not list(layer.parameters())
    assert all(not buffer.requires_grad for buffer in layer.buffers())


@pytest.mark.parametrize("packed", [False, True])
def test_the_operator_keeps_torchs_rules(packed: bool) -> None:
    """Fake tensors have the shapes of real ones, no input is written to, and autograd is registered as it must be."""
    layer, _ = make_layer(64, 32, 32, act_order=True, bias=True)
    tensors = layer.codes, layer.scales, layer.zeros, layer.perm, layer.bias, layer.group_size
    pair: Any = pack_for_cpu(layer.codes, layer.scales, layer.zeros, layer.group_size) if packed else ()
    x = torch.randn(3, 64, requires_grad=True)
    torch.library.opcheck(torch.ops.hf_paged.w4_linear.default, (x, *tensors, *pair))


def test_autocast_decides_the_dtype_as_for_any_linear_layer() -> None:
    layer, weight = make_layer(64, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(torch.ones(1, 64))
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.float(), weight.sum(1)[None], rtol=3e-2, atol=3e-2)


def test_new_weights_are_used_at_once() -> None:
    """The packed copy is of the weight as it is now, not as it was."""
    layer, _ = make_layer(64, 32, 32, seed=0)
    other, weight = make_layer(64, 32, 32, seed=1)
    x = torch.randn(2, 64)
    before = layer(x)
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(layer(x), x @ weight.T, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(layer(x), before)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_compute_the_same_and_carry_no_packed_weight(make: Any) -> None:
    layer, _ = make_layer(64, 32, 32, act_order=True)
    x = torch.randn(2, 64)
    expected = layer(x)
    other = make(layer)
    assert other._packed is None and layer._packed is not None
    assert torch.equal(other(x), expected)


def test_a_copy_made_in_inference_mode_serves_training() -> None:
    layer, weight = make_layer(64, 32, 32)
    with torch.inference_mode():
        layer(torch.ones(1, 64))
    x = torch.ones(1, 64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0)[None])


def test_groups_of_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="each of 2 groups 8 times"):
        in_group_order(torch.zeros(4, 16, dtype=torch.uint8), torch.tensor([0] * 9 + [1] * 7), 8)
