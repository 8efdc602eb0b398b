"""Each format's words, bit by bit, and random layers of every shape against what wrote them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantization import writers
from quantization.writers import (
    AWQ_CONFIG,
    DEEPSEEK_CONFIG,
    GPTQ_CONFIG,
    Layer,
    Weight,
    e4m3,
    fp8_config,
    fp8_writer,
    int32,
    random_weight,
    w4_config,
)
from torch import Tensor

from hf_paged.quantization.formats.awq import Awq
from hf_paged.quantization.formats.base import Format
from hf_paged.quantization.formats.compressed_tensors import compressed_tensors
from hf_paged.quantization.formats.fp8 import Fp8
from hf_paged.quantization.formats.gptq import Gptq

COUNT_UP = 0x76543210
"""Nibble i holds i."""


def read(format: Format, layer: Layer) -> Tensor:
    """The weight `[N, K]` in float32."""
    return format.read(layer, None, torch.float32).dequantize(torch.float32)


# ---- golden words --------------------------------------------------------------------------------------------------


def test_awq_interleaves_outputs() -> None:
    layer = {
        "qweight": int32([[COUNT_UP]] + [[0]] * 7),
        "qzeros": int32([[0x11111111]]),
        "scales": torch.ones(1, 8, dtype=torch.float16),
    }
    weight = read(Awq(AWQ_CONFIG | {"group_size": 8}), layer)
    assert weight[:, 0].tolist() == [-1, 3, 0, 4, 1, 5, 2, 6]
    assert weight[:, 1:].eq(-1).all()


def test_awq_interleaves_zeros_alike() -> None:
    layer = {
        "qweight": int32([[0]] * 8),
        "qzeros": int32([[COUNT_UP]]),
        "scales": torch.full((1, 8), 2.0, dtype=torch.float16),
    }
    weight = read(Awq(AWQ_CONFIG | {"group_size": -1}), layer)
    assert weight[:, 0].tolist() == [0, -8, -2, -10, -4, -12, -6, -14]


def test_gptq_packs_inputs() -> None:
    layer = {
        "qweight": int32([[COUNT_UP] + [0] * 7]),
        "qzeros": int32([[0]]),
        "scales": torch.ones(1, 8, dtype=torch.float16),
    }
    weight = read(Gptq(GPTQ_CONFIG | {"group_size": 8, "checkpoint_format": "gptq_v2"}), layer)
    assert weight[0].tolist() == list(range(8))
    assert weight[1:].eq(0).all()


@pytest.mark.parametrize(
    ("options", "zeros"),
    [
        ({"checkpoint_format": "gptq"}, [1, 2, 3, 4, 5, 6, 7, 0]),
        ({"format": "gptq"}, [1, 2, 3, 4, 5, 6, 7, 0]),
        ({}, [1, 2, 3, 4, 5, 6, 7, 0]),
        ({"checkpoint_format": "gptq_v2"}, [0, 1, 2, 3, 4, 5, 6, 15]),
        ({"checkpoint_format": None, "format": "gptq_v2"}, [0, 1, 2, 3, 4, 5, 6, 15]),
    ],
)
def test_gptqs_first_version_stores_one_less(options: dict[str, Any], zeros: list[int]) -> None:
    """And a zero of 0 as 15, which must not carry into the next nibble. The last word's sign bit is set."""
    layer = {
        "qweight": int32([[0] * 8]),
        "qzeros": int32([[0x06543210 | -1 << 28]]),
        "scales": torch.ones(1, 8, dtype=torch.float16),
    }
    weight = read(Gptq(GPTQ_CONFIG | {"group_size": -1} | options), layer)
    assert weight[:, 0].tolist() == [-zero for zero in zeros]


