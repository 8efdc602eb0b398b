"""Quantised layers and whole checkpoints on a GPU, where kernels of their own compute them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_models import needs_gpu
from models.families import make_prompts
from quantization import writers
from quantization.test_fp8 import make_layer as make_fp8_layer
from quantization.test_w4 import make_layer as make_w4_layer
from quantization.writers import CHECKPOINTS, write_checkpoint

import hf_paged
from hf_paged.kernels.triton.w4 import MOST_ROWS

pytestmark = needs_gpu

ROWS = [1, 7, 64, 65, MOST_ROWS, MOST_ROWS + 1]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("group_size", "act_order"), [(32, False), (128, True), (-1, False)])
def test_four_bits(rows: int, dtype: torch.dtype, group_size: int, act_order: bool) -> None:
    layer, weight = make_w4_layer(256, 96, group_size, act_order=act_order, bias=True)
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(rows)).to(dtype)
    assert layer.bias is not None
    expected = torch.nn.functional.linear(x.float(), weight, layer.bias)
    found = layer.to("cuda", dtype)(x.cuda())
    assert found.dtype is dtype and relative_error(found.cpu(), expected) < 2e-2


def test_gradients_of_four_bits() -> None:
    layer, weight = make_w4_layer(128, 64, 32, act_order=True)
    x = torch.randn(5, 128, device="cuda", requires_grad=True)
    layer.cuda()(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).cuda().expand(5, -1), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("block", "limit"), [(None, 6e-2), ((128, 128), 6e-2), ((32, 48), 1e-2)])
def test_fp8(rows: int, block: Any, limit: float) -> None:
    """With scales per output, and for few rows in blocks of 128 x 128, activations are in FP8 too."""
    layer, weight = make_fp8_layer(384, 208, block, bias=True)
    x = torch.randn(rows, 384, generator=torch.Generator().manual_seed(rows)).bfloat16()
    assert layer.bias is not None
    expected = torch.nn.functional.linear(x.float(), weight, layer.bias)
    assert relative_error(layer.to("cuda", torch.bfloat16)(x.cuda()).cpu(), expected) < limit


@pytest.mark.parametrize("name", ["awq", "gptq v2, act-order", "compressed, asymmetric", "fp8 in blocks"])
def test_whole_checkpoints(name: str, tmp_path: Path) -> None:
    """The tokens of a step in a graph are those of the model's own forward, and both are the dequantised model's."""
    meant = write_checkpoint(tmp_path, *CHECKPOINTS[name]).cuda()
    model = hf_paged.load(tmp_path)
    assert model.device.type == "cuda"
    prompts = make_prompts([5, 9, 17])
    ids = torch.tensor(prompts[:1], device="cuda")
    assert relative_error(model(ids).logits, meant(ids).logits.float()) < 1e-2
    for output in model.generate_many(prompts, hf_paged.SamplingParams(temperature=0.0, max_tokens=12, logprobs=1)):
        tokens = output.prompt_token_ids + list(output.outputs[0].token_ids)
        logits = model(torch.tensor([tokens], device="cuda")).logits[0, len(output.prompt_token_ids) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(output.outputs[0].token_ids, device="cuda")[:, None])[:, 0]
        assert bool((logits.amax(1) - chosen < 1e-2 * logits.abs().amax()).all())


def test_fp8_on_the_fly(tmp_path: Path) -> None:
    meant = writers.tiny_llama()
    meant.save_pretrained(tmp_path)
    model = hf_paged.load(tmp_path, dtype="bfloat16", quantization="fp8")
    ids = torch.tensor(make_prompts([17]))
    assert relative_error(model(ids.cuda()).logits.cpu(), meant(ids).logits) < 0.2
    outputs = model.generate_many(make_prompts([5, 9]), hf_paged.SamplingParams(temperature=0.0, max_tokens=12))
    assert all(len(output.outputs[0].token_ids) == 12 for output in outputs)
