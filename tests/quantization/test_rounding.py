"""Codes and scales of single weights: round-to-nearest, GPTQ, and the words in which formats write them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_paged.quantization.formats.awq import Awq
from hf_paged.quantization.formats.compressed_tensors import compressed_tensors
from hf_paged.quantization.formats.gptq import Gptq
from hf_paged.quantization.fp8 import FP8Linear
from hf_paged.quantization.writers.gptq import gptq
from hf_paged.quantization.writers.recipe import make_recipe
from hf_paged.quantization.writers.rounding import round_to_fp8, round_to_grid, round_to_nearest

ACT_ORDERS = [None, "group", "weight"]
GROUP_SIZES = st.sampled_from([8, 32, 64, 128, -1])


def random(outputs: int, inputs: int, seed: int = 0) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def gram_of(inputs: int, seed: int = 0, rows: int = 400) -> Tensor:
    """Of inputs that depend on one another and are of very different sizes."""
    x = random(rows, inputs, seed + 1) @ random(inputs, inputs, seed + 2) * (1 + 9 * random(1, inputs, seed + 3).abs())
    return x.T @ x


def error(weight: Tensor, rounded: Tensor, gram: Tensor) -> float:
    difference = rounded - weight
    return float((difference @ gram * difference).sum())


@settings(max_examples=40, deadline=None)
@given(
    size=GROUP_SIZES,
    groups=st.integers(1, 3),
    outputs=st.integers(1, 20),
    symmetric=st.booleans(),
    shift=st.sampled_from([-3.0, 0.0, 3.0]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_every_weight_is_within_half_a_step(
    size: int, groups: int, outputs: int, symmetric: bool, shift: float, dtype: torch.dtype, seed: int
) -> None:
    inputs = 24 * groups if size == -1 else size * groups
    weight = random(outputs, inputs, seed) + shift
    layer = round_to_nearest(weight, size, symmetric=symmetric, scale_dtype=dtype)
    steps = layer.scales.T.float().repeat_interleave(layer.group_size, 1)
    rounded = layer.dequantize(torch.float32)
    # The largest one of a symmetric group would have code 15.5, and scales are rounded too.
    slack = torch.finfo(dtype).eps * 16 + (1e-3 if not symmetric else 0.5)
    assert ((rounded - weight).abs() <= (0.5 + slack) * steps).all()
    assert layer.scales.dtype is dtype
    assert layer.zeros.eq(8).all() if symmetric else layer.zeros.ge(1).all() and layer.zeros.le(15).all()
    whole = layer.group_size
    assert torch.equal(rounded, round_to_grid(weight, whole, symmetric=symmetric, scale_dtype=dtype))


def test_a_grid_by_hand() -> None:
    weight = torch.tensor([[-1.0, 2.0, 0.4, 0.6, 0.0, 1.0, -0.4, 1.4]])
    layer = round_to_nearest(weight, 8, symmetric=False, scale_dtype=torch.float16)
    assert layer.scales.item() == pytest.approx(0.2, rel=1e-3) and layer.zeros.item() == 5
    torch.testing.assert_close(layer.dequantize(torch.float32), weight, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zeros(symmetric: bool) -> None:
    weight = torch.zeros(8, 16)
    weight[0, 8:] = 1.0
    layer = round_to_nearest(weight, 8, symmetric=symmetric, scale_dtype=torch.float16)
    assert torch.equal(layer.dequantize(torch.float32)[1:], weight[1:]) and layer.dequantize(torch.float32)[0, 0] == 0


@settings(max_examples=25, deadline=None)
@given(
    size=GROUP_SIZES,
    outputs=st.integers(1, 16),
    symmetric=st.booleans(),
    act_order=st.sampled_from(ACT_ORDERS),
    seed=st.integers(0, 99),
)
def test_gptq_with_independent_inputs_is_round_to_nearest(
    size: int, outputs: int, symmetric: bool, act_order: str | None, seed: int
) -> None:
    """Then there is nothing that one input could mend of another."""
    weight = random(outputs, 128, seed)
    options: dict[str, Any] = {"symmetric": symmetric, "scale_dtype": torch.float16}
    diagonal = torch.arange(128, 0, -1.0)  # in their order already, so that act-order has the same groups
    found = gptq(weight, torch.diag(diagonal), size, act_order=act_order, **options).dequantize(torch.float32)
    assert torch.equal(found, round_to_nearest(weight, size, **options).dequantize(torch.float32))


@pytest.mark.parametrize("size", [32, 64, 128, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", ACT_ORDERS)
def test_gptq_errs_less_than_round_to_nearest(size: int, symmetric: bool, act_order: str | None) -> None:
    weight, gram = random(24, 256), gram_of(256)
    options: dict[str, Any] = {"symmetric": symmetric, "scale_dtype": torch.float16}
    layer = gptq(weight, gram, size, act_order=act_order, **options)
    nearest = round_to_nearest(weight, size, **options)
    found = error(weight, layer.dequantize(torch.float32), gram)
    assert found < 0.5 * error(weight, nearest.dequantize(torch.float32), gram)
    x = random(3, 256, 7)
    torch.testing.assert_close(layer(x), x @ layer.dequantize(torch.float32).T, rtol=1e-3, atol=1e-2)


def test_act_order_rounds_the_largest_inputs_first() -> None:
    gram = gram_of(64)
    layer = gptq(random(8, 64), gram, 32, symmetric=True, scale_dtype=torch.float16, act_order="group")
    assert torch.equal(layer.perm, gram.diagonal().argsort(descending=True, stable=True))


def test_act_order_may_keep_the_groups() -> None:
    weight = random(8, 64)
    options: dict[str, Any] = {"symmetric": True, "scale_dtype": torch.float16}
    layer = gptq(weight, gram_of(64), 32, act_order="weight", **options)
    assert layer.perm is None and torch.equal(layer.scales, round_to_nearest(weight, 32, **options).scales)


def test_gptq_leaves_its_arguments_alone() -> None:
    weight, gram = random(8, 64), gram_of(64)
    before = weight.clone(), gram.clone()
    gptq(weight, gram, 32, symmetric=True, scale_dtype=torch.float16)
    assert torch.equal(weight, before[0]) and torch.equal(gram, before[1])


def test_gptq_on_inputs_that_were_never_there() -> None:
    gram = gram_of(64)
    gram[:, 5] = gram[5] = 0
    weight = random(8, 64)
    layer = gptq(weight, gram, -1, symmetric=True, scale_dtype=torch.float16)
    steps = layer.scales.T.float()
    assert ((layer.dequantize(torch.float32)[:, 5:6] - weight[:, 5:6]).abs() <= 1.01 * steps).all()


def test_gptq_on_inputs_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="not finite"):
        gptq(random(8, 32), torch.full((32, 32), torch.nan), 32, symmetric=True, scale_dtype=torch.half)


FORMATS = {
    "awq": Awq,
    "gptq": Gptq,
    "gptq_v2": lambda options: Gptq({**options, "checkpoint_format": "gptq_v2"}),
    "w4a16": compressed_tensors,
}


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    size=st.sampled_from([8, 32, 64, -1]),
    groups=st.integers(1, 3),
    words=st.integers(1, 4),
    symmetric=st.booleans(),
    desc_act=st.booleans(),
    seed=st.integers(0, 99),
)
def test_what_is_written_is_read(
    name: str, size: int, groups: int, words: int, symmetric: bool, desc_act: bool, seed: int
) -> None:
    awq = name == "awq"
    symmetric, desc_act = symmetric and not awq, desc_act and not awq
    recipe = make_recipe(name.removesuffix("_v2"), "gptq" if not awq else "rtn", size, symmetric, desc_act)
    format: Any = FORMATS[name](recipe.quantization_config([]))
    inputs = 24 * groups if size == -1 else size * groups
    weight = random(8 * words, inputs, seed)
    options: dict[str, Any] = {"symmetric": symmetric, "scale_dtype": torch.float16}
    if awq:
        layer = round_to_nearest(weight, size, **options)
    else:
        layer = gptq(weight, gram_of(inputs, seed), size, act_order=recipe.act_order, **options)
    tensors = format.write(layer)
    specs = format.specs(inputs, 8 * words)
    assert tensors.keys() <= specs.keys()
    for part, spec in specs.items():
        assert not spec.required or part in tensors
        assert part not in tensors or (tuple(tensors[part].shape) in spec.shapes and tensors[part].dtype in spec.dtypes)
    again = format.read(tensors, None, torch.float32)
    assert torch.equal(again.dequantize(torch.float32), layer.dequantize(torch.float32))


@settings(max_examples=25, deadline=None)
@given(to=st.sampled_from(["fp8", "fp8-block"]), inputs=st.integers(1, 300), outputs=st.integers(1, 300))
def test_fp8_of_any_shape(to: str, inputs: int, outputs: int) -> None:
    recipe = make_recipe(to)
    weight = random(outputs, inputs)
    layer = round_to_fp8(weight, recipe.block)
    assert isinstance(layer, FP8Linear)
    # Three bits of mantissa; what is small beside its block's largest is subnormal.
    torch.testing.assert_close(layer.dequantize(torch.float32), weight, rtol=2**-4, atol=2**-9 * 6 / 448)
    format = recipe.format()
    tensors = format.write(layer)
    specs = format.specs(inputs, outputs)
    assert all(tuple(t.shape) in specs[part].shapes and t.dtype in specs[part].dtypes for part, t in tensors.items())
    assert torch.equal(
        format.read(tensors, None, torch.float32).dequantize(torch.float32), layer.dequantize(torch.float32)
    )


def test_formats_refuse_what_they_have_no_words_for() -> None:
    options: dict[str, Any] = {"symmetric": False, "scale_dtype": torch.float16}
    scattered = gptq(random(8, 64), gram_of(64), 32, act_order="group", **options)
    with pytest.raises(ValueError, match="act-order"):
        Awq({}).write(scattered)
    with pytest.raises(ValueError, match="zeros other than 8"):
        make_recipe("w4a16", group_size=32).format().write(scattered)
    with pytest.raises(ValueError, match="a scale per"):
        make_recipe("fp8-block").format().write(round_to_fp8(random(8, 8), None))
