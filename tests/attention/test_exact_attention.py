"""Exact attention: a row's bits depend on its own keys alone, in the engine's steps and in a trainer's batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import Case, cases, check, shapes
from exactly import DEVICE, ON_GPU, bits, ordered_products  # noqa: F401
from hypothesis import HealthCheck, given, settings

pytest.importorskip("triton")

from hf_paged.attention.backend import AttentionBatch, LayerSpec, PrefillSpan
from hf_paged.attention.exact import exact_attention
from hf_paged.attention.exact_backend import ExactTritonBackend

DTYPE = torch.bfloat16 if ON_GPU else torch.float32
HEADS, KV_HEADS, DIM = (16, 4, 128) if ON_GPU else (4, 2, 32)
SPEC = LayerSpec(0, HEADS, KV_HEADS, DIM, DIM, DIM**-0.5)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(layout="NHD", shape=shapes(page_sizes=(1, 4, 16), max_decodes=4, max_spans=2)))
def test_it_is_attention(case: Case) -> None:
    check(ExactTritonBackend(DEVICE), case, DEVICE, rtol=2e-5, atol=2e-5)


def sequence(length: int, seed: int = 0) -> list[torch.Tensor]:
    """Queries, keys and values of one sequence."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(length, heads, DIM, generator=generator).to(DEVICE, DTYPE) for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


class Pools:
    """Pages of several sequences, and steps that compute some of their rows."""

    def __init__(self, sequences: list[list[torch.Tensor]], page: int, seed: int) -> None:
        self.sequences, self.page = sequences, page
        counts = [-(-len(q) // page) for q, _, _ in sequences]
        ids = np.random.default_rng(seed).permutation(sum(counts)).astype(np.int32)
        self.pages = np.split(ids, np.cumsum(counts)[:-1])
        self.pools = [torch.full((len(ids), page, KV_HEADS, DIM), 9.0, dtype=DTYPE, device=DEVICE) for _ in range(2)]
        self.backend = ExactTritonBackend(DEVICE)

    def step(self, decodes: list[tuple[int, int]], chunks: list[tuple[int, int, int]]) -> list[torch.Tensor]:
        """(sequence, position), (sequence, start, end) -> the rows' results, per decode and chunk."""
        ranges = [(s, at, at + 1) for s, at in decodes] + chunks
        width = max((len(self.pages[s]) for s, _ in decodes), default=0)
        table = np.zeros((len(decodes), width), dtype=np.int32)
        for row, (s, _) in enumerate(decodes):
            table[row, : len(self.pages[s])] = self.pages[s]
        spans, row = [], len(decodes)
        for s, start, end in chunks:
            spans.append(PrefillSpan(row, end - start, start, self.pages[s][: -(-end // self.page)]))
            row += end - start
        places = [(self.pages[s][p // self.page], p % self.page) for s, start, end in ranges for p in range(start, end)]
        pages, offsets = (np.array(column, dtype=np.int64) for column in zip(*places, strict=True))
        lengths = np.array([at + 1 for _, at in decodes], dtype=np.int64)
        batch = AttentionBatch(self.page, lengths, table, spans, pages, offsets)
        new = [torch.cat([self.sequences[s][i][start:end] for s, start, end in ranges]) for i in range(3)]
        out = self.backend.run(self.backend.plan(batch, [SPEC]), SPEC, *new, *self.pools, None)
        return list(out.split([end - start for _, start, end in ranges]))


@pytest.mark.parametrize("page", [4, 16, 32])
def test_chunks_decodes_and_neighbours_do_not_matter(page: int) -> None:
    one, other = sequence(77), sequence(50, seed=1)
    (whole,) = Pools([one], page, seed=0).step([], [(0, 0, 77)])
    pools = Pools([one, other], page, seed=1)
    parts = [pools.step([], [(1, 0, 33), (0, 0, 30)])[1]]
    parts.append(pools.step([(1, 33)], [(0, 30, 37)])[1])
    parts.append(pools.step([(0, 37), (1, 34)], [])[0])
    parts.append(pools.step([(1, 35), (0, 38)], [])[1])
    parts.append(pools.step([(1, 36)], [(0, 39, 77), (1, 37, 50)])[1])
    assert (bits(torch.cat(parts)) == bits(whole)).all()


def batch(masks: list[list[int]], seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Random queries, keys and values in transformers' layout, and the padding mask."""
    mask = torch.tensor(masks, dtype=torch.bool, device=DEVICE)
    generator = torch.Generator().manual_seed(seed)
    shape = (mask.shape[0], mask.shape[1], DIM)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    made = [torch.randn(shape[0], h, *shape[1:], generator=generator).to(DEVICE, DTYPE) for h in heads]
    return [x.requires_grad_() for x in made], mask


MASKS = [[1] * 40, [0] * 9 + [1] * 31, [0] * 3 + [1] * 20 + [0] * 17, [0, 1, 1, 0] * 10]


def test_a_trainers_batch_has_the_engines_bits() -> None:
    """Padding on the left, on the right, and in between."""
    (q, k, v), mask = batch(MASKS)
    out, _ = exact_attention(torch.nn.Identity(), q, k, v, mask)
    for row in range(len(MASKS)):
        real = [x[row].transpose(0, 1)[mask[row]] for x in (q, k, v)]
        (alone,) = Pools([real], 16, seed=3).step([], [(0, 0, len(real[0]))])
        assert (bits(out[row][mask[row]]) == bits(alone)).all()
        assert (out[row][~mask[row]] == 0).all()
    whole, _ = exact_attention(torch.nn.Identity(), q[:1], k[:1], v[:1], None)
    assert (bits(whole[0]) == bits(out[0])).all(), "no mask is no padding"


def test_its_gradient_is_torchs() -> None:
    inputs, mask = batch(MASKS)
    weight = torch.randn(len(MASKS), 40, HEADS, DIM, generator=torch.Generator().manual_seed(5)).to(DEVICE, DTYPE)
    weight = weight * mask[..., None, None]
    (exact_attention(torch.nn.Identity(), *inputs, mask)[0] * weight).sum().backward()
    found = [x.grad for x in inputs]
    again = [x.detach().clone().requires_grad_() for x in inputs]
    q, k, v = (x.repeat_interleave(HEADS // x.shape[1], 1) for x in again)
    seen = torch.ones(40, 40, dtype=torch.bool, device=DEVICE).tril() & mask[:, None, None, :]
    seen = seen | torch.eye(40, dtype=torch.bool, device=DEVICE)  # padding sees itself, lest its softmax be of nothing
    (F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2) * weight).sum().backward()
    close: dict[str, Any] = {"rtol": 0.05, "atol": 0.05} if ON_GPU else {"rtol": 1e-4, "atol": 1e-5}
    for mine, theirs in zip(found, again, strict=True):
        torch.testing.assert_close(mine, theirs.grad, **close)


@pytest.mark.parametrize(
    ("options", "says"), [({"dropout": 0.1}, "dropout"), ({"softcap": 3.0}, "soft cap"), ({"s_aux": 1}, "sinks")]
)
def test_what_it_cannot_do_is_refused(options: dict[str, Any], says: str) -> None:
    (q, k, v), mask = batch([[1] * 4])
    with pytest.raises(ValueError, match=says):
        exact_attention(torch.nn.Identity(), q, k, v, mask, **options)
    with pytest.raises(ValueError, match="cache"):
        exact_attention(torch.nn.Identity(), q[:, :, :1], k, v, mask)
