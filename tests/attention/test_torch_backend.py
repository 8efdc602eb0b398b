"""TorchBackend against the reference, over random steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import Case, as_verification, cases, check, make_batch, make_case, make_shape
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_paged.attention.backend import LayerSpec
from hf_paged.attention.torch_backend import TorchBackend
from hf_paged.kernels import reference

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn
BFLOAT16 = {"rtol": 0.05, "atol": 0.05}
"""bfloat16 keeps 8 bits: a score of 4 is off by 1/64, and so is its weight; outputs are of size 1."""


def layer(**changes: object) -> LayerSpec:
    base = {"index": 0, "num_heads": 4, "num_kv_heads": 2, "key_dim": 8, "value_dim": 8, "scaling": 8**-0.5}
    return LayerSpec(**(base | changes))  # type: ignore[arg-type]


@settings(max_examples=400, deadline=None)
@given(case=cases(layout="HND"))
def test_float32(case: Case) -> None:
    check(TorchBackend(CPU), case, CPU, rtol=2e-5, atol=2e-5)


@settings(max_examples=80, deadline=None)
@given(case=cases(layout="HND", dtype=torch.bfloat16))
def test_bfloat16(case: Case) -> None:
    check(TorchBackend(CPU), case, CPU, **BFLOAT16)


@settings(max_examples=60, deadline=None)
@given(
    case=cases(layout="HND", max_layers=1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scales=st.tuples(*[st.sampled_from([1.0, 0.25, 3.0, 1000.0])] * 2),
)
def test_pools_of_float8(case: Case, dtype: torch.dtype, scales: tuple[float, float]) -> None:
    """Rows are attended to as they are stored, those of a sequence's first chunk too."""
    one = case.layers[0]
    spec = replace(one.spec, key_scale=scales[0], value_scale=scales[1], scaling=one.spec.scaling / scales[0])
    rows = [(x * scale).to(dtype) for x, scale in zip((one.key, one.value), scales, strict=True)]
    # Garbage of strangers stays garbage; what is too large for FP8 is none of this test's.
    pools = [pool.clamp(-400, 400).to(FP8) for pool in (one.key_pool, one.value_pool)]
    backend, query = TorchBackend(CPU), one.query.to(dtype)
    out = backend.run(backend.plan(case.batch, [spec]), spec, query, *rows, *pools, one.sinks)
    real = []
    for pool, new, scale in zip(pools, rows, scales, strict=True):
        written = pool.view(torch.uint8).transpose(1, 2)[case.batch.write_pages, case.batch.write_offsets].view(FP8)
        assert torch.equal(written.float(), (new.float() / scale).to(FP8).float())
        real.append(pool.float() * scale)
    expected = reference.paged_attention(
        query.float(),
        *real,
        case.sequences,
        layout="HND",
        scaling=spec.scaling,
        window=spec.window,
        softcap=spec.softcap,
        sinks=one.sinks,
    )
    limit = 1e-4 if dtype is torch.float32 else 0.06
    assert out.dtype is dtype
    torch.testing.assert_close(out.float() / scales[1], expected / scales[1], rtol=limit, atol=limit)


def test_float8_is_clamped_and_keeps_nan() -> None:
    shape = make_shape(4, [], [(0, 3, 0, 0)], "dense", seed=0)
    case = make_case(shape, [layer(key_scale=0.5)], layout="HND", dtype=torch.float32, seed=0, strangers=0.0)
    one = case.layers[0]
    key = torch.full_like(one.key, 1e4)
    key[2] = torch.nan
    pools = [pool.clamp(-400, 400).to(FP8) for pool in (one.key_pool, one.value_pool)]
    backend = TorchBackend(CPU)
    backend.run(backend.plan(case.batch, [one.spec]), one.spec, one.query, key, one.value, *pools, None)
    written = pools[0].float().transpose(1, 2)[case.batch.write_pages, case.batch.write_offsets]
    assert bool(written[:2].eq(448).all()) and bool(written[2].isnan().all())