def test_gptqs_groups_may_be_scattered() -> None:
    """Input k has the scale of the group that g_idx names, and stays input k."""
    groups = [1, 0, 1, 0, 0, 0, 1, 1, 0, 1, 1, 0, 0, 1, 0, 1]
    layer = {
        "qweight": int32([[0x11111111] * 8] * 2),
        "qzeros": int32([[0], [0]]),
        "scales": torch.tensor([[1.0] * 8, [100.0] * 8]).half(),
        "g_idx": int32(groups),
    }
    linear = Gptq(GPTQ_CONFIG | {"group_size": 8, "checkpoint_format": "gptq_v2"}).read(layer, None, torch.float32)
    assert linear.dequantize(torch.float32)[0].tolist() == [100.0 if group else 1.0 for group in groups]
    assert torch.equal(linear(torch.eye(16))[:, 0], linear.dequantize(torch.float32)[0])


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_packs_inputs_and_zeros_by_output(symmetric: bool) -> None:
    layer = {
        "weight_packed": int32([[COUNT_UP]] + [[0]] * 7),
        "weight_scale": torch.ones(8, 1).bfloat16(),
        "weight_shape": torch.tensor([8, 8]),
        "weight_zero_point": int32([[COUNT_UP]]),
    }
    weight = read(compressed_tensors(w4_config(8, symmetric)), layer)
    zeros = [8] * 8 if symmetric else list(range(8))
    assert weight[0].tolist() == [code - zeros[0] for code in range(8)]
    assert weight[:, 0].tolist() == [-zero for zero in zeros]


def test_every_byte_of_fp8() -> None:
    octets = torch.tensor([bits for bits in range(256) if bits & 127 != 127], dtype=torch.uint8)
    layer = {
        "weight": octets[None].view(torch.float8_e4m3fn),
        "weight_scale_inv": torch.tensor([[1.0, 2.0]]),
    }
    weight = read(Fp8(DEEPSEEK_CONFIG), layer)
    meant = [e4m3(int(bits)) for bits in octets]
    assert weight[0].tolist() == meant[:128] + [2 * value for value in meant[128:]]


# ---- random layers -------------------------------------------------------------------------------------------------

WRITERS: dict[str, tuple[Callable[[Weight], Layer], Callable[[int], Format], bool]] = {
    "awq": (writers.write_awq, lambda size: Awq(AWQ_CONFIG | {"group_size": size}), False),
    "gptq": (lambda weight: writers.write_gptq(weight, 1), lambda size: Gptq(GPTQ_CONFIG | {"group_size": size}), True),
    "gptq_v2": (
        lambda weight: writers.write_gptq(weight, 2),
        lambda size: Gptq(GPTQ_CONFIG | {"group_size": size, "checkpoint_format": "gptq_v2"}),
        True,
    ),
    "compressed, symmetric": (
        lambda weight: writers.pack_quantized(weight, symmetric=True),
        lambda size: compressed_tensors(w4_config(size, True)),
        False,
    ),
    "compressed, asymmetric": (
        lambda weight: writers.pack_quantized(weight, symmetric=False),
        lambda size: compressed_tensors(w4_config(size, False)),
        False,
    ),
    "compressed, act-order": (
        lambda weight: writers.pack_quantized(weight, symmetric=False, act_order=True),
        lambda size: compressed_tensors(w4_config(size, False)),
        True,
    ),
}
"""(how a layer is written, who reads it, whether its groups may be scattered)."""


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(sorted(WRITERS)),
    group_size=st.sampled_from([8, 32, 64, 128, -1]),
    groups=st.integers(1, 3),
    words=st.integers(1, 4),
    symmetric=st.booleans(),
    act_order=st.booleans(),
    seed=st.integers(0, 999),
)
def test_what_is_written_is_read(
    name: str, group_size: int, groups: int, words: int, symmetric: bool, act_order: bool, seed: int
) -> None:
    write, reader, scatters = WRITERS[name]
    symmetric = symmetric or name == "compressed, symmetric"
    inputs = 24 * groups if group_size == -1 else groups * group_size
    weight = random_weight(inputs, 8 * words, group_size, seed, symmetric=symmetric, act_order=act_order and scatters)
    format, layer = reader(group_size), write(weight)
    for part, spec in format.specs(inputs, 8 * words).items():
        assert part not in layer or (tuple(layer[part].shape) in spec.shapes and layer[part].dtype in spec.dtypes)
    assert torch.equal(read(format, layer), weight.dequantized())


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(["channel", "tensor", "one", "block", "deepseek", "single"]),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 40),
    seed=st.integers(0, 999),
)
def test_what_is_written_in_fp8_is_read(kind: str, inputs: int, outputs: int, seed: int) -> None:
    block = {"weight_block_size": (16, 24)}
    format, write = {
        "channel": (compressed_tensors(fp8_config("channel")), fp8_writer("weight_scale", None)),
        "tensor": (compressed_tensors(fp8_config("tensor")), fp8_writer("weight_scale", None, (1,))),
        "one": (compressed_tensors(fp8_config("tensor")), fp8_writer("weight_scale", None, ())),
        "block": (
            compressed_tensors(fp8_config("block", block_structure=[16, 24])),
            fp8_writer("weight_scale", (16, 24)),
        ),
        "deepseek": (Fp8(DEEPSEEK_CONFIG | block), fp8_writer("weight_scale_inv", (16, 24))),
        "single": (Fp8(DEEPSEEK_CONFIG | {"weight_block_size": None}), fp8_writer("weight_scale", None, ())),
    }[kind]
    layer, weight = write(inputs, outputs, seed)
    for part, spec in format.specs(inputs, outputs).items():
        assert part not in layer or (tuple(layer[part].shape) in spec.shapes and layer[part].dtype in spec.dtypes)
    torch.testing.assert_close(read(format, layer), weight, rtol=1e-6, atol=0)


