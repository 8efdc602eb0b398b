"""Adapters by request on a GPU: kernels in half precision, and whole steps with and without graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_models import DEVICE, PROMPTS, answers, assert_idle, captured, greedy, make, make_half, needs_gpu, wrap
from kernels.test_lora_kernels import draw, one_by_one

pytest.importorskip("triton")
pytest.importorskip("peft")

from lora.adapters import Stock, save_adapter
from models.families import make_model

from hf_paged import LoRARequest
from hf_paged.kernels.triton.lora import add_lora
from hf_paged.lora.operator import add_adapters

pytestmark = needs_gpu

MIX = ["a", None, "b", "a", "b", None]
TARGETS: dict[str, Any] = {"a": ["q_proj", "k_proj", "v_proj"], "b": "all-linear", "c": ["gate_proj", "down_proj"]}


def save(root: Path, make_base: Any, alpha: int = 8) -> dict[str, LoRARequest]:
    found = {}
    for number, (name, target) in enumerate(TARGETS.items(), start=1):
        folder = save_adapter(root / name, make_base(), number, r=4 * number, lora_alpha=alpha, target_modules=target)
        found[name] = LoRARequest(name, number, str(folder))
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("inputs", "sizes", "rank"),
    [
        (4096, [4096, 1024, 1024], 16),
        (4096, [1024], 64),
        (14336, [4096], 128),
        (896, [4864, 4864], 32),
        (70, [50, 7], 256),
    ],
)
@pytest.mark.parametrize("rows", [1, 2, 17, 128, 129, 1000])
def test_kernels(dtype: torch.dtype, inputs: int, sizes: list[int], rank: int, rows: int) -> None:
    """Runs of a chunk's rows beside single decodes, by five adapters and none."""
    slots = [row % 6 if row < 40 else (row // 300) % 6 for row in range(rows)]
    base, x, a, b, order, starts = draw(slots, 5, inputs, sizes, rank, rows, dtype)
    a, b = a / inputs**0.5, b / rank**0.5
    found = add_lora(base, x, a, b, order, starts, sizes)
    expected = one_by_one(base, x, a, b, slots, sizes)
    assert float((found.double() - expected).norm() / expected.norm()) < (0.01 if dtype is torch.bfloat16 else 0.002)
    again = add_lora(base, x, a, b, order, starts, sizes)
    assert torch.equal(found, again), "the same bits every time"
    plain = torch.tensor([slot == 5 for slot in slots], device=DEVICE)
    assert torch.equal(found[plain], base[plain])


def test_the_kernels_in_a_graph_follow_the_rows() -> None:
    """A captured step is replayed for rows of other adapters, and for fewer."""
    sizes = [256, 200, 56]
    base, x, a, b, order, starts = draw([0] * 32, 3, 512, sizes, 16, 0, torch.float32)
    add_adapters(base, x, a, b, order, starts, sizes)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = add_adapters(base, x, a, b, order, starts, sizes)
    for slots in ([0] * 32, [3] * 32, [2, 0, 1, 3] * 8, [1] * 5 + [3] * 27):
        _, _, _, _, new_order, new_starts = draw(slots, 3, 512, sizes, 16, 0, torch.float32)
        order.copy_(new_order)
        starts.copy_(new_starts)
        graph.replay()
        torch.testing.assert_close(out.double(), one_by_one(base, x, a, b, slots, sizes), rtol=1e-3, atol=5e-2)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: Any) -> dict[str, LoRARequest]:
    return save(tmp_path_factory.mktemp("adapters"), lambda: make_model("Llama"))


@pytest.fixture(scope="module")
def expected(adapters: dict[str, LoRARequest]) -> list[list[int]]:
    stock = Stock(make(), adapters)
    stock.model.to(DEVICE)
    found = []
    for prompt, name in zip(PROMPTS, MIX, strict=True):
        ids = torch.tensor([prompt], device=DEVICE)
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 24}
        if name is None:
            with stock.model.disable_adapter():
                found.append(stock.model.generate(ids, **options)[0, len(prompt) :].tolist())
        else:
            stock.model.set_adapter(name)
            found.append(stock.model.generate(ids, **options)[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cuda_graphs": False},
        {"cuda_graphs": False, "compile": "off", "fuse_linear": False},
        {"compile": "off"},
        {"async_scheduling": False},
        {"max_loras": 1},
        {"max_num_seqs": 2, "max_num_batched_tokens": 16},
        {"num_pages": 16},
        {"attention_backend": "torch"},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}},
    ],
    ids=lambda options: ", ".join(options) or "default",
)
def test_a_mixed_batch_is_what_peft_says(
    adapters: dict[str, LoRARequest], expected: list[list[int]], options: dict[str, Any]
) -> None:
    model = wrap(make(), **{"enable_lora": True, "max_loras": 2} | options)
    for _ in range(3):  # graphs of steps with prefill are captured at the second time
        outputs = model.generate_many(PROMPTS, greedy(), lora_request=[adapters.get(name) for name in MIX])
        assert answers(outputs) == expected
    if not options:
        assert captured(model)
        kinds = model.engine.executor._graphs._captured
        assert any(kind.adapted for kind in kinds)
    assert_idle(model)