@pytest.mark.parametrize("order", ["dense", "shuffled", "scattered"])
@pytest.mark.parametrize("samples", [1, 2, 3, 16, 17])
@pytest.mark.parametrize("window", [None, 5, 21])
def test_samples_of_one_prompt(samples: int, order: str, window: int | None) -> None:
    """All samples share the prompt's five full pages, two by two one page more, and go on alone from there."""
    size = 4
    shared = [(5 * size + 1 + 3 * (i // 2), 0, 5) for i in range(samples)]
    forest = [(context + size, i - i % 2, 6) for i, (context, _, _) in enumerate(shared)]
    shape = make_shape(size, shared + forest, [(5 * size + 2, 3, 0, 5)], order, seed=samples)
    specs = [layer(window=window), layer(index=1, num_kv_heads=4, softcap=3.0, sinks=True)]
    case = make_case(shape, specs, layout="HND", dtype=torch.float32, seed=1, strangers=float("nan"))
    check(TorchBackend(CPU), case, CPU, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("window", [1, 4, 16, 17])
def test_lengths_around_page_and_window_edges(size: int, window: int) -> None:
    lengths = sorted({max(0, edge * 16 + off) for edge in (0, 1, 2) for off in (-2, -1, 0, 1)})
    spans = [(length, rows, 0, 0) for length in (0, 1, 15, 16, 17) for rows in (1, 2, 16, 17)]
    shape = make_shape(size, [(length, 0, 0) for length in lengths], spans, "shuffled", seed=size)
    specs = [layer(window=window), layer(index=1)]
    case = make_case(shape, specs, layout="HND", dtype=torch.float32, seed=2, strangers=float("nan"))
    check(TorchBackend(CPU), case, CPU, rtol=2e-5, atol=2e-5)


def test_scores_far_beyond_exp() -> None:
    """Scores in the thousands: only differences to the row's maximum may be exponentiated, over all its pages."""
    shape = make_shape(4, [(30, 0, 0), (29, 0, 5), (2, 0, 0)], [(9, 6, 0, 2), (0, 5, 0, 0)], "scattered", seed=0)
    specs = [layer(scaling=300.0), layer(index=1, scaling=300.0, sinks=True)]
    case = make_case(shape, specs, layout="HND", dtype=torch.float32, seed=3, strangers=1e4)
    check(TorchBackend(CPU), case, CPU, rtol=1e-3, atol=1e-3)


def test_pools_of_another_dtype() -> None:
    """A pool may be narrower than the model: rows are rounded as they are written."""
    shape = make_shape(4, [(30, 0, 0), (29, 0, 5)], [(9, 6, 0, 2)], "scattered", seed=0)
    case = make_case(shape, [layer()], layout="HND", dtype=torch.bfloat16, seed=3, strangers=1e4)
    one = case.layers[0]
    backend = TorchBackend(CPU)
    pools = one.key_pool.clone(), one.value_pool.clone()
    rows = (x.float() for x in (one.query, one.key, one.value))
    out = backend.run(backend.plan(case.batch, [one.spec]), one.spec, *rows, *pools, None)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, one.expected, **BFLOAT16)
    assert torch.equal(pools[0], one.key_pool_after)
    assert torch.equal(pools[1], one.value_pool_after)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("context", [0, 3, 30])
def test_decode_rows_of_one_sequence(context: int, window: int | None) -> None:
    """They see what the others of them write in the same step, up to their own place."""
    shape = make_shape(4, [], [(context, 6, 0, 0)], "scattered", seed=1)
    spec = layer(window=window)
    case = make_case(shape, [spec], layout="HND", dtype=torch.float32, seed=3, strangers=float("nan"))
    check(TorchBackend(CPU), as_verification(case), CPU, rtol=2e-5, atol=2e-5)


def test_plan_leaves_the_batch_alone() -> None:
    """The block table is a view of the engine's own."""
    shape = make_shape(2, [(7, 0, 0), (6, 0, 2)], [(3, 4, 0, 1)], "scattered", seed=4)
    batch, same = make_batch(shape, seed=5), make_batch(shape, seed=5)
    TorchBackend(CPU).plan(batch, [layer(window=3), layer(index=1)])
    for name in ("decode_lengths", "decode_pages", "write_pages", "write_offsets"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(same, name))
    for span, other in zip(batch.spans, same.spans, strict=True):
        np.testing.assert_array_equal(span.pages, other.pages)