# ---- what is not read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        (Awq, {"bits": 8}, "bits=8"),
        (Awq, {"version": "gemv"}, "version='gemv'"),
        (Awq, {"group_size": 12}, "group_size=12"),
        (Gptq, {"bits": 3}, "bits=3"),
        (Gptq, {"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        (Gptq, {"group_size": 0}, "group_size=0"),
        (Gptq, {"group_size": "128"}, "group_size='128'"),
        (Fp8, {"weight_block_size": [128]}, r"weight_block_size=\[128\]"),
        (Fp8, {"scale_fmt": "ue8m0"}, "scale_fmt='ue8m0'"),
        (compressed_tensors, {}, "config_groups"),
        (compressed_tensors, {"config_groups": ["W4A16"]}, "config_groups"),
        (compressed_tensors, {"config_groups": {"group_0": {"weights": None}}}, "config_groups"),
        (compressed_tensors, w4_config(32, True) | {"format": "marlin-24"}, "format='marlin-24'"),
        (compressed_tensors, w4_config(32, True) | {"sparsity_config": {"format": "sparse-24"}}, "'sparse-24'"),
        (compressed_tensors, writers.compressed_config("int-quantized", {"num_bits": 8}), "format='int-quantized'"),
        (compressed_tensors, writers.compressed_config("pack-quantized", {"num_bits": 8}), "int with 8 bits"),
        (compressed_tensors, fp8_config("token"), "strategy='token'"),
        (compressed_tensors, fp8_config("block"), "block_structure"),
        (compressed_tensors, writers.compressed_config("pack-quantized", {"num_bits": 4}, {"num_bits": 8}), "W4A8"),
        (
            compressed_tensors,
            {"config_groups": {"a": {"weights": {"num_bits": 4}}, "b": {"weights": {"num_bits": 8}}}},
            "different ways",
        ),
    ],
)
def test_other_options_are_refused_by_name(format: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        format(options)


@pytest.mark.parametrize("format", [Awq({}), Gptq({})])
@pytest.mark.parametrize(("inputs", "outputs", "message"), [(192, 8, "group size 128"), (128, 12, "12 outputs")])
def test_sizes_that_do_not_fit_are_refused(format: Any, inputs: int, outputs: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        format.specs(inputs, outputs)