def test_graphs_without_adapters_are_left_alone(adapters: dict[str, LoRARequest]) -> None:
    """Steps without adapters say what an engine without room for any says."""
    sampling = greedy(logprobs=0)
    plain = wrap(make()).generate_many(PROMPTS, sampling)
    model = wrap(make(), enable_lora=True, max_loras=2)
    model.generate_many(PROMPTS, sampling, lora_request=adapters["a"])
    found = model.generate_many(PROMPTS, sampling)
    assert answers(found) == answers(plain)
    told = [[o.outputs[0].token_logprobs for o in outputs] for outputs in (found, plain)]
    for mine, own in zip(*told, strict=True):
        assert mine == pytest.approx(own, abs=1e-5)


def test_warm_up_and_sleep(adapters: dict[str, LoRARequest], expected: list[list[int]]) -> None:
    model = wrap(make(), enable_lora=True, max_loras=2)
    requests = [adapters.get(name) for name in MIX]
    assert answers(model.generate_many(PROMPTS, greedy(), lora_request=requests)) == expected
    model.engine.warm_up()
    assert {kind.adapted for kind in model.engine.executor._graphs._captured} == {True, False}
    model.engine.sleep()
    assert answers(model.generate_many(PROMPTS, greedy(), lora_request=requests)) == expected


def test_half_precision_with_and_without_graphs(tmp_path: Path) -> None:
    """Log-probabilities of a bfloat16 model with adapters are those of its own steps without graphs, and of PEFT."""
    adapters = save(tmp_path, lambda: make_half().float().cpu(), alpha=1)
    sampling = greedy(logprobs=0)
    requests = [adapters.get(name) for name in MIX]
    stock = Stock(make_half(), adapters)
    stock.model.to(DEVICE)
    for options in ({}, {"cuda_graphs": False, "compile": "off"}):
        model = wrap(make_half(), enable_lora=True, max_loras=2, **options)
        outputs = model.generate_many(PROMPTS, sampling, lora_request=requests)
        for output, name in zip(outputs, MIX, strict=True):
            new = output.outputs[0].token_ids
            ids = torch.tensor([output.prompt_token_ids + new], device=DEVICE)
            with torch.no_grad():
                if name is None:
                    with stock.model.disable_adapter():
                        logits = stock.model(ids).logits[0]
                else:
                    stock.model.set_adapter(name)
                    logits = stock.model(ids).logits[0]
            rows = torch.log_softmax(logits.float(), -1)
            start = len(output.prompt_token_ids) - 1
            own = rows[range(start, start + len(new)), new].cpu()
            assert float((torch.tensor(output.outputs[0].token_logprobs) - own).abs().mean()) < 0.1
        assert_idle(model)
